"""Mistakes that ports of the encoder have made, and those of the negative controls, in every block at once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from converter.encoders.sam import window_partition, window_unpartition
from converter.verification.controls import MISTAKES, Change
from converter.verification.families import FAMILIES

# CLIP's normalisation in place of DeepSeek's.
_CLIP_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
_CLIP_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])
# From the right pixels, which are between -1 and 1.
PIXEL_MISTAKES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "CLIP's mean and standard deviation": lambda x: (
        (x / 2 + 0.5 - _CLIP_MEAN.to(x)[:, None, None]) / _CLIP_STD.to(x)[:, None, None]
    ),
    "pixels between 0 and 1": lambda x: x / 2 + 0.5,
    "pixels between 0 and 255": lambda x: 255 * (x / 2 + 0.5),
    "blue before red": lambda x: x.flip(1),
}
# What is usually wrong at a stage; the first pattern that matches a name decides.
USUAL = {
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
    """A mistake in one part of a DeepEncoder."""

    name: str
    family: str
    changes_blocks: bool  # Whether it is made in each block; else in the part itself
    change: Change


def class_token_last(encoder: Any, original: Any) -> None:
    """Put the class token after the patches."""
    forward = encoder.embeddings.forward
    encoder.embeddings.forward = lambda patches: forward(patches).roll(-1, 1)


def positions_as_llama_cpp(encoder: Any, original: Any) -> None:
    """Resample positions as llama.cpp does (tools/mtmd/models/deepseekocr.cpp), where the grid is not the trained one.

    The table's first rows are resampled as one line of positions, without antialiasing. The class token is last and has
    the last row.
    """
    embeddings = encoder.embeddings
    forward = embeddings.forward

    def mistaken(patches: Tensor) -> Tensor:
        if patches.shape[2] == embeddings.config.grid:
            right: Tensor = forward(patches)
            return right
        tokens, table = patches.flatten(2).transpose(1, 2), embeddings.position_embedding.weight
        line = F.interpolate(table[None, None, :-1], (tokens.shape[1], table.shape[1]), mode="bicubic")[0]
        last = (embeddings.class_embedding + table[-1]).expand(len(patches), 1, -1)
        return torch.cat([tokens + line, last], 1)

    embeddings.forward = mistaken


def window_padding_masked(block: Any, neighbour: Any) -> None:
    """Attend within windows without the padding."""

    def mistaken(x: Tensor) -> Tensor:
        inside = window_partition(torch.ones_like(x[..., :1]), block.window).flatten(1) > 0
        with _MaskedKeys(inside[:, None, None]):
            windows = block.attn(window_partition(block.norm1(x), block.window))
        x = x + window_unpartition(windows, x.shape[1], x.shape[2])
        y: Tensor = block.mlp(block.norm2(x))
        return x + y

    if block.window is not None:
        block.forward = mistaken


class _MaskedKeys(TorchFunctionMode):
    """Masks keys in attention, in this thread only."""

    def __init__(self, visible: Tensor) -> None:
        super().__init__()
        self.visible = visible

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            kwargs["attn_mask"] = kwargs["attn_mask"].masked_fill(~self.visible, -torch.inf)
        return func(*args, **kwargs)


_MORE = (
    Mistake("window padding masked", "sam", True, window_padding_masked),
    Mistake("the class token last", "clip", False, class_token_last),
    Mistake("llama.cpp's positions: resampled as one line, class token last", "clip", False, positions_as_llama_cpp),
)


def known_mistakes(families: Collection[str]) -> list[Mistake]:
    """Return the mistakes that are tried in the encoders of some families."""
    listed = [
        Mistake(name, family, changes_blocks, change)
        for family in families
        for changes_blocks, changes in ((True, MISTAKES[family].blocks), (False, MISTAKES[family].entry))
        for name, change in changes.items()
    ]
    return [*listed, *(mistake for mistake in _MORE if mistake.family in families)]


def with_mistakes(model: nn.Module, mistakes: Collection[Mistake]) -> nn.Module:
    """Return a copy of a DeepEncoder with some mistakes; unchanged tensors are shared."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    changed = copy.deepcopy(model, shared)
    for mistake in mistakes:
        for target, neighbour in _places(changed, model, mistake):
            mistake.change(target, neighbour)
    return changed


def _places(changed: nn.Module, model: nn.Module, mistake: Mistake) -> Iterator[tuple[Any, Any]]:
    """The modules that a mistake changes, each with its neighbour, or itself, in the original."""
    family = FAMILIES[mistake.family]
    path = family.prefix[:-1]
    if not mistake.changes_blocks:
        yield changed.get_submodule(path), model.get_submodule(path)
        return
    places: Any = (root.get_submodule(family.prefix + family.blocks_path) for root in (changed, model))
    blocks, originals = map(list, places)
    for index, block in enumerate(blocks):
        yield block, originals[index - 1 if index else min(1, len(blocks) - 1)]
