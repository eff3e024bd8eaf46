"""Tensors that an encoder's own source may lack: DeepSeek's compressor, and DeepSeek-OCR-2's queries.

An option supplies them, from a checkpoint that was trained with them or from a seed.
"""

from __future__ import annotations

import hashlib
import math
import re
import sys
from array import array
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from converter.checkpoint.open import Checkpoint
from converter.checkpoint.state_dict import StateDict, state_dicts
from converter.errors import LayoutError, UsageError, printable
from converter.layouts import registry
from converter.layouts.shapes import Shape, Sizes, concrete_shape, match_shape
from converter.tensors.dtypes import FLOAT32
from converter.tensors.lazy_tensor import Generated, LazyTensor, lazy_read
from converter.tensors.tensor_info import TensorInfo

SEED = "random:"
# The sizes of the encoders by family, in the order of the model.
EncoderSizes = Mapping[str, Sizes]


class Addition(NamedTuple):
    """Two tensors of an encoder that an option supplies."""

    option: str
    family: str  # The family whose canonical layout has them
    names: tuple[str, str]  # In that layout
    suffixes: tuple[tuple[str, str], ...]  # The ends of their names in checkpoints
    noun: str
    role: str
    typed_as: str  # The tensor of the encoder whose type they get from a seed
    draw: Callable[[str, tuple[int, ...]], bytes]  # Values in float32, from the name of a stream and a shape
    distribution: Callable[[tuple[int, ...]], str]  # Of these values, in words
    sizes: Callable[[EncoderSizes], Sizes]  # The sizes that the encoders require

    @property
    def full_names(self) -> list[str]:
        """Their names in DeepSeek-OCR's model."""
        return [registry.encoder_prefix(self.family) + name for name in self.names]

    def shapes(self, encoders: EncoderSizes) -> dict[str, tuple[int, ...]]:
        """Return the shapes that fit the encoders."""
        sizes = {**encoders[self.family], **self.sizes(encoders)}
        return {name: concrete_shape(shape, sizes) for name, shape in self._specified().items()}

    def find(self, opened: Checkpoint, model: str) -> list[LazyTensor]:
        """Return the tensors in a checkpoint; LayoutError, which names `model`, unless it has them once."""
        found = [pair for state_dict in state_dicts(opened.contents) for pair in self._pairs(state_dict)]
        if len(found) != 1:
            keys = ", ".join(printable(pair[1].key) for pair in found)
            what = f"{len(found)} {self.noun}s: {keys}" if found else f"no {self.noun} ({', '.join(self.names)})"
            raise LayoutError(f"{opened.name}: holds {what}", f"give one that was trained with one, such as {model}")
        return list(map(lazy_read, found[0]))

    def seeded(self, text: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, LazyTensor]:
        """Return untrained tensors in float32, which depend only on random:SEED, the names and the shapes.

        The values of a tensor come from a stream: SHAKE-128 of the text `SEED/NAME`, as little-endian 32-bit integers.
        """
        if not re.fullmatch(f"{SEED}[0-9]{{1,20}}", text):
            raise UsageError(f"--{self.option} {text}: expected a seed, such as {SEED}0")
        seed = int(text.removeprefix(SEED))
        return {
            name: Generated(FLOAT32, shape, cache(partial(self.draw, f"{seed}/{name}", shape)))
            for name, shape in shapes.items()
        }

    def check(self, tensors: Mapping[str, LazyTensor], encoders: EncoderSizes, origin: str, model: str) -> None:
        """Check that the tensors are there and fit the encoders.

        Args:
            tensors: Tensors by their names in DeepSeek-OCR's model.
            encoders: The sizes of the encoders.
            origin: The checkpoint or option that they come from.
            model: A checkpoint that has them.

        Raises:
            LayoutError: A tensor is missing, or has another shape.
        """
        found = {name: tensors.get(full) for name, full in zip(self.names, self.full_names, strict=True)}
        untrained = f"start with --{self.option} {SEED}0"
        if missing := [name for name, tensor in found.items() if tensor is None]:
            raise LayoutError(
                f"{origin}: holds no {', '.join(missing)}: {self.role}",
                f"take a trained one with --{self.option} {model}, or {untrained}",
            )
        for name, shape in self.shapes(encoders).items():
            tensor = found[name]
            if tensor is not None and tensor.shape != shape:
                widths = (f"{family.upper()} of width {sizes['width']}" for family, sizes in encoders.items())
                raise LayoutError(
                    f"{origin}: {name} has shape {list(tensor.shape)}, but these encoders need {list(shape)}: "
                    f"they are {' and '.join(widths)}",
                    f"take one that fits, such as --{self.option} {model} for encoders of its sizes, or {untrained}",
                )

    def _specified(self) -> dict[str, Shape]:
        specs = {spec.name.text: spec.shape for spec in registry.canonical(self.family).tensors}
        return {name: specs[name] for name in self.names}

    def _pairs(self, state_dict: StateDict) -> Iterator[tuple[TensorInfo, TensorInfo]]:
        for first, second in self.suffixes:
            for name, tensor in state_dict.tensors.items():
                prefix = name.removesuffix(first)
                other = state_dict.tensors.get(prefix + second)
                # Shapes are compared because other modules have the same names.
                if prefix != name and prefix[-1:] in ("", ".") and other and self._match(tensor, other):
                    yield tensor, other

    def _match(self, *tensors: TensorInfo) -> bool:
        sizes: Sizes = {}
        shapes = self._specified().values()
        return all(match_shape(shape, tensor.shape, sizes) for shape, tensor in zip(shapes, tensors, strict=True))


def is_seed(text: str) -> bool:
    """Return whether the value of an option is a seed, also in a wrong spelling, such as `random` or `seed=0`."""
    looks_like_seed = re.fullmatch(r"(random|seed)\W?\d*|\d+", text) is not None
    return text.startswith(SEED) or (looks_like_seed and not Path(text).exists())


def _uniform(text: str, shape: tuple[int, ...]) -> bytes:
    """Values of torch's distribution for a Conv2d without bias (kaiming_uniform_ with a=sqrt(5)).

    It is uniform within 1/sqrt(fan_in) of 0. Element i is number i of the stream, read as signed, times
    1/sqrt(fan_in)/2^31 in float64, rounded to float32.
    """
    scale = 1 / math.sqrt(math.prod(shape[1:])) / 2**31
    return _drawn("i", text, shape, scale.__mul__)


def _normal(text: str, shape: tuple[int, ...]) -> bytes:
    """Values of torch's distribution for an Embedding, the class of the queries in DeepSeek's code: N(0, 1).

    Element i is the quantile (n + 1/2) / 2^32 for number n at i of the stream, in float64, rounded to float32.
    """
    from statistics import NormalDist  # Imports decimal and fractions, which no other conversion needs

    quantile = NormalDist().inv_cdf
    return _drawn("I", text, shape, lambda number: quantile((number + 0.5) / 2**32))


def _drawn(code: str, text: str, shape: tuple[int, ...], value: Callable[[int], float]) -> bytes:
    """Return values in float32 of the first numbers of a stream: i for signed, I for unsigned."""
    numbers = array(code, hashlib.shake_128(text.encode()).digest(4 * math.prod(shape)))
    # An `array` has the machine's byte order; input and output are little-endian.
    if sys.byteorder == "big":
        numbers.byteswap()
    values = array("f", map(value, numbers))
    if sys.byteorder == "big":
        values.byteswap()
    return values.tobytes()


COMPRESSOR = Addition(
    option="compressor",
    family="sam",
    names=("net_2.weight", "net_3.weight"),
    # In DeepSeek-OCR, Unlimited-OCR, GOT-OCR2 and Vary; in transformers' Unlimited-OCR and DeepSeek-OCR-2; in
    # transformers' GOT-OCR2, where they belong to the projector, so that no mapping of SAM has them.
    suffixes=(
        ("net_2.weight", "net_3.weight"),
        ("proj.conv1.weight", "proj.conv2.weight"),
        ("multi_modal_projector.conv_upsampler1.weight", "multi_modal_projector.conv_upsampler2.weight"),
    ),
    noun="compressor",
    role="the compressor, which the DeepEncoder has after SAM",
    typed_as="neck.2.weight",
    draw=_uniform,
    distribution=lambda shape: f"uniform within 1/sqrt({math.prod(shape[1:])})",
    # It leads to the next encoder.
    sizes=lambda encoders: {"compressed": list(encoders.values())[-1]["width"]},
)
QUERIES = Addition(
    option="queries",
    family="qwen2",
    names=("query_768.weight", "query_1024.weight"),
    suffixes=(
        ("query_768.weight", "query_1024.weight"),
        ("query_768_resolution.weight", "query_1024_resolution.weight"),
    ),
    noun="query set",
    role="the queries, which Qwen2 reads after the image tokens",
    typed_as="model.model.norm.weight",
    draw=_normal,
    distribution=lambda shape: "normal with mean 0 and standard deviation 1",
    # As many as the image tokens at 768 and 1024 pixels, whatever the width.
    sizes=lambda encoders: {
        name: size for name, size in registry.canonical("qwen2").sizes.items() if name.endswith("_queries")
    },
)
ADDITIONS = (COMPRESSOR, QUERIES)
