"""The whole DeepEncoder with the converted part in it, at DeepSeek-OCR's sizes.

Only at sizes other than the trained one are positions resampled, so only there does a wrong resampling show. What the
converted file does not hold is seeded, the same in both chains: ours, with the converted tensors, and transformers' own
UnlimitedOcrVisionModel, with the source's.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from converter.encoders import ClipConfig, ClipEncoder, DeepEncoder, SamConfig
from converter.verify.assembled import assembled_chain
from converter.verify.outputs import Look, Tested, check_encoder
from converter.verify.references import Reference, State, in_layout, label, load_model, uninitialised
from converter.verify.result import Check, Trace, failed, passed
from converter.verify.stages import names_of, probes

PROOF = "outputs"
_PATCHES = "embeddings.patch_embedding.weight"
_MODULE = "transformers.models.unlimited_ocr"


class Chain(NamedTuple):
    """A DeepEncoder around a converted encoder, and the same chain by transformers where that has it."""

    whole: DeepEncoder
    reference: Reference | None


def build_chain(family: str, encoder: nn.Module, hub: State, device: torch.device) -> Chain:
    """`encoder` is the converted one; `hub` the source's tensors by the hub's names, for the reference."""
    whole = _around(family, encoder, device)
    part = "sam_model." if family == "sam" else "vision_model."
    state = whole.state_dict()
    truth = {**state, **{part + name: tensor for name, tensor in hub.items()}}
    reference = None
    if hub:
        make = _transformers_chain if importlib.util.find_spec(_MODULE) is not None else assembled_chain
        # Made where it runs: its own initialisation, overwritten at once, takes seconds on a processor.
        with device:
            reference = make(whole, truth)
        # Tensors of the source that it took as they are lie where they were read.
        reference.model.to(device)
    return Chain(whole, reference)


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
        clip, sam = (
            config,
            SamConfig(
                width=64 * heads,
                depth=depth,
                heads=heads,
                mlp=256 * heads,
                global_blocks=tuple(i for i in range(depth) if i % 3 == 2),
                neck=neck,
                compressor=(2 * neck, config.width),
            ),
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


def with_patches(encoder: Any, hub: State) -> tuple[ClipEncoder, State]:
    """A CLIP that came without patch embedding, which the chain never runs, with a seeded one; and so its source."""
    config = dataclasses.replace(encoder.config, patch_convolution=True)
    shape = (config.width, config.channels, config.patch, config.patch)
    patches = {_PATCHES: torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02}
    with torch.device("meta"):
        whole = ClipEncoder(config).eval()
    state = encoder.state_dict()
    device = state["embeddings.class_embedding"].device
    whole.load_state_dict({**state, _PATCHES: patches[_PATCHES].to(device)}, assign=True)
    return whole, {**hub, **patches}


def _transformers_chain(whole: DeepEncoder, truth: dict[str, Tensor]) -> Reference:
    """transformers' chain with `truth`, tensors by DeepSeek's names."""
    from transformers.models.unlimited_ocr import configuration_unlimited_ocr as configuration
    from transformers.models.unlimited_ocr.modeling_unlimited_ocr import UnlimitedOcrVisionModel

    sam, clip = whole.sam_model.config, whole.vision_model.config
    assert sam.compressor is not None
    sam_config = configuration.UnlimitedOcrSamVisionConfig(
        hidden_size=sam.width,
        output_channels=sam.neck,
        num_hidden_layers=sam.depth,
        num_attention_heads=sam.heads,
        image_size=sam.image_size,
        patch_size=sam.patch,
        window_size=sam.window,
        global_attn_indexes=list(sam.global_blocks),
        mlp_dim=sam.mlp,
        downsample_channels=list(sam.compressor),
    )
    clip_config = configuration.UnlimitedOcrVisionEncoderConfig(
        hidden_size=clip.width,
        intermediate_size=clip.mlp,
        num_hidden_layers=clip.depth,
        num_attention_heads=clip.heads,
        image_size=clip.image_size,
        patch_size=clip.patch,
    )
    sizes = configuration.UnlimitedOcrVisionConfig(sam_config=sam_config, encoder_config=clip_config)
    with uninitialised():
        model = UnlimitedOcrVisionModel(sizes).eval()
    state: State = {}
    for layout, part, prefix in (
        ("sam-unlimited-ocr-hf", "sam_model.", "model.vision_tower."),
        ("clip-unlimited-ocr-hf", "vision_model.", "model.vision_tower."),
    ):
        hub = {name.removeprefix(part): tensor for name, tensor in truth.items() if name.startswith(part)}
        state |= {name.removeprefix(prefix): tensor for name, tensor in in_layout(layout, hub).items()}
    load_model(model, {name: tensor for name, tensor in state.items() if not name.endswith("position_ids")})
    sam_part = model.sam_encoder
    places = probes(sam_part.patch_embed.projection, sam_part.layers, model.vision_encoder.encoder.layers)
    return Reference(label("transformers", "UnlimitedOcrVisionModel"), model, places, model)


def check_chain(chain: Chain, pixels: Tensor, precision: torch.dtype, look: Look) -> tuple[Check, Trace | None]:
    """The chain on pixels (1, 3, size, size): its shape, and its values where there is a reference."""
    whole, size = chain.whole, pixels.shape[-1]
    sam, layers = whole.sam_model, whole.vision_model.transformer.layers
    names = [f"sam_model.{name}" for name in names_of("sam", len(sam.blocks))]
    # Without the patch convolution, which the chain never runs.
    names += [f"vision_model.{name}" for name in names_of("clip", len(layers))[1:]]
    places = probes(sam.patch_embed.proj, sam.blocks, layers)
    if chain.reference is not None:
        tested = Tested(whole, places, [*names, "concatenation"], whole)
        return check_encoder(tested, chain.reference, pixels, precision, look)
    with torch.inference_mode():
        tokens = whole.to(precision)(pixels.to(precision))
    side = -(-size // (4 * whole.sam_model.config.patch))
    expected = (1, side * side, 2 * whole.vision_model.config.width)
    what = f"DeepEncoder at {size} x {size}"
    if tuple(tokens.shape) != expected or not bool(torch.isfinite(tokens).all()):
        return failed(PROOF, what, f"tokens {list(tokens.shape)}, expected {list(expected)}, finite", [what]), None
    return passed(PROOF, what, f"tokens {list(tokens.shape)}, finite; no second implementation to compare with"), None
