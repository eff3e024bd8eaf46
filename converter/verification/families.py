"""The encoder families as data. A new family needs an item here, and items for its layouts in `reference_models`.

A probe is a point of an encoder at which features are recorded and compared: the output or the input of a module.
"""

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
    config_from: Callable[..., Any]  # Returns the config for the shapes of the tensors
    # Builds a DeepEncoder from the configs of encoders by family: this one, and those before it in the model
    deep_encoder: Callable[[Mapping[str, Any]], nn.Module]
    patch_conv_path: str  # The path of the patch convolution, and the name of its probe; empty if there is none
    block_input_probe: str  # The name of the probe at the input of the first block
    blocks_path: str  # The path of the list of blocks; the probe of block i is `{blocks_path}.{i}`
    output_probe: str = ""  # The name of the probe at the output of `forward_method`; empty if it is the last block's
    forward_method: str = "forward"  # The name of the method that computes the features to compare from the input
    tokens: int = 0  # The number of tokens that the encoder by itself gets as input; 0 if it gets an image
    # Pixels along a side at which the DeepEncoder that ends in this encoder runs; only the first on a CPU
    sizes: tuple[int, ...] = (512, 640, 1024, 1280)
    # Prefixes of the tensors that are used before a probe and after the previous one. By default the probe's name is
    # the prefix.
    prefixes_by_probe: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # Returns names and shapes of tensors that a source may lack, as the DeepEncoder does not use them
    optional_shapes: Callable[[Any], Mapping[str, tuple[int, ...]]] = lambda config: {}

    @property
    def prefix(self) -> str:
        """The prefix of the encoder's tensors in the DeepEncoder."""
        return registry.encoder_prefix(self.name)

    def input(self, config: Any, draw_image: Callable[[int], Tensor]) -> Tensor:
        """Return the input of an encoder by itself: the image at the trained size, or seeded tokens (1, N, width)."""
        if not self.tokens:
            return draw_image(config.image_size)
        return torch.randn(1, self.tokens, config.width, generator=torch.Generator().manual_seed(0))

    def probes(self, blocks: Iterable[nn.Module], patches: nn.Module | None = None, prefix: str = "") -> list[Probe]:
        """Return the probes of any implementation of the encoder.

        Args:
            blocks: The transformer blocks in order.
            patches: The patch convolution, if it runs.
            prefix: Prefix of the probes' names.
        """
        blocks = list(blocks)
        probes = [Probe(prefix + self.patch_conv_path, patches)] if patches is not None else []
        probes.append(Probe(prefix + self.block_input_probe, blocks[0], takes_input=True))
        probes += [Probe(f"{prefix}{self.blocks_path}.{i}", block) for i, block in enumerate(blocks)]
        return probes

    def tensors_before(self, probe: str, names: Iterable[str]) -> list[str]:
        """Return those of the encoder's tensors that are used before a probe and after the previous one."""
        probe = probe.removeprefix(self.prefix)
        prefixes = self.prefixes_by_probe.get(probe, (f"{probe}.",))
        return [name for name in names if name.startswith(prefixes)]

    def config(self, tensors: Mapping[str, Any], assumptions: Assumptions) -> Any:
        """Return the config of an encoder with tensors of these shapes; LayoutError if they fit no encoder."""
        return self.config_from({name: tensor.shape for name, tensor in tensors.items()}, **values_of(assumptions))

    def load(self, tensors: State, assumptions: Assumptions | None = None) -> nn.Module:
        """Load the encoder strictly; `assumptions` are the DeepEncoder's by default.

        LayoutError if the shapes fit no encoder; RuntimeError for tensors that are missing, or not the encoder's.
        """
        with SkipInitialization():
            encoder = self.encoder(self.config(tensors, assumptions or {}))
        # assign=True keeps the types of the tensors, and avoids a second copy in memory.
        encoder.load_state_dict(tensors, strict=True, assign=True)
        return encoder.eval()

    def encoder_probes(self, encoder: nn.Module, prefix: str = "") -> list[Probe]:
        """Return the probes of our own implementation."""
        modules: dict[str, Any] = dict(encoder.named_modules())
        patches = modules.get(self.patch_conv_path) if self.patch_conv_path else None
        return self.probes(modules[self.blocks_path], patches, prefix)

    def probed(self, encoder: nn.Module) -> ProbedEncoder:
        """Return our own implementation with its probes."""
        run = getattr(encoder, self.forward_method)
        return ProbedEncoder(type(encoder).__name__, encoder, self.encoder_probes(encoder), run, self.output_probe)


def _clip_optional_shapes(config: ClipConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of the patch convolution, which the DeepEncoder never runs and some programs leave out."""
    shape = (config.width, config.channels, config.patch, config.patch)
    return {} if config.patch_convolution else {"embeddings.patch_embedding.weight": shape}


def _deep_encoder_for_sam(configs: Mapping[str, Any]) -> DeepEncoder:
    """Build a DeepEncoder with SAM, and a CLIP in DeepSeek-OCR's proportions: SAM-base gives CLIP-L."""
    sam: SamConfig = configs["sam"]
    compressor = sam.compressor or (2 * sam.neck, 4 * sam.neck)
    width = compressor[1]
    clip = ClipConfig(width=width, depth=2 * sam.depth, heads=max(width // 64, 1), mlp=4 * width)
    return DeepEncoder(replace(sam, compressor=compressor), clip)


def _deep_encoder_for_clip(configs: Mapping[str, Any]) -> DeepEncoder:
    return DeepEncoder(_sam_for(configs["clip"], configs), configs["clip"])


def _deep_encoder_for_qwen2(configs: Mapping[str, Any]) -> DeepEncoderV2:
    """Build a DeepEncoder with Qwen2, and with queries for 768 and 1024 pixels if Qwen2 lacks them."""
    qwen2: Qwen2Config = configs["qwen2"]
    return DeepEncoderV2(_sam_for(qwen2, configs), replace(qwen2, queries=qwen2.queries or Qwen2Config.queries))


def _sam_for(config: ClipConfig | Qwen2Config, configs: Mapping[str, Any]) -> SamConfig:
    """Return the config of SAM with a compressor to the encoder's width.

    Without a SAM in `configs`, it has DeepSeek-OCR's proportions: a CLIP of width 1024 gives 12 heads.
    """
    scale = config.width / type(config).width
    heads, depth, neck = max(int(12 * scale), 1), -(-config.depth // 2), max(int(256 * scale), 1)
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


# Prefixes of SAM's tensors after its blocks.
_AFTER_BLOCKS = ("neck.", "net_2.", "net_3.")
_ALL = (
    Family(
        name="sam",
        encoder=encoders.SamEncoder,
        config_from=encoders.sam_config_from,
        deep_encoder=_deep_encoder_for_sam,
        patch_conv_path="patch_embed.proj",
        block_input_probe="pos_embed",
        blocks_path="blocks",
        output_probe="neck",
        forward_method="features",
        # In the DeepEncoder, the input of CLIP's first block comes from the end of SAM.
        prefixes_by_probe={
            "pos_embed": ("pos_embed",),
            "vision_model.pre_layrnorm": _AFTER_BLOCKS,
            "qwen2_model.queries": _AFTER_BLOCKS,
        },
    ),
    Family(
        name="clip",
        encoder=encoders.ClipEncoder,
        config_from=encoders.clip_config_from,
        deep_encoder=_deep_encoder_for_clip,
        patch_conv_path="embeddings.patch_embedding",
        block_input_probe="pre_layrnorm",
        blocks_path="transformer.layers",
        prefixes_by_probe={"pre_layrnorm": ("embeddings.class_embedding", "embeddings.position_", "pre_layrnorm.")},
        optional_shapes=_clip_optional_shapes,
    ),
    Family(
        name="qwen2",
        encoder=encoders.Qwen2Encoder,
        config_from=encoders.qwen2_config_from,
        deep_encoder=_deep_encoder_for_qwen2,
        patch_conv_path="",
        block_input_probe="queries",
        blocks_path="model.model.layers",
        output_probe="model.model.norm",
        # By itself, Qwen2 needs no table of queries, which no Qwen2 checkpoint holds.
        forward_method="encode",
        # Half of the tokens are image tokens, as at 768 pixels.
        tokens=288,
        sizes=(768, 1024),
        prefixes_by_probe={"queries": ("query_",)},
    ),
)
FAMILIES = {family.name: family for family in _ALL}
