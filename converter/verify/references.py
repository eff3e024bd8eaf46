"""The implementations that define the layouts, built at a source's sizes and loaded with its own tensors.

Each layout has a library whose class reads its names. Where that library is not installed, or a layout has none
(checkpoints of OCR models under their authors' names), transformers' class is loaded through our own mappings, and the
label says so: such a comparison trusts the mapping of the one to the other, which the bytes are checked against.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from converter import catalogue, checkpoint
from converter.checkpoint import contiguous_strides
from converter.compute import evaluate
from converter.dtypes import BY_NAME
from converter.encoders import ClipConfig, SamConfig
from converter.mapping.apply import apply
from converter.mapping.expr import Expr, Read
from converter.mapping.rules import Mapping, Rule, invert
from converter.verify.stages import Probe, probes

State = dict[str, Tensor]

_NOWHERE = checkpoint.Storage(None, (0, 0), 0, 0, "memory")  # type: ignore[arg-type]


class Reference(NamedTuple):
    """A loaded encoder of somebody else's: the places to look at in order, and how to run it on pixels (B, 3, H, W)."""

    label: str
    model: nn.Module
    places: list[Probe]
    run: Callable[[Tensor], Any]


def transformers_sam(config: SamConfig, state: State) -> Reference:
    """transformers' SamVisionModel, from names of `sam-hf`."""
    from transformers import SamVisionConfig, SamVisionModel

    model = SamVisionModel(SamVisionConfig(**_sam_sizes(config)))
    load_model(model, {name: tensor for name, tensor in state.items() if name.startswith("vision_encoder.")})
    inner = model.vision_encoder
    places = probes(inner.patch_embed.projection, inner.layers)
    return Reference(label("transformers", "SamVisionModel"), model, places, model)


def segment_anything_sam(config: SamConfig, state: State) -> Reference:
    """segment-anything's ImageEncoderViT, from names of `sam-meta`."""
    from segment_anything.modeling import ImageEncoderViT

    model = ImageEncoderViT(
        img_size=config.image_size,
        patch_size=config.patch,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
        mlp_ratio=_mlp_ratio(config),
        out_chans=config.neck,
        norm_layer=_layer_norm(1e-6),
        use_rel_pos=True,
        window_size=config.window,
        global_attn_indexes=config.global_blocks,
    )
    load_model(model, _under("image_encoder.", state))
    places = probes(model.patch_embed.proj, model.blocks)
    return Reference(label("segment-anything", "ImageEncoderViT"), model, places, model)


def timm_sam(config: SamConfig, state: State) -> Reference:
    """timm's VisionTransformerSAM, from names of `sam-timm`."""
    from timm.models.vision_transformer_sam import VisionTransformerSAM

    model = VisionTransformerSAM(
        img_size=config.image_size,
        patch_size=config.patch,
        num_classes=0,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
        mlp_ratio=_mlp_ratio(config),
        norm_layer=_layer_norm(1e-6),
        neck_chans=config.neck,
        use_rel_pos=True,
        window_size=config.window,
        global_attn_indexes=config.global_blocks,
    )
    load_model(model, state)
    places = probes(model.patch_embed.proj, model.blocks)
    return Reference(label("timm", "VisionTransformerSAM"), model, places, model.forward_features)


def got_ocr2_sam(config: SamConfig, state: State) -> Reference:
    """transformers' GotOcr2VisionEncoder, from names of `sam-got-ocr2-hf`."""
    from transformers.models.got_ocr2.configuration_got_ocr2 import GotOcr2VisionConfig
    from transformers.models.got_ocr2.modeling_got_ocr2 import GotOcr2VisionEncoder

    model = GotOcr2VisionEncoder(GotOcr2VisionConfig(**_sam_sizes(config)))
    load_model(model, _under("model.vision_tower.", _under("vision_tower.", state)))
    places = probes(model.patch_embed.projection, model.layers)
    return Reference(label("transformers", "GotOcr2VisionEncoder"), model, places, model)


def transformers_clip(config: ClipConfig, state: State) -> Reference:
    """transformers' CLIPVisionModel, from names of `clip-hf`."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    model = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=config.width,
            intermediate_size=config.mlp,
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
            image_size=config.image_size,
            patch_size=config.patch,
            hidden_act="quick_gelu",
            layer_norm_eps=1e-5,
        )
    )
    tensors = {name: t for name, t in _under("vision_model.", state).items() if _is_clip_vision(name)}
    # transformers before 5 has the prefix in its own names.
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in model.state_dict()) else ""
    named = {prefix + name: tensor for name, tensor in tensors.items()}
    load_model(model, named, may_lack=(f"{prefix}post_layernorm.",))
    inner = getattr(model, "vision_model", model)
    places = probes(inner.embeddings.patch_embedding, inner.encoder.layers)
    return Reference(label("transformers", "CLIPVisionModel"), model, places, model)


def open_clip_clip(config: ClipConfig, state: State) -> Reference:
    """open_clip's VisionTransformer with quick_gelu, from names of `clip-openai`."""
    from open_clip.model import CLIPVisionCfg, _build_vision_tower

    sizes = CLIPVisionCfg(
        layers=config.depth,
        width=config.width,
        head_width=config.width // config.heads,
        mlp_ratio=_mlp_ratio(config),
        patch_size=config.patch,
        image_size=config.image_size,
    )
    tensors = _under("visual.", state)
    model = _build_vision_tower(tensors["proj"].shape[1] if "proj" in tensors else config.width, sizes, quick_gelu=True)
    own = model.state_dict()
    load_model(model, {name: tensor for name, tensor in tensors.items() if name in own}, may_lack=("ln_post.", "proj"))
    places = probes(model.conv1, model.transformer.resblocks)
    return Reference(label("open_clip_torch", "VisionTransformer"), model, places, model)


def timm_clip(config: ClipConfig, state: State) -> Reference:
    """timm's VisionTransformer with a norm before its blocks and quick_gelu, from names of `clip-timm`."""
    from timm.layers import QuickGELU
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch,
        num_classes=0,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
        mlp_ratio=_mlp_ratio(config),
        pre_norm=True,
        norm_layer=_layer_norm(1e-5),
        act_layer=QuickGELU,
    )
    load_model(model, {n: t for n, t in state.items() if not n.startswith("head.")}, may_lack=("norm.",))
    places = probes(model.patch_embed.proj, model.blocks)
    return Reference(label("timm", "VisionTransformer"), model, places, model.forward_features)


Config = SamConfig | ClipConfig

# By layout: the package whose class reads its names, and what builds it.
_OWN: dict[str, tuple[str, Callable[..., Reference]]] = {
    "sam-hf": ("transformers", transformers_sam),
    "sam-meta": ("segment_anything", segment_anything_sam),
    "sam-timm": ("timm", timm_sam),
    "sam-got-ocr2-hf": ("transformers", got_ocr2_sam),
    "clip-hf": ("transformers", transformers_clip),
    "clip-openai": ("open_clip", open_clip_clip),
    "clip-timm": ("timm", timm_clip),
}
_COMMON: dict[str, tuple[str, Callable[..., Reference]]] = {
    "sam": ("sam-hf", transformers_sam),
    "clip": ("clip-hf", transformers_clip),
}


@contextmanager
def uninitialised() -> Iterator[None]:
    """Layers made inside hold whatever lay in memory: all of it is overwritten next, and drawing it takes seconds."""
    kinds: tuple[Any, ...] = (nn.Linear, nn.Conv2d, nn.Embedding)
    before = [kind.reset_parameters for kind in kinds]
    for kind in kinds:
        kind.reset_parameters = _nothing
    try:
        yield
    finally:
        for kind, method in zip(kinds, before, strict=True):
            kind.reset_parameters = method


def _nothing(layer: nn.Module) -> None:
    pass


def build(mapping: Mapping, config: Config, own: State, hub: State) -> Reference:
    """The reference for a source: `own` are its tensors by their own names, `hub` the same by the hub's names.

    `own` is empty where the source's library cannot run what was made of it (resampled positions). Raises ImportError
    where neither the layout's own library nor transformers is installed.
    """
    package, make = _OWN.get(mapping.name, ("", transformers_sam))
    if own and package and importlib.util.find_spec(package) is not None:
        with uninitialised():
            found: Reference = make(config, own)
        return found
    layout, make = _COMMON[mapping.family]
    with uninitialised():
        reference: Reference = make(config, in_layout(layout, hub))
    return reference._replace(label=f"{reference.label}, loaded through {mapping.name} -> {layout}")


def in_layout(name: str, hub: State) -> State:
    """Tensors in the hub's names brought to a layout's, with the first of its prefixes."""
    mapping = catalogue.load(name)
    assert isinstance(mapping, Mapping)
    rules = [rule._replace(optional=True) for rule in invert(mapping.rules_for(mapping.signature.prefixes[0]))]
    values = {key: _described(key, tensor) for key, tensor in hub.items() if _claimed(key, rules)}
    made = apply(tuple(rules), values, name).values
    return {key: evaluate(value, lambda leaf: hub[leaf.key]) for key, value in made.items()}


def _claimed(key: str, rules: list[Rule]) -> bool:
    return any(template.match(key) is not None for rule in rules for template in rule.sources)


def _described(key: str, tensor: Tensor) -> Expr:
    """A tensor in memory as the rules know tensors; only its name, type and shape are looked at."""
    dtype, shape = BY_NAME[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape)
    return Read(dtype, shape, checkpoint.Tensor(key, dtype, shape, _NOWHERE, 0, contiguous_strides(shape)))


def _sam_sizes(config: SamConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "mlp_dim": config.mlp,
        "image_size": config.image_size,
        "patch_size": config.patch,
        "output_channels": config.neck,
        "window_size": config.window,
        "global_attn_indexes": list(config.global_blocks),
        "layer_norm_eps": 1e-6,
    }


def _mlp_ratio(config: Config) -> float:
    """What libraries multiply the width by, and then cut: the half keeps rounding from taking one off."""
    return (config.mlp + 0.5) / config.width


def _under(prefix: str, state: State) -> State:
    """The tensors under a prefix, without it; all of them where none has it."""
    found = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    return found or state


def _is_clip_vision(name: str) -> bool:
    return (
        name.startswith(("embeddings.", "pre_layrnorm.", "post_layernorm.", "encoder.")) and "position_ids" not in name
    )


def _layer_norm(eps: float) -> Callable[..., nn.LayerNorm]:
    return lambda width, **options: nn.LayerNorm(width, eps=eps)


def load_model(model: nn.Module, state: State, may_lack: tuple[str, ...] = ()) -> None:
    """Load strictly, but for what the encoder does not use (`may_lack`) and the source may leave out."""
    lacking, extra = model.load_state_dict(state, strict=False)
    lacking = [name for name in lacking if not name.startswith(may_lack)] if may_lack else lacking
    if lacking or extra:
        raise RuntimeError(f"{type(model).__name__}: missing {lacking[:3]}, unexpected {extra[:3]}")


def label(package: str, name: str) -> str:
    return f"{package} {importlib.metadata.version(package)} {name}"
