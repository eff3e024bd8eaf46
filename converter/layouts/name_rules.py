"""Rules that recognise weights which no layout describes, by the names of their tensors.

They are adapters, quantised weights and other architectures. The first rule that fits gives the reason and the next
step.
"""

from __future__ import annotations

# Next steps.
_MERGE = (
    "merge it into the weights first, in peft with model.merge_and_unload().save_pretrained(FOLDER), and convert that"
)
_UNFACTOR = (
    "compute them first, on the model in Python: torch.nn.utils.remove_weight_norm, .remove_spectral_norm, "
    ".prune.remove or .parametrize.remove_parametrizations; save its state dict and convert that"
)
DEQUANTISE = "convert the original weights from before quantisation, or dequantise these and save 16 or 32 bits"
_USE_SUPPORTED = (
    "the DeepEncoder is SAM (ViT-B, ViT-L, ViT-H) and CLIP (ViT) or Qwen2: convert a checkpoint of one of these"
)


class NameRule:
    """A rule that recognises tensors by name.

    Each of `patterns` is found in some name, and `absent` in none. They are regular expressions.
    """

    def __init__(self, what: str, *patterns: str, absent: str = "", hint: str = _USE_SUPPORTED) -> None:
        self.what, self.patterns, self.absent, self.hint = what, patterns, absent, hint


# Names of modules that change what an encoder computes. Layouts never drop them, wherever they are.
EXTRA_MODULES = (
    r"(?i)(^|[._])(lora|linear_[ab]_|dora|ia3|vera|loha|lokr|hada_w|adapter|attn_pool|vpt"
    r"|prompt_(generator|embedding|token))"
)
ADAPTERS = (
    NameRule(
        "holds LoRA adapters that are not merged",
        r"(?i:lora_?(a|b|down|up|magnitude|embedding))|\blinear_[ab]_[a-z]+\.|^w_[ab]_\d+$",
        hint=_MERGE,
    ),
    NameRule("holds layers wrapped by PEFT", r"\.(base_layer|modules_to_save)\.", hint=_MERGE),
    NameRule("holds PEFT adapters that are not merged", r"\.(ia3_l|b?oft_(r|s|R)|vera_lambda_[bd])(\.|$)", hint=_MERGE),
    NameRule(
        "holds weights in factors (weight_norm, spectral_norm, pruning)",
        r"\.(weight_(g|v|orig|mask)|parametrizations\.weight\.original\d?)$",
        hint=_UNFACTOR,
    ),
    NameRule("holds LoHa or LoKr adapters that are not merged", "hada_w[12]|lokr_w[12]", hint=_MERGE),
)
QUANTISED = (
    NameRule(
        "holds weights quantised by bitsandbytes (4 bits)", r"\.(quant_(state|map)|absmax)(\.|$)", hint=DEQUANTISE
    ),
    NameRule("holds weights quantised by bitsandbytes (8 bits)", r"\.(SCB|weight_format)$", hint=DEQUANTISE),
    NameRule("holds weights quantised by GPTQ", r"\.qweight$", r"\.g_idx$", hint=DEQUANTISE),
    NameRule("holds weights quantised by AWQ", r"\.qweight$", r"\.qzeros$", hint=DEQUANTISE),
    NameRule("holds weights quantised by HQQ", r"(^|\.)W_q$", hint=DEQUANTISE),
    NameRule("holds weights quantised with codebooks (AQLM, QuIP)", r"\.(codebooks?|Qidxs)$", hint=DEQUANTISE),
    NameRule("holds weights that MLX quantised", r"\.scales$", r"\.biases$", hint=DEQUANTISE),
    NameRule("holds quantised weights (qweight)", r"\.qweight$", hint=DEQUANTISE),
    NameRule("holds observers of quantisation", r"fake_quant\.|activation_post_process\.|_amax$", hint=DEQUANTISE),
    NameRule("holds weights that torch quantised dynamically", "_packed_params", hint=DEQUANTISE),
    NameRule(
        "holds quantised weights (8-bit, such as float8) with their scales",
        "((weight|input)(_quantizer)?[._]*scales?(_inv|_2|_ub)?|scale_(weight|input)|scaled_fp8)$",
        hint=DEQUANTISE,
    ),
)
_ENCODER_STEP = "convert the checkpoint of the vision encoder: config.json may name it (mm_vision_tower)"
_PLAIN_VIT = "is a ViT (DeiT, DINO, MAE) without the norm that CLIP has before its transformer"
# Names that only vision transformers have.
_VISION_TRANSFORMER = "class_embedding|cls_token|patch_embed"
VISION = rf"{_VISION_TRANSFORMER}|\b(visual|vision\w*)\."
ARCHITECTURES = (
    NameRule("was saved by FSDP in flat parameters", r"(^|[._])flat_param(_\d+)?$", hint="save a FULL_STATE_DICT"),
    NameRule("is SAM 3 (a Perception Encoder)", r"\bvision_backbone\.|vision_encoder\.neck\.fpn_layers\."),
    NameRule("is SAM 2 (a Hiera encoder)", r"\btrunk\.blocks\.0\.attn\.qkv", r"neck\.convs|maskmem"),
    NameRule("is SAM 2 (a Hiera encoder)", r"vision_encoder\.backbone\.blocks\.0\."),
    NameRule("is EdgeTAM (a RepViT encoder)", r"vision_encoder\.backbone\.timm_model\.|image_encoder\.trunk\.body\."),
    NameRule("is a Hiera, as SAM 2 has", r"\bblocks\.0\.attn\.qkv\.weight$", r"\bblocks\.\d+\.proj\.weight$"),
    NameRule("is a Hiera, as SAM 2 has", r"\bstages\.\d+\.layers\.0\.proj\.weight$"),
    NameRule("is MobileSAM (a TinyViT encoder)", r"\b(patch_embed\.seq\.0|blocks\.0\.conv1)\.c\."),
    NameRule("is an EfficientViT, as in EfficientViT-SAM", r"\.op_list\.\d+\.", absent=r"\bfuse_stage"),
    NameRule("is EfficientSAM or EdgeSAM", r"image_encoder\.(stage|fuse_stage|input_stem|neck\.0\.0\.)"),
    NameRule(
        "is a ViT with SAM's neck and no relative positions, as EfficientSAM is",
        r"\bblocks\.0\.mlp\.fc1\.weight$",
        r"\bneck\.0\.weight$",
        absent=r"\.rel_pos_[hw]$",
    ),
    NameRule("is a ViTDet, without SAM's neck", r"\bblocks\.\d+\.attn\.rel_pos_[hw]$", r"\bsimfp_\d|\bbackbone\.net\."),
    NameRule("is a ViTDet, without SAM's neck", r"\bencoder\.layers?\.\d+\.attention\.(qkv\.weight|rel_pos_h)$"),
    NameRule(
        "is the mask decoder of a SAM, without its image encoder",
        r"\bmask_decoder\.",
        absent=r"patch_embed\.|encoder\.(blocks|layers|trunk)\.|backbone\.",
        hint="convert a checkpoint of the whole SAM",
    ),
    NameRule("is a ResNet CLIP (RN50 and its kind)", r"\blayer1\.0\.conv1\.weight", r"\battnpool\."),
    NameRule(
        "is EVA-CLIP, with another transformer", r"\bblocks\.0\.(attn\.(q_bias|q_proj\.weight|inner_attn_ln)|mlp\.w1\.)"
    ),
    NameRule(
        "is BLIP or BLIP-2, with no norm before its layers", r"\bencoder\.layers\.0\.self_attn\.projection\.weight$"
    ),
    NameRule("is mPLUG-Owl, whose encoder is not CLIP's", r"encoder\.layers\.0\.self_attn\.query_key_value\."),
    NameRule("is CogVLM, whose encoder is an EVA-CLIP", r"\bvision\.patch_embedding\.cls_embedding$"),
    NameRule("is Florence-2 (a DaViT encoder)", r"\.channel_block\.channel_attn\."),
    NameRule("is MobileCLIP (a FastViT encoder)", r"\b(network\.\d+|blocks)\.\d+\.token_mixer\.|\.pre_norm_mha\."),
    NameRule("is X-CLIP, whose layers attend across frames", r"\.message_attn\."),
    NameRule("is a Perception Encoder (rotary positions)", r"\battn_pool\.(probe|latent)$", r"\b(ln_pre|norm_pre)\."),
    NameRule(
        "is SigLIP, which has no class token and no norm before its transformer",
        r"head\.probe$|attn_pool\.latent$|logit_bias$|\bembeddings\.patch_embedding\.bias$",
        absent=r"embeddings\.class_embedding$|\bcls_token$",
    ),
    NameRule(
        "is Stable Diffusion, which holds CLIP's text tower alone",
        r"^(model\.diffusion_model|first_stage_model|conditioner|cond_stage_model)\.",
        absent=r"\b(visual|vision_model)\.",
    ),
    NameRule(
        "is a text tower alone, without the vision encoder",
        r"\b(token_embedding|text_projection)(\.weight)?$",
        absent=r"class_embedding|conv1\.weight|patch_embed|visual\.|vision_model\.|class_token",
    ),
    NameRule(
        "has a Qwen2 in the place of CLIP, as DeepSeek-OCR-2 has",
        r"\bqwen2_model\.|\b(resample_)?query_(768|1024)",
        hint="its encoders convert: dsocr-convert sam ..., dsocr-convert qwen2 ...",
    ),
    NameRule("has tables of relative position biases (Swin, BEiT)", r"\.relative_position_bias_table$"),
    NameRule(
        "is a ViT with layer scales (DINOv2, InternViT, BEiT)",
        r"\b(ls1(\.gamma)?|layer_scale1\.lambda1|lambda_1|gamma_1)$",
    ),
    NameRule("is a RepViT, as in RepViT-SAM", r"\bfeatures\.\d+\.token_mixer\."),
    NameRule("is a YOLO, as FastSAM is", r"\bdfl\.conv\.weight$"),
    NameRule("is a GroupViT", r"\bgroup_token$"),
    NameRule("is a ConvNeXt", r"\bstages\.\d+\.(blocks\.)?\d+\.(conv_dw|dwconv)\."),
    NameRule(
        "has the vision encoder of Qwen-VL",
        r"\bvisual\.(merger|transformer\.resblocks\.0\.attn\.in_proj)\.|^merger\.(linear_fc1|ln_q)\.",
    ),
    NameRule("has the vision encoder of Llama 3.2 or 4", r"\b(gated_positional_embedding|positional_embedding_vlm)\b"),
    NameRule("is Pixtral (rotary positions)", r"\bpatch_conv\.weight$"),
    NameRule("is Pix2Struct, as Kosmos-2.5 has", r"\b(row|column)_embedder\.weight$"),
    NameRule("is AIMv2", r"\b(layers\.0\.rms_norm1|preprocessor\.patchifier\.proj)\.weight$"),
    NameRule("is BridgeTower, which reads every layer of its encoder", r"\bcross_modal_(image|text)_layers\."),
    NameRule("is MoonViT (rotary positions), as in Kimi-VL", r"\bblocks\.\d+\.wqkv\.weight$"),
    NameRule("is the vision encoder of dots.ocr", r"\bpatch_embed\.patchifier\.proj\.weight$"),
    NameRule("is a FocalNet", r"\.modulation\.(f|projection_in)\.weight$"),
    NameRule("is ViTamin, with convolutions before its transformer", r"\bpatch_embed\.backbone\.(stem|stages)\."),
    NameRule("is Whisper, a model of speech", r"\bencoder\.conv[12]\.weight$", absent=_VISION_TRANSFORMER),
    NameRule(
        "is a prompt learner (CoOp), without the vision encoder",
        r"(^|\.)ctx$",
        r"(^|\.)token_prefix$",
        absent=VISION,
        hint=_ENCODER_STEP,
    ),
    NameRule("is ImageBind", r"^modality_(trunks|preprocessors)\."),
    NameRule("is an EfficientNet, as in ALIGN", r"\.depthwise_conv\.depthwise_conv\.weight$"),
    NameRule(_PLAIN_VIT, r"\b(attention\.attention\.query|layers\.0\.layernorm_before)\.weight$"),
    NameRule(_PLAIN_VIT, r"\bcls_token$", r"\bblocks\.0\.attn\.qkv\.weight$", absent=r"\bnorm_pre\.|\.rel_pos_[hw]$"),
    NameRule("is a ResNet", r"\blayer1\.0\.conv1\.weight$", absent=_VISION_TRANSFORMER),
    NameRule(
        "is a diffusion model (UNet or VAE)",
        r"\b(mid_block\.attentions\.0|mid\.block_1|double_blocks\.0)\.",
        absent=_VISION_TRANSFORMER,
    ),
    NameRule(
        "is a model of Megatron, whose q, k and v are interleaved by heads",
        r"\bself_attention\.(linear_qkv|query_key_value)\.",
        hint="export it with the program that trained it (Megatron Bridge, NeMo) for transformers, and convert that",
    ),
    NameRule(
        "is a projector of image features, without the vision encoder",
        r"\b(mm_projector|llama_proj|image_proj|ip_adapter|multi_modal_projector|projector\.layers|perceiver\.latents)\b",
        absent=rf"{VISION}|\blayers\.0\.mlp\.",
        hint=_ENCODER_STEP,
    ),
    NameRule(
        "is a GGUF file of llama.cpp for another model",
        r"^(v\.)?blk\.0\.attn_q\.weight$",
        absent=r"query|\bsam\.",
        hint="convert the weights that it was made from, of its vision encoder (transformers, open_clip)",
    ),
    NameRule(
        "is a language model without a vision encoder",
        r"\blayers\.0\.(mlp\.(gate|up|gate_up)_proj|feed_forward\.w1)\.|\bh\.0\.attn\.c_attn\.|\.dense_h_to_4h\.",
        absent=_VISION_TRANSFORMER,
        hint=f"{_ENCODER_STEP}; dsocr-convert qwen2 converts Qwen2 and Qwen2.5 alone",
    ),
    NameRule(
        "is a text encoder (BERT, T5)",
        r"\b(layer\.0\.attention\.self\.query|block\.0\.layer\.0\.SelfAttention\.q)\.weight$",
        absent=_VISION_TRANSFORMER,
    ),
    NameRule("holds the state of an optimizer", r"\b(exp_avg(_sq)?|momentum_buffer)$", hint="convert the weights"),
)
