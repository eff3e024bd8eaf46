"""Reads PEFT's adapter_config.json: the ranks and scales of a LoRA adapter.

The file is not trusted: its patterns are never run as regular expressions.
"""

from __future__ import annotations

import re
from typing import Any

from converter.checkpoint.lora import AdapterConfig
from converter.checkpoint.open import Checkpoint
from converter.errors import ContainerError, LayoutError, first_names, printable

CONFIG_NAME = "adapter_config.json"
MERGE_IN_PEFT = (
    "merge it with peft, on the model that it was trained on: model.merge_and_unload().save_pretrained(FOLDER), and "
    "convert FOLDER without --lora"
)
_USE_PEFTS_FILE = "take the file that PEFT wrote with the adapter"
_MAX_RANK, _MAX_PATTERNS = 1 << 20, 10_000
# Settings of adapters that compute more than W + scale * B @ A, with the names of these methods.
_VARIANTS = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "lora_bias": "LoRA with a bias in B (lora_bias)",
    "layer_replication": "LoRA on replicated layers (layer_replication)",
    "target_parameters": "LoRA on parameters (target_parameters)",
    "trainable_token_indices": "trained tokens (trainable_token_indices)",
    "alora_invocation_tokens": "aLoRA (alora_invocation_tokens)",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}
# Prefixes of `init_lora_weights` for initialisations that also change the model's weights. An adapter does not contain
# these changes.
_INITS_THAT_CHANGE_MODEL = ("pissa", "olora", "corda", "loftq", "lora_ga")


def read_adapter_config(checkpoint: Checkpoint) -> AdapterConfig:
    """Read the config next to the files of an adapter.

    Raises:
        ContainerError: There is no config, or it is not one of PEFT's.
        LayoutError: It is the config of another kind of adapter.
    """
    location = f"{checkpoint.name}: {CONFIG_NAME}"
    config = _read(checkpoint)
    if config is None:
        raise ContainerError(
            f"{checkpoint.name}: no {CONFIG_NAME} next to it, which has the scale of the adapter",
            f"put the {CONFIG_NAME} of the training next to it, with its r and lora_alpha",
        )
    _check_kind(location, config)
    try:
        use_rslora = config.get("use_rslora")
        if use_rslora not in (None, True, False):
            raise ValueError("use_rslora is neither true nor false")
        return AdapterConfig(
            base_model=_base_model(config),
            rank=_rank(config["r"]),
            alpha=_alpha(config["lora_alpha"]),
            rank_pattern={name: _rank(value) for name, value in _pattern(config, "rank_pattern").items()},
            alpha_pattern={name: _alpha(value) for name, value in _pattern(config, "alpha_pattern").items()},
            use_rslora=bool(use_rslora),
        )
    except KeyError as error:
        raise ContainerError(f"{location}: lacks {error}", _USE_PEFTS_FILE) from error
    except ValueError as error:
        raise ContainerError(f"{location}: {error}", MERGE_IN_PEFT) from error


def base_model_of(checkpoint: Checkpoint) -> str | None:
    """Return the name of the model that an adapter was trained on: empty if unknown, None without a config."""
    config = _read(checkpoint)
    return None if config is None else _base_model(config)


def _read(checkpoint: Checkpoint) -> dict[str, Any] | None:
    try:
        return checkpoint.read_config(CONFIG_NAME)
    except ValueError as error:
        raise ContainerError(f"{checkpoint.name}: {CONFIG_NAME}: {error}", _USE_PEFTS_FILE) from error


def _base_model(config: dict[str, Any]) -> str:
    return printable(str(config.get("base_model_name_or_path") or ""))[:200]


def _check_kind(location: str, config: dict[str, Any]) -> None:
    """Raise LayoutError for adapters that are more than a product of two factors."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise LayoutError(f"{location}: an adapter of the kind {printable(str(kind))[:50]}, not LoRA", MERGE_IN_PEFT)
    variants = [method for setting, method in _VARIANTS.items() if config.get(setting)]
    if variants:
        raise LayoutError(f"{location}: {first_names(variants)}: more than the sum W + scale * B @ A", MERGE_IN_PEFT)
    init = str(config.get("init_lora_weights")).lower()[:50]
    if init.startswith(_INITS_THAT_CHANGE_MODEL):
        raise LayoutError(
            f"{location}: trained from {init}, which changes the model's own weights too",
            f"save it with path_initial_model_for_weight_conversion, as peft's documentation of {init} shows; "
            f"or {MERGE_IN_PEFT}",
        )


def _module_name(key: str) -> str:
    """Return a key of a pattern, which PEFT uses as a regular expression, as the name of a module or its end."""
    if not re.fullmatch(r"\^?([\w-]|\\?\.)+\$?", key):
        raise ValueError(
            f"the pattern {printable(key)[:100]!r} is a regular expression, which is not run; "
            "write a line for each module instead"
        )
    return key.replace("\\.", ".").removesuffix("$")


def _pattern(config: dict[str, Any], key: str) -> dict[str, Any]:
    """Return the values of `rank_pattern` or `alpha_pattern` by module."""
    pattern = config.get(key) or {}
    if not isinstance(pattern, dict) or len(pattern) > _MAX_PATTERNS:
        raise ValueError(f"{key} is not an object of at most {_MAX_PATTERNS} names")
    return {_module_name(name): value for name, value in pattern.items()}


def _rank(value: Any) -> int:
    if type(value) is not int or not 0 < value <= _MAX_RANK:
        raise ValueError(f"the rank {str(value)[:50]!r} is not a positive number")
    return value


def _alpha(value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) < 1e30:
        raise ValueError(f"the alpha {str(value)[:50]!r} is not a finite number")
    return float(value)
