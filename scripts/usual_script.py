#!/usr/bin/env python3
"""The script that everybody writes today, for scripts/bench.py to measure and for tests to compare bytes with.

usual_script.py sam|clip SOURCE OUT
"""

from __future__ import annotations

import sys

import torch
from safetensors.torch import load_file, save_file


def load(path: str) -> dict[str, torch.Tensor]:
    if path.endswith(".safetensors"):
        return load_file(path)
    state: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def sam(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    prefix = "image_encoder."
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def clip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    prefix = "vision_model."
    vision = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    result = {
        key.replace("encoder.layers.", "transformer.layers."): value
        for key, value in vision.items()
        if not key.startswith("post_layernorm.") and not any(f".{p}_proj." in key for p in "qkv")
    }
    depth = 1 + max(int(key.split(".")[2]) for key in vision if key.startswith("encoder.layers."))
    for i in range(depth):
        for param in ("weight", "bias"):
            parts = [vision[f"encoder.layers.{i}.self_attn.{p}_proj.{param}"] for p in "qkv"]
            result[f"transformer.layers.{i}.self_attn.qkv_proj.{param}"] = torch.cat(parts)
    return result


if __name__ == "__main__":
    family, source, output = sys.argv[1:]
    save_file({"sam": sam, "clip": clip}[family](load(source)), output, metadata={"format": "pt"})
