"""DeepSeek's compressor, two convolutions between SAM and the next encoder, from a checkpoint or from a seed."""

from __future__ import annotations

import hashlib
import math
import re
import sys
from array import array
from collections.abc import Iterator
from functools import cache, partial

from converter.checkpoint.open import Checkpoint
from converter.checkpoint.state_dict import StateDict, state_dicts
from converter.errors import LayoutError, UsageError, printable
from converter.layouts import registry
from converter.layouts.shapes import Sizes, match_shape
from converter.tensors.dtypes import FLOAT32
from converter.tensors.lazy_tensor import Generated, LazyTensor, lazy_read
from converter.tensors.tensor_info import TensorInfo

NAMES = ("net_2.weight", "net_3.weight")
# The family whose encoder it follows, and whose canonical layout has it.
FAMILY = "sam"

# Suffixes of the two names: in DeepSeek-OCR, Unlimited-OCR, GOT-OCR2 and Vary; in transformers' Unlimited-OCR and
# DeepSeek-OCR-2; in transformers' GOT-OCR2, where they belong to the projector, so that no mapping of SAM has them.
_NAME_SUFFIXES = (
    NAMES,
    ("proj.conv1.weight", "proj.conv2.weight"),
    ("multi_modal_projector.conv_upsampler1.weight", "multi_modal_projector.conv_upsampler2.weight"),
)


def find_compressor(opened: Checkpoint) -> dict[str, LazyTensor]:
    """Return net_2 [2*neck, neck, 3, 3] and net_3 [width, 2*neck, 3, 3]; LayoutError unless there is one pair."""
    found = [pair for state_dict in state_dicts(opened.contents) for pair in _pairs(state_dict)]
    if len(found) != 1:
        names = ", ".join(printable(pair[1].key) for pair in found)
        what = f"holds {len(found)} compressors: {names}" if found else f"holds no compressor ({', '.join(NAMES)})"
        raise LayoutError(
            f"{opened.name}: {what}", "give one that was trained with one, such as deepseek-ai/DeepSeek-OCR"
        )
    return dict(zip(NAMES, map(lazy_read, found[0]), strict=True))


def _pairs(state_dict: StateDict) -> Iterator[tuple[TensorInfo, TensorInfo]]:
    for first, second in _NAME_SUFFIXES:
        for name, tensor in state_dict.tensors.items():
            prefix = name.removesuffix(first)
            other = state_dict.tensors.get(prefix + second)
            # Shapes are compared because other modules have the same names.
            if prefix != name and prefix[-1:] in ("", ".") and other and _has_compressor_shapes(tensor, other):
                yield tensor, other


def _has_compressor_shapes(net_2: TensorInfo, net_3: TensorInfo) -> bool:
    sizes: Sizes = {}
    specs = {spec.name.text: spec.shape for spec in registry.canonical(FAMILY).tensors}
    return match_shape(specs[NAMES[0]], net_2.shape, sizes) and match_shape(specs[NAMES[1]], net_3.shape, sizes)


def _shapes(neck: int, width: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a compressor from SAM's `neck` channels to the next encoder's `width`."""
    return dict(zip(NAMES, ((2 * neck, neck, 3, 3), (width, 2 * neck, 3, 3)), strict=True))


def check_compressor(nets: dict[str, LazyTensor], neck: int, width: int, origin: str) -> None:
    """Check that a compressor connects SAM to the next encoder.

    Args:
        nets: The compressor's tensors by name.
        neck: SAM's number of output channels.
        width: The next encoder's width.
        origin: The checkpoint or option that the compressor comes from, for messages.

    Raises:
        LayoutError: A tensor is missing.
        UsageError: The number of channels differs.
    """
    missing = [name for name in NAMES if name not in nets]
    if missing:
        raise LayoutError(
            f"{origin}: holds no {', '.join(missing)}: the compressor, which the DeepEncoder has after SAM",
            "take a trained one with --compressor deepseek-ai/DeepSeek-OCR, or start with --compressor random:0",
        )
    for name, shape in _shapes(neck, width).items():
        if nets[name].shape != shape:
            raise UsageError(
                f"{origin}: {name} has shape {list(nets[name].shape)}, but these encoders need {list(shape)}: "
                f"SAM has {neck} output channels, and the next encoder a width of {width}",
                "choose a compressor and encoders of the same sizes",
            )


def seeded(name: str, neck: int, width: int) -> dict[str, LazyTensor]:
    """Return an untrained compressor in float32, which depends only on the seed and the sizes.

    The distribution is torch's for a Conv2d without bias: uniform within 1/sqrt(fan_in) of 0 (kaiming_uniform_ with
    a=sqrt(5)). Element i is number i of a stream times 1/sqrt(fan_in)/2^31 in float64, rounded to float32. The stream
    is SHAKE-128 of the text `SEED/net_2.weight` or `SEED/net_3.weight`, read as little-endian int32.

    Args:
        name: random:SEED.
        neck: SAM's number of output channels.
        width: The next encoder's width.

    Raises:
        UsageError: The seed is not a number.
    """
    seed = name.removeprefix("random:")
    if not re.fullmatch("[0-9]{1,20}", seed):
        raise UsageError(f"--compressor {name}: expected a number, such as random:0")
    return {
        key: Generated(FLOAT32, shape, cache(partial(_uniform, f"{int(seed)}/{key}", shape)))
        for key, shape in _shapes(neck, width).items()
    }


def _uniform(text: str, shape: tuple[int, ...]) -> bytes:
    """Return a convolution's weight in float32, from SHAKE-128 of `text`."""
    # An `array` has the machine's byte order; input and output are little-endian.
    numbers = array("i", hashlib.shake_128(text.encode()).digest(4 * math.prod(shape)))
    if sys.byteorder == "big":
        numbers.byteswap()
    scale = 1 / math.sqrt(math.prod(shape[1:])) / 2**31
    values = array("f", map(scale.__mul__, numbers))
    if sys.byteorder == "big":
        values.byteswap()
    return values.tobytes()
