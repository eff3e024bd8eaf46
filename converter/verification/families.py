"""The encoder families as data. A new family is a new entry here, and its layouts' entries in `reference_models`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

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
from converter.layouts import registry
from converter.plan.assumptions import Assumptions, values_of
from converter.verification.probes import Probe, ProbedEncoder
from converter.verification.skip_init import SkipInitialization

State = Mapping[str, Tensor]
# Pixels along a side -> the image (1, 3, side, side).
DrawImage = Callable[[int], Tensor]


def at_trained_size(config: Any, image: DrawImage) -> Tensor:
    """The image at the size at which no positions are resampled."""
    return image(config.image_size)


@dataclass(frozen=True, eq=False)
class Family:
    """One family of encoders."""

    name: str
    encoder: type[nn.Module]  # The module class, built from a config; its state_dict has the canonical names
    config_from: Callable[..., Any]
    # Builds a DeepEncoder from the configs of encoders by family: of this one, and of those before it
    deep_encoder: Callable[[Mapping[str, Any]], nn.Module]
    patches: str  # Module and probe: the patch convolution; empty if there is none
    entry: str  # Probe: the input of the first block
    blocks: str  # Module and prefix of probes: the list of blocks
    output: str = ""  # Probe: the features that `run` returns; empty if they are the last block's
    run: str = "forward"  # Name of the method that computes the features to compare from the input
    # Makes the input of an encoder by itself from its config and the image
    input: Callable[[Any, DrawImage], Tensor] = at_trained_size
    # Pixels along a side at which the DeepEncoder that ends in this encoder runs; the first on a CPU
    sizes: tuple[int, ...] = (512, 640, 1024, 1280)
    # Prefixes of the tensors used between a probe and the one before it, where they are not the probe's own
    used_at: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # Tensors, with their shapes, that a source may lack because the DeepEncoder does not use them
    optional: Callable[[Any], Mapping[str, tuple[int, ...]]] = lambda config: {}

    @property
    def prefix(self) -> str:
        """The prefix of the encoder's tensors in the DeepEncoder."""
        return registry.canonical(self.name).encoder_prefix

    def probes(self, blocks: Iterable[nn.Module], patches: nn.Module | None = None, prefix: str = "") -> list[Probe]:
        """The probes of an implementation, whatever its modules are called.

        Args:
            blocks: The transformer blocks in order.
            patches: The patch convolution, if it runs.
            prefix: Prefix of the probes' names.
        """
        blocks = list(blocks)
        first = [Probe(prefix + self.patches, patches)] if patches is not None else []
        entry = Probe(prefix + self.entry, blocks[0], takes_input=True)
        return [*first, entry, *(Probe(f"{prefix}{self.blocks}.{i}", block) for i, block in enumerate(blocks))]

    def tensors_at(self, probe: str, names: Iterable[str]) -> list[str]:
        """Those of the encoder's tensors that are used between a probe and the one before it."""
        probe = probe.removeprefix(self.prefix)
        return [name for name in names if name.startswith(self.used_at.get(probe, (f"{probe}.",)))]

    def config(self, tensors: Mapping[str, Any], assumptions: Assumptions) -> Any:
        """Return the config of an encoder.

        Args:
            tensors: The encoder's tensors, for their shapes.
            assumptions: What no shape shows.

        Raises:
            LayoutError: The shapes fit no encoder.
        """
        return self.config_from({name: tensor.shape for name, tensor in tensors.items()}, **values_of(assumptions))

    def load(self, tensors: State, assumptions: Assumptions | None = None) -> nn.Module:
        """Load the encoder strictly, built for the tensors' shapes.

        Args:
            tensors: The encoder's tensors.
            assumptions: What no shape shows; the DeepEncoder's values by default.

        Raises:
            LayoutError: The shapes fit no encoder.
            RuntimeError: Tensors are missing, unexpected or of another shape.
        """
        with SkipInitialization():
            encoder = self.encoder(self.config(tensors, assumptions or {}))
        # Assigned, not copied: the encoder takes the tensors' types, and no gigabyte is held twice.
        encoder.load_state_dict(tensors, strict=True, assign=True)
        return encoder.eval()

    def own_probes(self, encoder: nn.Module, prefix: str = "") -> list[Probe]:
        """The probes of our own encoder."""
        modules: dict[str, Any] = dict(encoder.named_modules())
        return self.probes(modules[self.blocks], modules.get(self.patches) if self.patches else None, prefix)

    def probed(self, encoder: nn.Module) -> ProbedEncoder:
        """Our own encoder with its probes."""
        run = getattr(encoder, self.run)
        return ProbedEncoder(type(encoder).__name__, encoder, self.own_probes(encoder), run, self.output)


def _clip_patches(config: ClipConfig) -> dict[str, tuple[int, ...]]:
    """The patch convolution, which the DeepEncoder never runs and some programs leave out."""
    shape = (config.width, config.channels, config.patch, config.patch)
    return {} if config.patch_convolution else {"embeddings.patch_embedding.weight": shape}


def _around_sam(configs: Mapping[str, Any]) -> DeepEncoder:
    """CLIP has DeepSeek-OCR's own sizes next to SAM-base, and the same proportions next to others."""
    sam: SamConfig = configs["sam"]
    compressor = sam.compressor or (2 * sam.neck, 4 * sam.neck)
    width = compressor[1]
    clip = ClipConfig(width=width, depth=2 * sam.depth, heads=max(width // 64, 1), mlp=4 * width)
    return DeepEncoder(dataclasses.replace(sam, compressor=compressor), clip)


def _around_clip(configs: Mapping[str, Any]) -> DeepEncoder:
    """SAM may lack the compressor; without a SAM, it has DeepSeek-OCR's own sizes next to CLIP-L.

    Next to others it has the same proportions.
    """
    return DeepEncoder(_before(configs["clip"], configs), configs["clip"])


def _around_qwen2(configs: Mapping[str, Any]) -> DeepEncoderV2:
    """SAM as for CLIP. Qwen2 may lack the queries, which are as many as the image tokens of 768 and 1024 pixels."""
    qwen2: Qwen2Config = configs["qwen2"]
    queries = qwen2.queries or Qwen2Config.queries
    return DeepEncoderV2(_before(qwen2, configs), dataclasses.replace(qwen2, queries=queries))


def _before(config: ClipConfig | Qwen2Config, configs: Mapping[str, Any]) -> SamConfig:
    """SAM, with a compressor that leads to the next encoder."""
    sam: SamConfig = configs.get("sam") or _next_to(config)
    return dataclasses.replace(sam, compressor=sam.compressor or (2 * sam.neck, config.width))


def _next_to(config: ClipConfig | Qwen2Config) -> SamConfig:
    share = config.width / type(config).width
    heads, depth, neck = max(int(12 * share), 1), -(-config.depth // 2), max(int(256 * share), 1)
    return SamConfig(
        width=64 * heads,
        depth=depth,
        heads=heads,
        mlp=256 * heads,
        global_blocks=tuple(range(2, depth, 3)),
        neck=neck,
        compressor=None,
    )


def _tokens(config: Qwen2Config, image: DrawImage) -> Tensor:
    """Seeded image tokens and queries (1, N, width), as many as at 768 pixels."""
    return torch.randn(1, 288, config.width, generator=torch.Generator().manual_seed(0))


# SAM's tensors after its blocks.
_AFTER_BLOCKS = ("neck.", "net_2.", "net_3.")
_ALL = (
    Family(
        name="sam",
        encoder=SamEncoder,
        config_from=sam_config_from,
        deep_encoder=_around_sam,
        patches="patch_embed.proj",
        entry="pos_embed",
        blocks="blocks",
        output="neck",
        run="features",
        # In the DeepEncoder, the input of CLIP's first block comes from the end of SAM.
        used_at={
            "pos_embed": ("pos_embed",),
            "vision_model.pre_layrnorm": _AFTER_BLOCKS,
            "qwen2_model.queries": _AFTER_BLOCKS,
        },
    ),
    Family(
        name="clip",
        encoder=ClipEncoder,
        config_from=clip_config_from,
        deep_encoder=_around_clip,
        patches="embeddings.patch_embedding",
        entry="pre_layrnorm",
        blocks="transformer.layers",
        used_at={"pre_layrnorm": ("embeddings.class_embedding", "embeddings.position_", "pre_layrnorm.")},
        optional=_clip_patches,
    ),
    Family(
        name="qwen2",
        encoder=Qwen2Encoder,
        config_from=qwen2_config_from,
        deep_encoder=_around_qwen2,
        patches="",
        entry="queries",
        blocks="model.model.layers",
        output="model.model.norm",
        # By itself, Qwen2 needs no table of queries, which no Qwen2 checkpoint holds.
        run="encode",
        input=_tokens,
        sizes=(768, 1024),
        used_at={"queries": ("query_",)},
    ),
)
FAMILIES = {family.name: family for family in _ALL}
