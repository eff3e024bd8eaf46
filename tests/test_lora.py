"""LoRA adapters, trained and saved by peft, are merged as peft's merge_and_unload does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import pytest
import torch
from lora import State, assert_merged, clip_loss, sam_loss, save_merged, save_model, train

import converter

# Warnings of peft and transformers about each other.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out"),
]
CLIP_ALL = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
SAM_ALL = ["qkv", "proj", "lin1", "lin2"]


def merged_and_expected(
    model: torch.nn.Module, loss: Any, family: str, folder: Path, dtype: torch.dtype = torch.float32, **config: Any
) -> tuple[State, State, State]:
    """The tensors of our merge, of peft's, and of the model from before the training."""
    trained = train(model, loss, dtype, **config)
    trained.save_pretrained(folder / "adapter")
    base = save_model(model, folder / "base.safetensors", dtype)
    peft_merged = save_merged(trained, folder / "merged.safetensors")
    ours = converter.load(base, family, lora=folder / "adapter")
    return ours, converter.load(peft_merged, family), converter.load(base, family)


def moved(ours: State, base: State) -> set[str]:
    """The kinds of tensors that differ from the base: their names without the index of the layer."""
    return {".".join(name.split(".")[-3:]) for name, tensor in ours.items() if not torch.equal(tensor, base[name])}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_all_linear_layers_of_clip(dtype: torch.dtype, tmp_path: Path) -> None:
    ours, expected, base = merged_and_expected(
        models.clip_hf(), clip_loss, "clip", tmp_path, dtype, target_modules=CLIP_ALL
    )
    assert_merged(ours, expected)
    assert moved(ours, base) == {
        "self_attn.qkv_proj.weight", "self_attn.out_proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_all_linear_layers_and_the_patch_convolution_of_sam(dtype: torch.dtype, tmp_path: Path) -> None:
    targets = [*SAM_ALL, "projection", "conv1", "conv2"]
    ours, expected, base = merged_and_expected(
        models.sam_hf(), sam_loss, "sam", tmp_path, dtype, target_modules=rf"vision_encoder\..*({'|'.join(targets)})"
    )
    assert_merged(ours, expected)
    assert {"attn.qkv.weight", "mlp.lin1.weight", "neck.0.weight", "neck.2.weight", "patch_embed.proj.weight"} <= moved(
        ours, base
    )


CONFIGS: dict[str, dict[str, Any]] = {
    "two of three parts": {"target_modules": ["q_proj", "v_proj"]},
    "rslora": {"target_modules": ["fc1"], "use_rslora": True, "r": 8},
    "patterns": {
        "target_modules": CLIP_ALL,
        "rank_pattern": {"fc1": 2, "layers.1.self_attn.q_proj": 6, r"vision_model\.encoder\.layers\.0\.mlp\.fc2": 3},
        "alpha_pattern": {"fc1": 5, "^vision_model.encoder.layers.2.self_attn.k_proj": 9},
    },
    "layers": {"target_modules": CLIP_ALL, "layers_to_transform": [1], "layers_pattern": "layers"},
    "fan_in_fan_out": {"target_modules": ["fc1", "q_proj"], "fan_in_fan_out": True},
    "embedding": {"target_modules": ["position_embedding", "out_proj"]},
    "modules_to_save": {"target_modules": ["v_proj"], "modules_to_save": ["patch_embedding", "pre_layrnorm"]},
    "bias": {"target_modules": ["fc2", "q_proj"], "bias": "lora_only"},
    "all biases": {"target_modules": ["fc2"], "bias": "all"},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_settings(config: dict[str, Any], tmp_path: Path) -> None:
    ours, expected, base = merged_and_expected(models.clip_hf(), clip_loss, "clip", tmp_path, **config)
    assert_merged(ours, expected)
    assert moved(ours, base)
