"""The whole DeepEncoder with the converted part in it, at DeepSeek-OCR's sizes.

Only at sizes other than the trained one are positions resampled, so only there does a wrong resampling show. What the
converted file does not hold is seeded, the same in both chains: ours, with the converted tensors, and transformers' own
UnlimitedOcrVisionModel, with the source's.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from converter.encoders import ClipConfig, ClipEncoder, DeepEncoder, SamConfig
from converter.verification.deep_encoder_reference import assembled_chain
from converter.verification.outputs import GROUP, Look, check_encoder
from converter.verification.probes import PART, names_of, probes
from converter.verification.reference_models import (
    Runner,
    State,
    clip_sizes,
    in_layout,
    installed,
    loaded,
    sam_sizes,
    under,
    uninitialised,
)
from converter.verification.result import Check, Trace, failed, passed

_PATCHES = "embeddings.patch_embedding.weight"
_MODULE = "transformers.models.unlimited_ocr"


class Chain(NamedTuple):
    """A DeepEncoder around a converted encoder, what its places are called, and the same by transformers, if it can."""

    tested: Runner
    names: list[str]
    reference: Runner | None


def build_chain(family: str, encoder: nn.Module, canonical: State, device: torch.device) -> Chain:
    """`encoder` is the converted one; `canonical` the source's tensors by the canonical names, for the reference."""
    whole = _around(family, encoder, device)
    sam, layers = whole.sam_model, whole.vision_model.transformer.layers
    names = [PART["sam"] + name for name in names_of("sam", len(sam.blocks))]
    # Without the patch convolution, which the chain never runs.
    names += [PART["clip"] + name for name in names_of("clip", len(layers))[1:]]
    tested = Runner("DeepEncoder", whole, probes(sam.patch_embed.proj, sam.blocks, layers), whole)
    reference = None
    if canonical:
        truth = {**whole.state_dict(), **{PART[family] + name: tensor for name, tensor in canonical.items()}}
        make = _transformers_chain if installed(_MODULE) else assembled_chain
        # Made where it runs: its own initialisation, overwritten at once, takes seconds on a processor.
        with device, uninitialised():
            reference = make(whole, truth)
        # Tensors of the source that it took as they are lie where they were read.
        reference.model.to(device)
    return Chain(tested, [*names, "concatenation"], reference)


def _around(family: str, encoder: nn.Module, device: torch.device) -> DeepEncoder:
    """The other encoder in DeepSeek-OCR's proportions: beside SAM-base or CLIP-L it has DeepSeek's own sizes."""
    config: Any = encoder.config
    if isinstance(config, SamConfig):
        compressor = config.compressor or (2 * config.neck, 4 * config.neck)
        sam = dataclasses.replace(config, compressor=compressor)
        width = compressor[1]
        # Heads of 64 channels, as CLIP has them everywhere.
        clip = ClipConfig(width=width, depth=2 * sam.depth, heads=max(width // 64, 1), mlp=4 * width)
    else:
        heads, neck = max(3 * config.width // 256, 1), max(config.width // 4, 1)
        depth = -(-config.depth // 2)
        clip = config
        sam = SamConfig(
            width=64 * heads,
            depth=depth,
            heads=heads,
            mlp=256 * heads,
            global_blocks=tuple(i for i in range(depth) if i % 3 == 2),
            neck=neck,
            compressor=(2 * neck, config.width),
        )
    with torch.device("meta"):
        whole = DeepEncoder(sam, clip).eval()
    whole.to_empty(device=device)
    _seed(whole, device)
    part = whole.sam_model if family == "sam" else whole.vision_model
    part.load_state_dict(encoder.state_dict(), strict=False)
    return whole


def _seed(model: DeepEncoder, device: torch.device) -> None:
    """Weights that keep a signal alive through 36 blocks, none constant."""
    generator = torch.Generator(device).manual_seed(0)
    for name, tensor in model.named_parameters():
        tensor.data.normal_(0.0, 0.02, generator=generator)
        if "norm" in name and name.endswith("weight"):
            tensor.data += 1
    ids = model.vision_model.embeddings.position_ids
    ids.copy_(torch.arange(ids.shape[-1])[None])


def with_patches(encoder: Any, canonical: State) -> tuple[ClipEncoder, State]:
    """A CLIP that came without patch embedding, which the chain never runs, with a seeded one; and so its source."""
    config = dataclasses.replace(encoder.config, patch_convolution=True)
    shape = (config.width, config.channels, config.patch, config.patch)
    patches = {_PATCHES: torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02}
    with torch.device("meta"):
        whole = ClipEncoder(config).eval()
    state = encoder.state_dict()
    device = state["embeddings.class_embedding"].device
    whole.load_state_dict({**state, _PATCHES: patches[_PATCHES].to(device)}, assign=True)
    return whole, {**canonical, **patches}


def _transformers_chain(whole: DeepEncoder, truth: State) -> Runner:
    """transformers' chain with `truth`, tensors by DeepSeek's names."""
    from transformers.models.unlimited_ocr import configuration_unlimited_ocr as configuration
    from transformers.models.unlimited_ocr.modeling_unlimited_ocr import UnlimitedOcrVisionModel

    sam, clip = whole.sam_model.config, whole.vision_model.config
    assert sam.compressor is not None
    sam_config = configuration.UnlimitedOcrSamVisionConfig(**sam_sizes(sam), downsample_channels=list(sam.compressor))
    clip_config = configuration.UnlimitedOcrVisionEncoderConfig(**clip_sizes(clip))
    model = UnlimitedOcrVisionModel(
        configuration.UnlimitedOcrVisionConfig(sam_config=sam_config, encoder_config=clip_config)
    ).eval()
    state: State = {}
    for family in ("sam", "clip"):
        state |= in_layout(f"{family}-unlimited-ocr-hf", under(PART[family], truth))
    tensors = under("model.vision_tower.", state)
    encoder = model.sam_encoder
    places = probes(encoder.patch_embed.projection, encoder.layers, model.vision_encoder.encoder.layers)
    return loaded("transformers", model, {n: t for n, t in tensors.items() if not n.endswith("position_ids")}, places)


def check_chain(chain: Chain, pixels: Tensor, precision: torch.dtype, look: Look) -> tuple[Check, Trace | None]:
    """The chain on pixels (1, 3, size, size): its shape, and its values where there is a reference."""
    if chain.reference is not None:
        return check_encoder(chain.tested, chain.names, chain.reference, pixels, precision, look)
    whole, size = chain.tested.model, pixels.shape[-1]
    assert isinstance(whole, DeepEncoder)
    with torch.inference_mode():
        tokens = whole.to(precision)(pixels.to(precision))
    side = -(-size // (4 * whole.sam_model.config.patch))
    expected = (1, side * side, 2 * whole.vision_model.config.width)
    what = f"{chain.tested.label} at {size} x {size}"
    if tuple(tokens.shape) != expected or not bool(torch.isfinite(tokens).all()):
        return failed(GROUP, what, f"tokens {list(tokens.shape)}, expected {list(expected)}, finite", [what]), None
    return passed(GROUP, what, f"tokens {list(tokens.shape)}, finite; no second implementation to compare with"), None
