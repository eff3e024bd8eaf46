"""DeepSeek's compressor, two convolutions between SAM and CLIP: found in a checkpoint, or seeded."""

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
from converter.layouts.shapes import Sizes, fits
from converter.tensors.dtypes import FLOAT32
from converter.tensors.lazy_tensor import Generated, LazyTensor, lazy_read
from converter.tensors.tensor_info import TensorInfo

NAMES = ("net_2.weight", "net_3.weight")

# How the names of the two end: the authors' own in DeepSeek-OCR, Unlimited-OCR, GOT-OCR2 and Vary; those of
# transformers' Unlimited-OCR and DeepSeek-OCR-2; those of transformers' GOT-OCR2, which counts them to its projector.
# transformers only renames them. No mapping can say so of GOT-OCR2: there, they lie outside of the encoder.
_SPELLINGS = (
    NAMES,
    ("proj.conv1.weight", "proj.conv2.weight"),
    ("multi_modal_projector.conv_upsampler1.weight", "multi_modal_projector.conv_upsampler2.weight"),
)


def find_compressor(opened: Checkpoint) -> dict[str, LazyTensor]:
    """net_2 [2*neck, neck, 3, 3] and net_3 [compressed, 2*neck, 3, 3] of a checkpoint; LayoutError if not just one."""
    found = [pair for state_dict in state_dicts(opened.contents) for pair in _pairs(state_dict)]
    if len(found) != 1:
        names = ", ".join(printable(pair[1].key) for pair in found)
        what = f"holds {len(found)} compressors: {names}" if found else f"holds no compressor ({', '.join(NAMES)})"
        raise LayoutError(
            f"{opened.name}: {what}", "give one that was trained with one, such as deepseek-ai/DeepSeek-OCR"
        )
    return dict(zip(NAMES, map(lazy_read, found[0]), strict=True))


def _pairs(state_dict: StateDict) -> Iterator[tuple[TensorInfo, TensorInfo]]:
    for first, second in _SPELLINGS:
        for name, tensor in state_dict.tensors.items():
            prefix = name.removesuffix(first)
            other = state_dict.tensors.get(prefix + second)
            # A whole name, or all of it after a dot; other modules are called so, too, and have other shapes.
            if prefix != name and prefix[-1:] in ("", ".") and other and _fit({}, tensor, other):
                yield tensor, other


def _fit(sizes: Sizes, net_2: TensorInfo | LazyTensor, net_3: TensorInfo | LazyTensor) -> bool:
    """Whether the shapes are a compressor's; its sizes go into `sizes`."""
    specs = {spec.name.text: spec.shape for spec in registry.canonical("sam").tensors}
    return fits(specs[NAMES[0]], net_2.shape, sizes) and fits(specs[NAMES[1]], net_3.shape, sizes)


def check_compressor(nets: dict[str, LazyTensor], neck: int, width: int, origin: str) -> None:
    """LayoutError unless both are there, UsageError unless they take SAM's `neck` channels and give CLIP's `width`."""
    lacking = [name for name in NAMES if name not in nets]
    if lacking:
        raise LayoutError(
            f"{origin}: holds no {', '.join(lacking)}: the compressor, which the DeepEncoder has between SAM and CLIP",
            "take a trained one with --compressor deepseek-ai/DeepSeek-OCR, or start with --compressor random:0",
        )
    takes, gives = nets[NAMES[0]].shape[1], nets[NAMES[1]].shape[0]
    if takes != neck:
        raise UsageError(
            f"{origin}: net_2.weight takes {takes} channels, and SAM's neck gives {neck}",
            "choose a compressor and a SAM of the same size",
        )
    if gives != width:
        raise UsageError(
            f"{origin}: net_3.weight gives {gives} channels, and CLIP takes {width}",
            "choose a compressor and a CLIP of the same size",
        )


def seeded(name: str, neck: int, width: int) -> dict[str, LazyTensor]:
    """An untrained compressor in float32, for `random:SEED`; UsageError for another `name`.

    As torch starts a Conv2d without bias: uniform within 1/sqrt(fan_in) of 0, which is what kaiming_uniform_ with
    a=sqrt(5) comes to. Element i of a tensor is number i of its stream times 1/sqrt(fan_in)/2^31 in float64, rounded to
    float32; its stream is SHAKE-128 of the text `SEED/net_2.weight`, read as little-endian int32. No library's or
    machine's own generator has a part in it.
    """
    shapes = dict(zip(NAMES, ((2 * neck, neck, 3, 3), (width, 2 * neck, 3, 3)), strict=True))
    seed = name.removeprefix("random:")
    if not re.fullmatch("[0-9]{1,20}", seed):
        raise UsageError(f"--compressor {name}: expected a number, such as random:0")
    return {
        key: Generated(FLOAT32, shape, cache(partial(_uniform, f"{int(seed)}/{key}", shape)))
        for key, shape in shapes.items()
    }


def _uniform(text: str, shape: tuple[int, ...]) -> bytes:
    """A convolution's weight in float32, from SHAKE-128 of `text`."""
    # An `array` has its numbers as the machine has them; both ends of ours are little-endian.
    numbers = array("i", hashlib.shake_128(text.encode()).digest(4 * math.prod(shape)))
    if sys.byteorder == "big":
        numbers.byteswap()
    scale = 1 / math.sqrt(math.prod(shape[1:])) / 2**31
    values = array("f", map(scale.__mul__, numbers))
    if sys.byteorder == "big":
        values.byteswap()
    return values.tobytes()
