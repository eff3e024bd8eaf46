"""Corruptions of correct conversions as data, and the verification of each.

Four kinds. `weights`: tensors changed in a correct conversion. `file`: names, types, bytes, or another
source. `architecture`: a mistake in the encoder itself, patched in for one run, which only outputs show. `function`: a
config with another activation, other heads or another epsilon, which no tensor shows.

Run by tests/test_corruptions.py on tiny encoders and by scripts/verify_on_gpu.py on true ones.
"""

from __future__ import annotations

import json
import math
import re
import struct
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import safetensors.torch
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import converter
from converter.api.verify import verify
from converter.encoders import Qwen2Config, SamConfig, clip, deepencoder, functional, qwen2, sam
from converter.errors import DsocrError
from converter.layouts import registry
from converter.tensors.evaluate import byte_swapped
from converter.verification.result import INCONCLUSIVE, Verification

State = dict[str, Tensor]
Config = dict[str, Any]
WEIGHTS, FILE, ARCHITECTURE, FUNCTION = "weights", "file", "architecture", "function"
SAM, CLIP, BOTH = ("sam",), ("clip",), ("sam", "clip")
# SAM with DeepSeek's net_2 and net_3, which no SAM checkpoint has.
COMPRESSOR = ("compressor",)
GROUPS = ("structure", "bytes", "outputs")


class Names(NamedTuple):
    """Names of a family's parts, and its sizes."""

    block: str
    qkv: str
    out: str
    norm1: str
    norm2: str
    fc1: str
    fc2: str
    positions: str
    patch: str
    depth: int
    heads: int

    def at(self, layer: int, part: str, param: str = "weight") -> str:
        """The name of a tensor in a layer, counted from the end if negative."""
        return f"{self.block}.{layer % self.depth}.{getattr(self, part, part)}.{param}"

    def layer(self, index: int) -> str:
        return f"{self.block}.{index % self.depth}."


class Corruption(NamedTuple):
    """One mistake. `change` alters tensors, `damage` the written file, `patch` the encoder, `source` the source given.

    `mapping` replaces texts in a mapping of the source's layout, under which the file is converted and verified.
    `config` gives other values to keys of config.json in a folder for transformers: in the converted one or, where
    `source` is "config", in the source.
    `tensor` is the first probe at which the outputs must diverge for an `architecture` mistake; `{block}` stands for
    the family's blocks, `{last}` for the last one's index. `quiet` ones stay below the noise floor of all outputs: only
    bytes catch them.
    """

    name: str
    families: tuple[str, ...]
    kind: str
    what: str
    change: Callable[[State, Names], None] | None = None
    damage: Callable[[Path], None] | None = None
    patch: Callable[[], AbstractContextManager[Any]] | None = None
    source: str = ""
    tensor: str = ""
    quiet: bool = False
    mapping: tuple[tuple[str, str], ...] = ()
    config: Callable[[Config], Config] | None = None


# Weights: helpers that replace tensors, never write into them --------------------------------------------------------

Change = Callable[[State, Names], None]


def edit(part: str, how: Callable[[Tensor], Tensor], *params: str, layer: int = 1) -> Change:
    """Replace a part's tensors in one layer, or one tensor by its full name."""

    def change(state: State, names: Names) -> None:
        for param in params or ("weight",):
            name = names.at(layer, part, param)
            if name not in state:
                name = f"{names.patch}.weight" if part == "patch" else getattr(names, part, part)
            state[name] = how(state[name])

    return change


def every(how: Callable[[Tensor], Tensor]) -> Change:
    """Replace all tensors of floating point."""

    def change(state: State, names: Names) -> None:
        for name, tensor in state.items():
            if tensor.is_floating_point():
                state[name] = how(tensor)

    return change


def swap(first: tuple[int, str, str], second: tuple[int, str, str]) -> Change:
    """Exchange two tensors, each given as layer, part and parameter."""

    def change(state: State, names: Names) -> None:
        a, b = names.at(*first), names.at(*second)
        state[a], state[b] = state[b], state[a]

    return change


def swap_names(a: str, b: str) -> Change:
    def change(state: State, names: Names) -> None:
        state[a], state[b] = state[b], state[a]

    return change


def both(*changes: Change) -> Change:
    def change(state: State, names: Names) -> None:
        for each in changes:
            each(state, names)

    return change


def move_layers(source: Callable[[int, int], int]) -> Change:
    """Fill layer i with the tensors of layer source(i, depth)."""

    def change(state: State, names: Names) -> None:
        before = dict(state)
        for i in range(names.depth):
            here, there = names.layer(i), names.layer(source(i, names.depth))
            for name in before:
                if name.startswith(here) and here != there:
                    state[name] = before[there + name.removeprefix(here)]

    return change


def _exchanged(a: int, b: int) -> Callable[[int, int], int]:
    def source(i: int, depth: int) -> int:
        first, second = a % depth, b % depth
        return {first: second, second: first}.get(i, i)

    return source


def _reorder(order: str) -> Callable[[Tensor], Tensor]:
    """q, k and v in another order; the tensor has them as thirds of dimension 0."""

    def how(tensor: Tensor) -> Tensor:
        parts = dict(zip("qkv", tensor.chunk(3), strict=True))
        return torch.cat([parts[name] for name in order])

    return how


def _third(which: str, how: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """One of q, k and v changed."""

    def changed(tensor: Tensor) -> Tensor:
        parts = list(tensor.chunk(3))
        parts["qkv".index(which)] = how(parts["qkv".index(which)])
        return torch.cat(parts)

    return changed


def _off_by_one_row(which: str) -> Callable[[Tensor], Tensor]:
    """A slice of the fused tensor that begins one row late (early for v), as a wrong bound takes it."""

    def how(tensor: Tensor) -> Tensor:
        width = len(tensor) // 3
        parts = list(tensor.chunk(3))
        start = "qkv".index(which) * width + (-1 if which == "v" else 1)
        parts["qkv".index(which)] = tensor[start : start + width]
        return torch.cat(parts)

    return how


def interleave_heads(state: State, names: Names) -> None:
    """(3, heads, D) rows stored as (heads, 3, D): Megatron's and BLOOM's order."""
    for param in ("weight", "bias"):
        name = names.at(1, "qkv", param)
        tensor = state[name]
        rows = tensor.reshape(3, names.heads, -1, *tensor.shape[1:])
        state[name] = rows.transpose(0, 1).reshape(tensor.shape)


def reverse_heads(state: State, names: Names) -> None:
    for param in ("weight", "bias"):
        name = names.at(1, "qkv", param)
        state[name] = _third("q", lambda q: q.reshape(names.heads, -1, *q.shape[1:]).flip(0).reshape(q.shape))(
            state[name]
        )


def interleave_rows(tensor: Tensor) -> Tensor:
    """Row by row q, k, v, q, k, v, ... instead of three parts."""
    return tensor.reshape(3, -1, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)


def _scaled_q(state: State, names: Names) -> None:
    for param in ("weight", "bias"):
        name = names.at(1, "qkv", param)
        width = len(state[name]) // 3 // names.heads
        state[name] = _third("q", lambda q: q * width**-0.5)(state[name])  # noqa: B023


def _bits(bit: int) -> Callable[[Tensor], Tensor]:
    """One bit flipped in the first element; 0 is the mantissa's lowest, 23 the exponent's, 31 the sign."""

    def how(tensor: Tensor) -> Tensor:
        flipped = tensor.clone()
        # In two steps: 1 << 31 is no int32.
        flipped.view(torch.int32).view(-1)[0] ^= (1 << bit) if bit < 31 else -(1 << 31)
        return flipped

    return how


def _cut(bits: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: (tensor.view(torch.int32) & -(1 << bits)).view(torch.float32)


def _through(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.to(dtype).to(tensor.dtype)


def int8(tensor: Tensor) -> Tensor:
    scale = tensor.abs().max() / 127
    return (tensor / scale).round() * scale


def _one(value: float) -> Callable[[Tensor], Tensor]:
    def how(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed.view(-1)[changed.numel() // 2] = value
        return changed

    return how


def stale(tensor: Tensor) -> Tensor:
    """A tensor of the same shape and statistics from another training run."""
    generator = torch.Generator().manual_seed(99)
    return torch.randn(tensor.shape, generator=generator) * tensor.std() + tensor.mean()


def stale_layer(state: State, names: Names) -> None:
    for name in state:
        if name.startswith(names.layer(1)):
            state[name] = stale(state[name])


def average(state: State, names: Names) -> None:
    a, b = names.at(1, "fc1"), names.at(2, "fc1")
    state[a] = (state[a] + state[b]) / 2


def _table(how: Callable[[Tensor], Tensor]) -> Change:
    """The patches' positions changed, as a square (side, side, C); CLIP's class token, the first row, stays."""

    def change(state: State, names: Names) -> None:
        table = state[names.positions]
        patches = table[0] if table.dim() == 4 else table[1:].reshape(math.isqrt(len(table)), -1, table.shape[-1])
        patches = patches.reshape(math.isqrt(patches.shape[0] * patches.shape[1]), -1, table.shape[-1])
        changed = how(patches)
        state[names.positions] = (
            changed[None]
            if table.dim() == 4
            else torch.cat([table[:1], changed.flatten(0, 1).reshape(-1, table.shape[-1])])
        )

    return change


def _flat(how: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda square: how(square.flatten(0, 1)).reshape(square.shape)


def resample_twice(square: Tensor) -> Tensor:
    """To half the size and back: what converting for another image size, and back, leaves."""
    image = square.permute(2, 0, 1)[None]
    half = F.interpolate(image, scale_factor=0.5, mode="bicubic", antialias=True)
    return F.interpolate(half, image.shape[-2:], mode="bicubic", antialias=True)[0].permute(1, 2, 0)


def _embed(part: str) -> str:
    return f"embeddings.{part}"


def class_token_last(state: State, names: Names) -> None:
    state[names.positions] = state[names.positions].roll(-1, 0)


def class_token_twice(state: State, names: Names) -> None:
    """Its position added to the class embedding already, as checkpoints made for speed do, and once more when run."""
    token = _embed("class_embedding")
    state[token] = state[token] + state[names.positions][0]


def class_token_and_position(state: State, names: Names) -> None:
    token, table = _embed("class_embedding"), state[names.positions]
    state[names.positions] = torch.cat([state[token][None], table[1:]])
    state[token] = table[0]


def transposed_fc(state: State, names: Names) -> None:
    state[names.at(1, "fc2")] = state[names.at(1, "fc1")].T.contiguous()


def relative(how: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], layer: int = 2) -> Change:
    def change(state: State, names: Names) -> None:
        h, w = (f"{names.layer(layer)}attn.rel_pos_{axis}" for axis in "hw")
        state[h], state[w] = how(state[h], state[w])

    return change


def relative_of_neighbour(state: State, names: Names) -> None:
    a, b = (f"{names.layer(i)}attn.rel_pos_h" for i in (0, 1))
    state[a], state[b] = state[b], state[a]


def compress_halves(tensor: Tensor) -> Tensor:
    return tensor.roll(len(tensor) // 2, 0)


# Names and files ------------------------------------------------------------------------------------------------------


def missing(part: str, param: str = "weight") -> Change:
    def change(state: State, names: Names) -> None:
        del state[names.at(1, part, param)]

    return change


def missing_layer(index: int) -> Change:
    def change(state: State, names: Names) -> None:
        for name in [name for name in state if name.startswith(names.layer(index))]:
            del state[name]

    return change


def extra(state: State, names: Names) -> None:
    state["logit_scale"] = torch.tensor(4.6)


def extra_layer(state: State, names: Names) -> None:
    for name in [name for name in state if name.startswith(names.layer(-1))]:
        state[f"{names.block}.{names.depth}." + name.removeprefix(names.layer(-1))] = state[name] + 0.001


def rename(pattern: str, replacement: str) -> Change:
    def change(state: State, names: Names) -> None:
        for name in list(state):
            renamed = re.sub(pattern, replacement, name)
            if renamed != name:
                state[renamed] = state.pop(name)

    return change


def unfused(state: State, names: Names) -> None:
    for param in ("weight", "bias"):
        name = names.at(1, "qkv", param)
        for letter, part in zip("qkv", state.pop(name).chunk(3), strict=True):
            state[name.replace("qkv", letter)] = part


def _header(path: Path) -> tuple[int, bytes]:
    data = path.read_bytes()
    return 8 + struct.unpack("<Q", data[:8])[0], data


def shift_data(path: Path) -> None:
    """All tensors begin 4 bytes late."""
    begin, data = _header(path)
    path.write_bytes(data[:begin] + data[-4:] + data[begin:-4])


def truncate(path: Path) -> None:
    _, data = _header(path)
    path.write_bytes(data[: len(data) * 2 // 3])


def zero_tail(path: Path) -> None:
    """As a download that was broken off into a file made at full size."""
    begin, data = _header(path)
    keep = begin + (len(data) - begin) * 2 // 3
    path.write_bytes(data[:keep] + bytes(len(data) - keep))


def big_endian(path: Path) -> None:
    begin, data = _header(path)
    path.write_bytes(data[:begin] + byte_swapped(bytearray(data[begin:]), 4))


# Architecture: the encoder itself, wrong ---------------------------------------------------------------------------

Patch = Callable[[], AbstractContextManager[Any]]


def replace(owner: Any, name: str, value: Any) -> Patch:
    return lambda: mock.patch.object(owner, name, value)


def resampled(owner: Any, **options: Any) -> Patch:
    """Position tables of one encoder resampled another way."""

    def resample(table: Tensor, h: int, w: int) -> Tensor:
        if table.shape[1:3] == (h, w):
            return table
        x = table.permute(0, 3, 1, 2).to(torch.promote_types(table.dtype, torch.float32))
        x = F.interpolate(x, (h, w), **{"mode": "bicubic", **options})
        return x.to(table.dtype).permute(0, 2, 3, 1)

    return replace(owner, "resample_abs_pos", resample)


def windows(choose: Callable[[int, SamConfig], int | None]) -> Patch:
    """Windows (None: the whole image) by block, other than the checkpoint's."""
    original = sam.SamEncoder.__init__

    def init(self: Any, config: SamConfig | None = None) -> None:
        original(self, config)
        for index, block in enumerate(self.blocks):
            block.window = choose(index, self.config)

    return replace(sam.SamEncoder, "__init__", init)


def mlp(kind: Any, first: str, second: str, activation: Callable[[Tensor], Tensor]) -> Patch:
    def forward(self: Any, x: Tensor) -> Tensor:
        y: Tensor = getattr(self, second)(activation(getattr(self, first)(x)))
        return y

    return replace(kind, "forward", forward)


def sam_mlp(activation: Callable[[Tensor], Tensor]) -> Patch:
    return mlp(sam._Mlp, "lin1", "lin2", activation)


def clip_mlp(activation: Callable[[Tensor], Tensor]) -> Patch:
    return mlp(clip._Mlp, "fc1", "fc2", activation)


def tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def low_precision_gelu(x: Tensor) -> Tensor:
    return F.gelu(x.bfloat16()).to(x.dtype)


def low_precision_quick_gelu(x: Tensor) -> Tensor:
    return quick_gelu(x.bfloat16()).to(x.dtype)


def unscaled(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = functional.split_heads(qkv, heads)
    return q * q.shape[-1] ** 0.5, k, v


def split_interleaved(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.reshape(*qkv.shape[:2], heads, 3, -1).permute(3, 0, 2, 1, 4)
    return q, k, v


def split_kqv(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = functional.split_heads(qkv, heads)
    return k, q, v


_SAM_BIAS = sam._Attention._rel_pos_bias
_REL_POS_EMBEDDINGS = sam._rel_pos_embeddings


def bias_of_scaled_query(self: Any, q: Tensor, h: int, w: int) -> tuple[Tensor, Tensor]:
    return _SAM_BIAS(self, q * q.shape[-1] ** -0.5, h, w)


def no_bias(self: Any, q: Tensor, h: int, w: int) -> tuple[Tensor, Tensor]:
    rows, columns = _SAM_BIAS(self, q, h, w)
    return torch.zeros_like(rows), torch.zeros_like(columns)


def bias_swapped(self: Any, q: Tensor, h: int, w: int) -> tuple[Tensor, Tensor]:
    q = q.reshape(*q.shape[:2], h, w, -1)
    rows = torch.einsum("bnhwd,hkd->bnhwk", q, sam._rel_pos_embeddings(self.rel_pos_w, h)).flatten(2, 3)
    columns = torch.einsum("bnhwd,wkd->bnhwk", q, sam._rel_pos_embeddings(self.rel_pos_h, w)).flatten(2, 3)
    return rows, columns


def nearest_offsets(table: Tensor, length: int) -> Tensor:
    return table if len(table) == length else F.interpolate(table.T[None], length, mode="nearest")[0].T


def corner_offsets(table: Tensor, length: int) -> Tensor:
    if len(table) == length:
        return table
    return F.interpolate(table.T[None], length, mode="linear", align_corners=True)[0].T


def norm_after_padding(self: Any, x: Tensor) -> Tensor:
    if self.window is None:
        y = self.attn(self.norm1(x))
    else:
        y = sam.window_unpartition(self.attn(self.norm1(sam.window_partition(x, self.window))), x.shape[1], x.shape[2])
    x = x + y
    return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


def to_windows_above(x: Tensor, side: int) -> Tensor:
    batch, h, w, channels = x.shape
    x = F.pad(x, (0, 0, -w % side, 0, -h % side, 0))
    x = x.reshape(batch, -(-h // side), side, -(-w // side), side, channels)
    return x.transpose(2, 3).flatten(0, 2)


def from_windows_above(windows: Tensor, h: int, w: int) -> Tensor:
    side, channels = windows.shape[2:]
    x = windows.reshape(-1, -(-h // side), -(-w // side), side, side, channels)
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, -h:, -w:]


def post_norm(self: Any, x: Tensor) -> Tensor:
    """Norms after attention and MLP, as the first transformers had them."""
    names = ("norm1", "norm2") if hasattr(self, "norm1") else ("layer_norm1", "layer_norm2")
    attention = self.attn if hasattr(self, "attn") else self.self_attn
    x = getattr(self, names[0])(x + attention(x))
    return getattr(self, names[1])(x + self.mlp(x))  # type: ignore[no-any-return]


def channel_norm(self: Any, width: int, eps: float) -> None:
    nn.LayerNorm.__init__(self, width, 1e-5)


def compressed_with_relu(self: Any, pixels: Tensor) -> Tensor:
    x: Tensor = self.features(pixels)
    return x if self.config.compressor is None else self.net_3(F.relu(self.net_2(x)))


def no_positions(table: Tensor, h: int, w: int) -> Tensor:
    return table.new_zeros(1, h, w, table.shape[-1])


def transposed_positions(table: Tensor, h: int, w: int) -> Tensor:
    return functional.resample_abs_pos(table.transpose(1, 2), h, w)


def embeddings(token: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Patch:
    """CLIP's embeddings joined another way: of class token (B, 1, C), patches (B, N, C), positions (1, 1 + N, C)."""

    def forward(self: Any, patches: Tensor) -> Tensor:
        batch, _, h, w = patches.shape
        classes = self.class_embedding.expand(batch, 1, -1)
        return token(classes, patches.flatten(2).transpose(1, 2), self._positions(h, w))

    return replace(clip._Embeddings, "forward", forward)


def causal(self: Any, x: Tensor) -> Tensor:
    q, k, v = functional.split_heads(self.qkv_proj(x), self.heads)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    return self.out_proj(y)  # type: ignore[no-any-return]


def without_pre_norm(self: Any, patches: Tensor) -> Tensor:
    return self.embeddings(patches)  # type: ignore[no-any-return]


def with_post_norm(self: Any, x: Tensor) -> Tensor:
    for layer in self.layers:
        x = layer(x)
    return F.layer_norm(x, x.shape[-1:])


def without_last_layer(self: Any, x: Tensor) -> Tensor:
    for layer in self.layers[:-1]:
        x = layer(x)
    return x


def chain(join: Callable[[Tensor, Tensor], Tensor]) -> Patch:
    """The chain's end joined another way from CLIP's tokens (B, 1 + N, C) and SAM's features (B, C, h, w)."""

    def forward(self: Any, pixels: Tensor) -> Tensor:
        features = self.sam_model(pixels)
        return join(self.vision_model(None, features), features)

    return replace(deepencoder.DeepEncoder, "forward", forward)


def rows(features: Tensor) -> Tensor:
    return features.flatten(2).transpose(1, 2)


# The catalogue --------------------------------------------------------------------------------------------------------

_ORDERS = {"kqv": "k, q, v", "vkq": "v, k, q", "qvk": "q, v, k", "kvq": "k, v, q", "vqk": "v, q, k"}


def _w(name: str, families: tuple[str, ...], what: str, change: Change, quiet: bool = False) -> Corruption:
    return Corruption(name, families, WEIGHTS, what, change=change, quiet=quiet)


def _f(name: str, families: tuple[str, ...], what: str, change: Change, quiet: bool = False) -> Corruption:
    return Corruption(name, families, FILE, what, change=change, quiet=quiet)


def _d(name: str, families: tuple[str, ...], what: str, damage: Callable[[Path], None]) -> Corruption:
    return Corruption(name, families, FILE, what, damage=damage)


def _a(name: str, families: tuple[str, ...], what: str, patch: Patch, tensor: str) -> Corruption:
    return Corruption(name, families, ARCHITECTURE, what, patch=patch, tensor=tensor)


def layer_norm(epsilon: float) -> Callable[[Any], nn.LayerNorm]:
    return lambda config: nn.LayerNorm(config.width, epsilon)


def flip(dim: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.flip(dim)


def roll(step: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.roll(step, 0)


def scaled(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor * factor


def transposed(tensor: Tensor) -> Tensor:
    return tensor.T.contiguous()


def turned(tensor: Tensor) -> Tensor:
    """A convolution's rows and columns exchanged."""
    return tensor.transpose(-1, -2).contiguous()


CATALOGUE: list[Corruption] = [
    # q, k and v
    *(
        _w(
            f"qkv-order-{order}",
            BOTH,
            f"one layer's q, k and v fused as {text}",
            edit("qkv", _reorder(order), "weight", "bias"),
        )
        for order, text in _ORDERS.items()
    ),
    _w(
        "qkv-bias-order",
        BOTH,
        "one layer's biases fused as k, q, v, its weights rightly",
        edit("qkv", _reorder("kqv"), "bias"),
    ),
    _w(
        "qkv-weight-order",
        BOTH,
        "one layer's weights fused as q, v, k, its biases rightly",
        edit("qkv", _reorder("qvk")),
    ),
    *(
        _w(
            f"{which}-off-by-one",
            BOTH,
            f"{which}'s slice of the fused weight taken one row off",
            edit("qkv", _off_by_one_row(which)),
        )
        for which in "qkv"
    ),
    _w("heads-interleaved", BOTH, "fused head by head, (heads, 3, D), instead of (3, heads, D)", interleave_heads),
    _w(
        "rows-interleaved",
        BOTH,
        "fused row by row instead of part by part",
        edit("qkv", interleave_rows, "weight", "bias"),
    ),
    _w("heads-reversed", BOTH, "q's heads in reverse order", reverse_heads),
    _w("q-transposed", BOTH, "q's part of the fused weight transposed", edit("qkv", _third("q", transposed))),
    _w("q-scaled", BOTH, "the softmax's scale folded into q, though the encoder applies it too", _scaled_q),
    _w(
        "k-bias-zeroed",
        BOTH,
        "k's bias lost; no output can show it",
        edit("qkv", _third("k", torch.zeros_like), "bias"),
        True,
    ),
    _w("q-bias-zeroed", BOTH, "q's bias lost", edit("qkv", _third("q", torch.zeros_like), "bias")),
    _w("qkv-bias-zeroed", BOTH, "all three biases lost", edit("qkv", torch.zeros_like, "bias")),
    _w(
        "qkv-bias-of-neighbour",
        BOTH,
        "a fused bias exchanged with its neighbour layer's",
        swap((1, "qkv", "bias"), (2, "qkv", "bias")),
    ),
    # Layers
    _w(
        "layers-shifted",
        BOTH,
        "every layer holds the next one's tensors",
        move_layers(lambda i, depth: (i + 1) % depth),
    ),
    _w("layers-reversed", BOTH, "layers in reverse order", move_layers(lambda i, depth: depth - 1 - i)),
    _w(
        "layers-as-words",
        BOTH,
        "layers numbered in the order of words: 0, 1, 10, 11, 2, ...",
        move_layers(lambda i, depth: int(sorted(map(str, range(depth)))[i])),
    ),
    _w("first-and-last", BOTH, "first and last layer exchanged", move_layers(_exchanged(0, -1))),
    _w("neighbours", BOTH, "layers 0 and 1 exchanged", move_layers(_exchanged(0, 1))),
    _w("layer-twice", BOTH, "layer 0 copied over layer 1", move_layers(lambda i, depth: 0 if i == 1 else i)),
    _w(
        "mlps-of-neighbours",
        BOTH,
        "two neighbours' fc1 weights exchanged",
        swap((1, "fc1", "weight"), (2, "fc1", "weight")),
    ),
    _w(
        "projections-of-neighbours",
        BOTH,
        "two neighbours' output projections exchanged",
        swap((1, "out", "weight"), (2, "out", "weight")),
    ),
    _w(
        "norm-bias-of-neighbour",
        BOTH,
        "one norm's bias exchanged with its neighbour layer's",
        swap((1, "norm1", "bias"), (2, "norm1", "bias")),
    ),
    _w("last-layer-stale", BOTH, "the last layer's fc2 weight from another checkpoint", edit("fc2", stale, layer=-1)),
    # Norms
    _w(
        "norms-exchanged",
        BOTH,
        "a layer's two norms exchanged",
        both(swap((1, "norm1", "weight"), (1, "norm2", "weight")), swap((1, "norm1", "bias"), (1, "norm2", "bias"))),
    ),
    _w(
        "norm-weight-and-bias",
        BOTH,
        "a norm's weight and bias exchanged",
        swap((1, "norm1", "weight"), (1, "norm1", "bias")),
    ),
    _w("norm-zero-centred", BOTH, "a norm's weight stored minus 1", edit("norm2", lambda tensor: tensor - 1)),
    _w(
        "norm-default",
        BOTH,
        "a norm left at its initial ones and zeros",
        both(edit("norm1", torch.ones_like), edit("norm1", torch.zeros_like, "bias")),
    ),
    # Matrices
    _w("out-transposed", BOTH, "the output projection transposed", edit("out", transposed)),
    _w("fc2-is-fc1", BOTH, "fc2's weight is fc1's, transposed", transposed_fc),
    _w("fc1-bias-zeroed", BOTH, "fc1's bias lost", edit("fc1", torch.zeros_like, "bias")),
    _w("fc1-bias-rolled", BOTH, "fc1's bias off by one", edit("fc1", roll(1), "bias")),
    _w(
        "biases-exchanged",
        BOTH,
        "the biases of fc2 and of the output projection exchanged",
        swap((1, "fc2", "bias"), (1, "out", "bias")),
    ),
    _w("fc1-reversed", BOTH, "fc1's rows in reverse order", edit("fc1", flip(0))),
    _w("fc2-negated", BOTH, "fc2's weight negated", edit("fc2", torch.neg)),
    _w("out-reversed", BOTH, "the output projection's columns in reverse order", edit("out", flip(1))),
    # Positions
    _w("positions-reversed", BOTH, "positions in reverse order", _table(_flat(flip(0)))),
    _w("positions-off-by-one", BOTH, "positions one place off", _table(_flat(roll(1)))),
    _w("positions-transposed", BOTH, "positions column by column", _table(lambda square: square.transpose(0, 1))),
    _w("positions-zeroed", BOTH, "positions lost", _table(torch.zeros_like)),
    _w("positions-resampled", BOTH, "positions resampled to half the size and back", _table(resample_twice)),
    _w("class-token-last", CLIP, "the class token's position at the table's end", class_token_last),
    _w("class-token-twice", CLIP, "the class token's position added to its embedding already", class_token_twice),
    _w("class-token-zeroed", CLIP, "the class embedding lost", edit(_embed("class_embedding"), torch.zeros_like)),
    _w(
        "class-token-and-position",
        CLIP,
        "the class embedding and its position exchanged",
        class_token_and_position,
        True,
    ),
    _w(
        "pre-norm-is-post-norm",
        CLIP,
        "the norm before the blocks is another checkpoint's",
        edit("pre_layrnorm.weight", stale),
    ),
    _w(
        "pre-norm-exchanged",
        CLIP,
        "that norm's weight and bias exchanged",
        swap_names("pre_layrnorm.weight", "pre_layrnorm.bias"),
    ),
    _w("relative-swapped", SAM, "relative positions of rows and columns exchanged", relative(lambda h, w: (w, h))),
    _w("relative-window-swapped", SAM, "the same in a block of windows", relative(lambda h, w: (w, h), layer=1)),
    _w(
        "relative-reversed",
        SAM,
        "relative positions with the sign of the offset turned",
        relative(lambda h, w: (h.flip(0), w.flip(0))),
    ),
    _w("relative-off-by-one", SAM, "relative positions one place off", relative(lambda h, w: (h.roll(1, 0), w))),
    _w(
        "relative-zeroed",
        SAM,
        "relative positions lost",
        relative(lambda h, w: (torch.zeros_like(h), torch.zeros_like(w))),
    ),
    _w("relative-of-neighbour", SAM, "relative positions exchanged with the neighbour block's", relative_of_neighbour),
    # Patch embedding, neck, compressor
    _w("patch-bgr", BOTH, "the patch embedding's colours in the order blue, green, red", edit("patch", flip(1))),
    _w("patch-flipped", BOTH, "the patch embedding mirrored", edit("patch", flip(3))),
    _w("patch-transposed", BOTH, "the patch embedding's rows and columns exchanged", edit("patch", turned)),
    _w("patch-scaled", BOTH, "the patch embedding scaled for pixels of 0 to 255", edit("patch", scaled(1 / 255))),
    _w("patch-bias-zeroed", SAM, "the patch embedding's bias lost", edit("patch_embed.proj.bias", torch.zeros_like)),
    _w(
        "neck-transposed",
        SAM,
        "the neck's second convolution with inputs and outputs exchanged",
        edit("neck.2.weight", lambda t: t.transpose(0, 1).contiguous()),
    ),
    _w("neck-flipped", SAM, "the neck's second convolution mirrored", edit("neck.2.weight", flip(2))),
    _w("neck-turned", SAM, "its rows and columns exchanged", edit("neck.2.weight", turned)),
    _w(
        "neck-norms",
        SAM,
        "the neck's two norms exchanged",
        both(swap_names("neck.1.weight", "neck.3.weight"), swap_names("neck.1.bias", "neck.3.bias")),
    ),
    _w("neck-bias-zeroed", SAM, "the neck's last bias lost", edit("neck.3.bias", torch.zeros_like)),
    _w("neck-swapped", SAM, "the neck's convolutions exchanged", swap_names("neck.0.weight", "neck.2.weight")),
    _w("net-2-zeroed", COMPRESSOR, "the compressor's first convolution lost", edit("net_2.weight", torch.zeros_like)),
    _w("net-3-zeroed", COMPRESSOR, "the compressor's second convolution lost", edit("net_3.weight", torch.zeros_like)),
    _w("net-3-halves", COMPRESSOR, "the two halves of its outputs exchanged", edit("net_3.weight", compress_halves)),
    _w("net-2-flipped", COMPRESSOR, "the compressor's first convolution mirrored", edit("net_2.weight", flip(3))),
    _w("net-3-fresh", COMPRESSOR, "the compressor's second convolution freshly drawn", edit("net_3.weight", stale)),
    # Values
    _w("bit-lowest", BOTH, "the lowest mantissa bit of one weight flipped", edit("fc1", _bits(0)), True),
    _w("bit-middle", BOTH, "the eleventh mantissa bit of one weight flipped", edit("fc1", _bits(11)), True),
    _w("bit-exponent", BOTH, "the lowest exponent bit of one weight flipped", edit("fc1", _bits(23))),
    _w("bit-exponent-high", BOTH, "a high exponent bit of one weight flipped", edit("fc1", _bits(29))),
    _w("bit-sign", BOTH, "the sign of one weight flipped", edit("fc1", _bits(31))),
    _w("mantissa-cut-8", BOTH, "the low 8 mantissa bits of all weights cut off", every(_cut(8))),
    _w("mantissa-cut-1", BOTH, "the lowest mantissa bit of all weights cut off", every(_cut(1)), True),
    _w("tf32", BOTH, "all weights rounded to TensorFloat-32", every(_cut(13))),
    _w("bfloat16", BOTH, "all weights rounded to bfloat16 and back", every(_through(torch.bfloat16))),
    _w("float16", BOTH, "all weights rounded to float16 and back", every(_through(torch.float16))),
    _w("bfloat16-one", BOTH, "one weight rounded to bfloat16 and back", edit("qkv", _through(torch.bfloat16))),
    _w("int8", BOTH, "one matrix rounded to 8 bits", edit("fc1", int8)),
    _w("nan", BOTH, "one element is NaN", edit("fc1", _one(math.nan))),
    _w("infinity", BOTH, "one element is infinite", edit("qkv", _one(-math.inf))),
    _w("zero", BOTH, "one tensor is all zero", edit("fc2", torch.zeros_like)),
    _w("constant", BOTH, "one norm is constant", edit("norm2", lambda tensor: torch.full_like(tensor, 1.0))),
    _w("scaled", BOTH, "one weight 0.1 % too large", edit("out", scaled(1.001))),
    _w("noise", BOTH, "one weight with noise of 1e-4", edit("fc1", lambda t: t + 1e-4 * stale(t))),
    _w("stale-tensor", BOTH, "one tensor from another checkpoint", edit("fc1", stale)),
    _w("stale-layer", BOTH, "one layer from another checkpoint", stale_layer),
    _w("average", BOTH, "one weight the mean of two layers'", average),
    # Files
    _f("missing-bias", BOTH, "one bias is missing", missing("fc1", "bias")),
    _f("missing-last-layer", BOTH, "the last layer is missing", missing_layer(-1)),
    _f("missing-middle-layer", BOTH, "a layer in the middle is missing", missing_layer(1)),
    _f("extra-tensor", BOTH, "a tensor too much", extra),
    _f("extra-layer", BOTH, "a layer too much", extra_layer),
    _f("renamed-norm", CLIP, "`pre_layrnorm` spelled rightly, which no program reads", rename("layrnorm", "layernorm")),
    _f(
        "renamed-neck",
        SAM,
        "one of the neck's norms has another library's name",
        rename(r"^neck\.1\.", "neck.layer_norm1."),
    ),
    _f("renamed-encoder", CLIP, "layers keep transformers' `encoder`", rename(r"^transformer\.", "encoder.")),
    _f("prefix-kept", SAM, "the prefix `image_encoder.` is kept", rename("^", "image_encoder.")),
    _f("prefix-in-one", BOTH, "one tensor keeps a prefix", rename(r"^(?=.*\.1\..*fc1|.*\.1\..*lin1)", "module.")),
    _f("unfused", BOTH, "one layer's q, k and v left apart", unfused),
    _f("transposed-shape", BOTH, "fc1's weight as (inputs, outputs)", edit("fc1", transposed)),
    _f("row-missing", BOTH, "fc1's weight without its last row", edit("fc1", lambda t: t[:-1].contiguous())),
    _f(
        "class-token-shape",
        CLIP,
        "the class embedding as (1, 1, C)",
        edit(_embed("class_embedding"), lambda t: t[None, None]),
    ),
    _f("positions-shape", SAM, "positions without their first dimension", edit("pos_embed", lambda t: t[0])),
    _f("float16-one", BOTH, "one tensor in float16", edit("fc1", lambda t: t.half())),
    _f("float64-one", BOTH, "one tensor in float64", edit("norm1", lambda t: t.double())),
    _f("ids-int32", CLIP, "position_ids of 32 bits", edit(_embed("position_ids"), lambda t: t.int())),
    _f("ids-float", CLIP, "position_ids as floating-point numbers", edit(_embed("position_ids"), lambda t: t.float())),
    _f("ids-shifted", CLIP, "position_ids from 1", edit(_embed("position_ids"), lambda t: t + 1)),
    _f("ids-reversed", CLIP, "position_ids in reverse order", edit(_embed("position_ids"), flip(1))),
    _f("ids-garbage", CLIP, "position_ids never filled in", edit(_embed("position_ids"), lambda t: t + 2**40)),
    _f("ids-missing", CLIP, "position_ids missing", rename(r"^embeddings\.position_ids$", "text_ids")),
    _d("data-shifted", BOTH, "all data 4 bytes late", shift_data),
    _d("data-truncated", BOTH, "the last third of the file cut off", truncate),
    _d("data-zeroed", BOTH, "the last third of the file zeros", zero_tail),
    _d("data-swapped", BOTH, "bytes in the order of another processor", big_endian),
    Corruption(
        "mapping-qkv-order",
        CLIP,
        FILE,
        "a --mapping that fuses k, q, v",
        mapping=(("parts: {proj: [q, k, v]}", "parts: {proj: [k, q, v]}"),),
    ),
    Corruption(
        "mapping-neck-norms",
        SAM,
        FILE,
        "a --mapping that exchanges the neck's norms",
        mapping=(("neck.1.{param}", "neck.@"), ("neck.3.{param}", "neck.1.{param}"), ("neck.@", "neck.3.{param}")),
    ),
    Corruption("another-checkpoint", BOTH, FILE, "the source is another checkpoint of the same layout", source="seed"),
    Corruption("another-family", BOTH, FILE, "the source is of the other family", source="family"),
    # Architecture
    _a("sam-eps", SAM, "norms with an eps of 1e-5", replace(sam, "_layer_norm", layer_norm(1e-5)), "{block}.0"),
    _a(
        "sam-neck-eps",
        SAM,
        "the neck's norms with an eps of 1e-5",
        replace(sam._LayerNorm2d, "__init__", channel_norm),
        "neck",
    ),
    _a("sam-quick-gelu", SAM, "quick_gelu for gelu", sam_mlp(quick_gelu), "{block}.0"),
    _a("sam-gelu-tanh", SAM, "gelu's tanh approximation for gelu", sam_mlp(tanh_gelu), "{block}.0"),
    _a("sam-relu", SAM, "relu for gelu", sam_mlp(F.relu), "{block}.0"),
    _a("sam-gelu-bfloat16", SAM, "the activation computed in bfloat16", sam_mlp(low_precision_gelu), "{block}.0"),
    _a(
        "sam-window-smaller",
        SAM,
        "windows one patch too small",
        windows(lambda i, c: None if i in c.global_blocks else c.window - 1),
        "{block}.0",
    ),
    _a("sam-all-global", SAM, "every block attends globally", windows(lambda i, c: None), "{block}.0"),
    _a("sam-all-windows", SAM, "every block attends within windows", windows(lambda i, c: c.window), "{block}.2"),
    _a(
        "sam-globals-shifted",
        SAM,
        "global blocks 1, 4, 7, 10 for 2, 5, 8, 11",
        windows(lambda i, c: None if i + 1 in c.global_blocks else c.window),
        "{block}.1",
    ),
    _a(
        "sam-last-global-missing",
        SAM,
        "global blocks 2, 5, 8 for 2, 5, 8, 11",
        windows(lambda i, c: None if i in c.global_blocks[:-1] else c.window),
        "{block}.{last}",
    ),
    _a(
        "sam-no-relative",
        SAM,
        "relative positions not used",
        replace(sam._Attention, "_rel_pos_bias", no_bias),
        "{block}.0",
    ),
    _a(
        "sam-relative-scaled",
        SAM,
        "relative positions times the scaled query",
        replace(sam._Attention, "_rel_pos_bias", bias_of_scaled_query),
        "{block}.0",
    ),
    _a(
        "sam-relative-swapped",
        SAM,
        "relative positions of rows used for columns",
        replace(sam._Attention, "_rel_pos_bias", bias_swapped),
        "{block}.0",
    ),
    _a(
        "sam-relative-sign",
        SAM,
        "offsets are key minus query",
        replace(sam, "_rel_pos_embeddings", lambda table, side: _REL_POS_EMBEDDINGS(table, side).transpose(0, 1)),
        "{block}.0",
    ),
    _a(
        "sam-relative-nearest",
        SAM,
        "relative positions resampled to the nearest",
        replace(sam, "resample_rel_pos", nearest_offsets),
        "{block}.2",
    ),
    _a(
        "sam-relative-corners",
        SAM,
        "relative positions resampled with align_corners",
        replace(sam, "resample_rel_pos", corner_offsets),
        "{block}.2",
    ),
    _a(
        "sam-norm-after-padding",
        SAM,
        "windows padded before the norm",
        replace(sam._Block, "forward", norm_after_padding),
        "{block}.0",
    ),
    _a(
        "sam-padded-above",
        SAM,
        "windows padded above and left",
        lambda: mock.patch.multiple(sam, window_partition=to_windows_above, window_unpartition=from_windows_above),
        "{block}.0",
    ),
    _a("sam-no-positions", SAM, "positions not added", replace(sam, "resample_abs_pos", no_positions), "pos_embed"),
    _a(
        "sam-positions-transposed",
        SAM,
        "positions added column by column",
        replace(sam, "resample_abs_pos", transposed_positions),
        "pos_embed",
    ),
    _a(
        "sam-relu-in-compressor",
        SAM,
        "relu between the compressor's convolutions",
        replace(sam.SamEncoder, "forward", compressed_with_relu),
        "vision_model.pre_layrnorm",
    ),
    _a("clip-eps", CLIP, "norms with an eps of 1e-6", replace(clip, "_layer_norm", layer_norm(1e-6)), "pre_layrnorm"),
    _a("clip-gelu", CLIP, "gelu for quick_gelu", clip_mlp(F.gelu), "{block}.0"),
    _a("clip-gelu-tanh", CLIP, "gelu's tanh approximation for quick_gelu", clip_mlp(tanh_gelu), "{block}.0"),
    _a(
        "clip-gelu-bfloat16",
        CLIP,
        "the activation computed in bfloat16",
        clip_mlp(low_precision_quick_gelu),
        "{block}.0",
    ),
    _a(
        "clip-no-pre-norm",
        CLIP,
        "the norm before the blocks left out",
        replace(clip.ClipEncoder, "embed", without_pre_norm),
        "pre_layrnorm",
    ),
    _a(
        "clip-post-norm",
        CLIP,
        "a norm after the blocks",
        replace(clip._Transformer, "forward", with_post_norm),
        "concatenation",
    ),
    _a(
        "clip-penultimate",
        CLIP,
        "features of the last block but one",
        replace(clip._Transformer, "forward", without_last_layer),
        "{block}.{last}",
    ),
    _a(
        "clip-class-token-last",
        CLIP,
        "the class token after the patches",
        embeddings(lambda c, p, pos: torch.cat([p, c], 1) + pos),
        "pre_layrnorm",
    ),
    _a(
        "clip-no-class-token",
        CLIP,
        "a class token of zeros",
        embeddings(lambda c, p, pos: torch.cat([c * 0, p], 1) + pos),
        "pre_layrnorm",
    ),
    _a(
        "clip-positions-twice",
        CLIP,
        "positions added twice",
        embeddings(lambda c, p, pos: torch.cat([c, p], 1) + 2 * pos),
        "pre_layrnorm",
    ),
    _a(
        "clip-no-positions",
        CLIP,
        "positions not added",
        embeddings(lambda c, p, pos: torch.cat([c, p], 1)),
        "pre_layrnorm",
    ),
    _a(
        "clip-patches-by-column",
        CLIP,
        "patches column by column",
        embeddings(lambda c, p, pos: torch.cat([c, _by_column(p)], 1) + pos),
        "pre_layrnorm",
    ),
    _a("clip-causal", CLIP, "the text tower's causal mask", replace(clip._Attention, "forward", causal), "{block}.0"),
    _a(
        "chain-order",
        BOTH,
        "SAM's channels before CLIP's",
        chain(lambda s, f: torch.cat([rows(f), s[:, 1:]], -1)),
        "concatenation",
    ),
    _a(
        "chain-class-token",
        BOTH,
        "the last patch cut off in place of the class token",
        chain(lambda s, f: torch.cat([s[:, :-1], rows(f)], -1)),
        "concatenation",
    ),
    _a(
        "chain-columns",
        BOTH,
        "SAM's features column by column",
        chain(lambda s, f: torch.cat([s[:, 1:], rows(f.transpose(2, 3))], -1)),
        "concatenation",
    ),
]


def _by_column(patches: Tensor) -> Tensor:
    side = math.isqrt(patches.shape[1])
    return patches.reshape(len(patches), side, side, -1).transpose(1, 2).flatten(1, 2)


def _in_both() -> list[Corruption]:
    """Mistakes that either encoder may have, patched into the one under test."""
    found = []
    for family, module, positions in (("sam", sam, "pos_embed"), ("clip", clip, "pre_layrnorm")):
        for name, what, patch in (
            ("no-antialias", "positions resampled without antialias", resampled(module)),
            ("bilinear", "positions resampled bilinearly", resampled(module, mode="bilinear", antialias=True)),
            (
                "align-corners",
                "positions resampled with align_corners",
                resampled(module, antialias=True, align_corners=True),
            ),
            ("nearest", "positions resampled to the nearest", resampled(module, mode="nearest")),
            ("unscaled", "the softmax's scale left out", replace(module, "split_heads", unscaled)),
            ("split-kqv", "the fused matrix read as k, q, v", replace(module, "split_heads", split_kqv)),
            ("split-heads", "the fused matrix read head by head", replace(module, "split_heads", split_interleaved)),
            ("norms-last", "norms after attention and MLP", replace(module._Block, "forward", post_norm)),
        ):
            first = positions if what.startswith("positions") else "{block}.0"
            found.append(_a(f"{family}-{name}", (family,), what, patch, first))
    return found


CATALOGUE += _in_both()


def other_activation(config: Config) -> Config:
    return {"hidden_act": "gelu" if config["hidden_act"] == "quick_gelu" else "quick_gelu"}


def other_heads(config: Config) -> Config:
    return {"num_attention_heads": 2 * config["num_attention_heads"]}


def other_epsilon(config: Config) -> Config:
    return {"layer_norm_eps": 1e-6 if config["layer_norm_eps"] == 1e-5 else 1e-5}


def _in_configs() -> list[Corruption]:
    """Configs with another function; relative positions show the heads of SAM."""
    found = []
    for name, families, what, config in (
        ("activation", BOTH, "gelu for quick_gelu (CLIP), quick_gelu for gelu (SAM)", other_activation),
        ("heads", CLIP, "heads of half the width", other_heads),
        ("epsilon", BOTH, "an epsilon of 1e-6 for 1e-5 (CLIP), 1e-5 for 1e-6 (SAM)", other_epsilon),
    ):
        for place, text in (
            ("source", "the source's config states"),
            ("config", "the converted folder's config is edited to"),
        ):
            found.append(
                Corruption(
                    f"{place}-{name}",
                    families,
                    FUNCTION,
                    f"{text} {what}",
                    config=config,
                    source="config" if place == "source" else "",
                )
            )
    return found


CATALOGUE += _in_configs()


# Qwen2, the second encoder of DeepSeek-OCR-2 --------------------------------------------------------------------------

# The same conversion at a size at which query_768 is used, and at one at which query_1024 is.
QWEN2, LARGE = ("qwen2",), ("queries",)
_ATTEND, _ROTATION, _QUERIES = qwen2.attend, qwen2._rotary_cos_sin, qwen2.Qwen2Encoder.queries
SMALL_TABLE, LARGE_TABLE = "query_768.weight", "query_1024.weight"


def pair(first: str, second: str) -> Change:
    """Exchange the parameters of two modules of a layer."""

    def change(state: State, names: Names) -> None:
        for param in ("weight", "bias"):
            if names.at(1, first, param) in state:
                swap((1, first, param), (1, second, param))(state, names)

    return change


def heads_of(part: str, how: Callable[[Tensor], Tensor]) -> Change:
    """Change the order of the channels of a projection, seen as (heads, 64, ...)."""

    def change(state: State, names: Names) -> None:
        for param in ("weight", "bias"):
            name = names.at(1, part, param)
            state[name] = (
                how(state[name].reshape(-1, 64, *state[name].shape[1:])).reshape(state[name].shape).contiguous()
            )

    return change


def pairs_of_channels(heads: Tensor) -> Tensor:
    """Rotated channels next to each other, as Meta's Llama has them."""
    return heads.reshape(len(heads), 2, 32, *heads.shape[2:]).transpose(1, 2)


def table(name: str, how: Callable[[State], Tensor]) -> Change:
    def change(state: State, names: Names) -> None:
        state[name] = how(state).contiguous()

    return change


def attention(how: Callable[..., Tensor]) -> Patch:
    return replace(qwen2, "attend", how)


def with_mask(allowed: Callable[[Tensor, Tensor, int], Tensor]) -> Patch:
    """Attention with another mask: of a query at i (a column), a key at j (a row), and the number of image tokens."""

    def attend(q: Tensor, k: Tensor, v: Tensor, n: int) -> Tensor:
        at = torch.arange(q.shape[2], device=q.device)
        mask = allowed(at[:, None], at[None], n).expand(len(at), len(at))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.contiguous())

    return attention(attend)


def other_groups(q: Tensor, k: Tensor, v: Tensor, n: int) -> Tensor:
    """Heads of queries share those of keys and values in turn, and not one after another."""
    heads = k.shape[1] // 2
    k, v = (x[:, ::heads].repeat(1, heads, 1, 1) for x in (k, v))
    return _ATTEND(q, k, v, n)


def restarted(x: Tensor, head_width: int, theta: float) -> tuple[Tensor, Tensor]:
    cos, sin = _ROTATION(x[:, : x.shape[1] // 2], head_width, theta)
    return cos.repeat(2, 1), sin.repeat(2, 1)


def late(x: Tensor, head_width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Positions from 1 for the queries alone."""
    cos, sin = _ROTATION(torch.cat([x, x[:, :1]], 1), head_width, theta)
    n = x.shape[1] // 2
    return torch.cat([cos[:n], cos[n + 1 :]]), torch.cat([sin[:n], sin[n + 1 :]])


def rotated_in_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1] // 2
    even, odd, cos, sin = x[..., ::2], x[..., 1::2], cos[..., :half], sin[..., :half]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def rms_norm(epsilon: float, centre: float = 0.0) -> Patch:
    def forward(self: Any, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)).to(x.dtype)
        return (self.weight + centre) * normed  # type: ignore[no-any-return]

    return replace(qwen2.RmsNorm, "forward", forward)


def gated_by_up(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(self.gate_proj(x) * self.activation(self.up_proj(x)))  # type: ignore[no-any-return]


def image_tokens_returned(self: Any, features: Tensor) -> Tensor:
    images = features.flatten(2).transpose(1, 2)
    queries = self.queries(images.shape[1]).expand(len(images), -1, -1)
    return self.encode(torch.cat([images, queries], 1), images.shape[1])[:, : queries.shape[1]]  # type: ignore[no-any-return]


def activation(how: Callable[[Tensor], Tensor]) -> Patch:
    return lambda: mock.patch.dict(functional.ACTIVATIONS, {"silu": how})


def by_column(state: State) -> Tensor:
    square = state[LARGE_TABLE].reshape(16, 16, -1)
    return square.transpose(0, 1).flatten(0, 1)


def only_queries(i: Tensor, j: Tensor, n: int) -> Tensor:
    return torch.where(i < n, j < n, (j >= n) & (j <= i))


def _qwen2_weights() -> list[Corruption]:
    q, k, v = (f"self_attn.{letter}_proj" for letter in "qkv")
    gate, up = "mlp.gate_proj", "mlp.up_proj"
    norms = ("input_layernorm", "post_attention_layernorm")
    entries: list[tuple[str, str, Change]] = [
        ("q-and-k", "one layer's q and k exchanged, which have other shapes", pair(q, k)),
        ("k-and-v", "one layer's k and v exchanged", pair(k, v)),
        ("gate-and-up", "one layer's gate and up exchanged", pair(gate, up)),
        ("norms", "a layer's two norms exchanged", pair(*norms)),
        ("k-groups", "k's heads in another order", heads_of(k, lambda heads: heads.flip(0))),
        ("v-groups", "v's heads in another order", heads_of(v, lambda heads: heads.flip(0))),
        (
            "kv-groups",
            "the heads of k and v in another order",
            both(*(heads_of(x, lambda y: y.flip(0)) for x in (k, v))),
        ),
        ("q-groups", "q's heads in reverse order", heads_of(q, lambda heads: heads.flip(0))),
        ("q-pairs", "q's rotated channels next to each other, as Meta has them", heads_of(q, pairs_of_channels)),
        (
            "qk-pairs",
            "q's and k's rotated channels next to each other",
            both(*(heads_of(x, pairs_of_channels) for x in (q, k))),
        ),
        *((f"{x[-6]}-bias", f"{x[-6]}'s bias lost", edit(x, torch.zeros_like, "bias")) for x in (q, k, v)),
        ("layers-shifted", "every layer holds the next one's tensors", move_layers(lambda i, depth: (i + 1) % depth)),
        ("layers-reversed", "layers in reverse order", move_layers(lambda i, depth: depth - 1 - i)),
        ("neighbours", "layers 0 and 1 exchanged", move_layers(_exchanged(0, 1))),
        ("down-negated", "the MLP's last weight negated", edit("mlp.down_proj", torch.neg)),
        ("out-transposed", "the output projection transposed", edit("self_attn.o_proj", transposed)),
        ("norm-zero-centred", "a norm's weight stored minus 1, as Gemma has it", edit(norms[0], lambda x: x - 1)),
        ("last-norm-lost", "the last norm left at its initial ones", edit("model.model.norm.weight", torch.ones_like)),
        ("float8", "a weight rounded to float8 (e4m3)", edit(up, _through(torch.float8_e4m3fn))),
        ("small-reversed", "query_768 in reverse order", table(SMALL_TABLE, lambda s: s[SMALL_TABLE].flip(0))),
        ("small-rolled", "query_768 off by one", table(SMALL_TABLE, lambda s: s[SMALL_TABLE].roll(1, 0))),
        (
            "small-of-large",
            "query_768 is the first rows of query_1024",
            table(SMALL_TABLE, lambda s: s[LARGE_TABLE][:144]),
        ),
        ("tables-exchanged", "query_768 and query_1024 exchanged", swap_names(SMALL_TABLE, LARGE_TABLE)),
        ("small-stale", "query_768 from another checkpoint", table(SMALL_TABLE, lambda s: stale(s[SMALL_TABLE]))),
    ]
    found = [_w(f"qwen2-{name}", QWEN2, what, change) for name, what, change in entries]
    for name, what, how in (
        ("reversed", "query_1024 in reverse order", lambda s: s[LARGE_TABLE].flip(0)),
        ("by-column", "query_1024 column by column", by_column),
        (
            "of-small",
            "the first rows of query_1024 are query_768's",
            lambda s: torch.cat([s[SMALL_TABLE], s[LARGE_TABLE][144:]]),
        ),
    ):
        found.append(_w(f"qwen2-large-{name}", LARGE, what, table(LARGE_TABLE, how)))
    return found


def _qwen2_encoders() -> list[Corruption]:
    block, output = "{block}.0", "model.model.norm"
    entries: list[tuple[str, str, Patch, str]] = [
        (
            "rope-theta",
            "rotary positions of base 1e4",
            replace(qwen2, "_rotary_cos_sin", lambda x, width, theta: _ROTATION(x, width, 1e4)),
            block,
        ),
        (
            "rope-in-pairs",
            "channels rotated in pairs, as Meta does",
            replace(qwen2, "_apply_rotary", rotated_in_pairs),
            block,
        ),
        ("rope-lost", "no rotary positions", replace(qwen2, "_apply_rotary", lambda x, cos, sin: x), block),
        ("rope-restarted", "the queries' positions from 0", replace(qwen2, "_rotary_cos_sin", restarted), block),
        ("rope-late", "the queries' positions one late", replace(qwen2, "_rotary_cos_sin", late), block),
        ("causal", "a causal mask for image tokens too", with_mask(lambda i, j, n: j <= i), block),
        ("open", "no mask for queries", with_mask(lambda i, j, n: (j < n) | (i >= n)), block),
        ("no-mask", "no mask at all", with_mask(lambda i, j, n: i == i), block),
        ("images-see-queries", "image tokens see all queries", with_mask(lambda i, j, n: (i < n) | (j <= i)), block),
        ("blind-to-itself", "no query sees itself", with_mask(lambda i, j, n: (j < n) | (j < i)), block),
        ("blind-to-images", "queries see no image token", with_mask(only_queries), block),
        ("unscaled", "the softmax's scale left out", attention(lambda q, k, v, n: _ATTEND(q * 8, k, v, n)), block),
        ("groups", "heads of keys and values shared in turn", attention(other_groups), block),
        ("epsilon", "norms with an epsilon of 1e-5", rms_norm(1e-5), block),
        ("gemma-norm", "norms that multiply by the weight plus 1", rms_norm(1e-6, 1.0), block),
        ("gelu", "GELU for SiLU", activation(F.gelu), block),
        ("quick-gelu", "quick_gelu for SiLU", activation(quick_gelu), block),
        ("gate-of-up", "the activation on up, and not on gate", replace(qwen2._Mlp, "forward", gated_by_up), block),
        (
            "image-tokens",
            "the image tokens' features returned",
            replace(qwen2.Qwen2Encoder, "forward", image_tokens_returned),
            "concatenation",
        ),
        (
            "queries-reversed",
            "queries read in reverse order",
            replace(qwen2.Qwen2Encoder, "queries", lambda self, n: _QUERIES(self, n).flip(0)),
            "queries",
        ),
        ("last-norm", "the last norm left out", replace(qwen2.Qwen2Encoder, "encode", without_last_norm), output),
    ]
    return [_a(f"qwen2-{name}", QWEN2, what, patch, tensor) for name, what, patch, tensor in entries]


def without_last_norm(self: Any, x: Tensor, image_tokens: int | None = None) -> Tensor:
    for layer in self.model.model.layers:
        x = layer(x, image_tokens)
    return x


CATALOGUE += [*_qwen2_weights(), *_qwen2_encoders()]


# Subjects: correct conversions ----------------------------------------------------------------------------------------


class Subject(NamedTuple):
    """A correct conversion: `kind` is a family, `compressor` or `queries`; `others` are other sources."""

    kind: str
    source: str
    state: State
    names: Names
    others: dict[str, str]
    sizes: tuple[int, ...]

    @property
    def family(self) -> str:
        return {"compressor": "sam", "queries": "qwen2"}.get(self.kind, self.kind)


def names_of(state: State) -> Names:
    """The names of a converted checkpoint's parts."""
    if SMALL_TABLE in state:
        parts = ("self_attn.q_proj", "self_attn.o_proj", "input_layernorm", "post_attention_layernorm", "mlp.gate_proj",
                 "mlp.down_proj", SMALL_TABLE, "")  # fmt: skip
        block, width, head = "model.model.layers", state[SMALL_TABLE].shape[1], 64
    elif "pos_embed" in state:
        head = state["blocks.0.attn.rel_pos_h"].shape[1]
        parts = ("attn.qkv", "attn.proj", "norm1", "norm2", "mlp.lin1", "mlp.lin2", "pos_embed", "patch_embed.proj")
        block, width = "blocks", state["pos_embed"].shape[-1]
    else:
        parts = ("self_attn.qkv_proj", "self_attn.out_proj", "layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2",
                 "embeddings.position_embedding.weight", "embeddings.patch_embedding")  # fmt: skip
        block, width, head = "transformer.layers", len(state["pre_layrnorm.weight"]), 64
    depth = 1 + max(int(match[1]) for name in state if (match := re.match(rf"{block}\.(\d+)\.", name)))
    return Names(block, *parts, depth, width // head)


def calm(state: State, seed: int) -> State:
    """Seeded values that keep a signal's size through every block: float32's noise is then small, and eps can be seen.

    With matrices of standard deviation 1 activations grow until an eps of 1e-5 is below float32's last bit.
    """
    generator = torch.Generator().manual_seed(seed)
    result: State = {}
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            result[name] = tensor
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.dim() == 1:
            noise = 1 + 0.2 * noise if name.endswith("weight") else 0.1 * noise
        elif "pos" in name:
            noise *= 0.2
        else:
            noise /= math.prod(tensor.shape[1:]) ** 0.5
            # A small first embedding: eps matters next to its variance.
            noise *= 0.3 if "patch_embed" in name else 1
        result[name] = noise.to(tensor.dtype)
    return result


def tiny_model(kind: str, depth: int = 12) -> Any:
    """Layers of a few channels each, as many as SAM has, or fewer."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, SamVisionConfig
    from transformers.models.sam.modeling_sam import SamVisionEncoder

    if kind == "clip":
        model = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=128, intermediate_size=192, num_hidden_layers=depth, num_attention_heads=2,
                image_size=56, patch_size=14,
            )
        )  # fmt: skip
        # Names without a prefix, whatever the release of transformers.
        return getattr(model, "vision_model", model)
    encoder = SamVisionEncoder(
        SamVisionConfig(
            hidden_size=48, mlp_dim=96, num_hidden_layers=depth, num_attention_heads=3, image_size=128, patch_size=16,
            output_channels=32, window_size=3, global_attn_indexes=[*range(2, depth, 3)],
        )
    )  # fmt: skip
    return torch.nn.ModuleDict({"vision_encoder": encoder})


def tiny_subjects(folder: Path, depth: int = 12) -> dict[str, Subject]:
    """Tiny correct conversions of each kind, from sources in `folder`."""
    paths = {}
    for kind in ("sam", "clip"):
        for seed in (0, 1):
            path = folder / f"{kind}-{seed}.safetensors"
            safetensors.torch.save_file(calm(tiny_model(kind, depth).state_dict(), seed), path)
            paths[kind, seed] = path
    qwen2_source = folder / "qwen2-0.safetensors"
    safetensors.torch.save_file(calm(tiny_qwen2(), 0), qwen2_source)
    found = {
        **qwen2_subjects(qwen2_source, folder, ((128,), (832,))),
        "sam": subject("sam", paths["sam", 0], {"seed": paths["sam", 1], "family": paths["clip", 0]}, folder, (192,)),
        "clip": subject(
            "clip", paths["clip", 0], {"seed": paths["clip", 1], "family": paths["sam", 0]}, folder, (192,)
        ),
    }
    return {**found, "compressor": with_compressor(found["sam"], folder)}


def tiny_state(command: str) -> State:
    """The tensors, with any values, of a checkpoint that a command of dsocr-convert takes."""
    if command == "qwen2":
        prefix = "model.qwen2_model.model."
        return {n.removeprefix(prefix): tensor for n, tensor in tiny_qwen2().items() if n.startswith(prefix)}
    return tiny_deepseek_ocr2() if command == "encoder" else tiny_model(command).state_dict()


def tiny_qwen2() -> State:
    """Four layers inside a DeepSeek-OCR-2, with its tables of queries."""
    config = Qwen2Config(width=256, depth=4, heads=4, key_value_heads=2, mlp=96)
    with torch.device("meta"):
        state = qwen2.Qwen2Encoder(config).state_dict()
    return {f"model.qwen2_model.{name}": torch.empty(tensor.shape) for name, tensor in state.items()}


def tiny_deepseek_ocr2() -> State:
    """Both encoders of a DeepSeek-OCR-2, by its names."""
    config = SamConfig(
        image_size=128, width=48, depth=12, heads=3, mlp=96, window=3, neck=32, compressor=(64, 256)
    )  # fmt: skip
    with torch.device("meta"):
        state = sam.SamEncoder(config).state_dict()
    return {**{f"model.sam_model.{name}": torch.empty(tensor.shape) for name, tensor in state.items()}, **tiny_qwen2()}


def qwen2_subjects(source: Path, folder: Path, sizes: tuple[tuple[int, ...], tuple[int, ...]]) -> dict[str, Subject]:
    """The conversion of a Qwen2 at sizes at which query_768 is used, and at some at which query_1024 is."""
    small = subject("qwen2", source, {}, folder, sizes[0])
    return {"qwen2": small, "queries": small._replace(kind="queries", sizes=sizes[1])}


def subject(kind: str, source: Path, others: dict[str, Path], folder: Path, sizes: tuple[int, ...]) -> Subject:
    """The correct conversion of a source, for the catalogue to corrupt."""
    out = folder / f"correct-{kind}.safetensors"
    converter.convert(str(source), "sam" if kind == "compressor" else kind, out=out, force=True)
    state = safetensors.torch.load_file(out)
    return Subject(kind, str(source), state, names_of(state), {name: str(path) for name, path in others.items()}, sizes)


def with_compressor(sam: Subject, folder: Path) -> Subject:
    """The same SAM with seeded net_2 and net_3, from a source as DeepSeek-OCR has it."""
    neck = sam.state["neck.0.weight"].shape[0]
    shapes = {"net_2.weight": (2 * neck, neck, 3, 3), "net_3.weight": (4 * neck, 2 * neck, 3, 3)}
    convolutions = calm({name: torch.empty(shape) for name, shape in shapes.items()}, 5)
    path = folder / "sam-compressor.safetensors"
    tensors = {f"model.sam_model.{name}": tensor for name, tensor in {**sam.state, **convolutions}.items()}
    safetensors.torch.save_file(tensors, path)
    return subject("compressor", path, {}, folder, sam.sizes)


# Runs -----------------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """The verification of one corruption in one kind of checkpoint.

    `caught` gives for each group whether a check failed (None: none was made); for `function`, whether outputs differ
    from the source's own function. `ok`: nothing was caught. `refused` is the error of a file that cannot be opened.
    `ratio` is the largest error of the outputs relative to its tolerance: more than 1 fails.
    """

    name: str
    kind: str
    family: str
    what: str
    quiet: bool
    ok: bool
    caught: dict[str, bool | None]
    refused: str
    ratio: float | None
    tensors: dict[str, list[str]]
    changed: list[str]
    first: str
    expected: str
    seconds: float


def cases() -> list[tuple[Corruption, str]]:
    """Every corruption with every kind of checkpoint that it applies to."""
    return [(corruption, kind) for corruption in CATALOGUE for kind in corruption.families]


def run(corruption: Corruption, subject: Subject, folder: Path, **options: Any) -> tuple[Row, Verification | None]:
    """Corrupt a correct conversion and verify it."""
    state = dict(subject.state)
    if corruption.change is not None:
        corruption.change(state, subject.names)
    before = subject.state
    changed = sorted(name for name in state.keys() | before.keys() if state.get(name) is not before.get(name))
    found, refused = None, ""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        if corruption.mapping:
            options["mapping"] = wrong_mapping(corruption, subject, Path(name))
        path, source = inputs(corruption, subject, state, changed, Path(name), options.get("mapping"))
        start = time.perf_counter()
        with corruption.patch() if corruption.patch is not None else nullcontext():
            try:
                found = verify(str(path), source, sizes=subject.sizes, **options)
            except DsocrError as error:
                refused = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    seconds = round(time.perf_counter() - start, 3)
    return _row(corruption, subject, found, refused, changed, seconds), found


def inputs(
    corruption: Corruption, subject: Subject, state: State, changed: Sequence[str], folder: Path, mapping: Path | None
) -> tuple[Path, str]:
    """The converted file or folder, and the source that it is verified with."""
    path = folder / f"{corruption.name}-{subject.kind}.safetensors"
    source = subject.others.get(corruption.source, subject.source)
    if corruption.config:
        other = other_config(corruption, subject, folder / "config")
        if corruption.source != "config":
            return other, source
        source = str(other)
    if corruption.config or mapping:
        converter.convert(source, subject.family, out=path, mapping=mapping)
        return path, source
    # A library's own writer; tensors that share memory it refuses.
    tensors = {name: tensor.clone().contiguous() if name in changed else tensor for name, tensor in state.items()}
    safetensors.torch.save_file(tensors, path, {"layout": f"deepencoder-{subject.family}"})
    if corruption.damage is not None:
        corruption.damage(path)
    return path, source


def other_config(corruption: Corruption, subject: Subject, folder: Path) -> Path:
    """The source as a folder for transformers, whose config.json has the mistake."""
    assert corruption.config is not None
    converter.convert(subject.source, subject.family, to=f"{subject.family}-hf", out=folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **corruption.config(config)}))
    return folder


def wrong_mapping(corruption: Corruption, subject: Subject, folder: Path) -> Path:
    """The mapping of the source's layout with the mistake, under another name."""
    text = registry.yaml_text(f"{subject.family}-hf").replace("layout: ", "layout: mine-", 1)
    for old, new in corruption.mapping:
        assert old in text
        text = text.replace(old, new, 1)
    path = folder / f"{corruption.name}.yaml"
    path.write_text(text)
    return path


def _row(
    corruption: Corruption,
    subject: Subject,
    found: Verification | None,
    refused: str,
    changed: list[str],
    seconds: float,
) -> Row:
    checks = found.checks if found else []
    caught: dict[str, bool | None] = {}
    for group in GROUPS:
        verdicts = [check.verdict for check in checks if check.group == group]
        ran = "failed" in verdicts or "passed" in verdicts
        caught[group] = "failed" in verdicts if ran else None
    function = [check for check in checks if check.verdict == INCONCLUSIVE and check.name.startswith("source's ")]
    caught["function"] = bool(function)
    failures = [check for check in checks if check.verdict == "failed"]
    tensors = {
        group: [name for check in failures if check.group == group for name in check.tensors] for group in GROUPS
    }
    ratios = [point.error / point.tolerance for trace in (found.traces if found else []) for point in trace.points]
    ratios += [check.figures["error"] / check.figures["tolerance"] for check in function]
    return Row(
        name=corruption.name,
        kind=corruption.kind,
        family=subject.kind,
        what=corruption.what,
        quiet=corruption.quiet,
        ok=bool(found and found.ok and not function),
        caught=caught,
        refused=refused,
        ratio=max(ratios, default=None),
        tensors={group: names[:40] for group, names in tensors.items()},
        changed=changed,
        first=tensors["outputs"][0] if tensors["outputs"] else "",
        expected=corruption.tensor.format(block=subject.names.block, last=subject.names.depth - 1),
        seconds=seconds,
    )


def unnamed(row: Row, found: Verification) -> list[str]:
    """The changed tensors that no failed check names."""
    at_fault = {tensor for check in found.checks if check.verdict == "failed" for tensor in check.tensors}
    return [name for name in row.changed if not any(name in tensor for tensor in at_fault)]


def as_json(rows_: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows for a JSON file, which has no infinity."""
    return [{**row._asdict(), "ratio": _finite(row.ratio)} for row in rows_]


def _finite(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else "inf"
