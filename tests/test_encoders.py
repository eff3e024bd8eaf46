"""The encoders compared with the libraries that define them: tiny models of the true architectures, random weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import models
import pytest
import safetensors.torch
import torch
from inventories import inventories
from torch import Tensor, nn

import converter
from converter.encoders import (
    ClipConfig,
    ClipEncoder,
    DeepEncoder,
    DeepEncoderV2,
    Qwen2Config,
    Qwen2Encoder,
    SamConfig,
    SamEncoder,
    clip_config_from,
    qwen2_config_from,
    sam_config_from,
)
from converter.encoders.config import Shapes
from converter.encoders.sam import attention_with_mask, attention_without_mask
from converter.errors import LayoutError
from converter.verification.outputs import KeepFloat64

# Bars for the norm of the difference over that of the reference; seen are 2e-15 and 8e-8. FLOAT32 is for references
# that take a step or two in float32 though everything else is float64.
FLOAT64, FLOAT32 = 1000 * torch.finfo(torch.float64).eps, 4 * torch.finfo(torch.float32).eps
# The trained size; odd numbers of patches, which windows are padded for; landscape and portrait.
SIZES = [(64, 64), (80, 80), (128, 192), (208, 208), (320, 128)]
HEAD_WIDTH = models.CLIP_WIDTH // models.CLIP_HEADS


def shapes_of(name: str, prefix: str = "") -> dict[str, tuple[int, ...]]:
    found = inventories()[name]
    return {key.removeprefix(prefix): shape for key, (_, shape) in found.items() if key.startswith(prefix)}


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def described(module: nn.Module) -> dict[str, tuple[str, tuple[int, ...]]]:
    state = module.state_dict()
    return {name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for name, tensor in state.items()}


def reference_of(model: nn.Module) -> nn.Module:
    """A copy in float64, with the eps that SAM was trained with.

    segment-anything's and timm's classes have 1e-5 by default. Meta's builder passes 1e-6; timm passes it nowhere.
    """
    model = copy.deepcopy(model).double().eval()
    if type(model).__name__ in ("Sam", "VisionTransformerSAM"):
        for part in model.modules():
            if isinstance(part, nn.LayerNorm):
                part.eps = 1e-6
    return model


def calmed(model: nn.Module) -> nn.Module:
    """The same, with matrices that keep the size of what goes through them: float32's noise is not blown up."""
    model = reference_of(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "pos" not in name:
                parameter /= math.prod(parameter.shape[1:]) ** 0.5
    # As a checkpoint would store them.
    return model.float().double()


def converted(model: nn.Module, family: str, folder: Path, **options: int) -> dict[str, Tensor]:
    """What dsocr-convert makes of a model's state dict saved in float32."""
    torch.save({name: tensor.float() for name, tensor in model.state_dict().items()}, folder / "source.pth")
    out = folder / f"{family}.safetensors"
    converter.convert(str(folder / "source.pth"), family, out=out, force=True, **options)
    return safetensors.torch.load_file(out)


def sam_from(model: nn.Module, folder: Path) -> SamEncoder:
    state = converted(model, "sam", folder)
    with torch.device("meta"):
        encoder = SamEncoder(sam_config_from(shapes(state)))
    encoder.load_state_dict(state, assign=True)
    return encoder.double().eval()


def clip_from(model: nn.Module, folder: Path, **options: int) -> ClipEncoder:
    state = converted(model, "clip", folder, **options)
    with torch.device("meta"):
        encoder = ClipEncoder(clip_config_from(shapes(state), HEAD_WIDTH))
    encoder.load_state_dict(state, assign=True)
    return encoder.double().eval()


def chain_from(model: nn.Module, folder: Path) -> DeepEncoder:
    sam, clip = sam_from(model, folder), clip_from(model, folder)
    with torch.device("meta"):
        encoder = DeepEncoder(sam.config, clip.config)
    encoder.sam_model, encoder.vision_model = sam, clip
    return encoder


def second_from(model: nn.Module, folder: Path) -> DeepEncoderV2:
    sam, state = sam_from(model, folder), converted(model, "qwen2", folder)
    encoder = DeepEncoderV2(sam.config, qwen2_config_from(shapes(state)))
    encoder.qwen2_model.load_state_dict(state)
    encoder.sam_model = sam
    return encoder.double().eval()


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm())


def check(found: Tensor, expected: Tensor, bar: float) -> None:
    difference = error(found, expected)
    assert difference < bar


# Names and sizes.


@pytest.mark.parametrize(("family", "kind"), [("sam", SamEncoder), ("clip", ClipEncoder), ("qwen2", Qwen2Encoder)])
def test_state_dict_is_deepseeks(family: str, kind: type[nn.Module]) -> None:
    with torch.device("meta"):
        module = kind()
    assert described(module) == inventories()[f"deepencoder-{family}"]


def test_the_chain_has_the_names_of_the_released_checkpoint() -> None:
    with torch.device("meta"):
        ours = shapes(DeepEncoder().state_dict())
    theirs = shapes_of("deepseek-ocr", "model.")
    parts = ("sam_model.", "vision_model.")
    # The one difference: DeepSeek published the checkpoint without this constant.
    del ours["vision_model.embeddings.position_ids"]
    assert ours == {name: shape for name, shape in theirs.items() if name.startswith(parts)}
    with torch.device("meta"):
        ours = shapes(DeepEncoderV2().state_dict())
    theirs = shapes_of("deepseek-ocr-2", "model.")
    assert ours == {name: shape for name, shape in theirs.items() if name.startswith(("sam_model.", "qwen2_model."))}


def test_configs_from_shapes() -> None:
    sam, clip = shapes_of("deepencoder-sam"), shapes_of("deepencoder-clip")
    assert sam_config_from(sam) == SamConfig()
    assert clip_config_from(clip) == ClipConfig()
    qwen2 = shapes_of("deepencoder-qwen2")
    assert qwen2_config_from(qwen2) == Qwen2Config()
    alone = {name: shape for name, shape in qwen2.items() if not name.startswith("query_")}
    assert qwen2_config_from(alone) == Qwen2Config(queries=None)
    bare = {name: shape for name, shape in sam.items() if not name.startswith("net_")}
    assert sam_config_from(bare) == SamConfig(compressor=None)
    del clip["embeddings.patch_embedding.weight"]
    assert clip_config_from(clip) == ClipConfig(patch_convolution=False)
    clip["embeddings.position_embedding.weight"] = (577, 1024)
    assert clip_config_from(clip).image_size == 336


def test_vit_h() -> None:
    theirs = shapes_of("sam-meta-vit-h", "image_encoder.")
    config = sam_config_from(theirs)
    size = {"width": 1280, "depth": 32, "heads": 16, "mlp": 5120, "global_blocks": (7, 15, 23, 31)}
    assert config == SamConfig(**size, compressor=None)  # type: ignore[arg-type]
    with torch.device("meta"):
        assert shapes(SamEncoder(config).state_dict()) == theirs


@pytest.mark.parametrize(
    "config",
    [
        SamConfig(),
        SamConfig(image_size=96, patch=8, channels=1, width=24, depth=2, heads=3, mlp=7, window=5, neck=4),
        SamConfig(global_blocks=(), compressor=None, depth=1),
        SamConfig(global_blocks=(0, 1), depth=2),
    ],
)
def test_sam_config_there_and_back(config: SamConfig) -> None:
    with torch.device("meta"):
        state = SamEncoder(config).state_dict()
    found = sam_config_from(shapes(state))
    assert described(SamEncoder(found).to("meta")) == described(SamEncoder(config).to("meta"))
    assert {**vars(found), "global_blocks": 0} == {**vars(config), "global_blocks": 0}
    assert found.global_blocks == tuple(index for index in config.global_blocks if index < config.depth)


Read = Callable[[Shapes], object]
BAD: dict[str, tuple[Read, str, str, tuple[int, ...] | None, str]] = {
    "missing": (sam_config_from, "sam", "pos_embed", None, "pos_embed: missing"),
    "dimensions": (sam_config_from, "sam", "pos_embed", (4096, 768), r"pos_embed: shape \[4096, 768\], expected 4"),
    "empty": (sam_config_from, "sam", "pos_embed", (1, 0, 0, 768), "pos_embed: shape"),
    "oblong": (sam_config_from, "sam", "pos_embed", (1, 64, 32, 768), "64 rows and 32 columns"),
    "windows": (sam_config_from, "sam", "blocks.3.attn.rel_pos_h", (25, 64), r"\[25, 27\] offsets"),
    "block": (sam_config_from, "sam", "blocks.3.attn.rel_pos_h", None, "blocks.3.attn.rel_pos_h: missing"),
    "head": (sam_config_from, "sam", "blocks.0.attn.rel_pos_h", (27, 65), "65 channels"),
    "gap": (sam_config_from, "sam", "blocks.999999.norm1.bias", (768,), r"blocks.\*: numbered"),
    "net_3": (sam_config_from, "sam", "net_3.weight", None, "net_3.weight: missing"),
    "no square": (clip_config_from, "clip", "embeddings.position_embedding.weight", (256, 1024), "256 positions"),
    "token alone": (clip_config_from, "clip", "embeddings.position_embedding.weight", (1, 1024), "1 positions"),
    "width": (clip_config_from, "clip", "embeddings.position_embedding.weight", (257, 1000), "1000 channels"),
    "key_value": (qwen2_config_from, "qwen2", "model.model.layers.0.self_attn.k_proj.weight", (96, 896), "96 x 896"),
    "one table": (qwen2_config_from, "qwen2", "query_1024.weight", None, "query_1024.weight: missing"),
    "mlp": (clip_config_from, "clip", "transformer.layers.0.mlp.fc1.weight", None, "fc1.weight: missing"),
}


@pytest.mark.parametrize("name", BAD)
def test_shapes_of_no_encoder_are_refused(name: str) -> None:
    read, family, key, shape, message = BAD[name]
    changed = {**shapes_of(f"deepencoder-{family}"), key: shape}
    with pytest.raises(LayoutError, match=message):
        read({name: shape for name, shape in changed.items() if shape is not None})


@pytest.mark.parametrize(("side", "tokens"), [(512, 64), (640, 100), (1024, 256), (1280, 400)])
def test_tokens_at_deepseeks_sizes(side: int, tokens: int) -> None:
    with torch.device("meta"):
        assert DeepEncoder()(torch.empty(2, 3, side, side)).shape == (2, tokens, 2048)


# SAM.


def hf_features(model: nn.Module, pixels: Tensor) -> Tensor:
    features: Tensor = model(pixels).last_hidden_state
    return features


SAM: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Tensor]]] = {
    "segment-anything": (models.sam_meta, lambda model, x: model.image_encoder(x)),
    "transformers": (models.sam_hf, lambda model, x: hf_features(model.vision_encoder, x)),
    "GOT-OCR2": (models.got_ocr2_hf, hf_features),
    "timm": (models.sam_timm, lambda model, x: model.forward_features(x)),
}


@pytest.mark.parametrize("library", SAM)
@torch.no_grad()
def test_sam_before_the_compressor(library: str, tmp_path: Path) -> None:
    make, run = SAM[library]
    reference = reference_of(make())
    ours = sam_from(reference, tmp_path)
    pixels = noise(2, 3, 64, 64)
    assert (ours.config.compressor, ours.config.window, ours.config.global_blocks) == (None, 2, (1,))
    # transformers' GOT-OCR2 has no attention but its own, with a softmax in float32, as had its SAM before 5.
    single = library == "GOT-OCR2" or (library == "transformers" and models.OLD_TRANSFORMERS)
    check(ours(pixels), run(reference, pixels), FLOAT32 if single else FLOAT64)
    assert torch.equal(ours(pixels), ours.features(pixels))


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_relative_positions_at_other_sizes(size: tuple[int, int], tmp_path: Path) -> None:
    """segment-anything resamples relative positions but not absolute ones: they are left out."""
    reference = reference_of(models.sam_meta())
    reference.image_encoder.pos_embed.zero_()
    ours = sam_from(reference, tmp_path)
    reference.image_encoder.pos_embed = None
    pixels = noise(2, 3, *size)
    check(ours(pixels), reference.image_encoder(pixels), FLOAT64)


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_sam_at_other_sizes(size: tuple[int, int], tmp_path: Path) -> None:
    reference = calmed(models.sam_timm())
    ours = sam_from(reference, tmp_path)
    reference.patch_embed.strict_img_size = False
    pixels = noise(2, 3, *size)
    check(ours(pixels), reference.forward_features(pixels), FLOAT32)


# CLIP.


def open_clip_tokens(model: nn.Module, pixels: Tensor) -> Tensor:
    visual = copy.deepcopy(model.visual)
    visual.ln_post, visual.proj, visual.output_tokens = nn.Identity(), None, True
    token, patches = visual(pixels)
    return torch.cat([token[:, None], patches], dim=1)


CLIP: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Tensor]]] = {
    "transformers": (models.clip_hf, lambda model, x: hf_features(model.vision_model, x)),
    "transformers' CLIPVisionModel": (models.clip_hf_vision, hf_features),
    "open_clip": (models.open_clip, open_clip_tokens),
}


@pytest.mark.parametrize("library", CLIP)
@torch.no_grad()
def test_clip_on_pixels(library: str, tmp_path: Path) -> None:
    make, run = CLIP[library]
    reference = reference_of(make())
    ours = clip_from(reference, tmp_path)
    pixels = noise(2, 3, 56, 56)
    check(ours(pixels), run(reference, pixels), FLOAT64)
    patches = ours.embeddings.patch_embedding(pixels)
    assert torch.equal(ours(None, patches), ours(pixels))


@pytest.mark.parametrize("side", [28, 84, 126])
@torch.no_grad()
def test_clip_at_other_sizes_is_what_image_size_converts_to(side: int, tmp_path: Path) -> None:
    """transformers resamples without antialias and with another cubic: it is the reference at the converted size."""
    from transformers import CLIPVisionModel

    source = calmed(models.clip_hf_vision())
    ours, resampled = clip_from(source, tmp_path), clip_from(source, tmp_path, image_size=side)
    pixels = noise(2, 3, side, side)
    check(ours(pixels), resampled(pixels), FLOAT32)
    config = copy.deepcopy(source.config)
    config.image_size = side
    table = resampled.embeddings.position_embedding.weight
    reference = CLIPVisionModel(config).double().eval()
    reference = getattr(reference, "vision_model", reference)
    reference.load_state_dict({**source.state_dict(), "embeddings.position_embedding.weight": table})
    check(resampled(pixels), hf_features(reference, pixels), FLOAT64)


# The chain.


@pytest.mark.parametrize("size", [*SIZES, (256, 256)])
@torch.no_grad()
def test_the_chain(size: tuple[int, int], tmp_path: Path) -> None:
    reference = calmed(models.unlimited_ocr_hf())
    ours = chain_from(reference, tmp_path)
    pixels = noise(2, 3, *size)
    found = ours(pixels)
    assert found.shape == (2, math.ceil(size[0] / 64) * math.ceil(size[1] / 64), 2 * models.CLIP_WIDTH)
    check(found, hf_features(reference, pixels), FLOAT32)


@torch.no_grad()
def test_the_bar_for_other_sizes_is_low_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Leaving out antialias is seen at more than a thousand times that bar."""
    reference = calmed(models.unlimited_ocr_hf())
    ours, pixels = chain_from(reference, tmp_path), noise(2, 3, 128, 128)
    expected = ours(pixels)
    interpolate = nn.functional.interpolate
    monkeypatch.setattr(nn.functional, "interpolate", lambda *a, antialias=False, **k: interpolate(*a, **k))
    assert error(ours(pixels), expected) > 1000 * FLOAT32


@pytest.mark.parametrize(("side", "tokens"), [(64, 144), (768, 144), (832, 256), (1024, 256)])
@torch.no_grad()
def test_the_second_version(side: int, tokens: int, tmp_path: Path) -> None:
    """At both trained sizes, and at others, whose table of queries is the smaller one up to 144 image tokens."""
    reference = calmed(models.deepseek_ocr2_hf())
    ours, pixels = second_from(reference, tmp_path), noise(1, 3, side, side)
    found = ours(pixels)
    assert found.shape == (1, tokens, models.QWEN2_WIDTH) and ours.num_tokens(side) == tokens
    with KeepFloat64():
        check(found, hf_features(reference, pixels), FLOAT64)
    check(found, hf_features(reference, pixels), FLOAT32)
    # In half precision, too, norms and angles are in float32.
    half = ours.bfloat16()(pixels.bfloat16())
    assert half.dtype == torch.bfloat16 and error(half.double(), found) < 8 * torch.finfo(half.dtype).eps


@torch.no_grad()
def test_what_tokens_of_the_second_version_see() -> None:
    """Image tokens see all image tokens and no query; a query all image tokens, and queries up to itself."""
    encoder = Qwen2Encoder(replace(models.qwen2_sizes(), depth=1)).double()
    tokens = noise(1, 9, models.QWEN2_WIDTH)
    before = encoder.encode(tokens, 4)
    for changed in range(9):
        other = tokens.clone()
        other[:, changed] += 1
        sees = (encoder.encode(other, 4) != before).any(-1)[0].tolist()
        assert sees == [changed < 4 or index >= changed for index in range(9)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_a_module_keeps_the_dtype_of_its_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    ours, pixels = chain_from(calmed(models.unlimited_ocr_hf()), tmp_path), noise(2, 3, 128, 128)
    expected = ours(pixels)
    found = ours.to(dtype)(pixels.to(dtype))
    assert found.dtype == dtype
    check(found.double(), expected, 8 * torch.finfo(dtype).eps)


def test_every_weight_learns(tmp_path: Path) -> None:
    ours = chain_from(calmed(models.unlimited_ocr_hf()), tmp_path)
    ours(noise(1, 3, 128, 128)).square().sum().backward()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_wrong_use_is_told() -> None:
    with torch.device("meta"):
        sam, clip, pixels = SamEncoder(SamConfig(depth=1)), ClipEncoder(ClipConfig(depth=1)), torch.empty(1, 3, 72, 64)
        bare = ClipEncoder(ClipConfig(depth=1, patch_convolution=False))
        for encoder, patch in ((sam, 16), (clip, 14)):
            with pytest.raises(ValueError, match=rf"shape \[1, 3, 72, 64\]: .* multiples of {patch}"):
                encoder(pixels)
        for encoder, given in ((bare, pixels), (clip, None)):
            with pytest.raises(ValueError, match="patch_embeds is required"):
                encoder(given)
        for qwen2, words in ((Qwen2Config(), "must end in Qwen2's 896"), (Qwen2Config(1024, queries=None), "queries")):
            with pytest.raises(ValueError, match=words):
                DeepEncoderV2(SamConfig(), qwen2)
        with pytest.raises(ValueError, match="no tables of queries"):
            Qwen2Encoder(Qwen2Config(depth=0, queries=None))(torch.empty(1, 896, 2, 2))
        for compressor in (None, (512, 896)):
            with pytest.raises(ValueError, match="must end in CLIP's 1024 channels"):
                DeepEncoder(SamConfig(compressor=compressor))


@pytest.mark.parametrize(("h", "w", "width"), [(4, 4, 64), (3, 5, 12), (1, 7, 80)])
def test_attention_without_a_mask_is_the_same(h: int, w: int, width: int) -> None:
    """A GPU takes the bias of global attention into the product of queries and keys: the same outputs and gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, h * w, channels) for channels in (width, width, width, h, w)]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    masked, product = attention_with_mask(*inputs), attention_without_mask(*inputs)
    torch.testing.assert_close(product, masked, rtol=1e-12, atol=1e-12)
    weights = torch.randn(masked.shape, generator=generator, dtype=torch.float64)
    expected, found = (torch.autograd.grad((weights * y).sum(), inputs) for y in (masked, product))
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_global_attention_of_half_precision_without_a_mask() -> None:
    """With a factor that is no power of two, bfloat16 loses no more than with a mask."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 2, 64, channels, generator=generator) for channels in (80, 80, 80, 8, 8)]
    exact = attention_with_mask(*(value.double() for value in inputs))
    errors = [
        (attend(*(value.bfloat16() for value in inputs)).double() - exact).norm()
        for attend in (attention_with_mask, attention_without_mask)
    ]
    assert errors[1] < 1.1 * errors[0]
