"""Configuration files of transformers' models: config.json and preprocessor_config.json.

Sizes follow from the shapes of the tensors. What no shape shows (activations, heads, epsilons) is in the plan's
assumptions. Images are preprocessed as for the published models of the family, with the mean and the standard deviation
of the source if it states them. The keys are those that transformers 4.46 to 5.23 read.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from converter.encoders.config import ClipConfig, SamConfig, Shapes, clip_config_from, sam_config_from, shape_of
from converter.errors import LayoutError
from converter.plan.assumptions import Assumptions, values_of
from converter.plan.plan import Plan

Json = dict[str, Any]


def config_files(plan: Plan, full_model: bool, normalization: Mapping[str, object]) -> dict[str, bytes]:
    """Return the configuration files of a folder by name.

    Args:
        plan: The planned conversion to sam-hf or clip-hf.
        full_model: Whether the output is the full model, not only the vision encoder.
        normalization: image_mean and image_std of the source, if it states them.

    Raises:
        LayoutError: The shapes do not belong to a model of the family.
    """
    make_documents = {"sam-hf": sam_documents, "clip-hf": clip_documents}[plan.layout]
    shapes = {name: value.shape for name, value in plan.canonical_tensors.items()}
    try:
        config, preprocessor = make_documents(shapes, plan.assumptions, full_model)
    except LayoutError as error:
        raise LayoutError(f"{error}", "write the tensors alone: end --output in .safetensors") from error
    # transformers loads all tensors with one type: the most frequent one here, or of several the first by name.
    dtypes = sorted(value.dtype.name for value in plan.outputs.values() if value.dtype.is_float)
    config["torch_dtype"] = Counter(dtypes).most_common(1)[0][0]
    documents = {"config.json": config, "preprocessor_config.json": {**preprocessor, **normalization}}
    return {name: f"{json.dumps(value, indent=2, sort_keys=True)}\n".encode() for name, value in documents.items()}


def sam_vision_config(sizes: SamConfig) -> Json:
    """Return the arguments of transformers' SamVisionConfig."""
    return {
        **_vision_config(sizes),
        "mlp_dim": sizes.mlp,
        "mlp_ratio": sizes.mlp / sizes.width,
        "output_channels": sizes.neck,
        "num_pos_feats": sizes.neck // 2,
        "window_size": sizes.window,
        "global_attn_indexes": list(sizes.global_blocks),
    }


def clip_vision_config(sizes: ClipConfig) -> Json:
    """Return the arguments of transformers' CLIPVisionConfig."""
    return {**_vision_config(sizes), "intermediate_size": sizes.mlp}


def _vision_config(sizes: SamConfig | ClipConfig) -> Json:
    return {
        "image_size": sizes.image_size,
        "patch_size": sizes.patch,
        "num_channels": sizes.channels,
        "hidden_size": sizes.width,
        "num_hidden_layers": sizes.depth,
        "num_attention_heads": sizes.heads,
        "hidden_act": sizes.activation,
        "layer_norm_eps": sizes.epsilon,
    }


def sam_documents(shapes: Shapes, assumptions: Assumptions, full_model: bool) -> tuple[Json, Json]:
    """Return config.json and preprocessor_config.json for SamModel, or for SamVisionModel.

    Args:
        shapes: The shapes of the tensors by canonical name.
        assumptions: The values that no shape shows.
        full_model: Whether the output is the full model, not only the vision encoder.

    Raises:
        LayoutError: Shapes contradict each other.
    """
    sizes = sam_config_from(shapes, **values_of(assumptions))
    vision = {"model_type": "sam_vision_model", **sam_vision_config(sizes)}
    preprocessor = _sam_preprocessor(sizes.image_size)
    if not full_model:
        return {"architectures": ["SamVisionModel"], **vision}, preprocessor
    prompts = {
        "image_size": sizes.image_size,
        "patch_size": sizes.patch,
        "image_embedding_size": sizes.grid,
        "hidden_size": sizes.neck,
        "mask_input_channels": shape_of(shapes, "prompt_encoder.mask_downscaling.3.weight", 4)[0],
        "num_point_embeddings": _count_indices(shapes, "prompt_encoder.point_embeddings."),
        **_function_config(assumptions, "prompt_encoder", sizes.neck),
    }
    config = {
        "architectures": ["SamModel"],
        "model_type": "sam",
        "vision_config": vision,
        "prompt_encoder_config": prompts,
        "mask_decoder_config": _sam_decoder(shapes, assumptions, sizes.neck),
    }
    return config, preprocessor | {"processor_class": "SamProcessor"}


def _sam_preprocessor(image_size: int) -> Json:
    mask_size = image_size // 4
    return {
        **_preprocessor("SamImageProcessor", resample=2),
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        # The longer side is resized to this size, and the shorter one padded.
        "size": {"longest_edge": image_size},
        "do_pad": True,
        "pad_size": {"height": image_size, "width": image_size},
        "mask_size": {"longest_edge": mask_size},
        "mask_pad_size": {"height": mask_size, "width": mask_size},
    }


def _sam_decoder(shapes: Shapes, assumptions: Assumptions, width: int) -> Json:
    attention_width = shape_of(shapes, "mask_decoder.transformer.final_attn_token_to_image.q_proj.weight", 2)[0]
    return {
        "hidden_size": width,
        "mlp_dim": shape_of(shapes, "mask_decoder.transformer.layers.0.mlp.lin1.weight", 2)[0],
        "num_hidden_layers": _count_indices(shapes, "mask_decoder.transformer.layers."),
        "attention_downsample_rate": width // attention_width,
        # One of the mask tokens is for single-mask output.
        "num_multimask_outputs": shape_of(shapes, "mask_decoder.mask_tokens.weight", 2)[0] - 1,
        "iou_head_depth": _count_indices(shapes, "mask_decoder.iou_prediction_head.layers."),
        "iou_head_hidden_dim": shape_of(shapes, "mask_decoder.iou_prediction_head.layers.0.weight", 2)[0],
        **_function_config(assumptions, "mask_decoder", width),
    }


def clip_documents(shapes: Shapes, assumptions: Assumptions, full_model: bool) -> tuple[Json, Json]:
    """Return config.json and preprocessor_config.json for CLIPModel, or for CLIPVisionModel.

    There are no files of a tokenizer, which no checkpoint contains.

    Args:
        shapes: The shapes of the tensors by canonical name.
        assumptions: The values that no shape shows.
        full_model: Whether the output is the full model, not only the vision encoder.

    Raises:
        LayoutError: Shapes contradict each other, or a width is not a multiple of the width of a head.
    """
    sizes = clip_config_from(shapes, **values_of(assumptions))
    vision = {"model_type": "clip_vision_model", **clip_vision_config(sizes)}
    preprocessor = {
        **_preprocessor("CLIPImageProcessor", resample=3),
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "size": {"shortest_edge": sizes.image_size},
        "do_center_crop": True,
        "crop_size": {"height": sizes.image_size, "width": sizes.image_size},
    }
    if not full_model:
        return {"architectures": ["CLIPVisionModel"], **vision}, preprocessor
    projection = {"projection_dim": shape_of(shapes, "visual_projection.weight", 2)[0]}
    config = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        **projection,
        "vision_config": vision | projection,
        "text_config": _clip_text(shapes, assumptions) | projection,
    }
    return config, preprocessor


def _clip_text(shapes: Shapes, assumptions: Assumptions) -> Json:
    vocabulary, width = shape_of(shapes, "text_model.embeddings.token_embedding.weight", 2)
    return {
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "max_position_embeddings": shape_of(shapes, "text_model.embeddings.position_embedding.weight", 2)[0],
        # The last two tokens of OpenAI's vocabulary mark the start and the end of a text.
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "hidden_size": width,
        "intermediate_size": shape_of(shapes, "text_model.transformer.layers.0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": _count_indices(shapes, "text_model.transformer.layers."),
        **_function_config(assumptions, "text_model", width),
    }


def _function_config(assumptions: Assumptions, part: str, width: int) -> Json:
    """Return activation, epsilon and number of heads, which no shape shows, for a part of a full model."""
    values = values_of(assumptions, part)
    config = {"hidden_act": values["activation"], "layer_norm_eps": values["epsilon"]}
    if "head_width" in values and width % values["head_width"]:
        raise LayoutError(f"{part}: {width} channels, expected a multiple of the head width {values['head_width']}")
    if "head_width" in values:
        config["num_attention_heads"] = width // values["head_width"]
    elif "heads" in values:
        config["num_attention_heads"] = values["heads"]
    return config


def _preprocessor(kind: str, resample: int) -> Json:
    """Return the keys that both processors share; `resample` is Pillow's constant: 2 bilinear, 3 bicubic."""
    return {
        "image_processor_type": kind,
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": resample,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
    }


def _count_indices(shapes: Shapes, prefix: str) -> int:
    """Return how many different indices follow a prefix in the names of the tensors."""
    matches = (re.match(rf"{re.escape(prefix)}([0-9]+)\.", name) for name in shapes)
    return len({match[1] for match in matches if match})
