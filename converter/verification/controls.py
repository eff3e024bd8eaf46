"""Negative controls: mistakes made on purpose, and the errors that the output check would have reported for them.

With weights near zero, q and k can be exchanged without an effect on any output: the output check then passes, and
proves nothing about q and k. Each mistake is made in a copy of one block of the converted encoder. The copy runs on the
block's input in the tested run, and its output is compared with the reference like the block's own output.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from converter.encoders.functional import quick_gelu
from converter.verification.deep_encoder import OUTPUT, sam_features
from converter.verification.families import FAMILIES, Family
from converter.verification.outputs import Features, Mistaken
from converter.verification.result import Control

# Makes a mistake in the copy of a block (or of an encoder), given its neighbour (or the encoder itself).
Change = Callable[[Any, Any], None]


def _set(module: Any, path: str, tensor: Tensor) -> None:
    owner, _, name = path.rpartition(".")
    setattr(module.get_submodule(owner), name, nn.Parameter(tensor, requires_grad=False))


def _reorder_parts(block: Any, neighbour: Any, path: str, order: str) -> None:
    """Concatenate q, k and v of a fused linear layer in another order, such as `kqv`."""
    for name, tensor in block.get_submodule(path).named_parameters():
        parts = dict(zip("qkv", tensor.chunk(3), strict=True))
        _set(block, f"{path}.{name}", torch.cat([parts[part] for part in order]))


def _exchange_parameters(block: Any, neighbour: Any, first: str, second: str) -> None:
    a, b = block.get_parameter(first), block.get_parameter(second)
    _set(block, first, b)
    _set(block, second, a)


def _exchange_modules(block: Any, neighbour: Any, first: str, second: str) -> None:
    for name, _ in [*block.get_submodule(first).named_parameters()]:
        _exchange_parameters(block, neighbour, f"{first}.{name}", f"{second}.{name}")


def _take_from_neighbour(block: Any, neighbour: Any, path: str) -> None:
    _set(block, path, neighbour.get_parameter(path))


def _move_first_row_last(encoder: Any, original: Any, path: str) -> None:
    _set(encoder, path, encoder.get_parameter(path).roll(-1, 0))


def _exchange_activation(block: Any, neighbour: Any) -> None:
    """Compute GELU for quick_gelu, and quick_gelu for any other activation."""
    block.mlp.activation = F.gelu if block.mlp.activation is quick_gelu else quick_gelu


def _change_heads(block: Any, neighbour: Any) -> None:
    """Attend with heads of half the width, or with a single head if the width is odd."""
    attention = block.self_attn
    heads = 2 * attention.heads
    attention.heads = 1 if attention.out_proj.in_features % heads else heads


def _change_head_width(block: Any, neighbour: Any) -> None:
    """Attend with twice as many heads of half the width."""
    block.self_attn.head_width = max(block.self_attn.head_width // 2, 2)


def _exchange_epsilon(block: Any, neighbour: Any) -> None:
    """Use an epsilon of 1e-5 in norms that have 1e-6, and 1e-6 in all others."""
    for module in block.modules():
        if hasattr(module, "eps"):
            module.eps = 1e-5 if module.eps < 5e-6 else 1e-6


def _change_rope_theta(block: Any, neighbour: Any) -> None:
    """Rotate positions with another base: that of Llama, or Qwen2's in place of it."""
    block.self_attn.rope_theta = 1e6 if block.self_attn.rope_theta == 1e4 else 1e4


def _change_mask(block: Any, neighbour: Any, image_tokens: Callable[[Tensor], int]) -> None:
    """Take another number of tokens for those of the image, which see each other."""
    forward = block.self_attn.forward
    block.self_attn.forward = lambda x, _: forward(x, image_tokens(x))


def _interpolate(encoder: Any, original: Any, **options: Any) -> None:
    """Resample position embeddings with other options of `torch.nn.functional.interpolate`."""
    embed = encoder.embed

    def mistaken(patches: Tensor) -> Tensor:
        with _Interpolation(options):
            features: Tensor = embed(patches)
        return features

    encoder.embed = mistaken


class _Interpolation(TorchFunctionMode):
    """Overrides the options of interpolations, in this thread only."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.options = options

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = self.options if func is F.interpolate else {}
        return func(*args, **{**(kwargs or {}), **options})


class Mistakes(NamedTuple):
    """The mistakes of one family. A name completes the sentence "outputs cannot show ... in this checkpoint"."""

    blocks: Mapping[str, Change]  # Mistakes within a block
    entry: Mapping[str, Change]  # Those between the patch convolution and the first block, which `encoder.embed` has


def _in_fused(path: str) -> dict[str, Change]:
    """Mistakes in a fused linear layer of q, k and v."""
    return {
        "q and k exchanged": partial(_reorder_parts, path=path, order="kqv"),
        "k and v exchanged": partial(_reorder_parts, path=path, order="qvk"),
        "a bias of the neighbour layer": partial(_take_from_neighbour, path=f"{path}.bias"),
    }


_ANY_BLOCK = {"GELU and quick_gelu exchanged": _exchange_activation, "another epsilon": _exchange_epsilon}
_RESAMPLED = {
    "positions resampled without antialiasing": partial(_interpolate, antialias=False),
    "positions resampled bilinearly": partial(_interpolate, mode="bilinear"),
}
_CLASS_POSITION_LAST = partial(_move_first_row_last, path="embeddings.position_embedding.weight")
MISTAKES = {
    "sam": Mistakes(
        blocks={
            **_in_fused("attn.qkv"),
            "relative positions of rows and columns exchanged": partial(
                _exchange_parameters, first="attn.rel_pos_h", second="attn.rel_pos_w"
            ),
            **_ANY_BLOCK,
        },
        entry=_RESAMPLED,
    ),
    "clip": Mistakes(
        blocks={**_in_fused("self_attn.qkv_proj"), "another number of heads": _change_heads, **_ANY_BLOCK},
        entry={"the class token's position at the end": _CLASS_POSITION_LAST, **_RESAMPLED},
    ),
    "qwen2": Mistakes(
        blocks={
            "k and v exchanged": partial(_exchange_modules, first="self_attn.k_proj", second="self_attn.v_proj"),
            "gate and up exchanged": partial(_exchange_modules, first="mlp.gate_proj", second="mlp.up_proj"),
            "both norms exchanged": partial(
                _exchange_modules, first="input_layernorm", second="post_attention_layernorm"
            ),
            "a bias of the neighbour layer": partial(_take_from_neighbour, path="self_attn.q_proj.bias"),
            "another number of heads": _change_head_width,
            "another base of rotary positions": _change_rope_theta,
            "a causal mask for image tokens": partial(_change_mask, image_tokens=lambda x: 1),
            "no mask for queries": partial(_change_mask, image_tokens=lambda x: x.shape[1]),
            "quick_gelu in place of SiLU": _exchange_activation,
            "another epsilon": _exchange_epsilon,
        },
        entry={},
    ),
}


def mistakes_in_blocks(family: Family, encoder: Any, features: Features) -> Iterator[Mistaken]:
    """Make each mistake in the first block and in the last one with the same shapes.

    They are the least and the most affected by rounding. A block of other shapes, SAM's with global attention, takes
    several times as long.

    Args:
        family: The encoder's family.
        encoder: The converted encoder, as it ran by itself.
        features: Its features at every probe.
    """
    blocks: list[Any] = list(encoder.get_submodule(family.blocks_path))
    shapes = [[tensor.shape for tensor in block.parameters()] for block in blocks]
    last_alike = max(index for index, block_shapes in enumerate(shapes) if block_shapes == shapes[0])
    for index in sorted({0, last_alike}):
        before = features[f"{family.blocks_path}.{index - 1}" if index else family.block_input_probe]
        neighbour = blocks[index - 1 if index else min(1, len(blocks) - 1)]
        for name, change in MISTAKES[family.name].blocks.items():
            mistaken = _changed(blocks[index], neighbour, change)
            yield (name, f"{family.blocks_path}.{index}", mistaken(before))


def mistakes_before_blocks(family: Family, model: nn.Module, prefix: str, features: Features) -> Iterator[Mistaken]:
    """Make each mistake between the patch convolution and the first block.

    Args:
        family: The encoder's family.
        model: The converted encoder, or a DeepEncoder with it.
        prefix: Prefix of the encoder in the model, and of its probes.
        features: The features at every probe.
    """
    encoder = model.get_submodule(prefix[:-1])
    for name, change in MISTAKES[family.name].entry.items():
        patches = features.get(prefix + family.patch_conv_path)
        # In a DeepEncoder, SAM's features take the place of CLIP's patches.
        patches = sam_features(features[OUTPUT]) if patches is None else patches
        yield (name, prefix + family.block_input_probe, _changed(encoder, encoder, change).embed(patches))


def _changed(module: nn.Module, neighbour: nn.Module, change: Change) -> Any:
    """A copy of a module with a mistake; unchanged tensors are shared."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    changed = copy.deepcopy(module, shared)
    change(changed, neighbour)
    return changed


def strongest(controls: Iterable[Control]) -> list[Control]:
    """The largest error of each mistake and probe in several runs, as one run that shows it is enough."""
    found: dict[tuple[str, str], Control] = {}
    for control in controls:
        for family in FAMILIES.values():
            control = replace(control, block=control.block.removeprefix(family.prefix))
        best = found.setdefault((control.mistake, control.block), control)
        if control.effect / control.tolerance > best.effect / best.tolerance:
            found[control.mistake, control.block] = control
    return list(found.values())
