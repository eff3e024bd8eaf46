"""Weights that no layout describes are named, with a next step that is not a mapping."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import models
import pytest
import torch
from safetensors.torch import save_file

import converter
from converter.errors import DsocrError

State = dict[str, torch.Tensor]
W = torch.ones(4, 4)
FC1 = "vision_model.encoder.layers.0.mlp.fc1"


def save(state: State, path: Path) -> None:
    # Copies: safetensors refuses tensors that share memory.
    save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, path)


def clip() -> State:
    return {name: tensor.clone() for name, tensor in models.clip_hf().state_dict().items()}


def clip_with(**changed: torch.Tensor | None) -> Callable[[], State]:
    """CLIP with tensors of its first matrix added, replaced or (None) removed."""

    def make() -> State:
        state = clip()
        for suffix, tensor in changed.items():
            name = f"{FC1}.{suffix.replace('__', '.')}"
            state.pop(name, None)
            if tensor is not None:
                state[name] = tensor
        return state

    return make


def wrapped_by_peft() -> State:
    state = clip_with(weight=None, base_layer__weight=W, lora_A__default__weight=W, lora_B__default__weight=W)()
    return {f"base_model.model.{name}": tensor for name, tensor in state.items()}


def adapter() -> State:
    name = "base_model.model.model.vision_model.transformer.layers.0.self_attn.out_proj.lora_{}.weight"
    return {name.format("A"): W, name.format("B"): W}


def siglip() -> State:
    import transformers

    config = transformers.SiglipVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=28, patch_size=14
    )
    return dict(transformers.SiglipVisionModel(config).state_dict())


def text_tower() -> State:
    return {name: tensor for name, tensor in clip().items() if name.startswith("text_model.")}


def names(*listed: str) -> Callable[[], State]:
    return lambda: {name: W.clone() for name in listed}


def not_gathered() -> State:
    return {name: torch.ones(0) for name in clip()}


def channels_last() -> State:
    name = "vision_model.embeddings.patch_embedding.weight"
    return {**clip(), name: clip()[name].permute(0, 2, 3, 1).contiguous()}


MARKS: dict[str, tuple[Callable[[], State], str, str]] = {
    "PEFT, not merged": (wrapped_by_peft, "LoRA", "merge"),
    "a LoRA adapter alone": (adapter, "LoRA", "merge"),
    "SAMed's LoRA": (
        names("image_encoder.blocks.0.attn.qkv.linear_a_q.weight", "image_encoder.blocks.0.attn.qkv.qkv.weight"),
        "LoRA",
        "merge",
    ),
    "LoHa": (names("blocks.0.attn.qkv.hada_w1_a"), "LoHa", "merge"),
    "bitsandbytes, 4 bits": (
        clip_with(weight__absmax=W, weight__quant_map=W), "bitsandbytes", "dequantise"
    ),
    "bitsandbytes, 8 bits": (clip_with(SCB=W), "bitsandbytes", "dequantise"),
    "GPTQ": (clip_with(weight=None, qweight=W, qzeros=W, scales=W, g_idx=W), "GPTQ", "dequantise"),
    "AWQ": (clip_with(weight=None, qweight=W, qzeros=W, scales=W), "AWQ", "dequantise"),
    "PEFT's copies": (clip_with(weight=None, modules_to_save__default__weight=W), "PEFT", "merge"),
    "IA3": (clip_with(ia3_l=W), "PEFT adapters", "merge"),
    "OFT": (clip_with(oft_r=W), "PEFT adapters", "merge"),
    "weight_norm": (clip_with(weight=None, weight_g=W, weight_v=W), "in factors", "remove_weight_norm"),
    "parametrized": (clip_with(weight=None, parametrizations__weight__original0=W), "in factors", "parametrize"),
    "pruning": (clip_with(weight=None, weight_orig=W, weight_mask=W), "in factors", "prune.remove"),
    "HQQ": (clip_with(weight=None, W_q=W, scale=W, zero=W), "HQQ", "dequantise"),
    "AQLM": (clip_with(weight=None, codes=W, codebooks=W, scales=W), "AQLM", "dequantise"),
    "MLX, 4 bits": (clip_with(weight=W, scales=W, biases=W), "MLX quantised", "dequantise"),
    "qweight alone": (clip_with(weight=None, qweight=W), "qweight", "dequantise"),
    "quantisation-aware training": (clip_with(weight_fake_quant__scale=W), "observers", "dequantise"),
    "float8 with scales": (clip_with(scale_weight=torch.ones(1)), "scales", "dequantise"),
    "compressed-tensors": (clip_with(weight_scale=torch.ones(1)), "scales", "dequantise"),
    "int8 without scales": (clip_with(weight=torch.ones(256, 64, dtype=torch.int8)), "int8", "dequantise"),
    "ZeRO-3": (not_gathered, "ZeRO-3", "zero_to_fp32"),
    "MLX": (channels_last, "channels last", "permute"),
    "SAM 2": (names("image_encoder.trunk.blocks.0.attn.qkv.weight", "neck.convs.0.conv.weight"), "SAM 2", "SAM"),
    "MobileSAM": (names("image_encoder.patch_embed.seq.0.c.weight"), "MobileSAM", "SAM"),
    "ResNet CLIP": (names("visual.layer1.0.conv1.weight", "visual.attnpool.positional_embedding"), "ResNet", "CLIP"),
    "EVA-CLIP": (names("visual.blocks.0.attn.q_bias", "visual.cls_token"), "EVA", "CLIP"),
    "SigLIP": (siglip, "SigLIP", "CLIP"),
    "a text tower": (text_tower, "text tower", "CLIP"),
    "Stable Diffusion": (names("model.diffusion_model.input_blocks.0.0.weight"), "Stable Diffusion", "CLIP"),
    "DINOv2": (names("blocks.0.ls1.gamma", "blocks.0.attn.qkv.weight"), "DINOv2", "CLIP"),
    "Qwen2 of DeepSeek-OCR-2": (names("model.qwen2_model.model.model.layers.0.mlp.gate_proj.weight"), "Qwen2", "sam"),
    "SAM 3": (names("detector.backbone.vision_backbone.trunk.blocks.0.attn.qkv.weight"), "SAM 3", "SAM"),
    "RepViT-SAM": (names("image_encoder.features.1.token_mixer.0.conv.c.weight"), "RepViT", "SAM"),
    "FastSAM": (names("model.22.dfl.conv.weight"), "FastSAM", "SAM"),
    "GroupViT": (names("vision_model.encoder.stages.0.group_token"), "GroupViT", "CLIP"),
    "ConvNeXt CLIP": (names("visual.trunk.stages.0.blocks.0.conv_dw.weight"), "ConvNeXt", "CLIP"),
    "Swin": (names("layers.0.blocks.0.attn.relative_position_bias_table"), "Swin", "CLIP"),
    "Qwen-VL": (names("visual.blocks.0.attn.qkv.weight", "visual.merger.ln_q.weight"), "Qwen-VL", "CLIP"),
    "ViT": (names("vit.encoder.layer.0.attention.attention.query.weight"), "DeiT", "CLIP"),
    "an optimizer": (names("blocks.0.attn.qkv.weight.exp_avg"), "optimizer", "weights"),
}  # fmt: skip


@pytest.mark.parametrize("mark", MARKS)
def test_what_the_weights_are_is_said(mark: str, tmp_path: Path) -> None:
    make, what, step = MARKS[mark]
    path = tmp_path / "weights.safetensors"
    save(make(), path)
    for family in ("clip", "sam"):
        with pytest.raises(DsocrError) as caught:
            converter.convert(path, family, out=tmp_path / "out.safetensors")
        assert what in caught.value.message and step in caught.value.hint, str(caught.value)
        assert "write a mapping" not in str(caught.value) and len(str(caught.value).splitlines()) <= 12
    assert not (tmp_path / "out.safetensors").exists()


def test_quantised_weights_outside_the_encoder_do_not_matter(tmp_path: Path) -> None:
    state = {**clip(), "lm.layers.0.mlp.qweight": W, "lm.layers.0.mlp.g_idx": W, "lm.lora_A.weight": W.clone()}
    save(state, tmp_path / "weights.safetensors")
    record = converter.convert(tmp_path / "weights.safetensors", "clip", out=tmp_path / "out.safetensors")
    assert record.dropped["lm.lora_A.weight"]


def test_the_other_family_is_named_only_without_a_trace_of_this_one(tmp_path: Path) -> None:
    sam = {f"sam.{name}": tensor.clone() for name, tensor in models.sam_meta().state_dict().items()}
    broken = {name: tensor for name, tensor in clip().items() if "pre_layrnorm" not in name}
    for state, words in ((sam, "is a SAM checkpoint, not CLIP"), ({**sam, **broken}, "nearest is clip-hf")):
        save(state, tmp_path / "weights.safetensors")
        with pytest.raises(DsocrError, match=words):
            converter.convert(tmp_path / "weights.safetensors", "clip", out=tmp_path / "out.safetensors")
