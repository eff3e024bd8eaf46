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

from converter.encoders import ClipConfig, SamConfig
from converter.layouts import registry
from converter.layouts.claims import claim
from converter.layouts.spec import LayoutMapping
from converter.plan.apply import apply
from converter.plan.route import writing_rules
from converter.storage.byte_range import Storage
from converter.tensors.dtypes import BY_NAME
from converter.tensors.evaluate import evaluate
from converter.tensors.lazy_tensor import LazyTensor, Read
from converter.tensors.tensor_info import TensorInfo as TensorInfo
from converter.tensors.tensor_info import contiguous_strides
from converter.verification.probes import Probe, probes

State = dict[str, Tensor]

_NOWHERE = Storage(None, (0, 0), 0, 0, "memory")  # type: ignore[arg-type]


class Runner(NamedTuple):
    """A loaded encoder: whose it is, the places to look at in order, and how to run it on pixels (B, 3, H, W)."""

    label: str
    model: nn.Module
    places: list[Probe]
    run: Callable[[Tensor], Any]


def transformers_sam(config: SamConfig, state: State) -> Runner:
    """transformers' SamVisionEncoder, which its SamVisionModel wraps from 4.52 on, from names of `sam-hf`."""
    from transformers import SamVisionConfig
    from transformers.models.sam.modeling_sam import SamVisionEncoder

    model = SamVisionEncoder(SamVisionConfig(**sam_sizes(config)))
    places = probes(model.patch_embed.projection, model.layers)
    return loaded("transformers", model, under("vision_encoder.", state), places)


def segment_anything_sam(config: SamConfig, state: State) -> Runner:
    """segment-anything's ImageEncoderViT, from names of `sam-meta`."""
    from segment_anything.modeling import ImageEncoderViT

    model = ImageEncoderViT(out_chans=config.neck, **_vitdet_sizes(config))
    places = probes(model.patch_embed.proj, model.blocks)
    return loaded("segment-anything", model, under("image_encoder.", state), places)


def timm_sam(config: SamConfig, state: State) -> Runner:
    """timm's VisionTransformerSAM, from names of `sam-timm`."""
    from timm.models.vision_transformer_sam import VisionTransformerSAM

    model = VisionTransformerSAM(num_classes=0, neck_chans=config.neck, **_vitdet_sizes(config))
    found = loaded("timm", model, state, probes(model.patch_embed.proj, model.blocks))
    return found._replace(run=model.forward_features)


def got_ocr2_sam(config: SamConfig, state: State) -> Runner:
    """transformers' GotOcr2VisionEncoder, from names of `sam-got-ocr2-hf`."""
    from transformers.models.got_ocr2.configuration_got_ocr2 import GotOcr2VisionConfig
    from transformers.models.got_ocr2.modeling_got_ocr2 import GotOcr2VisionEncoder

    model = GotOcr2VisionEncoder(GotOcr2VisionConfig(**sam_sizes(config)))
    tensors = under("model.vision_tower.", under("vision_tower.", state))
    return loaded("transformers", model, tensors, probes(model.patch_embed.projection, model.layers))


def transformers_clip(config: ClipConfig, state: State) -> Runner:
    """transformers' CLIPVisionModel, from names of `clip-hf`."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    model = CLIPVisionModel(CLIPVisionConfig(**clip_sizes(config)))
    encoder = getattr(model, "vision_model", model)
    # transformers before 5 has the prefix in its own names.
    prefix = "" if encoder is model else "vision_model."
    tensors = {
        prefix + name: tensor
        for name, tensor in under("vision_model.", state).items()
        if name.startswith(("embeddings.", "pre_layrnorm.", "post_layernorm.", "encoder."))
        and "position_ids" not in name
    }
    places = probes(encoder.embeddings.patch_embedding, encoder.encoder.layers)
    return loaded("transformers", model, tensors, places, may_lack=(f"{prefix}post_layernorm.",))


def open_clip_clip(config: ClipConfig, state: State) -> Runner:
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
    tensors = under("visual.", state)
    model = _build_vision_tower(tensors["proj"].shape[1] if "proj" in tensors else config.width, sizes, quick_gelu=True)
    own = model.state_dict()
    tensors = {name: tensor for name, tensor in tensors.items() if name in own}
    places = probes(model.conv1, model.transformer.resblocks)
    return loaded("open_clip_torch", model, tensors, places, may_lack=("ln_post.", "proj"))


def timm_clip(config: ClipConfig, state: State) -> Runner:
    """timm's VisionTransformer with a norm before its blocks and quick_gelu, from names of `clip-timm`."""
    from timm.layers import QuickGELU
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(num_classes=0, pre_norm=True, act_layer=QuickGELU, **_vit_sizes(config, 1e-5))
    tensors = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    found = loaded("timm", model, tensors, probes(model.patch_embed.proj, model.blocks), may_lack=("norm.",))
    return found._replace(run=model.forward_features)


# By layout: the module whose class reads its names, and what builds it.
_OWN: dict[str, tuple[str, Callable[..., Runner]]] = {
    "sam-hf": ("transformers", transformers_sam),
    "sam-meta": ("segment_anything", segment_anything_sam),
    "sam-timm": ("timm", timm_sam),
    "sam-got-ocr2-hf": ("transformers.models.got_ocr2", got_ocr2_sam),
    "clip-hf": ("transformers", transformers_clip),
    "clip-openai": ("open_clip", open_clip_clip),
    "clip-timm": ("timm", timm_clip),
}


def build(mapping: LayoutMapping, config: SamConfig | ClipConfig, own: State, canonical: State) -> Runner:
    """The reference for a source: `own` are its tensors by their own names, `canonical` the same by canonical names.

    `own` is empty where the source's library cannot run what was made of it (resampled positions). Raises ImportError
    where neither the layout's own library nor transformers is installed.
    """
    with uninitialised():
        if own and mapping.name in _OWN:
            module, make = _OWN[mapping.name]
            if installed(module):
                return make(config, own)
        layout = f"{mapping.family}-hf"
        _, make = _OWN[layout]
        found = make(config, in_layout(layout, canonical))
    return found._replace(label=f"{found.label}, loaded through {mapping.name} -> {layout}")


def installed(module: str) -> bool:
    """Whether a module can be imported; releases of transformers differ in what they have."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it would be in
        return False


@contextmanager
def uninitialised() -> Iterator[None]:
    """Layers made inside hold whatever lay in memory: all of it is overwritten next, and drawing it takes seconds."""
    kinds: tuple[Any, ...] = (nn.Linear, nn.Conv2d, nn.Embedding)
    before = [kind.reset_parameters for kind in kinds]
    for kind in kinds:
        kind.reset_parameters = lambda layer: None
    try:
        yield
    finally:
        for kind, method in zip(kinds, before, strict=True):
            kind.reset_parameters = method


def in_layout(name: str, canonical: State) -> State:
    """Tensors in the canonical names brought to a layout's, with the first of its prefixes."""
    mapping = registry.load(name).mapping
    rules = tuple(rule._replace(optional=True) for rule in writing_rules(mapping, full_model=False))
    unclaimed = set(claim(rules, canonical).unclaimed)
    values = {key: _described(key, tensor) for key, tensor in canonical.items() if key not in unclaimed}
    made = apply(rules, values, name).values
    return {key: evaluate(value, lambda leaf: canonical[leaf.key]) for key, value in made.items()}


def _described(key: str, tensor: Tensor) -> LazyTensor:
    """A tensor in memory as the rules know tensors; only its name, type and shape are looked at."""
    dtype, shape = BY_NAME[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape)
    return Read(dtype, shape, TensorInfo(key, dtype, shape, _NOWHERE, 0, contiguous_strides(shape)))


def sam_sizes(config: SamConfig) -> dict[str, Any]:
    """As transformers' configurations call them."""
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


def clip_sizes(config: ClipConfig) -> dict[str, Any]:
    """As transformers' configurations call them."""
    return {
        "hidden_size": config.width,
        "intermediate_size": config.mlp,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "image_size": config.image_size,
        "patch_size": config.patch,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }


def _vitdet_sizes(config: SamConfig) -> dict[str, Any]:
    """As Meta's class and timm's call them."""
    return {
        **_vit_sizes(config, 1e-6),
        "use_rel_pos": True,
        "window_size": config.window,
        "global_attn_indexes": config.global_blocks,
    }


def _vit_sizes(config: SamConfig | ClipConfig, eps: float) -> dict[str, Any]:
    return {
        "img_size": config.image_size,
        "patch_size": config.patch,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
        "mlp_ratio": _mlp_ratio(config),
        "norm_layer": lambda width, **options: nn.LayerNorm(width, eps=eps),
    }


def _mlp_ratio(config: SamConfig | ClipConfig) -> float:
    """What libraries multiply the width by, and then cut: the half keeps rounding from taking one off."""
    return (config.mlp + 0.5) / config.width


def under(prefix: str, state: State) -> State:
    """The tensors under a prefix, without it; all of them where none has it."""
    found = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    return found or state


def loaded(package: str, model: nn.Module, state: State, places: list[Probe], may_lack: tuple[str, ...] = ()) -> Runner:
    """The model with its weights loaded strictly, but for what no run uses (`may_lack`) and a source may leave out."""
    lacking, extra = model.load_state_dict(state, strict=False)
    lacking = [name for name in lacking if not name.startswith(may_lack)]
    if lacking or extra:
        raise RuntimeError(f"{type(model).__name__}: missing {lacking[:3]}, unexpected {extra[:3]}")
    return Runner(label(package, type(model).__name__), model, places, model)


def label(package: str, name: str) -> str:
    return f"{package} {importlib.metadata.version(package)} {name}"
