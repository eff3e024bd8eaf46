"""Tensors that the source of an encoder may lack: DeepSeek's compressor, and DeepSeek-OCR-2's queries.

An option (--compressor, --queries) takes them from a checkpoint that was trained with them, or generates them from a
seed.
"""

from __future__ import annotations

import hashlib
import math
import re
import sys
from array import array
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from operator import mul
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

    option: str  # The name of the option
    family: str  # The family whose canonical layout has the tensors
    names: tuple[str, str]  # Their names in this layout
    suffixes: tuple[tuple[str, str], ...]  # The possible ends of their names in checkpoints
    noun: str  # What both together are called, for messages
    role: str  # What they do, for messages
    dtype_like: str  # The tensor of the encoder whose type generated tensors get
    generate: Callable[[str, tuple[int, ...]], bytes]  # Returns float32 values, given a name and a shape
    describe_values: Callable[[tuple[int, ...]], str]  # Returns the distribution of these values, given the shape
    required_sizes: Callable[[EncoderSizes], Sizes]  # Returns the sizes that the encoders require

    @property
    def full_names(self) -> list[str]:
        """The names of the tensors in DeepSeek-OCR's model."""
        return [registry.encoder_prefix(self.family) + name for name in self.names]

    def shapes(self, encoders: EncoderSizes) -> dict[str, tuple[int, ...]]:
        """Return the shapes that fit the encoders."""
        sizes = {**encoders[self.family], **self.required_sizes(encoders)}
        return {name: concrete_shape(shape, sizes) for name, shape in self._canonical_shapes().items()}

    def find(self, opened: Checkpoint, model: str) -> list[LazyTensor]:
        """Return the two tensors in a checkpoint; LayoutError, with `model` as an example, unless it has one pair."""
        pairs = [pair for state_dict in state_dicts(opened.contents) for pair in self._find_pairs(state_dict)]
        if len(pairs) != 1:
            keys = ", ".join(printable(pair[1].key) for pair in pairs)
            what = f"{len(pairs)} {self.noun}s: {keys}" if pairs else f"no {self.noun} ({', '.join(self.names)})"
            raise LayoutError(f"{opened.name}: holds {what}", f"give one that was trained with one, such as {model}")
        return list(map(lazy_read, pairs[0]))

    def seeded(self, text: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, LazyTensor]:
        """Return untrained tensors in float32 for an option with the value random:SEED.

        They depend only on the seed, the names and the shapes. The values of a tensor are computed from random numbers:
        the output of SHAKE-128 for the text `SEED/NAME`, as little-endian 32-bit integers.
        """
        if not re.fullmatch(f"{SEED}[0-9]{{1,20}}", text):
            raise UsageError(f"--{self.option} {text}: expected a seed, such as {SEED}0")
        seed = int(text.removeprefix(SEED))
        return {
            name: Generated(FLOAT32, shape, cache(partial(self.generate, f"{seed}/{name}", shape)))
            for name, shape in shapes.items()
        }

    def check(self, tensors: Mapping[str, LazyTensor], encoders: EncoderSizes, origin: str, model: str) -> None:
        """Check that the tensors are present and fit the encoders.

        Args:
            tensors: Tensors by their names in DeepSeek-OCR's model.
            encoders: The sizes of the encoders.
            origin: The checkpoint or option that supplies the tensors.
            model: A published model that has them, as an example in messages.

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

    def _canonical_shapes(self) -> dict[str, Shape]:
        specs = {spec.name.text: spec.shape for spec in registry.canonical(self.family).tensors}
        return {name: specs[name] for name in self.names}

    def _find_pairs(self, state_dict: StateDict) -> Iterator[tuple[TensorInfo, TensorInfo]]:
        """Yield pairs of tensors that have the suffixes of the addition, under one prefix, and its shapes."""
        for first_suffix, second_suffix in self.suffixes:
            for name, first in state_dict.tensors.items():
                prefix = name.removesuffix(first_suffix)
                second = state_dict.tensors.get(prefix + second_suffix)
                # Shapes are compared because other modules have the same names.
                if prefix != name and prefix[-1:] in ("", ".") and second and self._has_shapes(first, second):
                    yield first, second

    def _has_shapes(self, *tensors: TensorInfo) -> bool:
        sizes: Sizes = {}
        shapes = self._canonical_shapes().values()
        return all(match_shape(shape, tensor.shape, sizes) for shape, tensor in zip(shapes, tensors, strict=True))


def is_seed(text: str) -> bool:
    """Return whether the value of an option is a seed, also in a wrong spelling, such as `random` or `seed=0`."""
    looks_like_seed = re.fullmatch(r"(random|seed)\W?\d*|\d+", text) is not None
    return text.startswith(SEED) or (looks_like_seed and not Path(text).exists())


def _uniform(seed_text: str, shape: tuple[int, ...]) -> bytes:
    """Return values of torch's distribution for a Conv2d without bias (kaiming_uniform_ with a=sqrt(5)).

    It is uniform within 1/sqrt(fan_in) of 0. Element i is the signed random number i times 1/sqrt(fan_in)/2^31 in
    float64, rounded to float32.
    """
    scale = 1 / math.sqrt(math.prod(shape[1:])) / 2**31
    return _random_values(seed_text, shape, "i", partial(mul, scale))


def _normal(seed_text: str, shape: tuple[int, ...]) -> bytes:
    """Return values of torch's distribution for an Embedding, the class of the queries in DeepSeek's code: N(0, 1).

    Element i is the quantile (n + 1/2) / 2^32 for the unsigned random number n with index i, in float64, rounded to
    float32.
    """
    from statistics import NormalDist  # Imports decimal and fractions, which no other conversion needs

    quantile = NormalDist().inv_cdf
    return _random_values(seed_text, shape, "I", lambda number: quantile((number + 0.5) / 2**32))


def _random_values(seed_text: str, shape: tuple[int, ...], typecode: str, to_value: Callable[[int], float]) -> bytes:
    """Return float32 values that are computed from 32-bit random numbers: signed for "i", unsigned for "I"."""
    numbers = array(typecode, hashlib.shake_128(seed_text.encode()).digest(4 * math.prod(shape)))
    # An `array` has the machine's byte order; input and output are little-endian.
    if sys.byteorder == "big":
        numbers.byteswap()
    values = array("f", map(to_value, numbers))
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
    dtype_like="neck.2.weight",
    generate=_uniform,
    describe_values=lambda shape: f"uniform within 1/sqrt({math.prod(shape[1:])})",
    # Its output has the width of the next encoder.
    required_sizes=lambda encoders: {"compressed": list(encoders.values())[-1]["width"]},
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
    dtype_like="model.model.norm.weight",
    generate=_normal,
    describe_values=lambda shape: "normal with mean 0 and standard deviation 1",
    # There are as many queries as image tokens at 768 and 1024 pixels, for any width of the encoder.
    required_sizes=lambda encoders: {
        name: size for name, size in registry.canonical("qwen2").sizes.items() if name.endswith("_queries")
    },
)
ADDITIONS = (COMPRESSOR, QUERIES)
