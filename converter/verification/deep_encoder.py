"""Builds a whole DeepEncoder from the converted encoders, and its reference.

Positions are resampled at every size but that of training, so wrong resampling shows only in the whole DeepEncoder,
which runs at other sizes. Weights that the converted file lacks are seeded, and the same in the reference:
transformers' own DeepEncoder or, if transformers has none, one assembled from its SAM and CLIP.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from converter.encoders import DeepEncoder, DeepEncoderV2
from converter.encoders.config import SamConfig
from converter.output.pretrained_config import clip_vision_config, sam_vision_config
from converter.plan.assumptions import Assumptions
from converter.verification import reference_models
from converter.verification.families import FAMILIES, Family, State
from converter.verification.probes import Probe, ProbedEncoder, SkipInitialization
from converter.verification.reference_models import Reference, label, to_layout, without_prefix

_SAM, _CLIP, _QWEN2 = FAMILIES["sam"], FAMILIES["clip"], FAMILIES["qwen2"]
# The name of the probe of a DeepEncoder's output: in version 1, CLIP's and SAM's channels.
OUTPUT = "concatenation"


def build_deep_encoder(encoders: Mapping[Family, Any], device: torch.device) -> ProbedEncoder:
    """Build a DeepEncoder of the last family's class from the converted encoders, and seed the weights of others.

    Raises:
        ValueError: The sizes of the encoders do not fit.
    """
    with device, SkipInitialization():
        configs = {family.name: encoder.config for family, encoder in encoders.items()}
        model = list(encoders)[-1].deep_encoder(configs).eval()
    _seed(model, device)
    for family, encoder in encoders.items():
        # Not strict: SAM may come without the compressor.
        model.get_submodule(family.prefix[:-1]).load_state_dict(encoder.state_dict(), strict=False)
    probes: list[Probe] = []
    for family in FAMILIES.values():
        if module := getattr(model, family.prefix[:-1], None):
            probes += family.encoder_probes(module, family.prefix)
    return ProbedEncoder(type(model).__name__, model, probes, model, OUTPUT)


def sam_features(output: Tensor) -> Tensor:
    """Return SAM's compressed features (B, C, size, size) in the output of a DeepEncoder (B, N, 2 * C)."""
    features = output.chunk(2, dim=-1)[1].transpose(1, 2)
    return features.reshape(*features.shape[:2], math.isqrt(features.shape[2]), -1)


def _seed(model: nn.Module, device: torch.device) -> None:
    """Set random weights with which activations neither vanish nor overflow in any block."""
    generator = torch.Generator(device).manual_seed(0)
    for name, tensor in model.named_parameters():
        tensor.data.normal_(0.0, 0.02, generator=generator)
        if "norm" in name and name.endswith("weight"):
            tensor.data += 1


def with_optional_tensors(
    family: Family, encoder: Any, canonical: State, assumptions: Assumptions
) -> tuple[Any, State]:
    """Add seeded tensors that an encoder needs to run alone, and that it and its source lack, to both.

    Args:
        family: The encoder's family.
        encoder: The converted encoder.
        canonical: The source's tensors by canonical names.
        assumptions: The values that no tensor shows, with which the encoder was loaded.
    """
    shapes = family.optional_shapes(encoder.config)
    if not shapes:
        return encoder, canonical
    generator, state = torch.Generator().manual_seed(0), encoder.state_dict()
    device = next(iter(state.values())).device
    seeded = {name: (torch.randn(shape, generator=generator) * 0.02).to(device) for name, shape in shapes.items()}
    return family.load({**state, **seeded}, assumptions), {**canonical, **seeded}


def build_deep_encoder_reference(model: Any, state: State, device: torch.device) -> ProbedEncoder:
    """Build another implementation of a DeepEncoder.

    Args:
        model: Our DeepEncoder, which has the sizes.
        state: The weights by DeepSeek-OCR's names.
        device: The device to build on.
    """
    candidates = REFERENCES[type(model)]
    reference = next((candidate for candidate in candidates if candidate.installed), candidates[-1])
    with device, SkipInitialization():
        encoder = reference.build(model, state)
    encoder.model.to(device).eval()
    return encoder


def unlimited_ocr(model: DeepEncoder, state: State) -> ProbedEncoder:
    """Build transformers' UnlimitedOcrVisionModel."""
    config = clip_vision_config(model.vision_model.config)
    reference = _transformers_model("unlimited_ocr", "UnlimitedOcr", model.sam_model.config, config)
    _load(reference, {_SAM: "sam-unlimited-ocr-hf", _CLIP: "clip-unlimited-ocr-hf"}, state)
    return _probed(reference, reference.sam_encoder, _CLIP, reference.vision_encoder.encoder.layers)


def deepseek_ocr2(model: DeepEncoderV2, state: State) -> ProbedEncoder:
    """Build transformers' DeepseekOcr2VisionModel."""
    config = reference_models.qwen2_config(model.qwen2_model.config)
    reference = _transformers_model("deepseek_ocr2", "DeepseekOcr2", model.sam_model.config, config)
    _load(reference, {_SAM: "sam-unlimited-ocr-hf", _QWEN2: "qwen2-deepseek-ocr2-hf"}, state)
    reference_models.keep_inv_freq_in_float32(reference.vision_encoder.rotary_emb)
    return _probed(reference, reference.sam_encoder, _QWEN2, reference.vision_encoder.layers)


def _transformers_model(package: str, name: str, sam: SamConfig, encoder: Mapping[str, Any]) -> Any:
    """Build transformers' model of a whole DeepEncoder, without weights."""
    configuration: Any = importlib.import_module(f"transformers.models.{package}.configuration_{package}")
    modeling: Any = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
    sam_config = getattr(configuration, f"{name}SamVisionConfig")(
        **sam_vision_config(sam), downsample_channels=list(sam.compressor or ())
    )
    encoder_config = getattr(configuration, f"{name}VisionEncoderConfig")(**encoder)
    config = getattr(configuration, f"{name}VisionConfig")(sam_config=sam_config, encoder_config=encoder_config)
    return getattr(modeling, f"{name}VisionModel")(config)


def _load(reference: nn.Module, layouts: Mapping[Family, str], state: State) -> None:
    """Load the weights of a DeepEncoder into transformers' model; `layouts` are the model's layouts by family."""
    tensors: dict[str, Tensor] = {}
    for family, layout in layouts.items():
        tensors |= to_layout(layout, without_prefix(family.prefix, state))
    tensors.pop("model.vision_tower.vision_encoder.embeddings.position_ids", None)
    reference.load_state_dict(without_prefix("model.vision_tower.", tensors))


def assembled(model: DeepEncoder, state: State) -> ProbedEncoder:
    """Assemble a DeepEncoder from transformers' SamVisionEncoder and CLIPVisionModel."""
    sam_state, config = without_prefix(_SAM.prefix, state), model.vision_model.config
    # CLIPVisionModel needs weights for its patch convolution, which does not run.
    convolution = torch.zeros(config.width, config.channels, config.patch, config.patch)
    clip_state = {"embeddings.patch_embedding.weight": convolution, **without_prefix(_CLIP.prefix, state)}
    sam: Any = reference_models.transformers_sam(model.sam_model.config, to_layout("sam-hf", sam_state)).model
    clip: Any = reference_models.transformers_clip(config, to_layout("clip-hf", clip_state)).model
    assembled_model = Assembled(sam, clip, sam_state["net_2.weight"], sam_state["net_3.weight"])
    return _probed(assembled_model, sam, _CLIP, clip.encoder.layers, "SamVisionEncoder and CLIPVisionModel, assembled")


def _probed(model: nn.Module, sam: Any, family: Family, layers: nn.ModuleList, name: str = "") -> ProbedEncoder:
    """Add probes to a model that contains transformers' SAM and another encoder, whose blocks are `layers`."""
    probes = _SAM.probes(sam.layers, sam.patch_embed.projection, _SAM.prefix)
    probes += family.probes(layers, prefix=family.prefix)
    return ProbedEncoder(label("transformers", name or type(model).__name__), model, probes, model, OUTPUT)


class Assembled(nn.Module):
    """transformers' SAM and CLIP, connected as in DeepSeek-OCR without any function of our encoders."""

    def __init__(self, sam: Any, clip: Any, net_2: Tensor, net_3: Tensor) -> None:
        super().__init__()
        self.sam, self.clip = sam, clip
        self.net_2, self.net_3 = nn.Parameter(net_2), nn.Parameter(net_3)

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode pixels (B, 3, H, W) to tokens (B, N, 2 * width), as DeepEncoder does."""
        features = self._compressed(pixels)
        return torch.cat((self._clip(features)[:, 1:], features.flatten(2).permute(0, 2, 1)), dim=-1)

    def _compressed(self, pixels: Tensor) -> Tensor:
        # SamVisionEncoder.forward refuses image sizes other than that of training.
        x = self.sam.patch_embed.projection(pixels).permute(0, 2, 3, 1)
        x = x + _resample(self.sam.pos_embed.permute(0, 3, 1, 2), x.shape[1], x.shape[2]).permute(0, 2, 3, 1)
        for layer in self.sam.layers:
            output = layer(x)
            # Before transformers 5, layers return a tuple.
            x = output if isinstance(output, Tensor) else output[0]
        x = F.conv2d(self.sam.neck(x), self.net_2, stride=2, padding=1)
        return F.conv2d(x, self.net_3, stride=2, padding=1)

    def _clip(self, features: Tensor) -> Any:
        embeddings = self.clip.embeddings
        batch, width, h, w = features.shape
        table = embeddings.position_embedding.weight
        grid = round((len(table) - 1) ** 0.5)
        patch_positions = _resample(table[1:].T.reshape(1, width, grid, grid), h, w)[0].flatten(1).T
        positions = torch.cat((table[:1], patch_positions))
        class_token = embeddings.class_embedding.reshape(1, 1, width).expand(batch, 1, width)
        x = torch.cat((class_token, features.flatten(2).permute(0, 2, 1)), dim=1) + positions
        return self.clip.encoder(inputs_embeds=self.clip.pre_layrnorm(x)).last_hidden_state


def _resample(positions: Tensor, h: int, w: int) -> Tensor:
    """Resample position embeddings (1, C, rows, columns) to (1, C, h, w), in float32 or wider."""
    if positions.shape[-2:] == (h, w):
        return positions
    wide = torch.promote_types(positions.dtype, torch.float32)
    return F.interpolate(positions.to(wide), size=(h, w), mode="bicubic", antialias=True).to(positions.dtype)


# The references of each class. The first one whose library is installed is used.
REFERENCES: dict[type[nn.Module], tuple[Reference, ...]] = {
    DeepEncoder: (
        Reference("transformers.models.unlimited_ocr", unlimited_ocr),
        Reference("transformers", assembled),
    ),
    DeepEncoderV2: (Reference("transformers.models.deepseek_ocr2", deepseek_ocr2),),
}
