#!/usr/bin/env python3
"""Writes checkpoints of true layout and size with seeded random weights, from names and shapes alone.

It stands in for downloads: no model library, no network. The same key always holds the same values, whatever the
container. Files that exist are kept.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import math
import re
import struct
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

# The project runs without NumPy; torch complains about that once.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

import torch  # noqa: E402

Shape = tuple[int, ...]
Inventory = dict[str, tuple[str, Shape]]  # key -> torch's name of the dtype, shape

DTYPES = {
    "float32": (torch.float32, "F32", 4),
    "bfloat16": (torch.bfloat16, "BF16", 2),
    "int64": (torch.int64, "I64", 8),
}


# Layouts ----------------------------------------------------------------------------------------------------------


def _linear(name: str, *shape: int) -> dict[str, Shape]:
    """A linear or convolution layer: its bias has one element an output, which the weight names first."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def _norm(name: str, width: int) -> dict[str, Shape]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _sam_image_encoder(depth: int, width: int, heads: int) -> dict[str, Shape]:
    """SAM's encoder at 1024 px: 64x64 patches, attention in 14x14 windows but for every fourth part's last block."""
    shapes: dict[str, Shape] = {"pos_embed": (1, 64, 64, width)}
    shapes |= _linear("patch_embed.proj", width, 3, 16, 16)
    for i in range(depth):
        block = f"blocks.{i}"
        window = 64 if (i + 1) % (depth // 4) == 0 else 14
        shapes |= _norm(f"{block}.norm1", width) | _norm(f"{block}.norm2", width)
        shapes |= {f"{block}.attn.rel_pos_{axis}": (2 * window - 1, width // heads) for axis in "hw"}
        shapes |= _linear(f"{block}.attn.qkv", 3 * width, width) | _linear(f"{block}.attn.proj", width, width)
        shapes |= _linear(f"{block}.mlp.lin1", 4 * width, width) | _linear(f"{block}.mlp.lin2", width, 4 * width)
    shapes |= {"neck.0.weight": (256, width, 1, 1), "neck.2.weight": (256, 256, 3, 3)}
    return shapes | _norm("neck.1", 256) | _norm("neck.3", 256)


def _sam_prompt_encoder() -> dict[str, Shape]:
    shapes: dict[str, Shape] = {"pe_layer.positional_encoding_gaussian_matrix": (2, 128)}
    for name in [*(f"point_embeddings.{i}" for i in range(4)), "not_a_point_embed", "no_mask_embed"]:
        shapes[f"{name}.weight"] = (1, 256)
    shapes |= _linear("mask_downscaling.0", 4, 1, 2, 2) | _norm("mask_downscaling.1", 4)
    shapes |= _linear("mask_downscaling.3", 16, 4, 2, 2) | _norm("mask_downscaling.4", 16)
    return shapes | _linear("mask_downscaling.6", 256, 16, 1, 1)


def _attention(name: str, width: int) -> dict[str, Shape]:
    """Attention over 256 channels, `width` of them inside."""
    shapes: dict[str, Shape] = {}
    for proj in "qkv":
        shapes |= _linear(f"{name}.{proj}_proj", width, 256)
    return shapes | _linear(f"{name}.out_proj", 256, width)


def _sam_mask_decoder() -> dict[str, Shape]:
    shapes: dict[str, Shape] = {"iou_token.weight": (1, 256), "mask_tokens.weight": (4, 256)}
    for i in range(2):
        layer = f"transformer.layers.{i}"
        shapes |= _attention(f"{layer}.self_attn", 256)
        shapes |= _attention(f"{layer}.cross_attn_token_to_image", 128)
        shapes |= _attention(f"{layer}.cross_attn_image_to_token", 128)
        shapes |= _linear(f"{layer}.mlp.lin1", 2048, 256) | _linear(f"{layer}.mlp.lin2", 256, 2048)
        for k in range(1, 5):
            shapes |= _norm(f"{layer}.norm{k}", 256)
    shapes |= _attention("transformer.final_attn_token_to_image", 128) | _norm("transformer.norm_final_attn", 256)
    # Transposed convolutions: their weights name the inputs first.
    shapes |= {"output_upscaling.0.weight": (256, 64, 2, 2), "output_upscaling.0.bias": (64,)}
    shapes |= {"output_upscaling.3.weight": (64, 32, 2, 2), "output_upscaling.3.bias": (32,)}
    shapes |= _norm("output_upscaling.1", 64)
    heads = {f"output_hypernetworks_mlps.{i}": 32 for i in range(4)} | {"iou_prediction_head": 4}
    for name, out in heads.items():
        for i, size in enumerate((256, 256, out)):
            shapes |= _linear(f"{name}.layers.{i}", size, 256)
    return shapes


def _sam_meta(depth: int, width: int, heads: int) -> dict[str, Shape]:
    parts = {
        "image_encoder": _sam_image_encoder(depth, width, heads),
        "prompt_encoder": _sam_prompt_encoder(),
        "mask_decoder": _sam_mask_decoder(),
    }
    return {f"{part}.{key}": shape for part, shapes in parts.items() for key, shape in shapes.items()}


# Hugging Face's names for Meta's, one after another.
SAM_HF_NAMES = [
    (r"^image_encoder\.blocks\.", "vision_encoder.layers."),
    (r"^image_encoder\.", "vision_encoder."),
    (r"\.patch_embed\.proj\.", ".patch_embed.projection."),
    (r"\.neck\.0\.", ".neck.conv1."),
    (r"\.neck\.1\.", ".neck.layer_norm1."),
    (r"\.neck\.2\.", ".neck.conv2."),
    (r"\.neck\.3\.", ".neck.layer_norm2."),
    (r"\.norm(\d|_final_attn)\.", r".layer_norm\1."),
    (r"\.mask_downscaling\.0\.", ".mask_embed.conv1."),
    (r"\.mask_downscaling\.1\.", ".mask_embed.layer_norm1."),
    (r"\.mask_downscaling\.3\.", ".mask_embed.conv2."),
    (r"\.mask_downscaling\.4\.", ".mask_embed.layer_norm2."),
    (r"\.mask_downscaling\.6\.", ".mask_embed.conv3."),
    (r"\.point_embeddings\.", ".point_embed."),
    (r"\.output_upscaling\.0\.", ".upscale_conv1."),
    (r"\.output_upscaling\.1\.", ".upscale_layer_norm."),
    (r"\.output_upscaling\.3\.", ".upscale_conv2."),
    (r"(_mlps\.\d|_head)\.layers\.0\.", r"\1.proj_in."),
    (r"(_mlps\.\d|_head)\.layers\.2\.", r"\1.proj_out."),
    (r"(_mlps\.\d|_head)\.layers\.1\.", r"\1.layers.0."),
    (r"^prompt_encoder\.pe_layer\..*", "shared_image_embedding.positional_embedding"),
]
# One tensor under two names, as torch.save keeps it and safetensors does not.
TIED = {"prompt_encoder.shared_embedding.positional_embedding": "shared_image_embedding.positional_embedding"}


def _sam_hf(depth: int, width: int, heads: int) -> dict[str, Shape]:
    shapes = {}
    for key, shape in _sam_meta(depth, width, heads).items():
        for pattern, name in SAM_HF_NAMES:
            key = re.sub(pattern, name, key)
        shapes[key] = shape
    return shapes


def _sam_hf_bin(depth: int, width: int, heads: int) -> dict[str, Shape]:
    shapes = _sam_hf(depth, width, heads)
    return shapes | {alias: shapes[key] for alias, key in TIED.items()}


def _clip_tower(name: str, depth: int, width: int, positions: int) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {
        "embeddings.position_ids": (1, positions),
        "embeddings.position_embedding.weight": (positions, width),
    }
    for i in range(depth):
        layer = f"encoder.layers.{i}"
        for proj in ("k_proj", "v_proj", "q_proj", "out_proj"):
            shapes |= _linear(f"{layer}.self_attn.{proj}", width, width)
        shapes |= _norm(f"{layer}.layer_norm1", width) | _norm(f"{layer}.layer_norm2", width)
        shapes |= _linear(f"{layer}.mlp.fc1", 4 * width, width) | _linear(f"{layer}.mlp.fc2", width, 4 * width)
    return {f"{name}.{key}": shape for key, shape in shapes.items()}


def _clip_hf(depth: int, width: int, patch: int) -> dict[str, Shape]:
    """A CLIP of 224 px; the text tower is that of ViT-L."""
    text, vocabulary = 768, 49408
    return {
        "logit_scale": (),
        "text_model.embeddings.token_embedding.weight": (vocabulary, text),
        **_clip_tower("text_model", 12, text, 77),
        **_norm("text_model.final_layer_norm", text),
        "vision_model.embeddings.class_embedding": (width,),
        "vision_model.embeddings.patch_embedding.weight": (width, 3, patch, patch),
        **_norm("vision_model.pre_layrnorm", width),  # spelled so in every checkpoint
        **_clip_tower("vision_model", depth, width, (224 // patch) ** 2 + 1),
        **_norm("vision_model.post_layernorm", width),
        "visual_projection.weight": (text, width),
        "text_projection.weight": (text, text),
    }


def _qwen2_layers(depth: int, width: int, mlp: int) -> dict[str, Shape]:
    """Layers with heads of 64 channels, of which two are of keys and values."""
    shapes: dict[str, Shape] = {"norm.weight": (width,)}
    for i in range(depth):
        attention, layer = f"layers.{i}.self_attn", f"layers.{i}"
        shapes |= _linear(f"{attention}.q_proj", width, width)
        shapes |= _linear(f"{attention}.k_proj", 128, width) | _linear(f"{attention}.v_proj", 128, width)
        shapes[f"{attention}.o_proj.weight"] = (width, width)
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (mlp, width) for name in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (width, mlp)
        shapes |= {f"{layer}.{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    return shapes


def _qwen2(depth: int, width: int, mlp: int) -> dict[str, Shape]:
    """Its embeddings are tied: there is no lm_head."""
    layers = {f"model.{name}": shape for name, shape in _qwen2_layers(depth, width, mlp).items()}
    return {"model.embed_tokens.weight": (151936, width), **layers}


def _deepseek_ocr2(depth: int, width: int, mlp: int) -> dict[str, Shape]:
    """The encoders, the compressor, the queries and the projector of DeepSeek-OCR-2, without its language model."""
    sam = {**_sam_image_encoder(12, 768, 12), "net_2.weight": (512, 256, 3, 3), "net_3.weight": (width, 512, 3, 3)}
    qwen2 = {f"model.model.{name}": shape for name, shape in _qwen2_layers(depth, width, mlp).items()}
    qwen2 |= {"query_768.weight": (144, width), "query_1024.weight": (256, width)}
    parts = {"sam_model": sam, "qwen2_model": qwen2, "projector": _linear("layers", 1280, width)}
    shapes = {f"model.{part}.{name}": shape for part, tensors in parts.items() for name, shape in tensors.items()}
    return {**shapes, "model.view_seperator": (1280,)}


# layout -> what makes its shapes of (depth, width, heads, patch or MLP), and the sizes it comes in
SAM_SIZES = {"vit-b": (12, 768, 12), "vit-l": (24, 1024, 16), "vit-h": (32, 1280, 16)}
CLIP_SIZES = {"vit-l-14": (24, 1024, 14)}
QWEN2_SIZES = {"0.5b": (24, 896, 4864)}
LAYOUTS: dict[str, tuple[Callable[[int, int, int], dict[str, Shape]], dict[str, tuple[int, int, int]]]] = {
    "sam-meta": (_sam_meta, SAM_SIZES),
    "sam-hf-safetensors": (_sam_hf, SAM_SIZES),
    "sam-hf-bin": (_sam_hf_bin, SAM_SIZES),
    "clip-hf": (_clip_hf, CLIP_SIZES),
    "qwen2-hf": (_qwen2, QWEN2_SIZES),
    "deepseek-ocr-2": (_deepseek_ocr2, QWEN2_SIZES),
}


def inventory(layout: str, size: str) -> Inventory:
    """Every key of a layout at one size, with dtype and shape; a layer's keys are adjacent."""
    shapes, sizes = LAYOUTS[layout]
    dtype = "bfloat16" if sizes is QWEN2_SIZES else "float32"
    return {
        key: ("int64" if key.endswith("position_ids") else dtype, shape) for key, shape in shapes(*sizes[size]).items()
    }


# Weights ----------------------------------------------------------------------------------------------------------


def make_tensor(key: str, dtype: str, shape: Shape) -> torch.Tensor:
    """The tensor of that name: counting integers, layer-norm weights around 1, all else around 0."""
    if dtype == "int64":
        return torch.arange(math.prod(shape)).reshape(shape)
    seed = int.from_bytes(hashlib.sha256(TIED.get(key, key).encode()).digest()[:8], "big") >> 1
    is_norm = len(shape) == 1 and key.endswith(".weight")
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(shape, dtype=DTYPES[dtype][0]).normal_(float(is_norm), 0.02, generator=generator)


# Containers -------------------------------------------------------------------------------------------------------


def write_torch(path: Path, tensors: Inventory) -> None:
    """The zip that torch.save makes; all of it is in memory meanwhile."""
    state = OrderedDict((key, make_tensor(key, *tensors[key])) for key in tensors if key not in TIED)
    state.update((alias, state[TIED[alias]]) for alias in tensors if alias in TIED)
    with _partial(path).open("wb") as file:
        torch.save(state, file)
    _partial(path).rename(path)


def write_safetensors(path: Path, tensors: Inventory) -> None:
    """One safetensors file, laid out as the library does: widest dtype first, then by name. One tensor in memory.

    Not by the library itself, which needs NumPy: the project runs without either.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    order = sorted(tensors, key=lambda key: (-DTYPES[tensors[key][0]][2], key))
    end = 0
    for key in order:
        dtype, shape = tensors[key]
        start, end = end, end + _nbytes(dtype, shape)
        header[key] = {"dtype": DTYPES[dtype][1], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with _partial(path).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key in order:
            tensor = make_tensor(key, *tensors[key])
            file.write((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))
    _partial(path).rename(path)


def write_sharded(path: Path, tensors: Inventory) -> None:
    """`path` is the index; the shards next to it are written in the keys' order, as transformers does."""
    total = sum(_nbytes(*spec) for spec in tensors.values())
    limit, generated = 700_000_000, 0
    shards: list[Inventory] = [{}]
    for key, spec in tensors.items():
        if generated + _nbytes(*spec) > limit:
            shards.append({})
            generated = 0
        shards[-1][key] = spec
        generated += _nbytes(*spec)
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(path.with_name(name), shard)
    where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    # Last: an index means that the shards are complete.
    path.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2) + "\n")


def _nbytes(dtype: str, shape: Shape) -> int:
    return math.prod(shape) * DTYPES[dtype][2]


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".part")


# Command ----------------------------------------------------------------------------------------------------------


class Target(NamedTuple):
    """One checkpoint that this script can write."""

    layout: str
    size: str
    path: str
    write: Callable[[Path, Inventory], None]


TARGETS = {
    "sam-b": Target("sam-meta", "vit-b", "sam_vit_b_01ec64.pth", write_torch),
    "sam-l": Target("sam-meta", "vit-l", "sam_vit_l_0b3195.pth", write_torch),
    "sam-h": Target("sam-meta", "vit-h", "sam_vit_h_4b8939.pth", write_torch),
    "sam-hf-bin": Target("sam-hf-bin", "vit-b", "sam-vit-base/pytorch_model.bin", write_torch),
    "sam-hf-safetensors": Target("sam-hf-safetensors", "vit-b", "sam-vit-base/model.safetensors", write_safetensors),
    "clip-bin": Target("clip-hf", "vit-l-14", "clip-vit-large-patch14/pytorch_model.bin", write_torch),
    "clip-safetensors": Target("clip-hf", "vit-l-14", "clip-vit-large-patch14/model.safetensors", write_safetensors),
    "clip-sharded": Target(
        "clip-hf", "vit-l-14", "clip-vit-large-patch14-sharded/model.safetensors.index.json", write_sharded
    ),
    "qwen2": Target("qwen2-hf", "0.5b", "Qwen2-0.5B/model.safetensors", write_safetensors),
    "deepseek-ocr-2": Target("deepseek-ocr-2", "0.5b", "DeepSeek-OCR-2/model.safetensors", write_safetensors),
}
QUICKSTART = ["sam-b", "clip-bin", "clip-sharded"]


def make(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    """Write the named targets into `folder`, each unless it is there; returns their paths."""
    paths = {}
    for name in names:
        target = TARGETS[name]
        path = paths[name] = folder / target.path
        if path.exists():
            print(f"  kept   {path}", flush=True)
            continue
        start = time.perf_counter()
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = inventory(target.layout, target.size)
        target.write(path, tensors)
        size = sum(_nbytes(*spec) for spec in tensors.values()) / 1e6
        seconds = time.perf_counter() - start
        print(f"  wrote  {path}  {len(tensors)} tensors, {size:,.0f} MB, {seconds:.0f} s", flush=True)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="OUT_DIR")
    parser.add_argument("--only", default=",".join(QUICKSTART), metavar="NAMES", help="default %(default)s")
    parser.epilog = f"Names: {', '.join(TARGETS)}"
    args = parser.parse_args()
    names = [name for name in args.only.split(",") if name]
    if unknown := [name for name in names if name not in TARGETS]:
        parser.error(f"no such checkpoint: {', '.join(unknown)}; there are {', '.join(TARGETS)}")
    make(args.folder, names)


if __name__ == "__main__":
    main()
