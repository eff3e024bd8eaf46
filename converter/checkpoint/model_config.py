"""Reads configs next to a checkpoint: config.json of transformers and timm, and open_clip_config.json.

All get transformers' keys. Configs are not trusted: their size is bounded, and remarks name what cannot be used.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePath
from typing import Any, NamedTuple

from converter.checkpoint.open import CONFIG_NAMES, Checkpoint
from converter.errors import DsocrError

Json = dict[str, Any]

_CONFIG, _OPEN_CLIP_CONFIG = CONFIG_NAMES
# The levels of nested objects; configs of language models with a vision tower have three.
_MAX_DEPTH = 6
# The largest `mlp_ratio` of open_clip, which is usually 4: larger ones would overflow.
_MAX_MLP_RATIO = 1000
# The tags of timm's checkpoints that were trained with quick_gelu, though their architecture's name means gelu.
_TIMM_QUICK_GELU = {"openai", "dfn2b", "dfn5b", "metaclip_400m", "metaclip_2pt5b"}

# The default sizes by model_type, which transformers' configs leave out.
DEFAULT_SIZES = {
    "clip_vision_model": {"hidden_size": 768, "patch_size": 32},
    "sam_vision_model": {"hidden_size": 768, "patch_size": 16},
}


class ConfigSection(NamedTuple):
    """An object in a config."""

    file: str  # The name of the config file
    path: str  # The keys that lead to the object, joined with dots; empty for the whole config
    values: Json  # The object, with transformers' keys
    parent: Json  # The object that contains it; the object itself for the whole config

    @property
    def location(self) -> str:
        """The file and the path, for messages."""
        return f"{self.file}: {self.path}" if self.path else self.file

    def sibling(self, name: str) -> ConfigSection | None:
        """Return the sibling object `name`, such as the text_config of a vision_config."""
        values = self.parent.get(name)
        path = f"{self.path.rpartition('.')[0]}.{name}".lstrip(".")
        return ConfigSection(self.file, path, values, self.parent) if isinstance(values, dict) else None


def read_configs(checkpoint: Checkpoint) -> tuple[list[list[ConfigSection]], list[str]]:
    """Read the configs next to a checkpoint.

    Returns:
        For each config, the objects in it, the whole config first; and remarks about files that cannot be used.
    """
    names = list(CONFIG_NAMES)
    if PurePath(checkpoint.name).name.startswith("open_clip"):
        names.reverse()
    remarks: list[str] = []
    configs = [(name, read_config(checkpoint, name, remarks)) for name in names]
    remarks += filter(None, (_other_architecture(name, config) for name, config in configs))
    return [list(_sections(name, "", _to_transformers(config))) for name, config in configs if config], remarks


def read_normalization(checkpoint: Checkpoint, remarks: list[str]) -> Json:
    """Return image_mean and image_std of the images that a checkpoint was trained with; empty if no file has both."""
    candidates = (
        ("preprocessor_config.json", "", "image_"),
        (_OPEN_CLIP_CONFIG, "preprocess_cfg", ""),
        (_CONFIG, "pretrained_cfg", ""),
    )
    for file, key, prefix in candidates:
        config = read_config(checkpoint, file, remarks)
        values = object_at(config, key) if key else config
        normalization = {f"image_{name}": values.get(prefix + name) for name in ("mean", "std")}
        if all(map(are_channels, normalization.values())):
            return normalization
    return {}


def are_channels(values: object) -> bool:
    """Return whether values are a list of three numbers from 0 to 1, one for each channel."""
    if not isinstance(values, list) or len(values) != 3:
        return False
    return all(type(value) in (int, float) and 0 <= value <= 1 for value in values)


def first_value(values: Mapping[str, Any], keys: Iterable[str]) -> tuple[str, Any]:
    """Return the first key whose value is not None, and the value; an empty key and None if there is none."""
    return next(((key, values[key]) for key in keys if values.get(key) is not None), ("", None))


def read_config(checkpoint: Checkpoint, name: str, remarks: list[str]) -> Json:
    """Parse a config; empty if there is none or it cannot be used.

    Args:
        checkpoint: The checkpoint.
        name: The name of the config.
        remarks: Remarks for the user, to which one on an unusable config is added.
    """
    try:
        return checkpoint.read_config(name) or {}
    except (ValueError, DsocrError) as error:
        remark = f"warning: {name} is ignored: {error.message if isinstance(error, DsocrError) else error}"
        if remark not in remarks:
            remarks.append(remark)
        return {}


def _sections(
    file: str, path: str, values: Json, parent: Json | None = None, depth: int = 0
) -> Iterator[ConfigSection]:
    """Yield an object of a config, and all objects nested in it."""
    kind = values.get("model_type")
    defaults = DEFAULT_SIZES.get(kind, {}) if isinstance(kind, str) else {}
    yield ConfigSection(file, path, {**defaults, **values}, parent or values)
    for key, value in values.items():
        if isinstance(value, dict) and depth < _MAX_DEPTH:
            yield from _sections(file, f"{path}.{key}".lstrip("."), value, values, depth + 1)


def _to_transformers(config: Json) -> Json:
    """Convert a config of open_clip or timm to transformers' keys; return other configs unchanged."""
    open_clip = config.get("model_cfg", config)
    if isinstance(open_clip, dict) and isinstance(open_clip.get("vision_cfg"), dict):
        return _from_open_clip(open_clip)
    return _from_timm(config) if isinstance(config.get("architecture"), str) else config


def _other_architecture(name: str, config: Json) -> str:
    """Return a warning if timm's config is that of another model, which may have the same tensor names; else empty."""
    architecture = config.get("architecture")
    if not isinstance(architecture, str) or re.search("_clip_|samvit", architecture):
        return ""
    return f"warning: {name}: the architecture {architecture[:100]!r} may compute something else than SAM or CLIP"


def _from_open_clip(model: Json) -> Json:
    vision, text = object_at(model, "vision_cfg"), object_at(model, "text_cfg")
    width, head_width = vision.get("width", 768), vision.get("head_width", 64)
    heads = width // head_width if are_counts(width, head_width) else None
    patch = {"patch_size": vision.get("patch_size", 16)}
    return {
        "vision_config": patch | _open_clip_tower(model, vision, width, heads),
        "text_config": _open_clip_tower(model, text, text.get("width", 512), text.get("heads", 8)),
    }


def _open_clip_tower(model: Json, tower: Json, width: Any, heads: Any) -> Json:
    """Convert the config of one tower, with open_clip's defaults for absent keys."""
    ratio, is_tanh = tower.get("mlp_ratio", 4.0), object_at(tower, "act_kwargs").get("approximate") == "tanh"
    gelu = "gelu_pytorch_tanh" if is_tanh else "gelu"
    has_mlp = are_counts(width) and isinstance(ratio, int | float) and 0 < ratio <= _MAX_MLP_RATIO
    return {
        "hidden_size": width,
        "intermediate_size": int(width * ratio) if has_mlp else None,
        "num_hidden_layers": tower.get("layers", 12),
        "num_attention_heads": heads,
        "hidden_act": "quick_gelu" if model.get("quick_gelu") else gelu,
        "layer_norm_eps": object_at(tower, "norm_kwargs").get("eps", 1e-5),
    }


def _from_timm(config: Json) -> Json:
    """Convert timm's config of a vision transformer of CLIP; return an empty one for other architectures."""
    architecture, width = config["architecture"], config.get("num_features", 0)
    arguments = object_at(config, "model_args")
    patch = re.match(r"vit_[a-z0-9]+_patch([0-9]{1,3})(_plus)?_clip_", architecture)
    if patch is None:
        return {}
    is_quick = "quickgelu" in architecture or object_at(config, "pretrained_cfg").get("tag") in _TIMM_QUICK_GELU
    return {
        "hidden_size": width,
        "patch_size": int(patch[1]),
        # Up to the large size, heads have 64 channels; larger sizes also have 16 heads.
        "num_attention_heads": arguments.get("num_heads", min(width // 64, 16) if are_counts(width) else None),
        "hidden_act": arguments.get("act_layer", "quick_gelu" if is_quick else "gelu"),
        "layer_norm_eps": 1e-5,
    }


def object_at(config: Mapping[str, Any], key: str) -> Json:
    """Return the object at a key; empty if there is none."""
    value = config.get(key)
    return value if isinstance(value, dict) else {}


def are_counts(*values: Any) -> bool:
    """Return whether all values are positive integers below 2**32."""
    return all(type(value) is int and 0 < value < 1 << 32 for value in values)
