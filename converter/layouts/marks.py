"""Marks of weights that no layout describes: adapters, quantised weights, other architectures. Each has a next step."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from converter.errors import first_names
from converter.layouts.shapes import shows_channels_last
from converter.tensors.dtypes import remedy
from converter.tensors.tensor_info import TensorInfo

Tensors = Mapping[str, TensorInfo]

_MERGE = (
    "merge it into the weights first, in peft with model.merge_and_unload().save_pretrained(FOLDER), and convert that"
)
_DEQUANTISE = "convert the original weights from before quantisation, or dequantise these and save 16 or 32 bits"
_OTHER = "the DeepEncoder is SAM (ViT-B, ViT-L, ViT-H) and CLIP (ViT) or Qwen2: convert a checkpoint of one of these"
_CHANNELS_LAST = "stores its convolutions channels last, as MLX does"

_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")


class Mark(NamedTuple):
    """Something that tensors show."""

    what: str  # What the tensors are, as it follows the name of the checkpoint
    hint: str
    examples: list[str]  # Names of tensors that show it

    @property
    def text(self) -> str:
        """The description of the tensors, with the first names."""
        return f"{self.what}: {first_names([repr(name) for name in self.examples], 2)}"


class _Rule(NamedTuple):
    """A mark that shows in names: all of `patterns` occur, and none of `absent`."""

    what: str
    hint: str
    patterns: tuple[str, ...]
    absent: tuple[str, ...] = ()


# Modules that change what an encoder computes, or that CLIP does not have. They are refused wherever they are.
_ADAPTER = re.compile(
    r"(?i)(^|[._])(lora|linear_[ab]_|dora|ia3|vera|loha|lokr|hada_w|adapter|attn_pool|vpt|prompt_(generator|embedding|token))"
)
_ADAPTERS = (
    _Rule("holds LoRA adapters that are not merged", _MERGE, (r"(?i)lora_?(a|b|down|up|magnitude|embedding)",)),
    _Rule("holds LoRA adapters that are not merged", _MERGE, (r"(^|\.)linear_[ab]_[a-z]+\.",)),
    _Rule("holds layers wrapped by PEFT (base_layer, modules_to_save)", _MERGE, (r"\.(base_layer|modules_to_save)\.",)),
    _Rule("holds PEFT adapters that are not merged", _MERGE, (r"\.(ia3_l|b?oft_(r|s|R)|vera_lambda_[bd])(\.|$)",)),
    _Rule(
        "holds weights in factors (weight_norm, spectral_norm, pruning)",
        "compute them first, on the model in Python: torch.nn.utils.remove_weight_norm, .remove_spectral_norm, "
        ".prune.remove or .parametrize.remove_parametrizations; save its state dict and convert that",
        (r"\.(weight_(g|v|orig|mask)|parametrizations\.weight\.original\d?)$",),
    ),
    _Rule("holds LoHa or LoKr adapters that are not merged", _MERGE, (r"hada_w[12]|lokr_w[12]",)),
)
_QUANTISED = (
    _Rule("holds weights that bitsandbytes quantised to 4 bits", _DEQUANTISE, (r"\.(quant_(state|map)|absmax)(\.|$)",)),
    _Rule("holds weights that bitsandbytes quantised to 8 bits", _DEQUANTISE, (r"\.(SCB|weight_format)$",)),
    _Rule("holds weights quantised by GPTQ", _DEQUANTISE, (r"\.qweight$", r"\.g_idx$")),
    _Rule("holds weights quantised by AWQ", _DEQUANTISE, (r"\.qweight$", r"\.qzeros$")),
    _Rule("holds weights quantised by HQQ", _DEQUANTISE, (r"\.W_q$",)),
    _Rule("holds weights quantised with codebooks (AQLM, QuIP)", _DEQUANTISE, (r"\.(codebooks?|Qidxs)$",)),
    _Rule("holds weights that MLX quantised", _DEQUANTISE, (r"\.scales$", r"\.biases$")),
    _Rule("holds quantised weights (qweight)", _DEQUANTISE, (r"\.qweight$",)),
    _Rule(
        "holds the observers of quantisation-aware training", _DEQUANTISE, (r"fake_quant\.|activation_post_process\.",)
    ),
    _Rule("holds weights that torch quantised dynamically", _DEQUANTISE, (r"_packed_params",)),
    _Rule(
        "holds quantised weights (8-bit, such as float8) with their scales",
        _DEQUANTISE,
        (r"((weight|input)(_quantizer)?[._]*scales?(_inv|_2|_ub)?|scale_(weight|input)|scaled_fp8)$",),
    ),
)
_PLAIN_VIT = "is a ViT (DeiT, DINO, MAE) without the norm that CLIP has before its transformer"
# Names that only vision transformers have.
_VISION_TRANSFORMER = (r"class_embedding|cls_token|patch_embed",)
_VISION = re.compile(rf"{_VISION_TRANSFORMER[0]}|(^|\.)(visual|vision\w*)\.")
_ARCHITECTURES = (
    _Rule("is SAM 2 (a Hiera encoder)", _OTHER, (r"(^|\.)trunk\.blocks\.0\.attn\.qkv", r"neck\.convs|maskmem")),
    _Rule("is SAM 2 (a Hiera encoder)", _OTHER, (r"vision_encoder\.backbone\.blocks\.0\.",)),
    _Rule(
        "is a Hiera, as SAM 2 has",
        _OTHER,
        (r"(^|\.)blocks\.0\.attn\.qkv\.weight$", r"(^|\.)blocks\.\d+\.proj\.weight$"),
    ),
    _Rule("is MobileSAM (a TinyViT encoder)", _OTHER, (r"(^|\.)(patch_embed\.seq\.0|blocks\.0\.conv1)\.c\.",)),
    _Rule("is EfficientSAM or EdgeSAM", _OTHER, (r"image_encoder\.(stage|fuse_stage|input_stem|neck\.0\.0\.)",)),
    _Rule(
        "is a ViT with SAM's neck and no relative positions, as EfficientSAM is",
        _OTHER,
        (r"(^|\.)blocks\.0\.mlp\.fc1\.weight$", r"(^|\.)neck\.0\.weight$"),
        (r"\.rel_pos_[hw]$",),
    ),
    _Rule(
        "is a ViTDet, which has the layers of SAM and another neck",
        _OTHER,
        (r"(^|\.)blocks\.\d+\.attn\.rel_pos_[hw]$", r"(^|\.)simfp_\d|(^|\.)backbone\.net\."),
    ),
    _Rule(
        "is the mask decoder of a SAM, without its image encoder",
        "convert a checkpoint of the whole SAM",
        (r"(^|\.)mask_decoder\.",),
        (r"patch_embed\.|encoder\.(blocks|layers|trunk)\.|backbone\.",),
    ),
    _Rule("is a ResNet CLIP (RN50 and its kind)", _OTHER, (r"(^|\.)layer1\.0\.conv1\.weight", r"(^|\.)attnpool\.")),
    _Rule(
        "is EVA-CLIP, which has another transformer than CLIP",
        _OTHER,
        (r"(^|\.)blocks\.0\.(attn\.(q_bias|q_proj\.weight|inner_attn_ln)|mlp\.w1\.)",),
    ),
    _Rule(
        "is BLIP or BLIP-2, whose encoder has no norm before its transformer",
        _OTHER,
        (r"(^|\.)encoder\.layers\.0\.self_attn\.projection\.weight$",),
    ),
    _Rule("is mPLUG-Owl, whose encoder is not CLIP's", _OTHER, (r"encoder\.layers\.0\.self_attn\.query_key_value\.",)),
    _Rule("is CogVLM, whose encoder is an EVA-CLIP", _OTHER, (r"(^|\.)vision\.patch_embedding\.cls_embedding$",)),
    _Rule("is Florence-2 (a DaViT encoder)", _OTHER, (r"\.channel_block\.channel_attn\.",)),
    _Rule("is MobileCLIP (a FastViT encoder)", _OTHER, (r"(^|\.)network\.\d+\.\d+\.token_mixer\.",)),
    _Rule("is X-CLIP, whose layers attend across frames", _OTHER, (r"\.message_attn\.",)),
    _Rule(
        "is a Perception Encoder, which rotates positions in its attention",
        _OTHER,
        (r"(^|\.)attn_pool\.(probe|latent)$", r"(^|\.)(ln_pre|norm_pre)\."),
    ),
    _Rule(
        "is SigLIP, which has no class token and no norm before its transformer",
        _OTHER,
        (r"head\.probe$|attn_pool\.latent$|logit_bias$|(^|\.)embeddings\.patch_embedding\.bias$",),
        (r"embeddings\.class_embedding$|(^|\.)cls_token$",),
    ),
    _Rule(
        "is Stable Diffusion, which holds CLIP's text tower alone",
        _OTHER,
        (r"^(model\.diffusion_model|first_stage_model|conditioner|cond_stage_model)\.",),
        (r"(^|\.)(visual|vision_model)\.",),
    ),
    _Rule(
        "is a text tower alone, without the vision encoder",
        _OTHER,
        (r"(^|\.)(token_embedding|text_projection)(\.weight)?$",),
        (r"class_embedding|conv1\.weight|patch_embed|visual\.|class_token",),
    ),
    _Rule(
        "has a Qwen2 in the place of CLIP, as DeepSeek-OCR-2 has",
        "its encoders convert: dsocr-convert sam ..., dsocr-convert qwen2 ...",
        (r"(^|\.)qwen2_model\.|(^|\.)(resample_)?query_(768|1024)",),
    ),
    _Rule(
        "is a ViT with layer scales (DINOv2, InternViT)",
        _OTHER,
        (r"(^|\.)(ls1(\.gamma)?|layer_scale1\.lambda1|lambda_1|gamma_1)$",),
    ),
    _Rule("is SAM 3 (a Perception Encoder)", _OTHER, (r"(^|\.)detector\.backbone\.vision_backbone\.",)),
    _Rule("is a RepViT, as in RepViT-SAM", _OTHER, (r"(^|\.)features\.\d+\.token_mixer\.",)),
    _Rule("is a YOLO, as FastSAM is", _OTHER, (r"(^|\.)dfl\.conv\.weight$",)),
    _Rule("is a GroupViT", _OTHER, (r"(^|\.)group_token$",)),
    _Rule("is a ConvNeXt", _OTHER, (r"(^|\.)stages\.\d+\.(blocks\.)?\d+\.(conv_dw|dwconv)\.",)),
    _Rule(
        "has tables of relative position biases (Swin, BEiT), which SAM and CLIP lack",
        _OTHER,
        (r"\.relative_position_bias_table$",),
    ),
    _Rule(
        "has the vision encoder of Qwen-VL",
        _OTHER,
        (r"(^|\.)visual\.(merger|transformer\.resblocks\.0\.attn\.in_proj)\.",),
    ),
    _Rule(_PLAIN_VIT, _OTHER, (r"(^|\.)encoder\.layer\.0\.attention\.attention\.query\.weight$",)),
    _Rule(
        _PLAIN_VIT,
        _OTHER,
        (r"(^|\.)cls_token$", r"(^|\.)blocks\.0\.attn\.qkv\.weight$"),
        (r"(^|\.)norm_pre\.|\.rel_pos_[hw]$",),
    ),
    _Rule("is a ResNet", _OTHER, (r"(^|\.)layer1\.0\.conv1\.weight$",), _VISION_TRANSFORMER),
    _Rule("is a diffusion model (UNet or VAE)", _OTHER, (r"(^|\.)mid_block\.attentions\.0\.",), _VISION_TRANSFORMER),
    _Rule(
        "is a language model without a vision encoder",
        "convert the vision encoder, a checkpoint of its own: the model's config.json may name it (mm_vision_tower)",
        (r"(^|\.)layers\.0\.mlp\.(gate|up|gate_up)_proj\.",),
        _VISION_TRANSFORMER,
    ),
    _Rule(
        "is a text encoder (BERT, T5)",
        _OTHER,
        (r"(^|\.)(layer\.0\.attention\.self\.query|block\.0\.layer\.0\.SelfAttention\.q)\.weight$",),
        _VISION_TRANSFORMER,
    ),
    _Rule("holds the state of an optimizer", "convert the weights of that training", (r"\.exp_avg(_sq)?$",)),
)


def find_mark(tensors: Tensors, is_channels_last: bool = False) -> Mark | None:
    """Return what tensors show that no layout describes, or None.

    With `is_channels_last`, a layout describes convolutions as MLX stores them.
    """
    marks = _marks(_CHECKS, tensors)
    return next((mark for mark in marks if not (is_channels_last and mark.what == _CHANNELS_LAST)), None)


def find_architecture(tensors: Tensors) -> Mark | None:
    """Return which other architecture tensors show, or None."""
    return next(_marks(_ARCHITECTURES, tensors), None)


def has_vision_encoder(names: Iterable[str]) -> bool:
    """Return whether some names are those of a vision encoder, of whatever architecture."""
    return any(_VISION.search(name) for name in names)


def find_adapters(names: Iterable[str]) -> list[str]:
    """Return the names that belong to adapters or other modules that change what an encoder computes."""
    return [name for name in names if _ADAPTER.search(name)]


def _marks(checks: Iterable[_Rule | Callable[[Tensors], Mark | None]], tensors: Tensors) -> Iterator[Mark]:
    # Names that differ in layer indices alone count once: there can be a hundred thousand. The lowest indices stay.
    kinds: dict[str, str] = {}
    for name in sorted(tensors, key=lambda name: (len(name), name)):
        kinds.setdefault(_LAYER.sub("", name), name)
    for check in checks:
        mark = _by_names(check, tensors, kinds.values()) if isinstance(check, _Rule) else check(tensors)
        if mark is not None:
            yield mark


def _by_names(rule: _Rule, tensors: Tensors, kinds: Iterable[str]) -> Mark | None:
    if not all(any(re.search(pattern, name) for name in kinds) for pattern in rule.patterns):
        return None
    if any(re.search(pattern, name) for pattern in rule.absent for name in kinds):
        return None
    return Mark(rule.what, rule.hint, [name for name in tensors if re.search(rule.patterns[0], name)])


def _not_gathered(tensors: Tensors) -> Mark | None:
    """Weights of ZeRO-3: they have shape [0], but for the smallest."""
    empty = [name for name, tensor in tensors.items() if tensor.shape == (0,) and name.endswith(("weight", "bias"))]
    if not empty:
        return None
    return Mark(
        "was saved by DeepSpeed ZeRO-3 without gathering the weights, which are empty here",
        "gather them: run zero_to_fp32.py in the checkpoint's folder, or train with "
        "stage3_gather_16bit_weights_on_model_save, and convert the result",
        empty,
    )


# The linear layers of a transformer.
_MATRIX = re.compile(r"(_proj|qkv|proj|fc[12]|lin[12]|c_fc|in_proj_weight|query|key|value|dense)(\.|$)")


def _packed_weights(tensors: Tensors) -> Mark | None:
    """Linear layers that hold integers, or 8-bit floats and a scale, of whatever quantisation."""
    layers = {name: tensor.dtype.name for name, tensor in tensors.items() if tensor.shape and _MATRIX.search(name)}
    found = [name for name, dtype in layers.items() if dtype.startswith(("int", "uint"))]
    if not found and any("scale" in name.rpartition(".")[2] for name in layers):
        found = [name for name, dtype in layers.items() if dtype.startswith("float8")]
    return Mark(f"holds quantised weights ({layers[found[0]]})", _DEQUANTISE, found) if found else None


def find_half_transposed(tensors: Tensors) -> Mark | None:
    """Convolutions in both orders; the fewer of them are named first."""
    first, last = _convolutions(tensors)
    if not first or not last:
        return None
    kinds = {"channels first, as torch does": first, "channels last, as MLX does": last}
    fewer, more = sorted(kinds, key=lambda kind: len(kinds[kind]))
    names = first_names([repr(name) for name in kinds[fewer]], 5)
    return Mark(
        f"stores some convolutions {fewer} ({names}), and others {more}",
        "convert the checkpoint that it was made from: which of these tensors are right does not show",
        kinds[more],
    )


def _channels_last(tensors: Tensors) -> Mark | None:
    """Convolutions in MLX's order, [out, height, width, in]."""
    _, last = _convolutions(tensors)
    hint = "convert the checkpoint that it was made from, or put the axes back in a mapping (permute: [0, 3, 1, 2])"
    return Mark(_CHANNELS_LAST, hint, last) if last else None


def _convolutions(tensors: Tensors) -> tuple[list[str], list[str]]:
    """Return the names in the file of convolutions with channels first and last, as far as shapes show it."""
    # llama.cpp's names of positions end so, too.
    weights = [tensor for name, tensor in tensors.items() if name.endswith("weight") and "pos_embd" not in name]
    shown = {tensor.key: shows_channels_last(tensor.shape) for tensor in weights}
    return [name for name in shown if shown[name] is False], [name for name in shown if shown[name]]


def _unreadable(tensors: Tensors) -> Mark | None:
    """Tensors that are not plain bytes in the file, such as arrays of numpy."""
    found = [name for name, tensor in tensors.items() if tensor.dtype.bits == 0]
    if not found:
        return None
    dtype = tensors[found[0]].dtype
    what = "quantised weights" if dtype.block else "weights that are no plain tensors"
    return Mark(f"holds {what} ({dtype.name})", remedy(dtype), found)


_CHECKS: tuple[_Rule | Callable[[Tensors], Mark | None], ...] = (
    *_ADAPTERS,
    *_QUANTISED,
    _not_gathered,
    _packed_weights,
    *_ARCHITECTURES,
    find_half_transposed,
    _channels_last,
    _unreadable,
)
