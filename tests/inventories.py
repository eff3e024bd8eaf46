"""Names, element types and shapes of real checkpoints, and files that have them but hold no weights.

`data/inventories.json.gz` is one JSON document, keys sorted: checkpoint -> family, origin (where names and shapes were
read), note, and tensors as name -> [type, shape].
"""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import struct
from functools import cache
from pathlib import Path

import torch

from converter.tensors.dtypes import BY_NAME

# Name -> element type and shape.
Inventory = dict[str, tuple[str, tuple[int, ...]]]


def owlvit_name(name: str) -> str:
    """Return transformers' name for a tensor of OWL-ViT by its name in CLIP."""
    return name.replace("pre_layrnorm", "pre_layernorm")


def mmpretrain_name(name: str) -> str:
    """Return the name of a tensor in mmpretrain's ViTSAM, by its name in segment-anything or timm."""
    for pattern, replacement in (
        (r"^blocks\.", "layers."),
        (r"\.norm([12])\.", r".ln\1."),
        (r"mlp\.(lin|fc)1", "ffn.layers.0.0"),
        (r"mlp\.(lin|fc)2", "ffn.layers.1"),
        (r"^patch_embed\.proj\.", "patch_embed.projection."),
        (r"^neck\.", "channel_reduction."),
    ):
        name = re.sub(pattern, replacement, name)
    return name


def mlx_name(name: str) -> str:
    """Return mlx-vlm's name for a tensor of DeepSeek-OCR, DeepSeek-OCR-2 or GOT-OCR2; transformers' names stay."""
    for pattern, replacement in (
        (r"^model\.vision_tower_high\.neck\.(0|2)\.", lambda found: f"vision_tower.conv{int(found[1]) // 2 + 1}."),
        (r"^model\.vision_tower_high\.neck\.(1|3)\.", lambda found: f"vision_tower.norm{int(found[1]) // 2 + 1}."),
        (r"^model\.vision_tower_high\.", "vision_tower."),
        (r"^model\.qwen2_model\.query_(\w+)\.weight$", r"vision_model.qwen2_encoder.query_\1"),
        (r"^model\.qwen2_model\.model\.model\.", "vision_model.qwen2_encoder."),
        (r"^model\.view_seperator$", "view_separator"),
        (r"^model\.(sam_model|vision_model|projector|image_newline)", r"\1"),
        (r"^(model\.(layers|embed_tokens|norm)\.|lm_head\.)", r"language_model.\1"),
    ):
        name = re.sub(pattern, replacement, name)
    return name


def is_convolution(name: str, shape: tuple[int, ...]) -> bool:
    """Whether MLX stores a tensor with its channels last."""
    return len(shape) == 4 and name.endswith("weight")


def mlx_entry(name: str, value: tuple[str, tuple[int, ...]]) -> tuple[str, tuple[int, ...]]:
    dtype, shape = value
    return dtype, tuple(shape[dim] for dim in (0, 2, 3, 1)) if is_convolution(name, shape) else shape


def mmproj_name(name: str) -> str:
    """Return llama.cpp's name for a tensor of DeepSeek-OCR or DeepSeek-OCR-2; empty for the language model."""
    for pattern, replacement in (
        (r"^model\.sam_model\.pos_embed$", "v.sam.pos_embd.weight"),
        (r"^model\.sam_model\.patch_embed\.proj\.", "v.sam.patch_embd."),
        (r"^model\.sam_model\.blocks\.", "v.sam.blk."),
        (r"^model\.sam_model\.", "v.sam."),
        (r"^(v\.sam\.blk\.\d+\.)norm1\.", r"\1pre_ln."),
        (r"^(v\.sam\.blk\.\d+\.)norm2\.", r"\1post_ln."),
        (r"^(v\.sam\.blk\.\d+\.attn\.)rel_(pos_[hw])$", r"\1\2.weight"),
        (r"^(v\.sam\.blk\.\d+\.attn\.)proj\.", r"\1out."),
        (r"^model\.vision_model\.embeddings\.(class|patch|position)_embedding", r"v.\1_embd"),
        (r"^model\.vision_model\.pre_layrnorm\.", "v.pre_ln."),
        (r"^model\.vision_model\.transformer\.layers\.", "v.blk."),
        (r"^model\.qwen2_model\.model\.model\.layers\.", "v.blk."),
        (r"^model\.qwen2_model\.model\.model\.norm\.", "v.post_ln."),
        (r"^model\.qwen2_model\.query_", "v.resample_query_"),
        (r"^(v\.blk\.\d+\.)(layer_norm1|input_layernorm)\.", r"\1ln1."),
        (r"^(v\.blk\.\d+\.)(layer_norm2|post_attention_layernorm)\.", r"\1ln2."),
        (r"^(v\.blk\.\d+\.)self_attn\.(qkv|q|k|v)_proj\.", r"\1attn_\2."),
        (r"^(v\.blk\.\d+\.)self_attn\.(out|o)_proj\.", r"\1attn_out."),
        (r"^(v\.blk\.\d+\.)mlp\.(fc1|up_proj)\.", r"\1ffn_up."),
        (r"^(v\.blk\.\d+\.)mlp\.(fc2|down_proj)\.", r"\1ffn_down."),
        (r"^(v\.blk\.\d+\.)mlp\.gate_proj\.", r"\1ffn_gate."),
        (r"^model\.projector\.layers\.", "mm.model.fc."),
        (r"^model\.(image_newline|view_seperator)$", r"v.\1"),
    ):
        name = re.sub(pattern, replacement, name)
    return "" if name.startswith(("model.", "lm_head.")) else name


def mmproj_entry(name: str, value: tuple[str, tuple[int, ...]]) -> tuple[str, tuple[int, ...]]:
    dtype, shape = value
    return dtype, (1, *shape) if name.endswith("view_seperator") else shape


@cache
def inventories() -> dict[str, Inventory]:
    """Every inventory by its checkpoint's name, and those that differ from another by a prefix alone."""
    text = gzip.decompress((Path(__file__).parent / "data" / "inventories.json.gz").read_bytes())
    found = {
        name: {key: (dtype, tuple(shape)) for key, (dtype, shape) in entry["tensors"].items()}
        for name, entry in json.loads(text).items()
    }
    language = {"lm_head.weight": ("bfloat16", (8, 4)), "model.layers.0.mlp.up_proj.weight": ("bfloat16", (4, 4))}
    sam = {f"model.vision_tower_high.{key}": value for key, value in found["deepencoder-sam"].items()}
    found["got-ocr2"] = {**sam, **language}
    # OpenAI's own file is open_clip's plus three numbers.
    scalars = ("input_resolution", "context_length", "vocab_size")
    found["clip-openai"] = {**found["clip-open_clip"], **dict.fromkeys(scalars, ("int64", ()))}
    # DeepSeek-OCR-2 has the language model of the first version.
    first = ("model.vision_model.", "model.image_newline")
    second = {key: value for key, value in found["deepseek-ocr"].items() if not key.startswith(first)}
    found["deepseek-ocr-2"] = {**second, **found["deepseek-ocr-2-vision"]}
    qwen2 = "model.qwen2_model."
    found["deepencoder-qwen2"] = {
        key.removeprefix(qwen2): ("float32", shape)
        for key, (_, shape) in found["deepseek-ocr-2-vision"].items()
        if key.startswith(qwen2)
    }
    # SGLang's names have one `model.` less.
    found["deepseek-ocr-2-sglang"] = {
        key.removeprefix("model.").replace("qwen2_model.model.model.", "qwen2_model.model."): value
        for key, value in found["deepseek-ocr-2-vision"].items()
    }
    # The names of these libraries for the same sizes.
    found["owlvit"] = {f"owlvit.{owlvit_name(key)}": value for key, value in found["clip-hf-current"].items()}
    found["mmpretrain"] = {f"backbone.{mmpretrain_name(key)}": value for key, value in found["sam-timm"].items()}
    # As MLX stores them.
    for name in ("deepseek-ocr", "deepseek-ocr-2", "got-ocr2", "sam-hf-safetensors", "clip-hf-current"):
        found[f"{name}-mlx"] = {mlx_name(key): mlx_entry(key, value) for key, value in found[name].items()}
    # As llama.cpp names them, without the language model.
    for name in ("deepseek-ocr", "deepseek-ocr-2"):
        found[f"{name}-mmproj"] = {
            mmproj_name(key): mmproj_entry(key, value) for key, value in found[name].items() if mmproj_name(key)
        }
    return found


def sparse(path: Path, inventory: Inventory) -> Path:
    """A safetensors file of these tensors, whose data is one hole in the file."""
    header: dict[str, object] = {}
    end = 0
    for name, (dtype, shape) in inventory.items():
        begin, end = end, end + math.prod(shape) * BY_NAME[dtype].itemsize
        header[name] = {"dtype": BY_NAME[dtype].code, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + end)
    return path


def random_state(inventory: Inventory) -> dict[str, torch.Tensor]:
    """Tensors of an inventory with random values, in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.bfloat16) for name, (_, shape) in inventory.items()
    }
