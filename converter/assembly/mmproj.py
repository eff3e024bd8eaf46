"""llama.cpp's mmproj: the types of its tensors, and the keys and values of its header.

Both are what llama.cpp's convert_hf_to_gguf.py --mmproj writes for DeepSeek-OCR, Unlimited-OCR and DeepSeek-OCR-2. As
there, sizes come from the configs of the checkpoint where they state them.
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
from converter.plan.assumptions import Assumption
from converter.plan.plan import sort_outputs
from converter.tensors.lazy_tensor import LazyTensor, cast, reshaped
from converter.tensors.tensor_info import TensorInfo

if TYPE_CHECKING:
    from converter.formats.gguf import Value

# The tensors that --dtype is for. All others are float32.
_MATRIX = re.compile(
    r"v\.(sam\.)?blk\.\d+\.(attn[._](qkv|q|k|v|out)|mlp\.lin\d|ffn_(gate|up|down))\.weight"
    r"|mm\.model\.fc\.weight|v\.resample_query_\d+\.weight"
)
# Also stored in float16, but not in bfloat16.
_PATCHES = "v.sam.patch_embd.weight"
_FILE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 32}


def typed(outputs: Mapping[str, LazyTensor], dtype: str) -> dict[str, LazyTensor]:
    """Return the tensors of an mmproj in its types; `dtype` is that of the matrices, or "keep" for the source's."""
    dtype = matrix_dtype(outputs) if dtype == "keep" else dtype
    return sort_outputs({name: cast(value, _dtype_of(name, dtype)) for name, value in outputs.items()})


def as_stored(projector: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Return the projector's tensors in llama.cpp's shapes: view_seperator is a matrix of one row."""
    return {
        name: reshaped(value, (1, *value.shape)) if name == "view_seperator" else value
        for name, value in projector.items()
    }


def _dtype_of(name: str, dtype: str) -> str:
    return dtype if _MATRIX.fullmatch(name) or (name == _PATCHES and dtype == "float16") else "float32"


def matrix_dtype(outputs: Mapping[str, LazyTensor | TensorInfo]) -> str:
    """Return the type of most matrices; float32 if llama.cpp has no such type."""
    found = Counter(value.dtype.name for name, value in outputs.items() if _MATRIX.fullmatch(name))
    dtype = found.most_common(1)[0][0] if found else ""
    return dtype if dtype in _FILE_TYPES else "float32"


class _Version(NamedTuple):
    """The header values and names that belong to one version of the model."""

    projector: str  # llama.cpp's name of the projector
    section: str  # The object in config.json's `vision_config.width` that describes the second encoder
    max_tiles: int
    keys: dict[str, tuple[str, ...]]  # The keys in the config of each value of the second encoder
    defaults: dict[str, int]  # The values of DeepSeek's own checkpoint, which no config need state


_SIZES = {
    "image_size": ("image_size",),
    "patch_size": ("patch_size",),
    "feed_forward_length": ("intermediate_size",),
    "block_count": ("n_layers", "num_hidden_layers", "n_layer", "num_layers", "depth", "layers"),
    "window_size": ("window_size",),
}
# By the family of the second encoder. llama.cpp's feed_forward_length of CLIP is four times the number of heads.
_VERSIONS = {
    "clip": _Version(
        "deepseekocr",
        "clip-l-14-224",
        9,
        _SIZES
        | {"embedding_length": ("width", "hidden_size")}
        | {"attention.head_count": ("num_attention_heads", "num_heads", "heads")},
        {"image_size": 224, "patch_size": 14, "embedding_length": 1024, "feed_forward_length": 64}
        | {"block_count": 24, "attention.head_count": 16, "window_size": 14},
    ),
    "qwen2": _Version(
        "deepseekocr2",
        "qwen2-0-5b",
        6,
        _SIZES | {"embedding_length": ("dim",), "attention.head_count": ("num_attention_heads",)},
        {"image_size": 1024, "patch_size": 16, "embedding_length": 896, "feed_forward_length": 4864}
        | {"block_count": 24, "attention.head_count": 14, "attention.head_count_kv": 2, "window_size": 14},
    ),
}
_SAM_KEYS = {"sam.block_count": ("layers",), "sam.embedding_length": ("width",), "sam.head_count": ("heads",)}
_SAM_DEFAULTS = {"sam.block_count": 12, "sam.embedding_length": 768, "sam.head_count": 12}
_MAX_TILES = {"UnlimitedOCRForCausalLM": 32}  # by architecture, where it is not the version's
_CONFIG = "config.json"
# The files with the normalisation of pixels, of which the last one counts, and an object in each that may hold it.
_PROCESSORS = (("preprocessor_config.json", "media_proc_cfg"), ("processor_config.json", "image_processor"))
_EPSILON, _HALF, _TOKENS = 1e-6, [0.5, 0.5, 0.5], 16
_DEFAULT, _HEADER = "DeepSeek's defaults", "the source's header"
# Of the header of a GGUF source, what the tensors show.
_SHOWN = ("general.file_type", "clip.vision.projection_dim")


# By their keys without `clip.vision.`; the origin is the file that states a value.
_Values = dict[str, Assumption]


class Header(NamedTuple):
    """The header of an mmproj."""

    keys: dict[str, Value]
    origins: dict[str, Assumption]  # What no tensor shows, by key
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
    projector = parts.projector.get("projector.layers.weight")
    if projector is None:
        raise LayoutError(
            f"{parts.sources[0].name}: llama.cpp does not read its projector ({', '.join(parts.projector)})",
            "an mmproj is written of DeepSeek-OCR, DeepSeek-OCR-2 and Unlimited-OCR",
        )
    remarks: list[str] = []
    config = read_config(parts.sources[0], _CONFIG, remarks)
    version, visible = _VERSIONS[list(parts.plans)[-1]], _visible_sizes(parts)
    found = _sizes(version, object_at(config, "vision_config"), visible) | _processing(parts.sources[0], remarks)
    kept = _carry_header(parts.sources[0], found, remarks)
    for key, size in visible.items():
        if found[key].value != size:
            remarks.append(f"warning: {found[key].origin} says {key} {found[key].value}; the tensors show {size}")
    tokens: Any = found.pop("tokens_per_side").value
    remarks.append(_origins(found))
    values: dict[str, Any] = {key: each.value for key, each in found.items()}
    scale = values["image_size"] // values["patch_size"] // tokens
    keys: dict[str, Value] = {
        "general.architecture": "clip",
        "general.type": "mmproj",
        "general.file_type": _FILE_TYPES[dtype],
        "general.quantization_version": 2,
        "clip.has_vision_encoder": True,
        "clip.projector_type": version.projector,
        "clip.use_gelu": True,
        "clip.vision.projection_dim": projector.shape[0],
        "clip.vision.preproc_min_tiles": 2,
        "clip.vision.preproc_max_tiles": _max_tiles(config, version),
        **{f"clip.vision.{key}": value for key, value in values.items()},
    }
    # llama.cpp takes 4 where there is none.
    if scale not in (0, 4) and not kept:
        keys["clip.vision.projector.scale_factor"] = scale
    return Header(keys | kept, {f"clip.vision.{key}": each for key, each in found.items()}, remarks)


def _visible_sizes(parts: EncoderParts) -> dict[str, int]:
    """Return the values that the tensors show."""
    sam, second = (resolved.plan.sizes for resolved in parts.plans.values())
    shown = {"embedding_length": second["width"], "block_count": second["depth"]}
    return shown | {"sam.embedding_length": sam["width"], "sam.block_count": sam["depth"]}


def _sizes(version: _Version, vision: Mapping[str, Any], visible: Mapping[str, int]) -> _Values:
    """Return sizes as `vision_config` states them; where there is none, DeepSeek's, or those of the tensors."""
    widths = object_at(vision, "width")
    second, sam = {**vision, **object_at(widths, version.section)}, object_at(widths, "sam_vit_b")
    heads = second.get("heads")
    if heads is not None and are_counts(heads):
        second |= {"num_heads": heads, "intermediate_size": 4 * heads}
    found: _Values = {}
    for key, default in {**version.defaults, **_SAM_DEFAULTS}.items():
        section, names = (sam, _SAM_KEYS[key]) if key in _SAM_KEYS else (second, version.keys.get(key, ()))
        stated = next((section[name] for name in names if are_counts(section.get(name))), None)
        value: Any = default
        origin = _DEFAULT
        if stated is not None:
            value, origin = stated, _CONFIG
        elif key in visible and not vision:
            value, origin = visible[key], "the tensors"
        found[key] = Assumption(value, default, origin)
    epsilon: Any = second.get("layer_norm_eps")
    value, origin = (epsilon, _CONFIG) if _is_like(epsilon, _EPSILON) else (_EPSILON, _DEFAULT)
    return found | {"attention.layer_norm_epsilon": Assumption(value, _EPSILON, origin)}


def _processing(source: Checkpoint, remarks: list[str]) -> _Values:
    """Return the normalisation of pixels, and the number of image tokens in a row."""
    found: _Values = {key: Assumption(_HALF, _HALF, _DEFAULT) for key in ("image_mean", "image_std")}
    found["tokens_per_side"] = Assumption(_TOKENS, _TOKENS, _DEFAULT)
    for file, nested in _PROCESSORS:
        config = read_config(source, file, remarks)
        config = {**config, **object_at(config, nested)}
        for key in ("image_mean", "image_std"):
            if are_channels(config.get(key)):
                found[key] = Assumption([float(value) for value in config[key]], _HALF, file)
        tokens = config.get("image_seq_length")
        if tokens is not None and are_counts(tokens):
            found["tokens_per_side"] = Assumption(math.isqrt(tokens), _TOKENS, file)
    return found


def _carry_header(source: Checkpoint, found: _Values, remarks: list[str]) -> dict[str, bytes]:
    """Put what the header of a GGUF source states into `found`; return its other values, as they are stored."""
    if source.containers != ("GGUF",):
        return {}
    from converter.formats.gguf import decoded, stored_keys

    stored = stored_keys(source.files[0])
    for key in [key for key in found if f"clip.vision.{key}" in stored]:
        value: Any = decoded(stored.pop(f"clip.vision.{key}"))
        if _is_like(value, found[key].expected):
            found[key] = found[key]._replace(value=value, origin=_HEADER)
        else:
            remarks.append(f"warning: {_HEADER}: clip.vision.{key} is ignored: it is not as llama.cpp writes it")
    kept = {key: value for key, value in stored.items() if key not in _SHOWN}
    if kept:
        remarks.append(f"llama.cpp's header: {len(kept)} more values as in the source: {first_names([*kept])}")
    return kept


def _is_like(value: object, default: object) -> bool:
    """Return whether a value can stand for one of DeepSeek's."""
    if isinstance(default, list):
        return are_channels(value)
    if isinstance(default, float):
        return isinstance(value, float) and 0 < value < 1
    return are_counts(value)


def _max_tiles(config: Mapping[str, Any], version: _Version) -> int:
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    return _MAX_TILES.get(first, version.max_tiles) if isinstance(first, str) else version.max_tiles


def _origins(found: _Values) -> str:
    """Return the keys of the values, by the file that states them."""
    keys: dict[str, list[str]] = {}
    for key, each in found.items():
        keys.setdefault(each.origin, []).append(key)
    return "llama.cpp's header: " + "; ".join(f"{', '.join(names)} from {origin}" for origin, names in keys.items())
