"""Negative controls: deliberate mistakes, and the errors that the output check would have reported for them.

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
from converter.verification.outputs import Features, MistakenFeatures
from converter.verification.result import Control

# Makes a mistake in a copy of a block, given the original's neighbour, or in a copy of an encoder, given the original.
Change = Callable[[Any, Any], None]


def _set_parameter(module: Any, path: str, tensor: Tensor) -> None:
    owner, _, name = path.rpartition(".")
    setattr(module.get_submodule(owner), name, nn.Parameter(tensor, requires_grad=False))


def _reorder_parts(block: Any, neighbour: Any, path: str, order: str) -> None:
    """Concatenate q, k and v of a fused linear layer in another order, such as `kqv`."""
    for name, tensor in block.get_submodule(path).named_parameters():
        parts = dict(zip("qkv", tensor.chunk(3), strict=True))
        _set_parameter(block, f"{path}.{name}", torch.cat([parts[part] for part in order]))


def _exchange_parameters(block: Any, neighbour: Any, first: str, second: str) -> None:
    a, b = block.get_parameter(first), block.get_parameter(second)
    _set_parameter(block, first, b)
    _set_parameter(block, second, a)


def _exchange_modules(block: Any, neighbour: Any, first: str, second: str) -> None:
    for name, _ in [*block.get_submodule(first).named_parameters()]:
        _exchange_parameters(block, neighbour, f"{first}.{name}", f"{second}.{name}")


def _take_from_neighbour(block: Any, neighbour: Any, path: str) -> None:
    _set_parameter(block, path, neighbour.get_parameter(path))


def _move_first_row_last(encoder: Any, original: Any, path: str) -> None:
    _set_parameter(encoder, path, encoder.get_parameter(path).roll(-1, 0))


def _exchange_activation(block: Any, neighbour: Any) -> None:
    """Replace quick_gelu by GELU, and any other activation by quick_gelu."""
    block.mlp.activation = F.gelu if block.mlp.activation is quick_gelu else quick_gelu


def _change_heads(block: Any, neighbour: Any) -> None:
    """Attend with twice as many heads, or with a single head if the width cannot be divided by that number."""
    attention = block.self_attn
    heads = 2 * attention.heads
    attention.heads = 1 if attention.out_proj.in_features % heads else heads


def _change_head_width(block: Any, neighbour: Any) -> None:
    """Attend with twice as many heads, each of half the width."""
    block.self_attn.head_width = max(block.self_attn.head_width // 2, 2)


def _exchange_epsilon(block: Any, neighbour: Any) -> None:
    """Use an epsilon of 1e-5 in norms with an epsilon of 1e-6, and 1e-6 in all others."""
    for module in block.modules():
        if hasattr(module, "eps"):
            module.eps = 1e-5 if module.eps < 5e-6 else 1e-6


def _change_rope_theta(block: Any, neighbour: Any) -> None:
    """Use Llama's base of rotary position embeddings, or Qwen2's if the encoder has Llama's."""
    block.self_attn.rope_theta = 1e6 if block.self_attn.rope_theta == 1e4 else 1e4


def _change_mask(block: Any, neighbour: Any, num_image_tokens: Callable[[Tensor], int]) -> None:
    """Mask attention as for another number of image tokens, which `num_image_tokens` returns for all tokens."""
    forward = block.self_attn.forward
    block.self_attn.forward = lambda x, _: forward(x, num_image_tokens(x))


def _interpolate(encoder: Any, original: Any, **options: Any) -> None:
    """Resample position embeddings with other options of `torch.nn.functional.interpolate`."""
    embed = encoder.embed

    def mistaken(patches: Tensor) -> Any:
        with _Interpolation(options):
            return embed(patches)

    encoder.embed = mistaken


class _Interpolation(TorchFunctionMode):
    """Overrides options of `torch.nn.functional.interpolate`, in this thread only."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.options = options

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = self.options if func is F.interpolate else {}
        return func(*args, **{**(kwargs or {}), **options})


class Mistakes(NamedTuple):
    """The mistakes of one family. A name completes the sentence "outputs cannot show ... in this checkpoint"."""

    blocks: Mapping[str, Change]  # Mistakes within a block
    before_blocks: Mapping[str, Change]  # Mistakes between the patch convolution and the first block (`encoder.embed`)


def _fused_qkv_mistakes(path: str) -> dict[str, Change]:
    """Return the mistakes in a fused linear layer of q, k and v."""
    return {
        "q and k exchanged": partial(_reorder_parts, path=path, order="kqv"),
        "k and v exchanged": partial(_reorder_parts, path=path, order="qvk"),
        "a bias of the neighbour layer": partial(_take_from_neighbour, path=f"{path}.bias"),
    }


_BLOCK_MISTAKES = {"GELU and quick_gelu exchanged": _exchange_activation, "another epsilon": _exchange_epsilon}
_RESAMPLING_MISTAKES = {
    "positions resampled without antialiasing": partial(_interpolate, antialias=False),
    "positions resampled bilinearly": partial(_interpolate, mode="bilinear"),
}
_CLASS_POSITION_LAST = partial(_move_first_row_last, path="embeddings.position_embedding.weight")
MISTAKES = {
    "sam": Mistakes(
        blocks={
            **_fused_qkv_mistakes("attn.qkv"),
            "relative positions of rows and columns exchanged": partial(
                _exchange_parameters, first="attn.rel_pos_h", second="attn.rel_pos_w"
            ),
            **_BLOCK_MISTAKES,
        },
        before_blocks=_RESAMPLING_MISTAKES,
    ),
    "clip": Mistakes(
        blocks={
            **_fused_qkv_mistakes("self_attn.qkv_proj"),
            "another number of heads": _change_heads,
            **_BLOCK_MISTAKES,
        },
        before_blocks={"the class token's position at the end": _CLASS_POSITION_LAST, **_RESAMPLING_MISTAKES},
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
            "a causal mask for image tokens": partial(_change_mask, num_image_tokens=lambda x: 1),
            "no mask for queries": partial(_change_mask, num_image_tokens=lambda x: x.shape[1]),
            "quick_gelu in place of SiLU": _exchange_activation,
            "another epsilon": _exchange_epsilon,
        },
        before_blocks={},
    ),
}


def mistakes_in_blocks(family: Family, encoder: Any, features: Features) -> Iterator[MistakenFeatures]:
    """Make each mistake in the first block, and in the last block whose parameters have the same shapes.

    These blocks are the least and the most affected by rounding. SAM's blocks with global attention have other shapes,
    and take several times as long.

    Args:
        family: The encoder's family.
        encoder: The converted encoder.
        features: The features at every probe when it ran alone, outside a DeepEncoder.
    """
    blocks: list[Any] = list(encoder.get_submodule(family.blocks_path))
    shapes = [[tensor.shape for tensor in block.parameters()] for block in blocks]
    last_index = max(index for index, block_shapes in enumerate(shapes) if block_shapes == shapes[0])
    for index in sorted({0, last_index}):
        before = features[f"{family.blocks_path}.{index - 1}" if index else family.block_input_probe]
        neighbour = blocks[index - 1 if index else min(1, len(blocks) - 1)]
        for name, change in MISTAKES[family.name].blocks.items():
            mistaken = _changed(blocks[index], neighbour, change)
            yield MistakenFeatures(name, f"{family.blocks_path}.{index}", mistaken(before))


def mistakes_before_blocks(
    family: Family, model: nn.Module, prefix: str, features: Features
) -> Iterator[MistakenFeatures]:
    """Make each mistake between the patch convolution and the first block.

    Args:
        family: The encoder's family.
        model: The converted encoder, or a DeepEncoder with it.
        prefix: The prefix of the encoder's modules and probes in the model.
        features: The features at every probe.
    """
    encoder = model.get_submodule(prefix[:-1])
    for name, change in MISTAKES[family.name].before_blocks.items():
        patches = features.get(prefix + family.patch_conv_path)
        # In a DeepEncoder, SAM's features take the place of CLIP's patches.
        patches = sam_features(features[OUTPUT]) if patches is None else patches
        mistaken = _changed(encoder, encoder, change)
        yield MistakenFeatures(name, prefix + family.block_input_probe, mistaken.embed(patches))


def copy_sharing_tensors(module: nn.Module) -> Any:
    """Return a copy of a module that shares all tensors with the original."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, shared)


def _changed(module: nn.Module, neighbour: nn.Module, change: Change) -> Any:
    """Return a copy of a module with a mistake. Tensors without the mistake are shared with the original."""
    changed = copy_sharing_tensors(module)
    change(changed, neighbour)
    return changed


def strongest_controls(controls: Iterable[Control]) -> list[Control]:
    """Return the control with the largest effect for each mistake and block, as one run that shows it is enough."""
    strongest: dict[tuple[str, str], Control] = {}
    for control in controls:
        for family in FAMILIES.values():
            control = replace(control, block=control.block.removeprefix(family.prefix))
        best = strongest.setdefault((control.mistake, control.block), control)
        if control.effect / control.tolerance > best.effect / best.tolerance:
            strongest[control.mistake, control.block] = control
    return list(strongest.values())
