"""Tiny models of the true architectures, built by the libraries that define the layouts, with random weights.

Every parameter and float buffer that is saved is drawn at random: libraries start norms, biases and relative positions
as constants, under which exchanged tensors would compare equal.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.metadata
from typing import Any

import pytest
import torch
from inventories import mmpretrain_name

from converter.encoders import ClipConfig, Qwen2Config, SamConfig

OLD_TRANSFORMERS = importlib.metadata.version("transformers") < "5"

DEPTH, WIDTH, HEADS, MLP, GRID, PATCH, NECK = 3, 24, 2, 40, 4, 16, 16
WINDOW, GLOBAL_BLOCKS = 2, (1,)
QWEN2_DEPTH, QWEN2_WIDTH, QWEN2_HEADS, QWEN2_KEY_VALUE_HEADS, QWEN2_MLP = 3, 256, 4, 2, 48
CLIP_DEPTH, CLIP_WIDTH, CLIP_HEADS, CLIP_MLP, CLIP_PATCH, CLIP_IMAGE = 3, 64, 2, 256, 14, 56


def randomised(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    saved = model.state_dict().keys()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and name in saved:
            tensor.data = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
    return model


@functools.cache
def sam_meta() -> torch.nn.Module:
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    encoder = ImageEncoderViT(
        img_size=GRID * PATCH,
        patch_size=PATCH,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        mlp_ratio=MLP / WIDTH,
        out_chans=NECK,
        qkv_bias=True,
        use_rel_pos=True,
        window_size=WINDOW,
        global_attn_indexes=GLOBAL_BLOCKS,
    )
    prompt = PromptEncoder(
        embed_dim=NECK, image_embedding_size=(GRID, GRID), input_image_size=(GRID * PATCH,) * 2, mask_in_chans=16
    )
    transformer = TwoWayTransformer(depth=2, embedding_dim=NECK, mlp_dim=32, num_heads=2)
    decoder = MaskDecoder(transformer_dim=NECK, transformer=transformer, iou_head_depth=3, iou_head_hidden_dim=NECK)
    return randomised(Sam(encoder, prompt, decoder))


def newer(name: str, module: str = "transformers") -> Any:
    """A class that old releases of transformers lack; the test is skipped where the installed one does."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        pytest.skip(f"the installed transformers has no {name}")


def _sam_config(kind: type, **more: object) -> object:
    return kind(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        mlp_dim=MLP,
        image_size=GRID * PATCH,
        patch_size=PATCH,
        output_channels=NECK,
        window_size=WINDOW,
        global_attn_indexes=list(GLOBAL_BLOCKS),
        **more,
    )


@functools.cache
def sam_hf() -> torch.nn.Module:
    from transformers import SamConfig, SamMaskDecoderConfig, SamModel, SamPromptEncoderConfig, SamVisionConfig

    config = SamConfig(
        vision_config=_sam_config(SamVisionConfig, num_pos_feats=NECK // 2),
        prompt_encoder_config=SamPromptEncoderConfig(
            hidden_size=NECK, image_size=GRID * PATCH, patch_size=PATCH, mask_input_channels=16
        ),
        mask_decoder_config=SamMaskDecoderConfig(
            hidden_size=NECK, mlp_dim=32, num_attention_heads=2, iou_head_hidden_dim=NECK
        ),
    )
    return randomised(SamModel(config))


@functools.cache
def sam_timm() -> torch.nn.Module:
    from timm.models.vision_transformer_sam import VisionTransformerSAM

    return randomised(
        VisionTransformerSAM(
            img_size=GRID * PATCH,
            patch_size=PATCH,
            embed_dim=WIDTH,
            depth=DEPTH,
            num_heads=HEADS,
            mlp_ratio=MLP / WIDTH,
            num_classes=0,
            neck_chans=NECK,
            use_rel_pos=True,
            window_size=WINDOW,
            global_attn_indexes=GLOBAL_BLOCKS,
        )
    )


@functools.cache
def sam_mmpretrain() -> torch.nn.Module:
    """segment-anything's encoder, which computes what mmpretrain's ViTSAM does, with names from the latter's source."""

    def save(module: torch.nn.Module, state: dict[str, torch.Tensor], *_: Any) -> None:
        for name in [*state]:
            state[mmpretrain_name(name)] = state.pop(name)

    def load(module: torch.nn.Module, state: dict[str, torch.Tensor], *_: Any) -> None:
        for name, _parameter in module.named_parameters():
            state[name] = state.pop(mmpretrain_name(name))

    encoder: Any = copy.deepcopy(sam_meta().image_encoder)
    encoder.register_state_dict_post_hook(save)
    encoder.register_load_state_dict_pre_hook(load)
    return encoder  # type: ignore[no-any-return]


@functools.cache
def got_ocr2_hf() -> torch.nn.Module:
    module = "transformers.models.got_ocr2"
    config = newer("GotOcr2VisionConfig", f"{module}.configuration_got_ocr2")
    return randomised(newer("GotOcr2VisionEncoder", f"{module}.modeling_got_ocr2")(_sam_config(config)))


@functools.cache
def clip_hf() -> torch.nn.Module:
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    text = CLIPTextConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    vision = CLIPVisionConfig(
        hidden_size=CLIP_WIDTH,
        intermediate_size=CLIP_MLP,
        num_hidden_layers=CLIP_DEPTH,
        num_attention_heads=CLIP_HEADS,
        image_size=CLIP_IMAGE,
        patch_size=CLIP_PATCH,
    )
    return randomised(
        CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16))
    )


@functools.cache
def owlvit() -> torch.nn.Module:
    from transformers import OwlViTConfig, OwlViTForObjectDetection

    sizes: Any = clip_hf().config
    config = OwlViTConfig(text_config=sizes.text_config.to_dict(), vision_config=sizes.vision_config.to_dict())
    return randomised(OwlViTForObjectDetection(config))


@functools.cache
def clip_hf_vision() -> torch.nn.Module:
    """The vision tower alone, under names without a prefix."""
    from transformers import CLIPVisionModel

    config: Any = clip_hf().config
    model = CLIPVisionModel(config.vision_config)
    # transformers before 5 wraps it.
    return randomised(getattr(model, "vision_model", model), seed=1)


@functools.cache
def open_clip() -> torch.nn.Module:
    from open_clip.model import CLIP

    vision = {
        "image_size": CLIP_IMAGE,
        "patch_size": CLIP_PATCH,
        "width": CLIP_WIDTH,
        "layers": CLIP_DEPTH,
        "head_width": CLIP_WIDTH // CLIP_HEADS,
    }
    text = {"context_length": 8, "vocab_size": 99, "width": 32, "heads": 2, "layers": 2}
    return randomised(CLIP(16, vision, text, quick_gelu=True))


@functools.cache
def clip_timm() -> torch.nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return randomised(
        VisionTransformer(
            img_size=CLIP_IMAGE,
            patch_size=CLIP_PATCH,
            embed_dim=CLIP_WIDTH,
            depth=CLIP_DEPTH,
            num_heads=CLIP_HEADS,
            mlp_ratio=CLIP_MLP / CLIP_WIDTH,
            num_classes=10,
            pre_norm=True,
        )
    )


@functools.cache
def unlimited_ocr_hf() -> torch.nn.Module:
    module = "transformers.models.unlimited_ocr"
    model = newer("UnlimitedOcrVisionModel", f"{module}.modeling_unlimited_ocr")
    configs = importlib.import_module(f"{module}.configuration_unlimited_ocr")
    sam = _sam_config(configs.UnlimitedOcrSamVisionConfig, downsample_channels=[2 * NECK, CLIP_WIDTH])
    clip = configs.UnlimitedOcrVisionEncoderConfig(
        hidden_size=CLIP_WIDTH,
        intermediate_size=CLIP_MLP,
        num_hidden_layers=CLIP_DEPTH,
        num_attention_heads=CLIP_HEADS,
        image_size=CLIP_IMAGE,
        patch_size=CLIP_PATCH,
    )
    return randomised(model(configs.UnlimitedOcrVisionConfig(sam_config=sam, encoder_config=clip)))


QWEN2 = {
    "hidden_size": QWEN2_WIDTH,
    "intermediate_size": QWEN2_MLP,
    "num_hidden_layers": QWEN2_DEPTH,
    "num_attention_heads": QWEN2_HEADS,
    "num_key_value_heads": QWEN2_KEY_VALUE_HEADS,
}


@functools.cache
def qwen2_hf() -> torch.nn.Module:
    from transformers import Qwen2Config as Config
    from transformers import Qwen2ForCausalLM

    return randomised(Qwen2ForCausalLM(Config(vocab_size=9, tie_word_embeddings=True, rope_theta=1e6, **QWEN2)))


@functools.cache
def deepseek_ocr2_hf() -> torch.nn.Module:
    module = "transformers.models.deepseek_ocr2"
    model = newer("DeepseekOcr2VisionModel", f"{module}.modeling_deepseek_ocr2")
    configs = importlib.import_module(f"{module}.configuration_deepseek_ocr2")
    sam = _sam_config(configs.DeepseekOcr2SamVisionConfig, downsample_channels=[2 * NECK, QWEN2_WIDTH])
    rope = {"rope_type": "default", "rope_theta": 1e6}
    qwen2 = configs.DeepseekOcr2VisionEncoderConfig(rope_parameters=rope, **QWEN2)
    return randomised(model(configs.DeepseekOcr2VisionConfig(sam_config=sam, encoder_config=qwen2)))


def sam_sizes() -> SamConfig:
    """The sizes of the SAMs here, for our own encoder, with a compressor that leads to the CLIPs'."""
    return SamConfig(
        image_size=GRID * PATCH,
        patch=PATCH,
        width=WIDTH,
        depth=DEPTH,
        heads=HEADS,
        mlp=MLP,
        window=WINDOW,
        global_blocks=GLOBAL_BLOCKS,
        neck=NECK,
        compressor=(2 * NECK, CLIP_WIDTH),
    )


def clip_sizes() -> ClipConfig:
    """The sizes of the CLIPs here, for our own encoder."""
    return ClipConfig(
        image_size=CLIP_IMAGE,
        patch=CLIP_PATCH,
        width=CLIP_WIDTH,
        depth=CLIP_DEPTH,
        heads=CLIP_HEADS,
        mlp=CLIP_MLP,
    )


def qwen2_sizes() -> Qwen2Config:
    """The sizes of the Qwen2s here, for our own encoder."""
    return Qwen2Config(
        width=QWEN2_WIDTH,
        depth=QWEN2_DEPTH,
        heads=QWEN2_HEADS,
        key_value_heads=QWEN2_KEY_VALUE_HEADS,
        mlp=QWEN2_MLP,
    )
