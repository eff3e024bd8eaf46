"""Recognises weights that no layout describes, by the names, types and shapes of their tensors.

They are adapters, quantised weights and other architectures. A `Mark` says what they are and what the user can do. The
rules on names are in `name_rules`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from converter.errors import LayoutError, first_names
from converter.layouts.name_rules import ADAPTERS, ARCHITECTURES, DEQUANTISE, EXTRA_MODULES, QUANTISED, VISION, NameRule
from converter.layouts.shapes import shows_channels_last
from converter.tensors.dtypes import remedy
from converter.tensors.tensor_info import TensorInfo

Tensors = Mapping[str, TensorInfo]


class Mark(NamedTuple):
    """A reason why no layout describes some tensors."""

    what: str  # What the checkpoint is or holds: the predicate of a sentence, such as "is a ResNet"
    hint: str  # What the user can do
    examples: list[str]  # Names of tensors that show it

    @property
    def text(self) -> str:
        """The predicate, with the names of the first examples."""
        return f"{self.what}: {first_names([repr(name) for name in self.examples], 2)}"

    def error(self, source: str) -> LayoutError:
        """Return the error for a checkpoint; `source` is its name."""
        return LayoutError(f"{source}: {self.text}", self.hint)


def find_mark(tensors: Tensors, is_channels_last: bool = False) -> Mark | None:
    """Return why no layout describes some tensors; None if nothing shows it.

    Args:
        tensors: The tensors by name.
        is_channels_last: Whether the expected layout stores convolutions as MLX does.
    """
    names = _distinct_names(tensors)
    return (
        _find_by_names(tensors, names, (*ADAPTERS, *QUANTISED))
        or _find_empty_weights(tensors)
        or _find_integer_weights(tensors)
        or _find_by_names(tensors, names, ARCHITECTURES)
        or find_mixed_convolutions(tensors)
        or (None if is_channels_last else _find_channels_last(tensors))
        or _find_unreadable(tensors)
    )


def find_architecture(tensors: Tensors) -> Mark | None:
    """Return the mark of a known architecture that no layout describes, or None."""
    return _find_by_names(tensors, _distinct_names(tensors), ARCHITECTURES)


def has_vision_encoder(names: Iterable[str]) -> bool:
    """Return whether some names are those of a vision encoder of any architecture."""
    return _occurs(VISION, names)


def find_extra_modules(names: Iterable[str]) -> list[str]:
    """Return the names that belong to adapters or other modules that change what an encoder computes."""
    return [name for name in names if re.search(EXTRA_MODULES, name)]


def _distinct_names(tensors: Tensors) -> list[str]:
    """Return one name, with the lowest indices, for all names that differ only in layer indices.

    A checkpoint may have a hundred thousand names.
    """
    names: dict[str, str] = {}
    for name in sorted(tensors, key=lambda name: (len(name), name)):
        names.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "", name), name)
    return list(names.values())


def _find_by_names(tensors: Tensors, names: list[str], rules: Iterable[NameRule]) -> Mark | None:
    """Return the mark of the first rule that recognises the names; its examples are all tensors that it matches."""
    for rule in rules:
        is_match = all(_occurs(pattern, names) for pattern in rule.patterns)
        if is_match and not (rule.absent and _occurs(rule.absent, names)):
            return Mark(rule.what, rule.hint, [name for name in tensors if re.search(rule.patterns[0], name)])
    return None


def _occurs(pattern: str, names: Iterable[str]) -> bool:
    return any(re.search(pattern, name) for name in names)


def _find_empty_weights(tensors: Tensors) -> Mark | None:
    """Find weights of shape [0]: ZeRO-3 saves all but the smallest weights so, unless it gathers them."""
    empty = [name for name, tensor in tensors.items() if tensor.shape == (0,) and name.endswith(("weight", "bias"))]
    hint = (
        "gather them: run zero_to_fp32.py in the checkpoint's folder, or train with "
        "stage3_gather_16bit_weights_on_model_save, and convert the result"
    )
    what = "was saved by DeepSpeed ZeRO-3 without gathering the weights, which are empty here"
    return Mark(what, hint, empty) if empty else None


def _find_integer_weights(tensors: Tensors) -> Mark | None:
    """Find linear layers of integers, or of 8-bit floats with scales, which any method of quantisation may write."""
    linear = r"(_proj|qkv|proj|fc[12]|lin[12]|c_fc|in_proj_weight|query|key|value|dense)(\.|$)"
    layers = {name: tensor.dtype.name for name, tensor in tensors.items() if tensor.shape and re.search(linear, name)}
    quantised = [name for name, dtype in layers.items() if dtype.startswith(("int", "uint"))]
    if not quantised and any("scale" in name.rpartition(".")[2] for name in layers):
        quantised = [name for name, dtype in layers.items() if dtype.startswith("float8")]
    return Mark(f"holds quantised weights ({layers[quantised[0]]})", DEQUANTISE, quantised) if quantised else None


def find_mixed_convolutions(tensors: Tensors) -> Mark | None:
    """Find convolutions that are partly stored channels first and partly channels last."""
    channels_first, channels_last = convolutions(tensors)
    if not channels_first or not channels_last:
        return None
    orders = [("channels first, as torch does", channels_first), ("channels last, as MLX does", channels_last)]
    (order, fewer), (other_order, more) = sorted(orders, key=lambda item: len(item[1]))
    names = first_names([repr(name) for name in fewer], 5)
    return Mark(
        f"stores some convolutions {order} ({names}), and others {other_order}",
        "convert the checkpoint that it was made from: which of these tensors are right does not show",
        more,
    )


def _find_channels_last(tensors: Tensors) -> Mark | None:
    """Find convolutions with MLX's order of dimensions, [out, height, width, in]."""
    channels_last = convolutions(tensors)[1]
    hint = (
        "convert the checkpoint that it was made from; or copy the mapping of its names (dsocr-convert mapping show "
        "LAYOUT > mine.yaml), add then: [permute: [0, 3, 1, 2]] to these tensors' rules, reorder their shapes under "
        "detect, and give --mapping mine.yaml"
    )
    return Mark("stores its convolutions channels last, as MLX does", hint, channels_last) if channels_last else None


def convolutions(tensors: Tensors) -> tuple[list[str], list[str]]:
    """Return the names of the convolutions whose shapes show channels first, and of those that show channels last.

    They are the names in the file.
    """
    # The names of llama.cpp's position embeddings end in "weight" too.
    weights = [tensor for name, tensor in tensors.items() if name.endswith("weight") and "pos_embd" not in name]
    is_last = {tensor.key: shows_channels_last(tensor.shape) for tensor in weights}
    return [key for key in is_last if is_last[key] is False], [key for key in is_last if is_last[key]]


def _find_unreadable(tensors: Tensors) -> Mark | None:
    """Find tensors that are not plain bytes in the file, such as arrays of numpy."""
    names = [name for name, tensor in tensors.items() if tensor.dtype.bits == 0]
    if not names:
        return None
    dtype = tensors[names[0]].dtype
    what = "quantised weights" if dtype.block else "weights that are not plain tensors"
    return Mark(f"holds {what} ({dtype.name})", remedy(dtype), names)
