"""llama.cpp's mmproj files: the types of the tensors, and the keys and values of the header.

Both are what llama.cpp's convert_hf_to_gguf.py --mmproj writes for DeepSeek-OCR, Unlimited-OCR and DeepSeek-OCR-2. As
in that script, sizes come from the configs of the checkpoint, if these state them.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from converter.assembly.parts import EncoderParts
from converter.checkpoint.model_config import are_channels, are_counts, object_at, read_config
from converter.checkpoint.open import Checkpoint
from converter.errors import LayoutError, first_names
from converter.output.names import grouped
from converter.plan.assumptions import Assumption
from converter.plan.plan import sort_outputs
from converter.tensors.lazy_tensor import LazyTensor, cast, reshaped
from converter.tensors.tensor_info import TensorInfo

if TYPE_CHECKING:
    from converter.formats.gguf import Value

# The names of the tensors that --dtype applies to. All others are float32.
_MATRIX_NAME = re.compile(
    r"v\.(sam\.)?blk\.\d+\.(attn[._](qkv|q|k|v|out)|mlp\.lin\d|ffn_(gate|up|down))\.weight"
    r"|mm\.model\.fc\.weight|v\.resample_query_\d+\.weight"
)
# SAM's patch convolution: --dtype float16 applies to it, bfloat16 does not.
_PATCH_EMBEDDING = "v.sam.patch_embd.weight"
_FILE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 32}


def cast_to_mmproj(outputs: Mapping[str, LazyTensor], dtype: str) -> dict[str, LazyTensor]:
    """Cast the tensors of an mmproj; `dtype` is the type of the matrices, or "keep" for the source's type."""
    dtype = matrix_dtype(outputs) if dtype == "keep" else dtype
    return sort_outputs({name: cast(value, _dtype_of(name, dtype)) for name, value in outputs.items()})


def as_mmproj_shapes(projector: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Reshape the projector's tensors as in llama.cpp, where view_seperator is a matrix of one row."""
    return {
        name: reshaped(value, (1, *value.shape)) if name == "view_seperator" else value
        for name, value in projector.items()
    }


def _dtype_of(name: str, dtype: str) -> str:
    uses_dtype = _MATRIX_NAME.fullmatch(name) or (name == _PATCH_EMBEDDING and dtype == "float16")
    return dtype if uses_dtype else "float32"


def matrix_dtype(outputs: Mapping[str, LazyTensor | TensorInfo]) -> str:
    """Return the most frequent type of the matrices; float32 if an mmproj cannot have it."""
    dtypes = Counter(value.dtype.name for name, value in outputs.items() if _MATRIX_NAME.fullmatch(name))
    dtype = dtypes.most_common(1)[0][0] if dtypes else ""
    return dtype if dtype in _FILE_TYPES else "float32"


class _Version(NamedTuple):
    """The header values and names that belong to one version of the model."""

    projector_type: str  # llama.cpp's name of the projector
    config_section: str  # The object in config.json's `vision_config.width` that describes the second encoder
    max_tiles: int
    config_keys: dict[str, tuple[str, ...]]  # The possible keys in the config of each value of the second encoder
    defaults: dict[str, int]  # The values of DeepSeek's own checkpoint, for configs that do not state them


_CONFIG_KEYS = {
    "image_size": ("image_size",),
    "patch_size": ("patch_size",),
    "feed_forward_length": ("intermediate_size",),
    "block_count": ("n_layers", "num_hidden_layers", "n_layer", "num_layers", "depth", "layers"),
    "window_size": ("window_size",),
}
# By the family of the second encoder. llama.cpp's feed_forward_length of CLIP is four times the number of heads.
_VERSIONS = {
    "clip": _Version(
        projector_type="deepseekocr",
        config_section="clip-l-14-224",
        max_tiles=9,
        config_keys=_CONFIG_KEYS
        | {"embedding_length": ("width", "hidden_size")}
        | {"attention.head_count": ("num_attention_heads", "num_heads", "heads")},
        defaults={"image_size": 224, "patch_size": 14, "embedding_length": 1024, "feed_forward_length": 64}
        | {"block_count": 24, "attention.head_count": 16, "window_size": 14},
    ),
    "qwen2": _Version(
        projector_type="deepseekocr2",
        config_section="qwen2-0-5b",
        max_tiles=6,
        config_keys=_CONFIG_KEYS | {"embedding_length": ("dim",), "attention.head_count": ("num_attention_heads",)},
        defaults={"image_size": 1024, "patch_size": 16, "embedding_length": 896, "feed_forward_length": 4864}
        | {"block_count": 24, "attention.head_count": 14, "attention.head_count_kv": 2, "window_size": 14},
    ),
}
_SAM_CONFIG_KEYS = {"sam.block_count": ("layers",), "sam.embedding_length": ("width",), "sam.head_count": ("heads",)}
_SAM_DEFAULTS = {"sam.block_count": 12, "sam.embedding_length": 768, "sam.head_count": 12}
_MAX_TILES = {"UnlimitedOCRForCausalLM": 32}  # by architecture, if it is not the version's number
_CONFIG = "config.json"
# The files that may state the normalisation of pixels, and an object in each that may contain it. The last file counts.
_PROCESSOR_CONFIGS = (("preprocessor_config.json", "media_proc_cfg"), ("processor_config.json", "image_processor"))
_EPSILON, _HALF, _TOKENS_PER_SIDE = 1e-6, [0.5, 0.5, 0.5], 16
_FROM_DEFAULTS, _FROM_HEADER = "DeepSeek's defaults", "the source's header"
# Keys of a GGUF source's header that are not copied, as the tensors show the values.
_NOT_COPIED = ("general.file_type", "clip.vision.projection_dim")


# The values of the header, by key without `clip.vision.`; the origin of a value is the file that states it.
_Values = dict[str, Assumption]


class Header(NamedTuple):
    """The header of an mmproj."""

    keys: dict[str, Value]
    assumptions: dict[str, Assumption]  # The values that come from configs or defaults, by key
    remarks: list[str]  # Remarks for the user


NO_HEADER = Header({}, {}, [])


def make_header(parts: EncoderParts, dtype: str) -> Header:
    """Return the header of an mmproj.

    Args:
        parts: The encoder with its projector.
        dtype: The type of the matrices.

    Raises:
        LayoutError: The projector is not DeepSeek's.
    """
    source = parts.sources[0]
    projector = parts.projector.get("projector.layers.weight")
    if projector is None:
        raise LayoutError(
            f"{source.name}: llama.cpp does not read its projector ({', '.join(parts.projector)})",
            "an mmproj can only be written for DeepSeek-OCR, DeepSeek-OCR-2 and Unlimited-OCR",
        )
    remarks: list[str] = []
    config = read_config(source, _CONFIG, remarks)
    version, tensor_sizes = _VERSIONS[list(parts.plans)[-1]], _sizes_of_tensors(parts)
    assumptions = _read_sizes(version, object_at(config, "vision_config"), tensor_sizes)
    assumptions |= _read_preprocessing(source, remarks)
    copied = _copy_header(source, assumptions, remarks)
    for key, size in tensor_sizes.items():
        value, _, origin = assumptions[key]
        if value != size:
            remarks.append(f"warning: {origin} says {key} {value}; the tensors show {size}")
    tokens_per_side: Any = assumptions.pop("tokens_per_side").value
    remarks.append(_describe_origins(assumptions))
    values: dict[str, Any] = {key: assumption.value for key, assumption in assumptions.items()}
    scale = values["image_size"] // values["patch_size"] // tokens_per_side
    keys: dict[str, Value] = {
        "general.architecture": "clip",
        "general.type": "mmproj",
        "general.file_type": _FILE_TYPES[dtype],
        "general.quantization_version": 2,
        "clip.has_vision_encoder": True,
        "clip.projector_type": version.projector_type,
        "clip.use_gelu": True,
        "clip.vision.projection_dim": projector.shape[0],
        "clip.vision.preproc_min_tiles": 2,
        "clip.vision.preproc_max_tiles": _max_tiles(config, version),
        **{f"clip.vision.{key}": value for key, value in values.items()},
    }
    # Without this key, llama.cpp uses 4.
    if scale not in (0, 4) and not copied:
        keys["clip.vision.projector.scale_factor"] = scale
    by_full_key = {f"clip.vision.{key}": assumption for key, assumption in assumptions.items()}
    return Header(keys | copied, by_full_key, remarks)


def _sizes_of_tensors(parts: EncoderParts) -> dict[str, int]:
    """Return the values of the header that the shapes of the tensors show."""
    sam, second = (resolved.plan.sizes for resolved in parts.plans.values())
    return {
        "embedding_length": second["width"],
        "block_count": second["depth"],
        "sam.embedding_length": sam["width"],
        "sam.block_count": sam["depth"],
    }


def _read_sizes(version: _Version, vision: Mapping[str, Any], tensor_sizes: Mapping[str, int]) -> _Values:
    """Return the sizes that `vision_config` states, or DeepSeek's. Without a config, the tensors show some of them."""
    widths = object_at(vision, "width")
    second, sam = {**vision, **object_at(widths, version.config_section)}, object_at(widths, "sam_vit_b")
    heads = second.get("heads")
    if heads is not None and are_counts(heads):
        second |= {"num_heads": heads, "intermediate_size": 4 * heads}
    sizes: _Values = {}
    for key, default in {**version.defaults, **_SAM_DEFAULTS}.items():
        section, names = second, version.config_keys.get(key, ())
        if key in _SAM_CONFIG_KEYS:
            section, names = sam, _SAM_CONFIG_KEYS[key]
        stated = next((section[name] for name in names if are_counts(section.get(name))), None)
        value: Any = default
        origin = _FROM_DEFAULTS
        if stated is not None:
            value, origin = stated, _CONFIG
        elif key in tensor_sizes and not vision:
            value, origin = tensor_sizes[key], "the tensors"
        sizes[key] = Assumption(value, default, origin)
    epsilon: Any = second.get("layer_norm_eps")
    value, origin = (epsilon, _CONFIG) if _is_valid(epsilon, _EPSILON) else (_EPSILON, _FROM_DEFAULTS)
    return sizes | {"attention.layer_norm_epsilon": Assumption(value, _EPSILON, origin)}


def _read_preprocessing(source: Checkpoint, remarks: list[str]) -> _Values:
    """Return the normalisation of pixels, and the number of image tokens in a row."""
    values: _Values = {key: Assumption(_HALF, _HALF, _FROM_DEFAULTS) for key in ("image_mean", "image_std")}
    values["tokens_per_side"] = Assumption(_TOKENS_PER_SIDE, _TOKENS_PER_SIDE, _FROM_DEFAULTS)
    for file, nested in _PROCESSOR_CONFIGS:
        config = read_config(source, file, remarks)
        config = {**config, **object_at(config, nested)}
        for key in ("image_mean", "image_std"):
            if are_channels(config.get(key)):
                values[key] = Assumption([float(value) for value in config[key]], _HALF, file)
        tokens = config.get("image_seq_length")
        if tokens is not None and are_counts(tokens):
            values["tokens_per_side"] = Assumption(math.isqrt(tokens), _TOKENS_PER_SIDE, file)
    return values


def _copy_header(source: Checkpoint, values: _Values, remarks: list[str]) -> dict[str, bytes]:
    """Replace `values` by those in the header of a GGUF source; return its other keys with their stored bytes."""
    if source.containers != ("GGUF",):
        return {}
    from converter.formats.gguf import decode_value, stored_keys

    stored = stored_keys(source.files[0])
    for key in [key for key in values if f"clip.vision.{key}" in stored]:
        value: Any = decode_value(stored.pop(f"clip.vision.{key}"))
        if _is_valid(value, values[key].expected):
            values[key] = values[key]._replace(value=value, origin=_FROM_HEADER)
        else:
            remarks.append(f"warning: {_FROM_HEADER}: clip.vision.{key} is ignored: it is not as llama.cpp writes it")
    others = {key: value for key, value in stored.items() if key not in _NOT_COPIED}
    if others:
        remarks.append(f"llama.cpp's header: {len(others)} more values as in the source: {first_names([*others])}")
    return others


def _is_valid(value: object, default: object) -> bool:
    """Return whether a value has the type of a default value, and is in the range for that type."""
    if isinstance(default, list):
        return are_channels(value)
    if isinstance(default, float):
        return isinstance(value, float) and 0 < value < 1
    return are_counts(value)


def _max_tiles(config: Mapping[str, Any], version: _Version) -> int:
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    return _MAX_TILES.get(first, version.max_tiles) if isinstance(first, str) else version.max_tiles


def _describe_origins(assumptions: _Values) -> str:
    """Return a remark that lists the keys of the values by origin."""
    keys_by_origin = grouped((assumption.origin, key) for key, assumption in assumptions.items())
    sources = [f"{', '.join(keys)} from {origin}" for origin, keys in keys_by_origin.items()]
    return f"llama.cpp's header: {'; '.join(sources)}"
