"""Reference implementations: the encoders of other libraries, loaded with a source's tensors.

Most layouts have a library whose class loads tensors under their names. If that library is not installed, or a layout
has none (OCR models under their authors' names), transformers' class is loaded through our own mappings. The label
says so, as such a comparison depends on the mappings.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from converter.encoders import ClipConfig, Qwen2Config, SamConfig
from converter.layouts import registry
from converter.layouts.claims import claim
from converter.layouts.spec import LayoutMapping
from converter.output.pretrained_config import clip_vision_config, sam_vision_config
from converter.plan.apply import apply
from converter.plan.route import writing_rules
from converter.tensors.dtypes import BY_NAME, dtype_name
from converter.tensors.evaluate import evaluate
from converter.tensors.lazy_tensor import LazyTensor, lazy_read
from converter.tensors.tensor_info import TensorInfo
from converter.verification.families import FAMILIES, State
from converter.verification.probes import ProbedEncoder, SkipInitialization


class Reference(NamedTuple):
    """A library's implementation of an encoder."""

    module: str  # The module to import. Older releases of the library may lack it.
    build: Callable[[Any, State], ProbedEncoder]  # Called with a config and the tensors by the layout's names

    @property
    def installed(self) -> bool:
        """Whether the module and its own dependencies can be imported."""
        try:
            importlib.import_module(self.module)
        except ModuleNotFoundError:
            return False
        return True


def transformers_sam(config: SamConfig, state: State) -> ProbedEncoder:
    """Build transformers' SamVisionEncoder, which SamVisionModel wraps since transformers 4.52."""
    from transformers import SamVisionConfig
    from transformers.models.sam.modeling_sam import SamVisionEncoder

    model = SamVisionEncoder(SamVisionConfig(**sam_vision_config(config)))
    return _transformers_sam(model, without_prefix("vision_encoder.", state))


def segment_anything_sam(config: SamConfig, state: State) -> ProbedEncoder:
    """Build segment-anything's ImageEncoderViT."""
    from segment_anything.modeling import ImageEncoderViT

    model = ImageEncoderViT(out_chans=config.neck, **_sam_sizes(config))
    tensors = without_prefix("image_encoder.", state)
    return _loaded("sam", "segment-anything", model, tensors, model.blocks, model.patch_embed.proj)


def timm_sam(config: SamConfig, state: State) -> ProbedEncoder:
    """Build timm's VisionTransformerSAM."""
    from timm.models.vision_transformer_sam import VisionTransformerSAM

    model = VisionTransformerSAM(num_classes=0, neck_chans=config.neck, **_sam_sizes(config))
    encoder = _loaded("sam", "timm", model, state, model.blocks, model.patch_embed.proj)
    return replace(encoder, run=model.forward_features)


def got_ocr2_sam(config: SamConfig, state: State) -> ProbedEncoder:
    """Build transformers' GotOcr2VisionEncoder."""
    from transformers.models.got_ocr2.configuration_got_ocr2 import GotOcr2VisionConfig
    from transformers.models.got_ocr2.modeling_got_ocr2 import GotOcr2VisionEncoder

    model = GotOcr2VisionEncoder(GotOcr2VisionConfig(**sam_vision_config(config)))
    return _transformers_sam(model, without_prefix("model.vision_tower.", without_prefix("vision_tower.", state)))


def _transformers_sam(model: Any, state: State) -> ProbedEncoder:
    return _loaded("sam", "transformers", model, state, model.layers, model.patch_embed.projection)


def transformers_clip(config: ClipConfig, state: State) -> ProbedEncoder:
    """Build transformers' CLIPVisionModel."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    model = CLIPVisionModel(CLIPVisionConfig(**clip_vision_config(config)))
    # Before transformers 5, the encoder is in a `vision_model`, which is also a prefix of its names.
    encoder = getattr(model, "vision_model", model)
    prefixes = ("embeddings.", "pre_layrnorm.", "post_layernorm.", "encoder.")
    tensors = {
        name: tensor
        for name, tensor in without_prefix("vision_model.", state).items()
        if name.startswith(prefixes) and "position_ids" not in name
    }
    layers, patches = encoder.encoder.layers, encoder.embeddings.patch_embedding
    result = _loaded("clip", "transformers", encoder, tensors, layers, patches, ("post_layernorm.",))
    return replace(result, label=label("transformers", type(model).__name__))


def open_clip_clip(config: ClipConfig, state: State) -> ProbedEncoder:
    """Build open_clip's VisionTransformer."""
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
    embed_dim = tensors["proj"].shape[1] if "proj" in tensors else config.width
    model = _build_vision_tower(embed_dim, sizes, quick_gelu=config.activation == "quick_gelu")
    blocks, names = model.transformer.resblocks, model.state_dict().keys()
    if config.activation not in ("quick_gelu", "gelu"):
        for block in blocks:
            block.mlp.gelu = _ACTIVATIONS[config.activation]()
    tensors = {name: tensor for name, tensor in tensors.items() if name in names}
    return _loaded("clip", "open_clip_torch", model, tensors, blocks, model.conv1, ("ln_post.", "proj"))


def timm_clip(config: ClipConfig, state: State) -> ProbedEncoder:
    """Build timm's VisionTransformer with a norm before its blocks."""
    from timm.layers import QuickGELU
    from timm.models.vision_transformer import VisionTransformer

    sizes = _vit_sizes(config)
    if config.activation == "quick_gelu":
        sizes["act_layer"] = QuickGELU
    model = VisionTransformer(num_classes=0, pre_norm=True, weight_init="skip", **sizes)
    tensors = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    encoder = _loaded("clip", "timm", model, tensors, model.blocks, model.patch_embed.proj, ("norm.",))
    return replace(encoder, run=model.forward_features)


def transformers_qwen2(config: Qwen2Config, state: State) -> ProbedEncoder:
    """Build transformers' Qwen2Model, which runs with DeepSeek-OCR-2's attention mask."""
    from transformers import Qwen2Config as Config
    from transformers import Qwen2Model

    model = Qwen2Model(Config(vocab_size=1, rope_theta=config.rope_theta, **qwen2_config(config)))

    def run(x: Tensor) -> Any:
        return model(inputs_embeds=x, attention_mask=_attention_bias(x), use_cache=False)

    return _loaded_qwen2(model, state, run)


def _attention_bias(x: Tensor) -> Tensor:
    """Return the mask (1, 1, N, N) to add to attention scores of (B, N, C), whose first N / 2 tokens are an image's."""
    total = x.shape[1]
    allowed = torch.ones(total, total, dtype=torch.bool, device=x.device).tril()
    allowed[: total // 2, : total // 2] = True
    return torch.zeros_like(allowed, dtype=x.dtype).masked_fill(~allowed, torch.finfo(x.dtype).min)[None, None]


def deepseek_ocr2_qwen2(config: Qwen2Config, state: State) -> ProbedEncoder:
    """Build transformers' DeepseekOcr2VisionEncoder."""
    from transformers.models.deepseek_ocr2.configuration_deepseek_ocr2 import DeepseekOcr2VisionEncoderConfig
    from transformers.models.deepseek_ocr2.modeling_deepseek_ocr2 import DeepseekOcr2VisionEncoder

    model = DeepseekOcr2VisionEncoder(DeepseekOcr2VisionEncoderConfig(**qwen2_config(config)))
    return _loaded_qwen2(model, state, lambda x: model(inputs_embeds=x, num_patches=x.shape[1] // 2))


def qwen2_config(config: Qwen2Config) -> dict[str, Any]:
    """Return the arguments of transformers' config classes of Qwen2."""
    return {
        "hidden_size": config.width,
        "intermediate_size": config.mlp,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.key_value_heads,
        "hidden_act": config.activation,
        "rms_norm_eps": config.epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
    }


def _loaded_qwen2(model: Any, state: State, run: Callable[[Tensor], Any]) -> ProbedEncoder:
    """Load a model of Qwen2's layers with the tensors of any layout, matched by the ends of their names."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        match = re.search(r"(?:^|\.)((?:layers|norm)\..+)$", name)
        # In transformers' DeepSeek-OCR-2, SAM's names have the same prefix.
        if match and "sam_encoder." not in name and "inv_freq" not in name:
            tensors[match[1]] = tensor
    keep_inv_freq_in_float32(model.rotary_emb)
    return replace(_loaded("qwen2", "transformers", model, tensors, model.layers, None, ("embed_tokens.",)), run=run)


def keep_inv_freq_in_float32(rotary: Any) -> None:
    """Keep the frequencies of rotary embeddings in float32 when a model is cast, as `from_pretrained` does."""
    inv_freq = rotary.inv_freq.clone()

    def restore(module: Any, args: Any) -> None:
        module.inv_freq = inv_freq.to(args[0].device, torch.promote_types(args[0].dtype, torch.float32))

    rotary.register_forward_pre_hook(restore)


# The references by layout. Layouts that are not listed use the reference of `<family>-hf`.
REFERENCES = {
    "sam-hf": Reference("transformers", transformers_sam),
    "sam-meta": Reference("segment_anything", segment_anything_sam),
    "sam-timm": Reference("timm", timm_sam),
    "sam-got-ocr2-hf": Reference("transformers.models.got_ocr2", got_ocr2_sam),
    "clip-hf": Reference("transformers", transformers_clip),
    "clip-openai": Reference("open_clip", open_clip_clip),
    "clip-timm": Reference("timm", timm_clip),
    "qwen2-hf": Reference("transformers", transformers_qwen2),
    **dict.fromkeys(
        ("qwen2-deepseek-ocr2", "qwen2-deepseek-ocr2-hf", "qwen2-deepseek-ocr2-sglang"),
        Reference("transformers.models.deepseek_ocr2", deepseek_ocr2_qwen2),
    ),
}


def build_reference(mapping: LayoutMapping, config: Any, native: State, canonical: State) -> ProbedEncoder:
    """Build another implementation of an encoder, with the source's weights.

    Args:
        mapping: The mapping from the source's layout.
        config: The encoder's config.
        native: The tensors by the names of the source's layout; empty if its library cannot load them, as with
            resampled positions.
        canonical: The same tensors by canonical names.

    Raises:
        ModuleNotFoundError: Neither the layout's own library nor transformers is installed.
    """
    native_reference, general_layout = REFERENCES.get(mapping.name), f"{mapping.family}-hf"
    with SkipInitialization():
        if native and native_reference and native_reference.installed:
            return native_reference.build(config, native)
        encoder = REFERENCES[general_layout].build(config, to_layout(general_layout, canonical))
    return replace(encoder, label=f"{encoder.label}, loaded through {mapping.name} -> {general_layout}")


def to_layout(name: str, canonical: State) -> dict[str, Tensor]:
    """Convert tensors from canonical names to a layout, under the first of its prefixes."""
    mapping = registry.load(name).mapping
    rules = tuple(rule._replace(optional=True) for rule in writing_rules(mapping, full_model=False))
    unclaimed = set(claim(rules, canonical).unclaimed)
    values = {key: _lazy(key, tensor) for key, tensor in canonical.items() if key not in unclaimed}
    outputs = apply(rules, values, name).values
    return {key: evaluate(value, lambda leaf: canonical[leaf.key]) for key, value in outputs.items()}


def _lazy(key: str, tensor: Tensor) -> LazyTensor:
    """Return a lazy tensor for a tensor in memory, which `to_layout` reads by its key, not from a storage."""
    no_storage: Any = None
    dtype = BY_NAME[dtype_name(tensor.dtype)]
    return lazy_read(TensorInfo(key, dtype, tuple(tensor.shape), no_storage, 0, ()))


class _QuickGelu(nn.Module):
    """The activation quick_gelu, for libraries without it."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1.702 * x).sigmoid()


# Activation modules by transformers' names.
_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "quick_gelu": _QuickGelu,
    "gelu": nn.GELU,
    "gelu_pytorch_tanh": partial(nn.GELU, approximate="tanh"),
    "relu": nn.ReLU,
    "silu": nn.SiLU,
}


def _vit_sizes(config: SamConfig | ClipConfig) -> dict[str, Any]:
    """Return the arguments of segment-anything's and timm's vision transformers."""
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


def _sam_sizes(config: SamConfig) -> dict[str, Any]:
    """Return the arguments of segment-anything's and timm's SAM."""
    attention = {"use_rel_pos": True, "window_size": config.window, "global_attn_indexes": config.global_blocks}
    return _vit_sizes(config) | attention


def _mlp_ratio(config: SamConfig | ClipConfig) -> float:
    """Return the ratio of MLP width to width. Libraries truncate the product; 0.5 more keeps it from losing 1."""
    return (config.mlp + 0.5) / config.width


def without_prefix(prefix: str, state: State) -> State:
    """Return the tensors under a prefix, by names without it, or all tensors if no name has it."""
    tensors = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    return tensors or state


def _loaded(
    family: str,
    package: str,
    model: nn.Module,
    state: State,
    blocks: Iterable[nn.Module],
    patches: nn.Module | None,
    unused: tuple[str, ...] = (),
) -> ProbedEncoder:
    """Load a library's model and add probes. `state` may lack the tensors whose names start with one of `unused`."""
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [name for name in missing if not name.startswith(unused)]
    if missing or unexpected:
        raise RuntimeError(f"{type(model).__name__}: missing {missing[:3]}, unexpected {unexpected[:3]}")
    probes, output = FAMILIES[family].probes(blocks, patches), FAMILIES[family].output_probe
    return ProbedEncoder(label(package, type(model).__name__), model.eval(), probes, model, output)


def label(package: str, name: str) -> str:
    """Return the label of a reference: distribution, version and class."""
    return f"{package} {importlib.metadata.version(package)} {name}"
