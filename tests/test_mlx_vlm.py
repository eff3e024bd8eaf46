"""What is written for MLX, in mlx-vlm's own classes: left unchanged by `sanitize`, loaded strictly, the same outputs.

scripts/test installs mlx-vlm; without it, these tests are skipped.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from inventories import inventories, mmproj_name, random_state
from torch import nn

import converter
from converter.encoders import ClipConfig, ClipEncoder, Qwen2Config, Qwen2Encoder, SamConfig, SamEncoder

sys.path.append(str(Path(sys.prefix) / "oracles" / "mlx-vlm"))
mx = pytest.importorskip("mlx.core", reason="mlx-vlm is not installed: bash scripts/test does it")
# Older releases of transformers lack what it imports.
pytest.importorskip("mlx_vlm.models.deepseekocr", exc_type=ImportError)

# mlx-vlm's classes fix the channels of the compressor, and CLIP's grid of 16 x 16 patches.
WIDTH, DEPTH, HEADS = 64, 3, 2
SAM = SamConfig(
    image_size=64, width=24, depth=DEPTH, heads=HEADS, mlp=96, window=2, global_blocks=(1,), compressor=(512, WIDTH)
)
# What mlx-vlm computes: gelu where DeepSeek's code has quick_gelu. Its epsilon comes from a config.
CLIP = ClipConfig(width=WIDTH, depth=DEPTH, heads=HEADS, mlp=128, activation="gelu")
QWEN2 = Qwen2Config(width=WIDTH, depth=DEPTH, heads=4, key_value_heads=2, mlp=96)


def small(model: nn.Module, seed: int) -> Any:
    """Random weights under which activations stay small."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.parameters():
        tensor.data = torch.randn(tensor.shape, generator=generator) * 0.1
    return model.eval()


def version(number: int) -> nn.Module:
    """The encoder of DeepSeek-OCR or DeepSeek-OCR-2 under its names."""
    model, encoder = nn.Module(), nn.Module()
    encoder.sam_model = small(SamEncoder(SAM), 0)
    if number == 1:
        encoder.vision_model = small(ClipEncoder(CLIP), 1)
    else:
        encoder.qwen2_model = small(Qwen2Encoder(QWEN2), 1)
    model.model = encoder
    return model


def save(model: nn.Module, path: Path) -> Path:
    state = {name: tensor for name, tensor in model.state_dict().items() if "position_ids" not in name}
    safetensors.torch.save_file(state, path)
    return path


def sam() -> Any:
    from mlx_vlm.models.deepseekocr.sam import SAMEncoder

    return SAMEncoder(
        img_size=SAM.image_size,
        embed_dim=SAM.width,
        depth=DEPTH,
        num_heads=HEADS,
        window_size=SAM.window,
        global_attn_indexes=SAM.global_blocks,
        final_out_chans=WIDTH,
    )


def clip() -> Any:
    from mlx_vlm.models.deepseekocr import VisionConfig, VisionModel

    return VisionModel(
        VisionConfig(
            model_type="vision",
            layers=DEPTH,
            hidden_size=WIDTH,
            intermediate_size=CLIP.mlp,
            num_attention_heads=HEADS,
            layer_norm_eps=CLIP.epsilon,
        )
    )


def qwen2() -> Any:
    from mlx_vlm.models.deepseekocr_2.config import VisionConfig
    from mlx_vlm.models.deepseekocr_2.vision import VisionModel

    sizes = {"dim": WIDTH, "layers": DEPTH, "heads": QWEN2.heads, "kv_heads": 2, "intermediate_size": QWEN2.mlp}
    return VisionModel(VisionConfig(model_type="vision", params={"qwen2": sizes}))


def loaded(model: Any, weights: dict[str, Any], prefix: str) -> Any:
    own = [(name.removeprefix(prefix), value) for name, value in weights.items() if name.startswith(prefix)]
    model.load_weights(own, strict=True)
    return model


def assert_unchanged(sanitized: dict[str, Any], weights: dict[str, Any]) -> None:
    assert sorted(sanitized) == sorted(weights)
    for name, value in weights.items():
        assert sanitized[name].shape == value.shape and mx.array_equal(sanitized[name], value), name


def to_mlx(x: torch.Tensor) -> Any:
    """Features (B, C, H, W) with their channels last."""
    return mx.array(x.permute(0, 2, 3, 1).numpy())


def assert_close(theirs: Any, ours: torch.Tensor) -> None:
    torch.testing.assert_close(torch.tensor(theirs.tolist()), ours, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("number", [1, 2])
def test_a_whole_encoder(number: int, tmp_path: Path) -> None:
    from mlx_vlm.models.deepseekocr import deepseekocr
    from mlx_vlm.models.deepseekocr_2 import deepseekocr_2

    model: Any = version(number)
    out = tmp_path / "mlx.safetensors"
    converter.encoder(save(model, tmp_path / "model.safetensors"), to="mlx", out=out)
    weights, metadata = mx.load(str(out), return_metadata=True)
    assert metadata["format"] == "mlx"
    second: Any = clip() if number == 1 else qwen2()
    module = deepseekocr if number == 1 else deepseekocr_2
    assert_unchanged(module.Model.sanitize(weights), weights)
    assert_unchanged(second.sanitize(weights), weights)
    pixels = torch.randn(1, 3, SAM.image_size, SAM.image_size)
    features = torch.randn(1, WIDTH, 16, 16)
    with torch.no_grad():
        encoded = model.model.sam_model(pixels)
        last = model.model.vision_model(None, features) if number == 1 else model.model.qwen2_model(features)
    assert_close(loaded(sam(), weights, "sam_model.")(to_mlx(pixels)), encoded.permute(0, 2, 3, 1))
    images = mx.zeros((1, 224, 224, 3))
    assert_close(loaded(second, weights, "vision_model.")(images, to_mlx(features)), last)


def test_got_ocr2(tmp_path: Path) -> None:
    from mlx_vlm.models.got.config import VisionConfig
    from mlx_vlm.models.got.got import Model
    from mlx_vlm.models.got.vision import VisionModel

    model = nn.Module()
    model.model = nn.Module()
    model.model.vision_tower_high = small(SamEncoder(SAM), 0)
    source = save(model, tmp_path / "model.safetensors")
    out = tmp_path / "mlx.safetensors"
    converter.convert(source, "sam", to="sam-got-ocr2-mlx", out=out)
    weights = mx.load(str(out))
    config = SimpleNamespace(text_config=SimpleNamespace(tie_word_embeddings=False))
    assert_unchanged(Model.sanitize(SimpleNamespace(config=config), weights), weights)
    # And what it makes of the original is what we write.
    assert_unchanged(Model.sanitize(SimpleNamespace(config=config), mx.load(str(source))), weights)
    sizes = VisionConfig(
        img_size=SAM.image_size, embed_dim=SAM.width, depth=DEPTH, num_heads=HEADS, out_dim=WIDTH, window_size=2,
        global_attn_indexes=SAM.global_blocks,
    )  # fmt: skip
    pixels = torch.randn(1, 3, SAM.image_size, SAM.image_size)
    ours = loaded(VisionModel(sizes), weights, "vision_tower.")(to_mlx(pixels))
    with torch.no_grad():
        expected = model.model.vision_tower_high(pixels).flatten(2).transpose(1, 2)
    assert_close(ours, expected)


@pytest.mark.parametrize("size", ["tiny", pytest.param("true", marks=pytest.mark.true_size)])
@pytest.mark.parametrize("number", [1, 2])
def test_sanitize_gives_what_we_write(number: int, size: str, tmp_path: Path) -> None:
    from mlx_vlm.models.deepseekocr import deepseekocr
    from mlx_vlm.models.deepseekocr_2 import deepseekocr_2

    if size == "tiny":
        source = save(version(number), tmp_path / "model.safetensors")
    else:
        inventory = inventories()["deepseek-ocr" if number == 1 else "deepseek-ocr-2"]
        state = random_state({name: entry for name, entry in inventory.items() if mmproj_name(name)})
        safetensors.torch.save_file(state, tmp_path / "model.safetensors")
        source = tmp_path / "model.safetensors"
    converter.encoder(source, to="mlx", out=tmp_path / "mlx.safetensors", with_projector=size == "true")
    model, second = (deepseekocr, clip()) if number == 1 else (deepseekocr_2, qwen2())
    theirs = second.sanitize(model.Model.sanitize(mx.load(str(source))))
    assert_unchanged(theirs, mx.load(str(tmp_path / "mlx.safetensors")))
