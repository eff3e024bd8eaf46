"""State dicts with unusual values, dtypes, wrappers and names, or with missing tensors, in valid containers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import numpy as np
import torch

from hostile.case import Accepted, Build, Case, Refused, State, clip, sam, saved

# Exponent all ones: quiet and signalling NaNs of either sign with payloads, both infinities; then -0 and a subnormal.
ODD_BITS = {
    torch.float64: (0x7FF8000000000001, 0x7FF0000000000001, 0xFFF4DEADBEEF0001, 0x7FF0000000000000, 0xFFF0000000000000,
                    0x8000000000000000, 1),
    torch.float32: (0x7FC00001, 0x7F800001, 0xFFA0BEEF, 0x7F800000, 0xFF800000, 0x80000000, 1),
    torch.float16: (0x7E01, 0x7C01, 0xFD55, 0x7C00, 0xFC00, 0x8000, 1),
    torch.bfloat16: (0x7FC1, 0x7F81, 0xFFA5, 0x7F80, 0xFF80, 0x8000, 1),
    torch.float8_e5m2: (0x7D, 0x7E, 0xFF, 0x7C, 0xFC, 0x80, 1),
    torch.float8_e4m3fn: (0x7F, 0xFF, 0x7F, 0xFF, 0x7F, 0x80, 1),
}  # fmt: skip
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}

LIN1 = "image_encoder.blocks.1.mlp.lin1.weight"
SQUARE = "image_encoder.blocks.1.attn.proj.weight"


def odd_values(dtype: torch.dtype, state: State) -> State:
    """The state in one dtype, with unusual values in every tensor that is not empty."""
    bits = np.array(ODD_BITS[dtype], _UNSIGNED[dtype.itemsize])
    odd = torch.frombuffer(bytearray(bits.tobytes()), dtype=torch.uint8)
    made = {}
    for name, tensor in state.items():
        made[name] = tensor.to(dtype).contiguous().clone() if tensor.is_floating_point() else tensor
        flat = made[name].view(-1).view(torch.uint8)
        if tensor.is_floating_point() and len(flat) >= len(odd):
            flat[-len(odd) :] = odd
    return made


def _renamed(state: State, pattern: str, new: str) -> State:
    found = {re.sub(pattern, new, name): tensor for name, tensor in state.items()}
    assert found.keys() != state.keys()
    return found


def _file(value: Callable[[], object], *options: str) -> Build:
    """The file that torch.save writes of it."""

    def build(folder: Path) -> list[str | Path]:
        path = folder / "model.pth"
        path.write_bytes(saved(value()))
        return [path, *options]

    return build


def _typed(state: State, types: Callable[[str], torch.dtype]) -> State:
    return {name: tensor.to(types(name)) if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def _mixed(name: str) -> torch.dtype:
    """A different dtype in each block, one per block: tensors of a block are fused."""
    kinds = (torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float32)
    found = re.search(r"(?:blocks|layers)\.(\d+)", name)
    return kinds[int(found[1]) if found else -1 - len(name) % 3]


def _odd_heads() -> State:
    return {n: t[..., :-1].clone() if "rel_pos" in n else t for n, t in sam().items()}


def _zero() -> State:
    return {name: torch.zeros_like(tensor) for name, tensor in sam().items()}


def _turned() -> State:
    """A square matrix transposed, which no shape shows."""
    return {**sam(), SQUARE: sam()[SQUARE].T.contiguous()}


def _wrapped(*keys: str) -> Callable[[], object]:
    def make() -> object:
        value: object = sam()
        for key in reversed(keys):
            value = {"epoch": 3, key: value}
        return value

    return make


def _prefixed(prefix: str, share: int = 1) -> Callable[[], State]:
    """A prefix on every name, or on one in `share`."""
    return lambda: {(prefix if i % share == 0 else "") + name: t for i, (name, t) in enumerate(sam().items())}


def _without(family: Callable[[], State], pattern: str) -> Callable[[], State]:
    def make() -> State:
        state = {name: tensor for name, tensor in family().items() if not re.search(pattern, name)}
        assert len(state) < len(family())
        return state

    return make


def _with(
    family: Callable[[], State], name: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[], State]:
    return lambda: {**family(), name: change(family()[name])}


def _half_fused() -> State:
    """The first layer's q, k and v already fused."""
    state = clip()
    for param in ("weight", "bias"):
        parts = [state.pop(f"{_LAYER}.0.self_attn.{p}_proj.{param}") for p in "qkv"]
        state[f"{_LAYER}.0.self_attn.qkv_proj.{param}"] = torch.cat(parts)
    return state


_LAYER = "vision_model.encoder.layers" if any(n.startswith("vision_model.") for n in clip()) else "encoder.layers"
_FC1 = f"{_LAYER}.1.mlp.fc1.weight"
_Q = f"{_LAYER}.1.self_attn.q_proj.weight"


def _language_model() -> State:
    names = [
        f"model.layers.{i}.{n}.weight" for i in range(4) for n in ("self_attn.q_proj", "mlp.up_proj", "input_layernorm")
    ]
    return {name: torch.zeros(8, 8) for name in ["model.embed_tokens.weight", *names, "lm_head.weight"]}


def _both() -> dict[str, Any]:
    return {"sam": sam(), "clip": clip(), "step": 7}


SAM_ACCEPTED: dict[str, tuple[Build, Callable[[], State], tuple[str, ...]]] = {
    **{
        f"NaN payloads and infinities, {str(dtype).removeprefix('torch.')}": (
            _file(lambda dtype=dtype: odd_values(dtype, sam())), lambda dtype=dtype: odd_values(dtype, sam()), (),
        )
        for dtype in ODD_BITS
    },
    "all zero": (_file(_zero), _zero, ()),
    "six types": (_file(lambda: _typed(sam(), _mixed)), lambda: _typed(sam(), _mixed), ("float8_e4m3fn", "float64")),
    "wrapped": (_file(_wrapped("state_dict")), sam, ()),
    "wrapped twice": (_file(_wrapped("state_dict", "model")), sam, ()),
    "wrapped four times": (_file(_wrapped("a", "b", "c", "d")), sam, ()),
    "wrapped in a key with dots": (_file(_wrapped("a.b", "c")), sam, ()),
    "module.": (_file(_prefixed("module.")), sam, ()),
    "module. twice": (_file(_prefixed("module.module.")), sam, ()),
    "module. on every second name": (_file(_prefixed("module.", 2)), sam, ()),
    "_orig_mod. on every third name": (_file(_prefixed("_orig_mod.", 3)), sam, ()),
    "a prefix of one's own": (_file(_prefixed("net.vision.")), sam, ("prefix net.vision.",)),
    "a wrapper and a prefix": (_file(lambda: {"model": _prefixed("module.")()}), sam, ()),
    "an optimizer's tensors in between": (
        _file(lambda: {**sam(), "exp_avg": torch.zeros(3)}), sam, ("dropped exp_avg",)
    ),
    "a name that steers the terminal": (
        _file(lambda: {**sam(), "\x1b[2J\u202e\nerror: all is well": torch.zeros(3)}),
        sam, ("dropped \\x1b[2J\\u202e\\x0aerror: all is well",),
    ),
    "both families in one dict": (_file(lambda: {**sam(), **clip()}), sam, ("dropped embeddings.class_embedding",)),
    "an odd size of heads": (
        _file(_odd_heads), _odd_heads,
        ("not the DeepEncoder's size", "head 11 (not 64)"),
    ),
    "a transposed square matrix": (_file(_turned), _turned, ()),
    "SAM of two families": (_file(_both), sam, ()),
}  # fmt: skip

CLIP_ACCEPTED: dict[str, tuple[Build, Callable[[], State], tuple[str, ...]]] = {
    "NaN payloads, CLIP": (
        _file(lambda: odd_values(torch.bfloat16, clip())), lambda: odd_values(torch.bfloat16, clip()), ()
    ),
    "six types, CLIP": (_file(lambda: _typed(clip(), _mixed)), lambda: _typed(clip(), _mixed), ("float8_e4m3fn",)),
    "CLIP of two families": (_file(_both), clip, ()),
}  # fmt: skip

SAM_REFUSED: dict[str, tuple[Build, tuple[str, ...]]] = {
    "prefix on every second name": (_file(_prefixed("model.", 2)), ("matches nothing", "image_encoder.pos_embed")),
    "wrapped nine times": (_file(_wrapped(*"abcdefghi")), ("model.pth", "contains no named tensors")),
    "the same twice without the wrapper": (
        _file(lambda: {**sam(), **_prefixed("module.")()}),
        ("'module.image_encoder.", "are both 'image_encoder.", "without their wrappers"),
    ),
    "two state dicts that fit": (
        _file(lambda: {"model": sam(), "ema": sam()}), ("2 state dicts that fit: model", "--state-dict model")
    ),
    "CLIP given as SAM": (_file(clip), ("is a CLIP checkpoint, not SAM", "dsocr-convert clip")),
    "a language model": (_file(_language_model), ("is a language model", "the vision encoder")),
    "empty": (_file(dict), ("model.pth: contains no named tensors",)),
    "no tensors": (_file(lambda: {"epoch": 3, "state_dict": {}}), ("model.pth: contains no named tensors",)),
    "a list of tensors": (_file(lambda: list(sam().values())), ("model.pth",)),
    "one tensor": (_file(lambda: torch.zeros(3)), ("model.pth",)),
    "numbered names": (_file(lambda: dict(enumerate(sam().values()))), ("model.pth: contains no named tensors",)),
    "a transposed matrix": (
        _file(_with(sam, LIN1, lambda t: t.T.contiguous())),
        ("'blocks.1.mlp.lin1.weight'", "has shape [24, 40]; expected [mlp, width]", "mlp = 40"),
    ),
    "a matrix flattened": (
        _file(_with(sam, LIN1, torch.Tensor.flatten)), ("'blocks.1.mlp.lin1.weight'", "has shape [960]")
    ),
    "one tensor lacking": (
        _file(_without(sam, "blocks.2.norm1.bias")), ("missing tensor 'blocks.2.norm1.bias'", "mapping show sam-meta")
    ),
    "one block lacking": (_file(_without(sam, r"blocks\.1\.")), ("missing tensor 'blocks.1.norm1.weight'", "more")),
    "the first block lacking": (_file(_without(sam, r"blocks\.0\.")), ("no SAM layout fits", "nearest is sam-meta")),
    "the neck lacking": (_file(_without(sam, "neck")), ("no SAM layout fits", "image_encoder.", "no tensor for neck")),
    "a tensor too much": (
        _file(lambda: {**sam(), "image_encoder.head.weight": torch.zeros(3)}),
        ("no rule claims 'image_encoder.head.weight'",),
    ),
    "a name of a megabyte": (_file(lambda: {**sam(), "x" * (1 << 20): torch.zeros(3)}), ("a name of 1048576 char",)),
    "blocks from 1": (
        _file(lambda: _renamed(sam(), r"blocks\.(\d)", "blocks.1\\1")), ("no SAM layout fits", "nearest is sam-meta")
    ),
    "a block's number left out": (
        _file(lambda: _renamed(sam(), r"blocks\.2", "blocks.3")), ("missing tensor 'blocks.2.norm1.weight'",)
    ),
    "leading zeros": (
        _file(lambda: _renamed(sam(), r"blocks\.1", "blocks.01")),
        ("deepencoder-sam has no tensor 'blocks.01.",),
    ),
    "a negative block": (
        _file(lambda: _renamed(sam(), r"blocks\.2", "blocks.-1")), ("deepencoder-sam has no tensor 'blocks.-1.",)
    ),
    "a block of a million": (
        _file(lambda: {**sam(), "image_encoder.blocks.999999.norm1.weight": torch.zeros(24)}), ("layer index 999999",)
    ),
    "a block of 5,000 digits": (
        _file(lambda: {**sam(), f"image_encoder.blocks.{'9' * 5000}.norm1.weight": torch.zeros(24)}),
        ("no rule claims 'image_encoder.blocks.9999",),
    ),
    "a block in superscript": (
        _file(lambda: {**sam(), "image_encoder.blocks.\u00b2.norm1.weight": torch.zeros(24)}),
        ("deepencoder-sam has no tensor 'blocks.\u00b2.",),
    ),
    "integers for weights": (
        _file(_with(sam, LIN1, lambda t: t.to(torch.int8))),
        ("quantised weights (int8)", LIN1),
    ),
    "truth for weights": (
        _file(_with(sam, LIN1, lambda t: t > 0)), (f"(from '{LIN1}') is bool; expected a floating-point type",)
    ),
    "one block of another width": (
        _file(_with(sam, "image_encoder.blocks.2.norm1.weight", lambda t: t[:-1].clone())),
        ("'image_encoder.blocks.2.norm1.weight'", "has shape [23]; expected [width], where width = 24"),
    ),
    "one block of another size of heads": (
        _file(_with(sam, "image_encoder.blocks.2.attn.rel_pos_h", lambda t: t[:, :-1].clone())),
        ("'image_encoder.blocks.2.attn.rel_pos_h'", "expected [_, head], where head = 12"),
    ),
}  # fmt: skip

CLIP_REFUSED: dict[str, tuple[Build, tuple[str, ...]]] = {
    "SAM given as CLIP": (_file(sam), ("is a SAM checkpoint, not CLIP", "dsocr-convert sam")),
    "a language model given as CLIP": (_file(_language_model), ("is a language model without a vision encoder",)),
    "half converted": (_file(_half_fused), ("no CLIP layout fits", "qkv_proj")),
    "q without k and v": (
        _file(_without(clip, r"layers\.1\.self_attn\.[kv]_proj")),
        (f"'{_LAYER}.1.self_attn.k_proj.weight'", f"is missing next to '{_Q}'"),
    ),
    "q of another type": (
        _file(_with(clip, _Q, lambda t: t.half())), (f"'{_Q}'", "cannot fuse float16 with float32")
    ),
    "q of another shape": (
        _file(_with(clip, _Q, lambda t: t[:, :-1].clone())), (f"'{_Q}'", "cannot fuse shapes [64, 63] and [64, 64]")
    ),
    "a transposed matrix, CLIP": (
        _file(_with(clip, _FC1, lambda t: t.T.contiguous())),
        (f"(from '{_FC1}')", "has shape [64, 256]; expected [mlp, width]"),
    ),
}  # fmt: skip


def _text_layer(index: str) -> Callable[[], State]:
    """A full CLIP with a tensor of another layer in its text tower."""
    return lambda: {
        **models.clip_hf().state_dict(),
        f"text_model.encoder.layers.{index}.layer_norm1.weight": torch.zeros(32),
    }


def _superscript() -> State:
    return {**sam(), "mask_decoder.transformer.layers.\u00b2.norm1.weight": torch.zeros(24)}


OTHERS = [
    Case(
        "content: a text layer of a million, on to another layout",
        _file(_text_layer("999999")),
        Refused(("lacks tensors of clip-hf", "text_model.encoder.layers.2.")),
        ("clip", "--to", "clip-hf", "--full-model"),
    ),
    Case(
        "content: a decoder layer in superscript, on to another layout",
        _file(_superscript),
        Accepted(
            _superscript, ("dropped mask_decoder.transformer.layers.\u00b2.norm1.weight: sam-hf has no such tensor",)
        ),
        ("sam", "--to", "sam-hf", "--full-model"),
    ),
    Case(
        "content: positions of no square, resampled",
        _file(
            _with(clip, next(n for n in clip() if n.endswith("position_embedding.weight")), lambda t: t[:-1].clone())
        ),
        Refused(("embeddings.position_embedding.weight", "not a class token and a square grid")),
        ("clip", "--image-size", "112"),
    ),
    Case(
        "content: --state-dict of nothing",
        _file(_both, "--state-dict", "ema"),
        Refused(("no such state dict", "sam (", "clip ("), code=2),
    ),
]

CASES = [
    *(Case(f"content: {n}", build, Accepted(like, words)) for n, (build, like, words) in SAM_ACCEPTED.items()),
    *(
        Case(f"content: {n}", build, Accepted(like, words), ("clip",))
        for n, (build, like, words) in CLIP_ACCEPTED.items()
    ),
    *(Case(f"content: {n}", build, Refused(words)) for n, (build, words) in SAM_REFUSED.items()),
    *(Case(f"content: {n}", build, Refused(words), ("clip",)) for n, (build, words) in CLIP_REFUSED.items()),
    *OTHERS,
]
