"""Reference implementations: the libraries' own encoders, loaded with a source's tensors.

Each layout has a library whose class reads its names. Where that library is not installed, or a layout has none (OCR
models under their authors' names), transformers' class is loaded through our own mappings, and the label says so: such
a comparison depends on the mappings.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from converter.encoders import ClipConfig, SamConfig
from converter.layouts import registry
from converter.layouts.claims import claim
from converter.layouts.spec import LayoutMapping
from converter.output.pretrained_config import clip_vision_config, sam_vision_config
from converter.plan.apply import apply
from converter.plan.route import writing_rules
from converter.tensors.dtypes import BY_NAME
from converter.tensors.evaluate import evaluate
from converter.tensors.lazy_tensor import LazyTensor, Read
from converter.tensors.tensor_info import TensorInfo
from converter.verification.families import FAMILIES, State
from converter.verification.probes import ProbedEncoder
from converter.verification.skip_init import SkipInitialization


@dataclass(frozen=True)
class Reference:
    """A library's implementation of a layout."""

    module: str  # Older releases of the library may lack it
    build: Callable[[Any, State], ProbedEncoder]  # From a config and the tensors by the layout's names

    @property
    def installed(self) -> bool:
        """Whether the module, and what it needs itself, can be imported."""
        try:
            importlib.import_module(self.module)
        except ModuleNotFoundError:
            return False
        return True


def transformers_sam(config: SamConfig, state: State) -> ProbedEncoder:
    """transformers' SamVisionEncoder, which its SamVisionModel wraps from 4.52 on."""
    from transformers import SamVisionConfig
    from transformers.models.sam.modeling_sam import SamVisionEncoder

    model = SamVisionEncoder(SamVisionConfig(**sam_vision_config(config)))
    tensors = without_prefix("vision_encoder.", state)
    return _loaded("sam", "transformers", model, tensors, model.layers, model.patch_embed.projection)


def segment_anything_sam(config: SamConfig, state: State) -> ProbedEncoder:
    """segment-anything's ImageEncoderViT."""
    from segment_anything.modeling import ImageEncoderViT

    model = ImageEncoderViT(out_chans=config.neck, **_vitdet_sizes(config))
    tensors = without_prefix("image_encoder.", state)
    return _loaded("sam", "segment-anything", model, tensors, model.blocks, model.patch_embed.proj)


def timm_sam(config: SamConfig, state: State) -> ProbedEncoder:
    """timm's VisionTransformerSAM."""
    from timm.models.vision_transformer_sam import VisionTransformerSAM

    model = VisionTransformerSAM(num_classes=0, neck_chans=config.neck, **_vitdet_sizes(config))
    encoder = _loaded("sam", "timm", model, state, model.blocks, model.patch_embed.proj)
    return replace(encoder, run=model.forward_features)


def got_ocr2_sam(config: SamConfig, state: State) -> ProbedEncoder:
    """transformers' GotOcr2VisionEncoder."""
    from transformers.models.got_ocr2.configuration_got_ocr2 import GotOcr2VisionConfig
    from transformers.models.got_ocr2.modeling_got_ocr2 import GotOcr2VisionEncoder

    model = GotOcr2VisionEncoder(GotOcr2VisionConfig(**sam_vision_config(config)))
    tensors = without_prefix("model.vision_tower.", without_prefix("vision_tower.", state))
    return _loaded("sam", "transformers", model, tensors, model.layers, model.patch_embed.projection)


def transformers_clip(config: ClipConfig, state: State) -> ProbedEncoder:
    """transformers' CLIPVisionModel."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    model = CLIPVisionModel(CLIPVisionConfig(**clip_vision_config(config)))
    # transformers before 5 wraps the encoder in a `vision_model`, which its names begin with.
    encoder = getattr(model, "vision_model", model)
    parts = ("embeddings.", "pre_layrnorm.", "post_layernorm.", "encoder.")
    tensors = {
        name: tensor
        for name, tensor in without_prefix("vision_model.", state).items()
        if name.startswith(parts) and "position_ids" not in name
    }
    patches = encoder.embeddings.patch_embedding
    result = _loaded("clip", "transformers", encoder, tensors, encoder.encoder.layers, patches, ("post_layernorm.",))
    return replace(result, label=label("transformers", type(model).__name__))


def open_clip_clip(config: ClipConfig, state: State) -> ProbedEncoder:
    """open_clip's VisionTransformer."""
    from open_clip.model import CLIPVisionCfg, _build_vision_tower

    sizes = CLIPVisionCfg(
        layers=config.depth,
        width=config.width,
        head_width=config.width // config.heads,
        mlp_ratio=_mlp_ratio(config),
        patch_size=config.patch,
        image_size=config.image_size,
        norm_kwargs={"eps": config.epsilon},
    )
    tensors = without_prefix("visual.", state)
    projected = tensors["proj"].shape[1] if "proj" in tensors else config.width
    model = _build_vision_tower(projected, sizes, quick_gelu=config.activation == "quick_gelu")
    if config.activation not in ("quick_gelu", "gelu"):
        for block in model.transformer.resblocks:
            block.mlp.gelu = _ACTIVATIONS[config.activation]()
    names = model.state_dict().keys()
    tensors = {name: tensor for name, tensor in tensors.items() if name in names}
    blocks = model.transformer.resblocks
    return _loaded("clip", "open_clip_torch", model, tensors, blocks, model.conv1, ("ln_post.", "proj"))


def timm_clip(config: ClipConfig, state: State) -> ProbedEncoder:
    """timm's VisionTransformer with a norm before its blocks."""
    from timm.layers import QuickGELU
    from timm.models.vision_transformer import VisionTransformer

    sizes = _vit_sizes(config)
    if config.activation == "quick_gelu":
        sizes["act_layer"] = QuickGELU
    model = VisionTransformer(num_classes=0, pre_norm=True, weight_init="skip", **sizes)
    tensors = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    encoder = _loaded("clip", "timm", model, tensors, model.blocks, model.patch_embed.proj, ("norm.",))
    return replace(encoder, run=model.forward_features)


# By layout. A family's `<family>-hf` is also used for layouts without a library of their own.
REFERENCES = {
    "sam-hf": Reference("transformers", transformers_sam),
    "sam-meta": Reference("segment_anything", segment_anything_sam),
    "sam-timm": Reference("timm", timm_sam),
    "sam-got-ocr2-hf": Reference("transformers.models.got_ocr2", got_ocr2_sam),
    "clip-hf": Reference("transformers", transformers_clip),
    "clip-openai": Reference("open_clip", open_clip_clip),
    "clip-timm": Reference("timm", timm_clip),
}


def build_reference(mapping: LayoutMapping, config: Any, own: State, canonical: State) -> ProbedEncoder:
    """The reference for a source.

    Args:
        mapping: The mapping from the source's layout.
        config: The encoder's config.
        own: The source's tensors by their own names; empty if its library cannot load them (resampled positions).
        canonical: The same tensors by canonical names.

    Raises:
        ModuleNotFoundError: Neither the layout's own library nor transformers is installed.
    """
    reference = REFERENCES.get(mapping.name)
    with SkipInitialization():
        if own and reference is not None and reference.installed:
            return reference.build(config, own)
        layout = f"{mapping.family}-hf"
        encoder = REFERENCES[layout].build(config, to_layout(layout, canonical))
    return replace(encoder, label=f"{encoder.label}, loaded through {mapping.name} -> {layout}")


def to_layout(name: str, canonical: State) -> dict[str, Tensor]:
    """Tensors by canonical names converted to a layout, under the first of its prefixes."""
    mapping = registry.load(name).mapping
    rules = tuple(rule._replace(optional=True) for rule in writing_rules(mapping, full_model=False))
    unclaimed = set(claim(rules, canonical).unclaimed)
    values = {key: _lazy(key, tensor) for key, tensor in canonical.items() if key not in unclaimed}
    outputs = apply(rules, values, name).values
    return {key: evaluate(value, lambda leaf: canonical[leaf.key]) for key, value in outputs.items()}


def _lazy(key: str, tensor: Tensor) -> LazyTensor:
    """A tensor in memory as a lazy tensor: `to_layout` reads it by its key, not from a storage."""
    no_storage: Any = None
    dtype, shape = BY_NAME[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape)
    return Read(dtype, shape, TensorInfo(key, dtype, shape, no_storage, 0, ()))


def _vitdet_sizes(config: SamConfig) -> dict[str, Any]:
    """The arguments of segment-anything's and timm's classes."""
    return {
        **_vit_sizes(config),
        "use_rel_pos": True,
        "window_size": config.window,
        "global_attn_indexes": config.global_blocks,
    }


class _QuickGelu(nn.Module):
    """transformers' `quick_gelu`, for libraries without it."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1.702 * x).sigmoid()


# Modules of activations by transformers' names.
_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "quick_gelu": _QuickGelu,
    "gelu": nn.GELU,
    "gelu_pytorch_tanh": partial(nn.GELU, approximate="tanh"),
    "relu": nn.ReLU,
    "silu": nn.SiLU,
}


def _vit_sizes(config: SamConfig | ClipConfig) -> dict[str, Any]:
    return {
        "img_size": config.image_size,
        "patch_size": config.patch,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
        "mlp_ratio": _mlp_ratio(config),
        "act_layer": _ACTIVATIONS[config.activation],
        "norm_layer": lambda width, **options: nn.LayerNorm(width, eps=config.epsilon),
    }


def _mlp_ratio(config: SamConfig | ClipConfig) -> float:
    """The factor from width to MLP width; libraries cut the product, and the half keeps rounding from losing one."""
    return (config.mlp + 0.5) / config.width


def without_prefix(prefix: str, state: State) -> State:
    """The tensors under a prefix, without it; all tensors if none has it."""
    found = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    return found or state


def _loaded(
    family: str,
    package: str,
    model: nn.Module,
    state: State,
    blocks: Iterable[nn.Module],
    patches: nn.Module,
    unused: tuple[str, ...] = (),
) -> ProbedEncoder:
    """A library's model with weights and probes. `state` may lack tensors under the prefixes `unused`.

    Raises:
        RuntimeError: Tensors are missing, unexpected or of another shape.
    """
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [name for name in missing if not name.startswith(unused)]
    if missing or unexpected:
        raise RuntimeError(f"{type(model).__name__}: missing {missing[:3]}, unexpected {unexpected[:3]}")
    spec = FAMILIES[family]
    probes = spec.probes(blocks, patches)
    return ProbedEncoder(label(package, type(model).__name__), model.eval(), probes, model, spec.output)


def label(package: str, name: str) -> str:
    """Distribution, version and class."""
    return f"{package} {importlib.metadata.version(package)} {name}"
