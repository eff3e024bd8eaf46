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

    return dict(transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIZES)).state_dict())


SIZES = {
    "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


def blip2() -> State:
    import transformers

    return dict(transformers.Blip2VisionModel(transformers.Blip2VisionConfig(**SIZES)).state_dict())


def x_clip() -> State:
    import transformers

    mit = {"mit_hidden_size": 8, "mit_intermediate_size": 8, "mit_num_attention_heads": 1, "num_frames": 1}
    return dict(transformers.XCLIPVisionModel(transformers.XCLIPVisionConfig(**SIZES, **mit)).state_dict())


def perception_encoder() -> State:
    import timm

    model = timm.create_model("vit_pe_core_tiny_patch16_384", embed_dim=64, depth=1, num_heads=1, img_size=32)
    return {f"visual.trunk.{name}": tensor for name, tensor in model.state_dict().items()}


def focalnet() -> State:
    import transformers

    sizes = {"embed_dim": 8, "hidden_sizes": [8], "depths": [1], "focal_levels": [2], "focal_windows": [3]}
    return dict(transformers.FocalNetModel(transformers.FocalNetConfig(**sizes)).state_dict())


def whisper() -> State:
    import transformers

    sizes = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 8, "pad_token_id": 0}
    heads = {"encoder_attention_heads": 1, "decoder_attention_heads": 1}
    return dict(transformers.WhisperModel(transformers.WhisperConfig(**sizes, **heads)).state_dict())


def bridge_tower() -> State:
    import transformers

    text = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 8}
    vision = {"hidden_size": 64, "num_hidden_layers": 1, "patch_size": 14, "image_size": 28}
    sizes = {"hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    config = transformers.BridgeTowerConfig(text_config=text, vision_config=vision, **sizes)
    return dict(transformers.BridgeTowerModel(config).state_dict())


def text_tower() -> State:
    return {name: tensor for name, tensor in clip().items() if name.startswith("text_model.")}


def names(*listed: str) -> Callable[[], State]:
    return lambda: {name: W.clone() for name in listed}


def not_gathered() -> State:
    return {name: torch.ones(0) for name in clip()}


def channels_last() -> State:
    """MLX's order under names that no layout of MLX has."""
    state = models.open_clip().visual.state_dict()
    return {**state, "conv1.weight": state["conv1.weight"].permute(0, 2, 3, 1)}


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
    "bitsandbytes, scales alone": (clip_with(weight__absmax=W), "bitsandbytes", "dequantise"),
    "ExLlama": (clip_with(weight=None, q_weight=W.int(), q_scale=W.int()), "int32", "dequantise"),
    "gpt-oss": (clip_with(weight=None, weight_blocks=W.byte(), weight_scales=W.byte()), "quantised", "dequantise"),
    "EETQ": (clip_with(weight=W.char(), weight_scales=W), "with their scales", "dequantise"),
    "quanto": (clip_with(weight___data=W.char(), weight___scale=W), "with their scales", "dequantise"),
    "float8 and a scale of some name": (
        clip_with(weight=torch.ones(256, 64).to(torch.float8_e4m3fn), descale=W), "float8_e4m3fn", "dequantise"
    ),
    "ZeRO-3, one weight": (clip_with(weight=torch.ones(0)), "ZeRO-3", "zero_to_fp32"),
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
    "ModelOpt": (clip_with(weight_quantizer___amax=W), "quantisation", "dequantise"),
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
    "EfficientSAM": (
        names("image_encoder.blocks.0.mlp.fc1.weight", "image_encoder.neck.0.weight", "image_encoder.patch_embed.w"),
        "EfficientSAM", "SAM",
    ),
    "ViTDet": (names("backbone.net.blocks.0.attn.rel_pos_h", "backbone.simfp_2.0.weight"), "ViTDet", "SAM"),
    "SAM's decoder": (names("mask_decoder.iou_token.weight", "prompt_encoder.w"), "mask decoder", "SAM"),
    "BLIP-2": (blip2, "BLIP", "CLIP"),
    "InternViT in transformers": (names("model.vision_tower.encoder.layer.0.lambda_1"), "layer scales", "CLIP"),
    "mPLUG-Owl": (names("vision_model.encoder.layers.0.self_attn.query_key_value.weight"), "mPLUG-Owl", "CLIP"),
    "CogVLM": (names("model.vision.patch_embedding.cls_embedding"), "CogVLM", "CLIP"),
    "Florence-2": (
        names("vision_tower.blocks.0.0.channel_block.channel_attn.fn.qkv.weight"), "Florence-2", "CLIP"
    ),
    "MobileCLIP": (names("image_encoder.model.network.0.0.token_mixer.mixer.rbr_skip.weight"), "MobileCLIP", "CLIP"),
    "X-CLIP": (x_clip, "X-CLIP", "CLIP"),
    "Perception Encoder": (perception_encoder, "Perception Encoder", "CLIP"),
    "Hiera": (names("blocks.0.attn.qkv.weight", "blocks.1.proj.weight", "pos_embed"), "Hiera", "SAM"),
    "a plain ViT": (names("cls_token", "blocks.0.attn.qkv.weight", "patch_embed.proj.weight"), "DeiT", "CLIP"),
    "ResNet": (names("conv1.weight", "layer1.0.conv1.weight"), "ResNet", "CLIP"),
    "a VAE": (names("encoder.mid_block.attentions.0.to_q.weight"), "diffusion", "CLIP"),
    "LLaVA without its tower": (
        names("model.layers.0.mlp.gate_proj.weight", "model.mm_projector.0.weight", "model.image_newline"),
        "language model", "mm_vision_tower",
    ),
    "BERT": (names("bert.encoder.layer.0.attention.self.query.weight"), "BERT", "CLIP"),
    "T5": (names("encoder.block.0.layer.0.SelfAttention.q.weight"), "T5", "CLIP"),
    "Qwen-VL, the first": (names("transformer.visual.transformer.resblocks.0.attn.in_proj.weight"), "Qwen-VL", "CLIP"),
    "SAM 3 in transformers": (names("vision_encoder.neck.fpn_layers.0.scale_layers.0.weight"), "SAM 3", "SAM"),
    "SAM 3 as published": (names("detector.backbone.vision_backbone.trunk.blocks.0.attn.qkv.weight"), "SAM 3", "SAM"),
    "EdgeTAM": (names("vision_encoder.backbone.timm_model.layer1.0.conv1.weight"), "EdgeTAM", "SAM"),
    "Hiera in transformers": (names("encoder.stages.1.layers.0.proj.weight"), "Hiera", "SAM"),
    "ViTDet in transformers": (names("encoder.layer.0.attention.rel_pos_h"), "ViTDet", "SAM"),
    "EfficientViT-SAM": (names("image_encoder.backbone.stages.0.op_list.0.main.conv.weight"), "EfficientViT", "SAM"),
    "BEiT": (names("layers.0.lambda_1", "layers.0.a.relative_position_bias_table"), "BEiT", "CLIP"),
    "ViT in transformers 5": (names("embeddings.cls_token", "layers.0.layernorm_before.weight"), "DeiT", "CLIP"),
    "Qwen3-VL's encoder alone": (names("blocks.0.attn.qkv.weight", "merger.linear_fc1.weight"), "Qwen-VL", "CLIP"),
    "Llama 3.2": (names("gated_positional_embedding.gate", "class_embedding"), "Llama 3.2", "CLIP"),
    "Pixtral": (names("vision_tower.patch_conv.weight", "vision_tower.ln_pre.weight"), "Pixtral", "CLIP"),
    "Kosmos-2.5": (names("vision_model.embeddings.row_embedder.weight"), "Kosmos-2.5", "CLIP"),
    "FocalNet": (focalnet, "FocalNet", "CLIP"),
    "Whisper": (whisper, "Whisper", "CLIP"),
    "BridgeTower": (bridge_tower, "BridgeTower", "CLIP"),
    "MoonViT": (names("vision_tower.encoder.blocks.0.wqkv.weight"), "MoonViT", "CLIP"),
    "dots.ocr": (names("vision_tower.patch_embed.patchifier.proj.weight"), "dots.ocr", "CLIP"),
    "ViTamin": (names("visual.trunk.patch_embed.backbone.stem.conv1.weight"), "ViTamin", "CLIP"),
    "CoOp": (names("prompt_learner.ctx", "prompt_learner.token_prefix"), "CoOp", "vision encoder"),
    "AIMv2": (names("vision_model.encoder.layers.0.rms_norm1.weight"), "AIMv2", "CLIP"),
    "ImageBind": (names("modality_trunks.vision.blocks.0.attn.in_proj_weight"), "ImageBind", "CLIP"),
    "ALIGN": (
        names("vision_model.encoder.blocks.0.depthwise_conv.depthwise_conv.weight", "text_projection.weight"),
        "EfficientNet", "CLIP",
    ),
    "MobileCLIP2": (names("visual.trunk.stages.0.blocks.0.token_mixer.mixer.conv.weight"), "MobileCLIP", "CLIP"),
    "Megatron": (names("vision_model.decoder.layers.0.self_attention.linear_qkv.weight"), "Megatron", "export"),
    "LLaVA's projector": (names("model.mm_projector.0.weight"), "projector", "mm_vision_tower"),
    "IP-Adapter": (names("image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"), "projector", "vision encoder"),
    "Meta's Llama": (names("layers.0.feed_forward.w1.weight"), "language model", "mm_vision_tower"),
    "LLaVA's mmproj": (names("v.blk.0.attn_q.weight", "v.pre_ln.weight", "mm.0.weight"), "llama.cpp", "was made from"),
    "a Llama in GGUF": (names("blk.0.attn_q.weight", "token_embd.weight"), "llama.cpp", "was made from"),
    "SAMed's LoRA alone": (names("w_a_000", "w_b_000", "mask_decoder.iou_token.weight"), "LoRA", "merge"),
    "FSDP, flat": (names("vision_model.encoder.layers.0._flat_param"), "flat parameters", "FULL_STATE_DICT"),
    "an optimizer's file": (names("0.exp_avg", "0.momentum_buffer"), "optimizer", "weights"),
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


def test_modules_that_hqq_saved_one_by_one(tmp_path: Path) -> None:
    """HQQ's own file is a dict of modules, each with its tensors."""
    quantised = {"W_q": torch.zeros(8, 1, dtype=torch.uint8), "meta": {"nbits": 4, "scale": W}, "bias": torch.ones(4)}
    modules = {"vision_model.embeddings.patch_embedding": {"weight": W}, FC1: quantised}
    torch.save(modules, tmp_path / "qmodel.pt")
    with pytest.raises(DsocrError, match="quantised by HQQ") as caught:
        converter.convert(tmp_path / "qmodel.pt", "clip", out=tmp_path / "out.safetensors")
    assert "dequantise" in caught.value.hint


def test_quantised_weights_outside_the_encoder_do_not_matter(tmp_path: Path) -> None:
    state = {**clip(), "lm.layers.0.mlp.qweight": W, "lm.layers.0.mlp.g_idx": W, "lm.lora_A.weight": W.clone()}
    save(state, tmp_path / "weights.safetensors")
    record = converter.convert(tmp_path / "weights.safetensors", "clip", out=tmp_path / "out.safetensors")
    assert record.dropped["lm.lora_A.weight"]


def test_the_other_family_is_named_beside_weights_of_other_models(tmp_path: Path) -> None:
    """Stable Diffusion with an image encoder, a quantised language model, a pooling of CoCa: CLIP, and no SAM."""
    visual = {name: t for name, t in models.open_clip().state_dict().items() if name.startswith("visual.")}
    coca = {"visual.attn_pool.query": W, "visual.attn_pool.attn.in_proj_weight": W, "text_decoder.ln.weight": W}
    others = {
        "conditioner.embedders.0.open_clip.model.": {"model.diffusion_model.out.weight": W},
        "model.vision_tower.": {"model.layers.0.mlp.up_proj.qweight": W, "model.layers.0.mlp.up_proj.qzeros": W},
        "": coca,
    }
    for prefix, other in others.items():
        path, out = tmp_path / "weights.safetensors", tmp_path / "out.safetensors"
        save({**{prefix + name: tensor for name, tensor in visual.items()}, **other}, path)
        assert set(other) <= set(converter.convert(path, "clip", out=out, force=True).dropped)
        with pytest.raises(DsocrError, match="is a CLIP checkpoint, not SAM"):
            converter.convert(path, "sam", out=out)


def test_matrices_that_are_pruned_or_wrapped(tmp_path: Path) -> None:
    qkv = "image_encoder.blocks.0.attn.qkv."
    sam = models.sam_meta().state_dict()
    pruned = {**sam, f"{qkv}weight": torch.ones(3, sam[f"{qkv}weight"].shape[1])}
    wrapped = {name.replace(qkv, f"{qkv}linear."): tensor for name, tensor in sam.items()}
    for state, words in ((pruned, r"has shape \[3, .*\n.*pruned model"), (wrapped, f"no tensor '{qkv}weight'")):
        save(state, tmp_path / "weights.safetensors")
        with pytest.raises(DsocrError, match=words):
            converter.convert(tmp_path / "weights.safetensors", "sam", out=tmp_path / "out.safetensors")


def test_learned_prompts_inside_the_encoder_are_refused(tmp_path: Path) -> None:
    visual = {
        n.removeprefix("visual."): t for n, t in models.open_clip().state_dict().items() if n.startswith("visual.")
    }
    save(
        {f"image_encoder.{name}": tensor for name, tensor in {**visual, "VPT": W}.items()}, tmp_path / "in.safetensors"
    )
    with pytest.raises(DsocrError, match=r"no rule claims 'VPT'\nthe DeepEncoder has no such modules"):
        converter.convert(tmp_path / "in.safetensors", "clip", out=tmp_path / "out.safetensors")


def test_a_file_without_an_encoder_gets_no_plain_advice_to_write_a_mapping(tmp_path: Path) -> None:
    save({"prompt_learner.ctx": W, "film_mul.weight": W.clone()}, tmp_path / "weights.safetensors")
    with pytest.raises(DsocrError, match=r"first names: .*\nif a vision encoder of SAM or CLIP is among them"):
        converter.convert(tmp_path / "weights.safetensors", "clip", out=tmp_path / "out.safetensors")


def test_the_other_family_is_named_only_without_a_trace_of_this_one(tmp_path: Path) -> None:
    sam = {f"sam.{name}": tensor.clone() for name, tensor in models.sam_meta().state_dict().items()}
    broken = {name: tensor for name, tensor in clip().items() if "pre_layrnorm" not in name}
    for state, words in ((sam, "is a SAM checkpoint, not CLIP"), ({**sam, **broken}, "nearest is clip-hf")):
        save(state, tmp_path / "weights.safetensors")
        with pytest.raises(DsocrError, match=words):
            converter.convert(tmp_path / "weights.safetensors", "clip", out=tmp_path / "out.safetensors")
