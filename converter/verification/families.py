"""The encoder families as data. A new family is a new entry here, and its layouts' entries in `reference_models`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from converter import encoders
from converter.encoders import ClipConfig, DeepEncoder, DeepEncoderV2, Qwen2Config, SamConfig
from converter.layouts import registry
from converter.plan.assumptions import Assumptions, values_of
from converter.verification.probes import Probe, ProbedEncoder, SkipInitialization

State = Mapping[str, Tensor]


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
    tokens: int = 0  # Number of tokens that the encoder takes by itself; 0 if it takes an image
    # Pixels along a side at which the DeepEncoder that ends in this encoder runs; the first on a CPU
    sizes: tuple[int, ...] = (512, 640, 1024, 1280)
    # Prefixes of the tensors used between a probe and the one before it, where they are not the probe's own
    used_at: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # Tensors, with their shapes, that a source may lack because the DeepEncoder does not use them
    optional: Callable[[Any], Mapping[str, tuple[int, ...]]] = lambda config: {}

    @property
    def prefix(self) -> str:
        """The prefix of the encoder's tensors in the DeepEncoder."""
        return registry.encoder_prefix(self.name)

    def input(self, config: Any, draw_image: Callable[[int], Tensor]) -> Tensor:
        """The input of an encoder by itself: the image at the trained size, or seeded tokens (1, N, width)."""
        if not self.tokens:
            return draw_image(config.image_size)
        return torch.randn(1, self.tokens, config.width, generator=torch.Generator().manual_seed(0))

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
        """The config of an encoder of the tensors' shapes; LayoutError if they fit none."""
        return self.config_from({name: tensor.shape for name, tensor in tensors.items()}, **values_of(assumptions))

    def load(self, tensors: State, assumptions: Assumptions | None = None) -> nn.Module:
        """Load the encoder strictly; `assumptions` are the DeepEncoder's by default.

        LayoutError if the shapes fit no encoder; RuntimeError for tensors that are missing, or not the encoder's.
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
    return DeepEncoder(replace(sam, compressor=compressor), clip)


def _around_clip(configs: Mapping[str, Any]) -> DeepEncoder:
    return DeepEncoder(_before(configs["clip"], configs), configs["clip"])


def _around_qwen2(configs: Mapping[str, Any]) -> DeepEncoderV2:
    """Qwen2 may lack the queries, which are as many as the image tokens of 768 and 1024 pixels."""
    qwen2: Qwen2Config = configs["qwen2"]
    return DeepEncoderV2(_before(qwen2, configs), replace(qwen2, queries=qwen2.queries or Qwen2Config.queries))


def _before(config: ClipConfig | Qwen2Config, configs: Mapping[str, Any]) -> SamConfig:
    """SAM, or one of DeepSeek-OCR's proportions next to the encoder, with a compressor that leads to it."""
    share = config.width / type(config).width
    heads, depth, neck = max(int(12 * share), 1), -(-config.depth // 2), max(int(256 * share), 1)
    sam: SamConfig = configs.get("sam") or SamConfig(
        width=64 * heads,
        depth=depth,
        heads=heads,
        mlp=256 * heads,
        global_blocks=tuple(range(2, depth, 3)),
        neck=neck,
        compressor=None,
    )
    return replace(sam, compressor=sam.compressor or (2 * sam.neck, config.width))


# SAM's tensors after its blocks.
_AFTER_BLOCKS = ("neck.", "net_2.", "net_3.")
_ALL = (
    Family(
        name="sam",
        encoder=encoders.SamEncoder,
        config_from=encoders.sam_config_from,
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
        encoder=encoders.ClipEncoder,
        config_from=encoders.clip_config_from,
        deep_encoder=_around_clip,
        patches="embeddings.patch_embedding",
        entry="pre_layrnorm",
        blocks="transformer.layers",
        used_at={"pre_layrnorm": ("embeddings.class_embedding", "embeddings.position_", "pre_layrnorm.")},
        optional=_clip_patches,
    ),
    Family(
        name="qwen2",
        encoder=encoders.Qwen2Encoder,
        config_from=encoders.qwen2_config_from,
        deep_encoder=_around_qwen2,
        patches="",
        entry="queries",
        blocks="model.model.layers",
        output="model.model.norm",
        # By itself, Qwen2 needs no table of queries, which no Qwen2 checkpoint holds.
        run="encode",
        # Half of them are image tokens, as at 768 pixels.
        tokens=288,
        sizes=(768, 1024),
        used_at={"queries": ("query_",)},
    ),
)
FAMILIES = {family.name: family for family in _ALL}
