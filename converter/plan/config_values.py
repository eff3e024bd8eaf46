"""Reads assumptions from the configs of a checkpoint: activation, heads and epsilon, which no tensor shows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from converter.checkpoint.model_config import ConfigSection, are_counts, first_value, read_configs
from converter.checkpoint.open import Checkpoint
from converter.encoders.config import ACTIVATION_NAMES
from converter.errors import printable
from converter.layouts.spec import CanonicalLayout
from converter.plan.assumptions import ASSUMED, Assumption, Value, default_assumptions

# The number of characters of a value that a message shows.
_MAX_VALUE_CHARS = 40
_HEADS = ("num_attention_heads", "heads")
# By the names of sizes in canonical layouts: the keys of configs that state them.
_SIZES = {
    "width": ("hidden_size", "width"),
    "depth": ("num_hidden_layers", "layers"),
    "mlp": ("intermediate_size", "mlp_dim"),
    "patch": ("patch_size",),
    "neck": ("output_channels",),
}


def read_assumptions(
    source: Checkpoint, target: CanonicalLayout, sizes: Mapping[str, int]
) -> tuple[dict[str, Assumption], list[str]]:
    """Return the values of a canonical layout's assumptions for a checkpoint, and remarks for the user.

    Args:
        source: The checkpoint.
        target: The canonical layout.
        sizes: The sizes of the encoder, by name. A config that states other sizes is not used.
    """
    configs, remarks = read_configs(source)
    # The sizes that an encoder's object must state: language models have no patch size.
    required = [_SIZES[name] for name in ("width", "patch") if name in target.sizes]
    configs = [[section for section in config if _has_values(section.values, required)] for config in configs]
    fitting = [[section for section in config if _has_sizes(section.values, sizes)] for config in configs]
    # One section of each config, a vision_config if there is one.
    encoders = [min(config, key=lambda section: "vision" not in section.path) for config in fitting if config]
    if not encoders:
        remarks += [_other_sizes(section, sizes) for config in configs for section in config if _is_only(section)]
    assumptions = default_assumptions(target)
    for name, assumption in assumptions.items():
        stated = [item for item in (_read(section, name) for section in encoders) if item]
        usable = [(value, location) for value, location, _ in stated if value is not None]
        unusable = [f"{location} is {text}" for value, location, text in stated if value is None]
        used, origin = usable[0] if usable else (None, "")
        if used is not None:
            assumptions[name] = Assumption(used, assumption.expected, origin)
        elif unusable:
            assumptions[name] = assumption._replace(origin=f"{ASSUMED}, as {unusable[0]}, which cannot be used")
        label = name.rpartition(".")[2].replace("_", " ")
        remarks += [f"warning: {text}, which cannot be used: {label} is assumed" for text in unusable]
        others = [(value, location) for value, location in usable if value != used]
        remarks += [f"{location} says {value}, {origin} says {used}: the latter is used" for value, location in others]
    return assumptions, remarks


def _has_values(values: Mapping[str, Any], required: Iterable[Iterable[str]]) -> bool:
    stated = [first_value(values, keys)[1] for keys in required]
    # DeepSeek's `width` is an object with one config for each encoder.
    return not any(value is None or isinstance(value, dict) for value in stated)


def _is_only(section: ConfigSection) -> bool:
    """Return whether an object describes the only encoder in its config."""
    # The sizes next to a vision_config are those of the language model.
    return section.path in ("", "vision_config") and "vision_config" not in section.values


def _different_sizes(values: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    stated = {name: first_value(values, keys)[1] for name, keys in _SIZES.items() if name in sizes}
    return {name: value for name, value in stated.items() if value not in (None, sizes[name])}


def _has_sizes(values: Mapping[str, Any], sizes: Mapping[str, int]) -> bool:
    heads = first_value(values, _HEADS)[1]
    if "head" in sizes and heads is not None and (not are_counts(heads) or sizes["head"] * heads != sizes["width"]):
        return False
    return not _different_sizes(values, sizes)


def _other_sizes(section: ConfigSection, sizes: Mapping[str, int]) -> str:
    different = _different_sizes(section.values, sizes).items()
    text = ", ".join(f"{name} {_shown(value)} (not {sizes[name]})" for name, value in different)
    return f"warning: {section.location} is ignored: it describes another encoder: {text or 'other heads'}"


def _read(encoder: ConfigSection, name: str) -> tuple[Value | None, str, str] | None:
    """Return the value that a config states, the file and key, and its text; None if the config does not state it.

    The value is None if it cannot be used.

    Args:
        encoder: The encoder's object in the config, whose siblings describe other parts of the model.
        name: The name of the assumption.
    """
    part, _, kind = name.rpartition(".")
    section = encoder.sibling(f"{part.removesuffix('_model')}_config") if part else encoder
    if section is None or kind not in _PARSERS:
        return None
    keys, parse = _PARSERS[kind]
    key, stated = first_value(section.values, keys)
    if not key:
        return None
    location = f"{section.location}{'.' if section.path else ': '}{key}"
    return parse(stated, section.values), location, _shown(stated)


def _shown(value: object) -> str:
    text = printable(repr(value))
    return text if len(text) <= _MAX_VALUE_CHARS else f"{text[:_MAX_VALUE_CHARS]}..."


def _activation(value: Any, section: Mapping[str, Any]) -> str | None:
    return ACTIVATION_NAMES.get(value) if isinstance(value, str) else None


def _head_width(value: Any, section: Mapping[str, Any]) -> int | None:
    width = first_value(section, _SIZES["width"])[1]
    return width // value if are_counts(width, value) and width % value == 0 else None


def _heads(value: Any, section: Mapping[str, Any]) -> int | None:
    return value if are_counts(value) and _head_width(value, section) else None


def _epsilon(value: Any, section: Mapping[str, Any]) -> float | None:
    return value if isinstance(value, float) and 0 < value < 1 else None


def _rope_theta(value: Any, section: Mapping[str, Any]) -> float | None:
    """Return the base of rotary positions, which transformers 5 puts into an object of `rope_parameters`."""
    parameters: dict[str, Any] = value if isinstance(value, dict) else {"rope_theta": value}
    theta, is_scaled = parameters.get("rope_theta"), parameters.get("rope_type", "default") != "default"
    if is_scaled or section.get("rope_scaling") or isinstance(theta, bool) or not isinstance(theta, int | float):
        return None
    return float(theta) if 1 < theta < math.inf else None


# By the name of an assumption without its part: the keys, and a parser that returns None for unusable values.
_PARSERS: dict[str, tuple[tuple[str, ...], Callable[[Any, Mapping[str, Any]], Value | None]]] = {
    "activation": (("hidden_act",), _activation),
    "head_width": (_HEADS, _head_width),
    "heads": (_HEADS, _heads),
    "epsilon": (("layer_norm_eps", "rms_norm_eps"), _epsilon),
    "rope_theta": (("rope_theta", "rope_parameters"), _rope_theta),
}
