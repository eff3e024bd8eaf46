"""Recognises weights that no layout describes, by the names, types and shapes of their tensors.

They are adapters, quantised weights and other architectures. A `Mark` says what they are and what the user can do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from converter.errors import LayoutError, first_names
from converter.layouts.shapes import shows_channels_last
from converter.tensors.dtypes import remedy
from converter.tensors.tensor_info import TensorInfo

Tensors = Mapping[str, TensorInfo]

# Next steps.
_MERGE = (
    "merge it into the weights first, in peft with model.merge_and_unload().save_pretrained(FOLDER), and convert that"
)
_UNFACTOR = (
    "compute them first, on the model in Python: torch.nn.utils.remove_weight_norm, .remove_spectral_norm, "
    ".prune.remove or .parametrize.remove_parametrizations; save its state dict and convert that"
)
_DEQUANTISE = "convert the original weights from before quantisation, or dequantise these and save 16 or 32 bits"
_USE_SUPPORTED = (
    "the DeepEncoder is SAM (ViT-B, ViT-L, ViT-H) and CLIP (ViT) or Qwen2: convert a checkpoint of one of these"
)


class Mark(NamedTuple):
    """A reason why no layout describes some tensors."""

    what: str  # What the checkpoint is or holds: the predicate of a sentence, such as "is a ResNet"
    hint: str  # What the user can do
    examples: list[str]  # Names of tensors that show it

    @property
    def text(self) -> str:
        """The predicate, with the names of the first examples."""
        return f"{self.what}: {first_names([repr(name) for name in self.examples], 2)}"

    def error(self, source: str) -> LayoutError:
        """Return the error for a checkpoint; `source` is its name."""
        return LayoutError(f"{source}: {self.text}", self.hint)


class _NameRule:
    """A rule that recognises tensors by name.

    Each of `patterns` is found in some name, and `absent` in none. They are regular expressions.
    """

    def __init__(self, what: str, *patterns: str, absent: str = "", hint: str = _USE_SUPPORTED) -> None:
        self.what, self.patterns, self.absent, self.hint = what, patterns, absent, hint


# Names of modules that change what an encoder computes. Layouts never drop them, wherever they are.
_EXTRA_MODULES = (
    r"(?i)(^|[._])(lora|linear_[ab]_|dora|ia3|vera|loha|lokr|hada_w|adapter|attn_pool|vpt"
    r"|prompt_(generator|embedding|token))"
)
_ADAPTERS = (
    _NameRule(
        "holds LoRA adapters that are not merged",
        r"(?i:lora_?(a|b|down|up|magnitude|embedding))|\blinear_[ab]_[a-z]+\.|^w_[ab]_\d+$",
        hint=_MERGE,
    ),
    _NameRule("holds layers wrapped by PEFT", r"\.(base_layer|modules_to_save)\.", hint=_MERGE),
    _NameRule(
        "holds PEFT adapters that are not merged", r"\.(ia3_l|b?oft_(r|s|R)|vera_lambda_[bd])(\.|$)", hint=_MERGE
    ),
    _NameRule(
        "holds weights in factors (weight_norm, spectral_norm, pruning)",
        r"\.(weight_(g|v|orig|mask)|parametrizations\.weight\.original\d?)$",
        hint=_UNFACTOR,
    ),
    _NameRule("holds LoHa or LoKr adapters that are not merged", "hada_w[12]|lokr_w[12]", hint=_MERGE),
)
_QUANTISED = (
    _NameRule(
        "holds weights quantised by bitsandbytes (4 bits)", r"\.(quant_(state|map)|absmax)(\.|$)", hint=_DEQUANTISE
    ),
    _NameRule("holds weights quantised by bitsandbytes (8 bits)", r"\.(SCB|weight_format)$", hint=_DEQUANTISE),
    _NameRule("holds weights quantised by GPTQ", r"\.qweight$", r"\.g_idx$", hint=_DEQUANTISE),
    _NameRule("holds weights quantised by AWQ", r"\.qweight$", r"\.qzeros$", hint=_DEQUANTISE),
    _NameRule("holds weights quantised by HQQ", r"\.W_q$", hint=_DEQUANTISE),
    _NameRule("holds weights quantised with codebooks (AQLM, QuIP)", r"\.(codebooks?|Qidxs)$", hint=_DEQUANTISE),
    _NameRule("holds weights that MLX quantised", r"\.scales$", r"\.biases$", hint=_DEQUANTISE),
    _NameRule("holds quantised weights (qweight)", r"\.qweight$", hint=_DEQUANTISE),
    _NameRule("holds observers of quantisation", r"fake_quant\.|activation_post_process\.|_amax$", hint=_DEQUANTISE),
    _NameRule("holds weights that torch quantised dynamically", "_packed_params", hint=_DEQUANTISE),
    _NameRule(
        "holds quantised weights (8-bit, such as float8) with their scales",
        "((weight|input)(_quantizer)?[._]*scales?(_inv|_2|_ub)?|scale_(weight|input)|scaled_fp8)$",
        hint=_DEQUANTISE,
    ),
)
_ENCODER_STEP = "convert the checkpoint of the vision encoder: config.json may name it (mm_vision_tower)"
_PLAIN_VIT = "is a ViT (DeiT, DINO, MAE) without the norm that CLIP has before its transformer"
# Names that only vision transformers have.
_VISION_TRANSFORMER = "class_embedding|cls_token|patch_embed"
_VISION = rf"{_VISION_TRANSFORMER}|\b(visual|vision\w*)\."
_ARCHITECTURES = (
    _NameRule("was saved by FSDP in flat parameters", r"(^|[._])flat_param(_\d+)?$", hint="save a FULL_STATE_DICT"),
    _NameRule("is SAM 3 (a Perception Encoder)", r"\bvision_backbone\.|vision_encoder\.neck\.fpn_layers\."),
    _NameRule("is SAM 2 (a Hiera encoder)", r"\btrunk\.blocks\.0\.attn\.qkv", r"neck\.convs|maskmem"),
    _NameRule("is SAM 2 (a Hiera encoder)", r"vision_encoder\.backbone\.blocks\.0\."),
    _NameRule("is EdgeTAM (a RepViT encoder)", r"vision_encoder\.backbone\.timm_model\.|image_encoder\.trunk\.body\."),
    _NameRule("is a Hiera, as SAM 2 has", r"\bblocks\.0\.attn\.qkv\.weight$", r"\bblocks\.\d+\.proj\.weight$"),
    _NameRule("is a Hiera, as SAM 2 has", r"\bstages\.\d+\.layers\.0\.proj\.weight$"),
    _NameRule("is MobileSAM (a TinyViT encoder)", r"\b(patch_embed\.seq\.0|blocks\.0\.conv1)\.c\."),
    _NameRule("is an EfficientViT, as in EfficientViT-SAM", r"\.op_list\.\d+\.", absent=r"\bfuse_stage"),
    _NameRule("is EfficientSAM or EdgeSAM", r"image_encoder\.(stage|fuse_stage|input_stem|neck\.0\.0\.)"),
    _NameRule(
        "is a ViT with SAM's neck and no relative positions, as EfficientSAM is",
        r"\bblocks\.0\.mlp\.fc1\.weight$",
        r"\bneck\.0\.weight$",
        absent=r"\.rel_pos_[hw]$",
    ),
    _NameRule(
        "is a ViTDet, without SAM's neck", r"\bblocks\.\d+\.attn\.rel_pos_[hw]$", r"\bsimfp_\d|\bbackbone\.net\."
    ),
    _NameRule("is a ViTDet, without SAM's neck", r"\bencoder\.layers?\.\d+\.attention\.(qkv\.weight|rel_pos_h)$"),
    _NameRule(
        "is the mask decoder of a SAM, without its image encoder",
        r"\bmask_decoder\.",
        absent=r"patch_embed\.|encoder\.(blocks|layers|trunk)\.|backbone\.",
        hint="convert a checkpoint of the whole SAM",
    ),
    _NameRule("is a ResNet CLIP (RN50 and its kind)", r"\blayer1\.0\.conv1\.weight", r"\battnpool\."),
    _NameRule(
        "is EVA-CLIP, with another transformer", r"\bblocks\.0\.(attn\.(q_bias|q_proj\.weight|inner_attn_ln)|mlp\.w1\.)"
    ),
    _NameRule(
        "is BLIP or BLIP-2, with no norm before its layers", r"\bencoder\.layers\.0\.self_attn\.projection\.weight$"
    ),
    _NameRule("is mPLUG-Owl, whose encoder is not CLIP's", r"encoder\.layers\.0\.self_attn\.query_key_value\."),
    _NameRule("is CogVLM, whose encoder is an EVA-CLIP", r"\bvision\.patch_embedding\.cls_embedding$"),
    _NameRule("is Florence-2 (a DaViT encoder)", r"\.channel_block\.channel_attn\."),
    _NameRule("is MobileCLIP (a FastViT encoder)", r"\b(network\.\d+|blocks)\.\d+\.token_mixer\.|\.pre_norm_mha\."),
    _NameRule("is X-CLIP, whose layers attend across frames", r"\.message_attn\."),
    _NameRule("is a Perception Encoder (rotary positions)", r"\battn_pool\.(probe|latent)$", r"\b(ln_pre|norm_pre)\."),
    _NameRule(
        "is SigLIP, which has no class token and no norm before its transformer",
        r"head\.probe$|attn_pool\.latent$|logit_bias$|\bembeddings\.patch_embedding\.bias$",
        absent=r"embeddings\.class_embedding$|\bcls_token$",
    ),
    _NameRule(
        "is Stable Diffusion, which holds CLIP's text tower alone",
        r"^(model\.diffusion_model|first_stage_model|conditioner|cond_stage_model)\.",
        absent=r"\b(visual|vision_model)\.",
    ),
    _NameRule(
        "is a text tower alone, without the vision encoder",
        r"\b(token_embedding|text_projection)(\.weight)?$",
        absent=r"class_embedding|conv1\.weight|patch_embed|visual\.|vision_model\.|class_token",
    ),
    _NameRule(
        "has a Qwen2 in the place of CLIP, as DeepSeek-OCR-2 has",
        r"\bqwen2_model\.|\b(resample_)?query_(768|1024)",
        hint="its encoders convert: dsocr-convert sam ..., dsocr-convert qwen2 ...",
    ),
    _NameRule("has tables of relative position biases (Swin, BEiT)", r"\.relative_position_bias_table$"),
    _NameRule(
        "is a ViT with layer scales (DINOv2, InternViT, BEiT)",
        r"\b(ls1(\.gamma)?|layer_scale1\.lambda1|lambda_1|gamma_1)$",
    ),
    _NameRule("is a RepViT, as in RepViT-SAM", r"\bfeatures\.\d+\.token_mixer\."),
    _NameRule("is a YOLO, as FastSAM is", r"\bdfl\.conv\.weight$"),
    _NameRule("is a GroupViT", r"\bgroup_token$"),
    _NameRule("is a ConvNeXt", r"\bstages\.\d+\.(blocks\.)?\d+\.(conv_dw|dwconv)\."),
    _NameRule(
        "has the vision encoder of Qwen-VL",
        r"\bvisual\.(merger|transformer\.resblocks\.0\.attn\.in_proj)\.|^merger\.(linear_fc1|ln_q)\.",
    ),
    _NameRule("has the vision encoder of Llama 3.2 or 4", r"\b(gated_positional_embedding|positional_embedding_vlm)\b"),
    _NameRule("is Pixtral (rotary positions)", r"\bpatch_conv\.weight$"),
    _NameRule("is Pix2Struct, as Kosmos-2.5 has", r"\b(row|column)_embedder\.weight$"),
    _NameRule("is AIMv2", r"\b(layers\.0\.rms_norm1|preprocessor\.patchifier\.proj)\.weight$"),
    _NameRule("is ImageBind", r"^modality_(trunks|preprocessors)\."),
    _NameRule("is an EfficientNet, as in ALIGN", r"\.depthwise_conv\.depthwise_conv\.weight$"),
    _NameRule(_PLAIN_VIT, r"\b(attention\.attention\.query|layers\.0\.layernorm_before)\.weight$"),
    _NameRule(_PLAIN_VIT, r"\bcls_token$", r"\bblocks\.0\.attn\.qkv\.weight$", absent=r"\bnorm_pre\.|\.rel_pos_[hw]$"),
    _NameRule("is a ResNet", r"\blayer1\.0\.conv1\.weight$", absent=_VISION_TRANSFORMER),
    _NameRule(
        "is a diffusion model (UNet or VAE)",
        r"\b(mid_block\.attentions\.0|mid\.block_1|double_blocks\.0)\.",
        absent=_VISION_TRANSFORMER,
    ),
    _NameRule(
        "is a model of Megatron, whose q, k and v are interleaved by heads",
        r"\bself_attention\.(linear_qkv|query_key_value)\.",
        hint="export it with the program that trained it (Megatron Bridge, NeMo) for transformers, and convert that",
    ),
    _NameRule(
        "is a projector of image features, without the vision encoder",
        r"\b(mm_projector|llama_proj|image_proj|ip_adapter|multi_modal_projector|projector\.layers|perceiver\.latents)\b",
        absent=rf"{_VISION}|\blayers\.0\.mlp\.",
        hint=_ENCODER_STEP,
    ),
    _NameRule(
        "is a GGUF file of llama.cpp for another model",
        r"^(v\.)?blk\.0\.attn_q\.weight$",
        absent=r"query|\bsam\.",
        hint="convert the weights that it was made from, of its vision encoder (transformers, open_clip)",
    ),
    _NameRule(
        "is a language model without a vision encoder",
        r"\blayers\.0\.(mlp\.(gate|up|gate_up)_proj|feed_forward\.w1)\.|\bh\.0\.attn\.c_attn\.|\.dense_h_to_4h\.",
        absent=_VISION_TRANSFORMER,
        hint=f"{_ENCODER_STEP}; dsocr-convert qwen2 converts Qwen2 and Qwen2.5 alone",
    ),
    _NameRule(
        "is a text encoder (BERT, T5)",
        r"\b(layer\.0\.attention\.self\.query|block\.0\.layer\.0\.SelfAttention\.q)\.weight$",
        absent=_VISION_TRANSFORMER,
    ),
    _NameRule("holds the state of an optimizer", r"\b(exp_avg(_sq)?|momentum_buffer)$", hint="convert the weights"),
)


def find_mark(tensors: Tensors, is_channels_last: bool = False) -> Mark | None:
    """Return why no layout describes some tensors; None if nothing shows it.

    Args:
        tensors: The tensors by name.
        is_channels_last: Whether the expected layout stores convolutions as MLX does.
    """
    names = _distinct_names(tensors)
    return (
        _find_by_names(tensors, names, (*_ADAPTERS, *_QUANTISED))
        or _find_empty_weights(tensors)
        or _find_integer_weights(tensors)
        or _find_by_names(tensors, names, _ARCHITECTURES)
        or find_mixed_convolutions(tensors)
        or (None if is_channels_last else _find_channels_last(tensors))
        or _find_unreadable(tensors)
    )


def find_architecture(tensors: Tensors) -> Mark | None:
    """Return the mark of a known architecture that no layout describes, or None."""
    return _find_by_names(tensors, _distinct_names(tensors), _ARCHITECTURES)


def has_vision_encoder(names: Iterable[str]) -> bool:
    """Return whether some names are those of a vision encoder of any architecture."""
    return _occurs(_VISION, names)


def find_extra_modules(names: Iterable[str]) -> list[str]:
    """Return the names that belong to adapters or other modules that change what an encoder computes."""
    return [name for name in names if re.search(_EXTRA_MODULES, name)]


def _distinct_names(tensors: Tensors) -> list[str]:
    """Return one name, with the lowest indices, for all names that differ only in layer indices.

    A checkpoint may have a hundred thousand names.
    """
    names: dict[str, str] = {}
    for name in sorted(tensors, key=lambda name: (len(name), name)):
        names.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "", name), name)
    return list(names.values())


def _find_by_names(tensors: Tensors, names: list[str], rules: Iterable[_NameRule]) -> Mark | None:
    """Return the mark of the first rule that recognises the names; its examples are all tensors that it matches."""
    for rule in rules:
        is_match = all(_occurs(pattern, names) for pattern in rule.patterns)
        if is_match and not (rule.absent and _occurs(rule.absent, names)):
            return Mark(rule.what, rule.hint, [name for name in tensors if re.search(rule.patterns[0], name)])
    return None


def _occurs(pattern: str, names: Iterable[str]) -> bool:
    return any(re.search(pattern, name) for name in names)


def _find_empty_weights(tensors: Tensors) -> Mark | None:
    """Find weights of shape [0]: ZeRO-3 saves all but the smallest weights so, unless it gathers them."""
    empty = [name for name, tensor in tensors.items() if tensor.shape == (0,) and name.endswith(("weight", "bias"))]
    hint = (
        "gather them: run zero_to_fp32.py in the checkpoint's folder, or train with "
        "stage3_gather_16bit_weights_on_model_save, and convert the result"
    )
    what = "was saved by DeepSpeed ZeRO-3 without gathering the weights, which are empty here"
    return Mark(what, hint, empty) if empty else None


def _find_integer_weights(tensors: Tensors) -> Mark | None:
    """Find linear layers of integers, or of 8-bit floats with scales, which any method of quantisation may write."""
    linear = r"(_proj|qkv|proj|fc[12]|lin[12]|c_fc|in_proj_weight|query|key|value|dense)(\.|$)"
    layers = {name: tensor.dtype.name for name, tensor in tensors.items() if tensor.shape and re.search(linear, name)}
    quantised = [name for name, dtype in layers.items() if dtype.startswith(("int", "uint"))]
    if not quantised and any("scale" in name.rpartition(".")[2] for name in layers):
        quantised = [name for name, dtype in layers.items() if dtype.startswith("float8")]
    return Mark(f"holds quantised weights ({layers[quantised[0]]})", _DEQUANTISE, quantised) if quantised else None


def find_mixed_convolutions(tensors: Tensors) -> Mark | None:
    """Find convolutions that are partly stored channels first and partly channels last."""
    channels_first, channels_last = convolutions(tensors)
    if not channels_first or not channels_last:
        return None
    orders = [("channels first, as torch does", channels_first), ("channels last, as MLX does", channels_last)]
    (order, fewer), (other_order, more) = sorted(orders, key=lambda item: len(item[1]))
    names = first_names([repr(name) for name in fewer], 5)
    return Mark(
        f"stores some convolutions {order} ({names}), and others {other_order}",
        "convert the checkpoint that it was made from: which of these tensors are right does not show",
        more,
    )


def _find_channels_last(tensors: Tensors) -> Mark | None:
    """Find convolutions with MLX's order of dimensions, [out, height, width, in]."""
    channels_last = convolutions(tensors)[1]
    hint = (
        "convert the checkpoint that it was made from; or copy the mapping of its names (dsocr-convert mapping show "
        "LAYOUT > mine.yaml), add then: [permute: [0, 3, 1, 2]] to these tensors' rules, reorder their shapes under "
        "detect, and give --mapping mine.yaml"
    )
    return Mark("stores its convolutions channels last, as MLX does", hint, channels_last) if channels_last else None


def convolutions(tensors: Tensors) -> tuple[list[str], list[str]]:
    """Return the names of the convolutions whose shapes show channels first, and of those that show channels last.

    They are the names in the file.
    """
    # The names of llama.cpp's position embeddings end in "weight" too.
    weights = [tensor for name, tensor in tensors.items() if name.endswith("weight") and "pos_embd" not in name]
    is_last = {tensor.key: shows_channels_last(tensor.shape) for tensor in weights}
    return [key for key in is_last if is_last[key] is False], [key for key in is_last if is_last[key]]


def _find_unreadable(tensors: Tensors) -> Mark | None:
    """Find tensors that are not plain bytes in the file, such as arrays of numpy."""
    names = [name for name, tensor in tensors.items() if tensor.dtype.bits == 0]
    if not names:
        return None
    dtype = tensors[names[0]].dtype
    what = "quantised weights" if dtype.block else "weights that are not plain tensors"
    return Mark(f"holds {what} ({dtype.name})", remedy(dtype), names)
