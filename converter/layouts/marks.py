"""Marks of weights that no layout describes: adapters, quantised weights, other architectures. Each has a next step."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from converter.errors import LayoutError, first_names
from converter.layouts.shapes import shows_channels_last
from converter.tensors.dtypes import remedy
from converter.tensors.tensor_info import TensorInfo

Tensors = Mapping[str, TensorInfo]

_MERGE = (
    "merge it into the weights first, in peft with model.merge_and_unload().save_pretrained(FOLDER), and convert that"
)
_UNFACTOR = (
    "compute them first, on the model in Python: torch.nn.utils.remove_weight_norm, .remove_spectral_norm, "
    ".prune.remove or .parametrize.remove_parametrizations; save its state dict and convert that"
)
_DEQUANTISE = "convert the original weights from before quantisation, or dequantise these and save 16 or 32 bits"
_OTHER = "the DeepEncoder is SAM (ViT-B, ViT-L, ViT-H) and CLIP (ViT) or Qwen2: convert a checkpoint of one of these"


class Mark(NamedTuple):
    """Something that tensors show."""

    what: str  # What the tensors are, as it follows the name of the checkpoint
    hint: str
    examples: list[str]  # Names of tensors that show it

    @property
    def text(self) -> str:
        """The description of the tensors, with the first names."""
        return f"{self.what}: {first_names([repr(name) for name in self.examples], 2)}"

    def error(self, source: str) -> LayoutError:
        """Return the error for a checkpoint of that name."""
        return LayoutError(f"{source}: {self.text}", self.hint)


class _Rule:
    """A mark that shows in names: all of `patterns` occur, and `absent` does not. `\\b` is the start of a segment."""

    def __init__(self, what: str, *patterns: str, absent: str = "", hint: str = _OTHER) -> None:
        self.what, self.patterns, self.absent, self.hint = what, patterns, absent, hint


# Modules that change what an encoder computes, or that CLIP does not have. They are refused wherever they are.
_ADAPTER = (
    r"(?i)(^|[._])(lora|linear_[ab]_|dora|ia3|vera|loha|lokr|hada_w|adapter|attn_pool|vpt"
    r"|prompt_(generator|embedding|token))"
)
_ADAPTERS = (
    _Rule(
        "holds LoRA adapters that are not merged",
        r"(?i:lora_?(a|b|down|up|magnitude|embedding))|\blinear_[ab]_[a-z]+\.",
        hint=_MERGE,
    ),
    _Rule("holds layers wrapped by PEFT", r"\.(base_layer|modules_to_save)\.", hint=_MERGE),
    _Rule("holds PEFT adapters that are not merged", r"\.(ia3_l|b?oft_(r|s|R)|vera_lambda_[bd])(\.|$)", hint=_MERGE),
    _Rule(
        "holds weights in factors (weight_norm, spectral_norm, pruning)",
        r"\.(weight_(g|v|orig|mask)|parametrizations\.weight\.original\d?)$",
        hint=_UNFACTOR,
    ),
    _Rule("holds LoHa or LoKr adapters that are not merged", "hada_w[12]|lokr_w[12]", hint=_MERGE),
)
_QUANTISED = (
    _Rule("holds weights quantised by bitsandbytes (4 bits)", r"\.(quant_(state|map)|absmax)(\.|$)", hint=_DEQUANTISE),
    _Rule("holds weights quantised by bitsandbytes (8 bits)", r"\.(SCB|weight_format)$", hint=_DEQUANTISE),
    _Rule("holds weights quantised by GPTQ", r"\.qweight$", r"\.g_idx$", hint=_DEQUANTISE),
    _Rule("holds weights quantised by AWQ", r"\.qweight$", r"\.qzeros$", hint=_DEQUANTISE),
    _Rule("holds weights quantised by HQQ", r"\.W_q$", hint=_DEQUANTISE),
    _Rule("holds weights quantised with codebooks (AQLM, QuIP)", r"\.(codebooks?|Qidxs)$", hint=_DEQUANTISE),
    _Rule("holds weights that MLX quantised", r"\.scales$", r"\.biases$", hint=_DEQUANTISE),
    _Rule("holds quantised weights (qweight)", r"\.qweight$", hint=_DEQUANTISE),
    _Rule(
        "holds observers of quantisation-aware training", r"fake_quant\.|activation_post_process\.", hint=_DEQUANTISE
    ),
    _Rule("holds weights that torch quantised dynamically", "_packed_params", hint=_DEQUANTISE),
    _Rule(
        "holds quantised weights (8-bit, such as float8) with their scales",
        "((weight|input)(_quantizer)?[._]*scales?(_inv|_2|_ub)?|scale_(weight|input)|scaled_fp8)$",
        hint=_DEQUANTISE,
    ),
)
_PLAIN_VIT = "is a ViT (DeiT, DINO, MAE) without the norm that CLIP has before its transformer"
# Names that only vision transformers have.
_VISION_TRANSFORMER = "class_embedding|cls_token|patch_embed"
_VISION = rf"{_VISION_TRANSFORMER}|\b(visual|vision\w*)\."
_ARCHITECTURES = (
    _Rule("is SAM 2 (a Hiera encoder)", r"\btrunk\.blocks\.0\.attn\.qkv", r"neck\.convs|maskmem"),
    _Rule("is SAM 2 (a Hiera encoder)", r"vision_encoder\.backbone\.blocks\.0\."),
    _Rule("is a Hiera, as SAM 2 has", r"\bblocks\.0\.attn\.qkv\.weight$", r"\bblocks\.\d+\.proj\.weight$"),
    _Rule("is MobileSAM (a TinyViT encoder)", r"\b(patch_embed\.seq\.0|blocks\.0\.conv1)\.c\."),
    _Rule("is EfficientSAM or EdgeSAM", r"image_encoder\.(stage|fuse_stage|input_stem|neck\.0\.0\.)"),
    _Rule(
        "is a ViT with SAM's neck and no relative positions, as EfficientSAM is",
        r"\bblocks\.0\.mlp\.fc1\.weight$",
        r"\bneck\.0\.weight$",
        absent=r"\.rel_pos_[hw]$",
    ),
    _Rule("is a ViTDet, without SAM's neck", r"\bblocks\.\d+\.attn\.rel_pos_[hw]$", r"\bsimfp_\d|\bbackbone\.net\."),
    _Rule(
        "is the mask decoder of a SAM, without its image encoder",
        r"\bmask_decoder\.",
        absent=r"patch_embed\.|encoder\.(blocks|layers|trunk)\.|backbone\.",
        hint="convert a checkpoint of the whole SAM",
    ),
    _Rule("is a ResNet CLIP (RN50 and its kind)", r"\blayer1\.0\.conv1\.weight", r"\battnpool\."),
    _Rule(
        "is EVA-CLIP, with another transformer", r"\bblocks\.0\.(attn\.(q_bias|q_proj\.weight|inner_attn_ln)|mlp\.w1\.)"
    ),
    _Rule("is BLIP or BLIP-2, with no norm before its layers", r"\bencoder\.layers\.0\.self_attn\.projection\.weight$"),
    _Rule("is mPLUG-Owl, whose encoder is not CLIP's", r"encoder\.layers\.0\.self_attn\.query_key_value\."),
    _Rule("is CogVLM, whose encoder is an EVA-CLIP", r"\bvision\.patch_embedding\.cls_embedding$"),
    _Rule("is Florence-2 (a DaViT encoder)", r"\.channel_block\.channel_attn\."),
    _Rule("is MobileCLIP (a FastViT encoder)", r"\bnetwork\.\d+\.\d+\.token_mixer\."),
    _Rule("is X-CLIP, whose layers attend across frames", r"\.message_attn\."),
    _Rule("is a Perception Encoder (rotary positions)", r"\battn_pool\.(probe|latent)$", r"\b(ln_pre|norm_pre)\."),
    _Rule(
        "is SigLIP, which has no class token and no norm before its transformer",
        r"head\.probe$|attn_pool\.latent$|logit_bias$|\bembeddings\.patch_embedding\.bias$",
        absent=r"embeddings\.class_embedding$|\bcls_token$",
    ),
    _Rule(
        "is Stable Diffusion, which holds CLIP's text tower alone",
        r"^(model\.diffusion_model|first_stage_model|conditioner|cond_stage_model)\.",
        absent=r"\b(visual|vision_model)\.",
    ),
    _Rule(
        "is a text tower alone, without the vision encoder",
        r"\b(token_embedding|text_projection)(\.weight)?$",
        absent=r"class_embedding|conv1\.weight|patch_embed|visual\.|class_token",
    ),
    _Rule(
        "has a Qwen2 in the place of CLIP, as DeepSeek-OCR-2 has",
        r"\bqwen2_model\.|\b(resample_)?query_(768|1024)",
        hint="its encoders convert: dsocr-convert sam ..., dsocr-convert qwen2 ...",
    ),
    _Rule(
        "is a ViT with layer scales (DINOv2, InternViT)", r"\b(ls1(\.gamma)?|layer_scale1\.lambda1|lambda_1|gamma_1)$"
    ),
    _Rule("is SAM 3 (a Perception Encoder)", r"\bdetector\.backbone\.vision_backbone\."),
    _Rule("is a RepViT, as in RepViT-SAM", r"\bfeatures\.\d+\.token_mixer\."),
    _Rule("is a YOLO, as FastSAM is", r"\bdfl\.conv\.weight$"),
    _Rule("is a GroupViT", r"\bgroup_token$"),
    _Rule("is a ConvNeXt", r"\bstages\.\d+\.(blocks\.)?\d+\.(conv_dw|dwconv)\."),
    _Rule("has tables of relative position biases (Swin, BEiT)", r"\.relative_position_bias_table$"),
    _Rule("has the vision encoder of Qwen-VL", r"\bvisual\.(merger|transformer\.resblocks\.0\.attn\.in_proj)\."),
    _Rule(_PLAIN_VIT, r"\bencoder\.layer\.0\.attention\.attention\.query\.weight$"),
    _Rule(_PLAIN_VIT, r"\bcls_token$", r"\bblocks\.0\.attn\.qkv\.weight$", absent=r"\bnorm_pre\.|\.rel_pos_[hw]$"),
    _Rule("is a ResNet", r"\blayer1\.0\.conv1\.weight$", absent=_VISION_TRANSFORMER),
    _Rule("is a diffusion model (UNet or VAE)", r"\bmid_block\.attentions\.0\.", absent=_VISION_TRANSFORMER),
    _Rule(
        "is a language model without a vision encoder",
        r"\blayers\.0\.mlp\.(gate|up|gate_up)_proj\.",
        absent=_VISION_TRANSFORMER,
        hint="convert the checkpoint of the vision encoder: config.json may name it (mm_vision_tower)",
    ),
    _Rule(
        "is a text encoder (BERT, T5)",
        r"\b(layer\.0\.attention\.self\.query|block\.0\.layer\.0\.SelfAttention\.q)\.weight$",
        absent=_VISION_TRANSFORMER,
    ),
    _Rule("holds the state of an optimizer", r"\.exp_avg(_sq)?$", hint="convert the weights of that training"),
)


def find_mark(tensors: Tensors, is_channels_last: bool = False) -> Mark | None:
    """Return what tensors show that no layout describes, or None.

    With `is_channels_last`, a layout describes convolutions as MLX stores them.
    """
    kinds = _kinds(tensors)
    return (
        _by_names(tensors, kinds, (*_ADAPTERS, *_QUANTISED))
        or _not_gathered(tensors)
        or _packed_weights(tensors)
        or _by_names(tensors, kinds, _ARCHITECTURES)
        or find_half_transposed(tensors)
        or (None if is_channels_last else _channels_last(tensors))
        or _unreadable(tensors)
    )


def find_architecture(tensors: Tensors) -> Mark | None:
    """Return which other architecture tensors show, or None."""
    return _by_names(tensors, _kinds(tensors), _ARCHITECTURES)


def has_vision_encoder(names: Iterable[str]) -> bool:
    """Return whether some names are those of a vision encoder, of whatever architecture."""
    return _occurs(_VISION, names)


def find_adapters(names: Iterable[str]) -> list[str]:
    """Return the names that belong to adapters or other modules that change what an encoder computes."""
    return [name for name in names if re.search(_ADAPTER, name)]


def _kinds(tensors: Tensors) -> list[str]:
    """Return one name of those that differ in layer indices alone, of which there can be a hundred thousand."""
    kinds: dict[str, str] = {}
    # The lowest indices stay.
    for name in sorted(tensors, key=lambda name: (len(name), name)):
        kinds.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "", name), name)
    return list(kinds.values())


def _by_names(tensors: Tensors, kinds: list[str], rules: Iterable[_Rule]) -> Mark | None:
    for rule in rules:
        if all(_occurs(each, kinds) for each in rule.patterns) and not (rule.absent and _occurs(rule.absent, kinds)):
            return Mark(rule.what, rule.hint, [name for name in tensors if re.search(rule.patterns[0], name)])
    return None


def _occurs(pattern: str, names: Iterable[str]) -> bool:
    return any(re.search(pattern, name) for name in names)


def _not_gathered(tensors: Tensors) -> Mark | None:
    """Weights of ZeRO-3: they have shape [0], but for the smallest."""
    empty = [name for name, tensor in tensors.items() if tensor.shape == (0,) and name.endswith(("weight", "bias"))]
    hint = (
        "gather them: run zero_to_fp32.py in the checkpoint's folder, or train with "
        "stage3_gather_16bit_weights_on_model_save, and convert the result"
    )
    what = "was saved by DeepSpeed ZeRO-3 without gathering the weights, which are empty here"
    return Mark(what, hint, empty) if empty else None


def _packed_weights(tensors: Tensors) -> Mark | None:
    """Linear layers that hold integers, or 8-bit floats and a scale, of whatever quantisation."""
    linear = r"(_proj|qkv|proj|fc[12]|lin[12]|c_fc|in_proj_weight|query|key|value|dense)(\.|$)"
    layers = {name: tensor.dtype.name for name, tensor in tensors.items() if tensor.shape and re.search(linear, name)}
    found = [name for name, dtype in layers.items() if dtype.startswith(("int", "uint"))]
    if not found and any("scale" in name.rpartition(".")[2] for name in layers):
        found = [name for name, dtype in layers.items() if dtype.startswith("float8")]
    return Mark(f"holds quantised weights ({layers[found[0]]})", _DEQUANTISE, found) if found else None


def find_half_transposed(tensors: Tensors) -> Mark | None:
    """Convolutions in both orders; the fewer of them are named first."""
    first, last = convolutions(tensors)
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
    last = convolutions(tensors)[1]
    hint = (
        "convert the checkpoint that it was made from; or copy the mapping of its names (dsocr-convert mapping show "
        "LAYOUT > mine.yaml), add then: [permute: [0, 3, 1, 2]] to these tensors' rules, reorder their shapes under "
        "detect, and give --mapping mine.yaml"
    )
    return Mark("stores its convolutions channels last, as MLX does", hint, last) if last else None


def convolutions(tensors: Tensors) -> tuple[list[str], list[str]]:
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
