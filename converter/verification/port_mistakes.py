"""Mistakes that ports of the DeepEncoder have made. Those in blocks are made in every block at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from converter.encoders.sam import window_partition, window_unpartition
from converter.verification.controls import MISTAKES, Change, copy_sharing_tensors
from converter.verification.families import FAMILIES

_CLIP_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
_CLIP_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])


def _unit_range(pixels: Tensor) -> Tensor:
    return pixels / 2 + 0.5


def _normalised_as_clip(pixels: Tensor) -> Tensor:
    return (_unit_range(pixels) - _CLIP_MEAN.to(pixels)[:, None, None]) / _CLIP_STD.to(pixels)[:, None, None]


# Each changes correct pixels, which are between -1 and 1.
PIXEL_MISTAKES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "CLIP's mean and standard deviation": _normalised_as_clip,
    "pixels between 0 and 1": _unit_range,
    "pixels between 0 and 255": lambda pixels: 255 * _unit_range(pixels),
    "blue before red": lambda pixels: pixels.flip(1),
}
# Common causes of a difference by stage. The first pattern that matches the name of the stage applies.
COMMON_CAUSES = {
    "pixels": "mean and standard deviation of 0.5, red before blue",
    "sam_model.patch_embed.proj": "the order of the convolution's axes",
    "sam_model.pos_embed": "bicubic resampling with antialiasing, rows before columns",
    "sam_model.blocks.*": "window padding (zeros after the norm, not masked), relative positions, epsilon 1e-6",
    "sam_model.*": "norms over channels with epsilon 1e-6, padding 1, stride 2 in the compressor",
    "vision_model.embeddings": "the class token first; positions resampled as a grid, bicubic with antialiasing",
    "vision_model.*": "quick_gelu, epsilon 1e-5, heads of 64 channels, the order of q, k and v",
    "qwen2_model.queries": "image tokens, then the table of queries for this size",
    "qwen2_model.*": "the mask, positions from 0 with a base of 1e6, two heads of keys and values, epsilon 1e-6",
    "output": "CLIP's channels before SAM's, without the class token",
    "*": "",
}


@dataclass(frozen=True)
class Mistake:
    """A mistake in one encoder of a DeepEncoder."""

    name: str
    family: str
    changes_blocks: bool  # Whether `change` is applied to each block; else it is applied to the encoder
    change: Change


def class_token_last(encoder: Any, original: Any) -> None:
    """Put the class token after the patches."""
    forward = encoder.embeddings.forward
    encoder.embeddings.forward = lambda patches: forward(patches).roll(-1, 1)


def positions_as_llama_cpp(encoder: Any, original: Any) -> None:
    """Resample positions as llama.cpp does (tools/mtmd/models/deepseekocr.cpp) if the grid is not that of training.

    All rows of the table but the last are resampled as a one-dimensional sequence, without antialiasing. The class
    token comes last, and has the position of the last row.
    """
    embeddings = encoder.embeddings
    forward = embeddings.forward

    def mistaken(patches: Tensor) -> Any:
        if patches.shape[2] == embeddings.config.grid:
            return forward(patches)
        tokens, table = patches.flatten(2).transpose(1, 2), embeddings.position_embedding.weight
        positions = F.interpolate(table[None, None, :-1], (tokens.shape[1], table.shape[1]), mode="bicubic")[0]
        class_token = (embeddings.class_embedding + table[-1]).expand(len(patches), 1, -1)
        return torch.cat([tokens + positions, class_token], 1)

    embeddings.forward = mistaken


def window_padding_masked(block: Any, neighbour: Any) -> None:
    """Mask the padding of windows in attention, so that patches attend to the image only."""

    def mistaken(x: Tensor) -> Any:
        inside = window_partition(torch.ones_like(x[..., :1]), block.window).flatten(1) > 0
        with _MaskedKeys(inside[:, None, None]):
            windows = block.attn(window_partition(block.norm1(x), block.window))
        x = x + window_unpartition(windows, x.shape[1], x.shape[2])
        return x + block.mlp(block.norm2(x))

    if block.window is not None:
        block.forward = mistaken


class _MaskedKeys(TorchFunctionMode):
    """Masks keys in `scaled_dot_product_attention`, in this thread only."""

    def __init__(self, visible: Tensor) -> None:
        super().__init__()
        self.visible = visible

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            kwargs["attn_mask"] = kwargs["attn_mask"].masked_fill(~self.visible, -torch.inf)
        return func(*args, **kwargs)


_PORT_MISTAKES = (
    Mistake("window padding masked", "sam", True, window_padding_masked),
    Mistake("the class token last", "clip", False, class_token_last),
    Mistake("llama.cpp's positions: resampled as one line, class token last", "clip", False, positions_as_llama_cpp),
)


def known_mistakes(families: Collection[str]) -> list[Mistake]:
    """Return the mistakes of the negative controls and of ports in the encoders of some families."""
    mistakes: list[Mistake] = []
    for family in families:
        blocks, before_blocks = MISTAKES[family]
        mistakes += [Mistake(name, family, True, change) for name, change in blocks.items()]
        mistakes += [Mistake(name, family, False, change) for name, change in before_blocks.items()]
    return [*mistakes, *(mistake for mistake in _PORT_MISTAKES if mistake.family in families)]


def with_mistakes(model: nn.Module, mistakes: Collection[Mistake]) -> nn.Module:
    """Return a copy of a DeepEncoder with some mistakes. Tensors without a mistake are shared with the original."""
    changed: nn.Module = copy_sharing_tensors(model)
    for mistake in mistakes:
        for target, neighbour in _targets(changed, model, mistake):
            mistake.change(target, neighbour)
    return changed


def _targets(changed: nn.Module, model: nn.Module, mistake: Mistake) -> Iterator[tuple[Any, Any]]:
    """Yield the arguments of `mistake.change`: each module to change, with its neighbour or original in `model`."""
    family = FAMILIES[mistake.family]
    path = family.prefix[:-1]
    if not mistake.changes_blocks:
        yield changed.get_submodule(path), model.get_submodule(path)
        return
    blocks: Any = changed.get_submodule(f"{family.prefix}{family.blocks_path}")
    originals: Any = model.get_submodule(f"{family.prefix}{family.blocks_path}")
    for index, block in enumerate(blocks):
        yield block, originals[index - 1 if index else min(1, len(blocks) - 1)]
