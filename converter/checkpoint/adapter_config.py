"""adapter_config.json of PEFT: ranks and scales of a LoRA adapter. It is not trusted, and never run as a pattern."""

from __future__ import annotations

import re
from typing import Any

from converter.checkpoint.lora import AdapterConfig
from converter.checkpoint.open import Checkpoint
from converter.errors import ContainerError, LayoutError, first_names, printable

CONFIG = "adapter_config.json"
MERGE_IN_PEFT = (
    "merge it with peft, on the model that it was trained on: model.merge_and_unload().save_pretrained(FOLDER), and "
    "convert FOLDER without --lora"
)
_PEFTS_FILE = "take the file that PEFT wrote with the adapter"
_MAX_RANK, _MAX_PATTERNS = 1 << 20, 10_000
# Settings that make another sum of an adapter than W + scale * B @ A, and what they are called.
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
# Initialisations that change the weights of the model too, which the adapter does not hold.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def read_adapter_config(checkpoint: Checkpoint) -> AdapterConfig:
    """Read the config next to the files of an adapter.

    Raises:
        ContainerError: There is none, or it is not one of PEFT.
        LayoutError: It is that of another kind of adapter.
    """
    name = f"{checkpoint.name}: {CONFIG}"
    config = _read(checkpoint)
    if config is None:
        raise ContainerError(
            f"{checkpoint.name}: no {CONFIG} next to it, which has the scale of the adapter",
            f"put the {CONFIG} of the training next to it, with its r and lora_alpha",
        )
    _check_kind(name, config)
    rslora = config.get("use_rslora")
    try:
        if rslora not in (None, True, False):
            raise ValueError("use_rslora is neither true nor false")
        return AdapterConfig(
            _base_model(config),
            _rank(config["r"]),
            _alpha(config["lora_alpha"]),
            {_plain(key): _rank(value) for key, value in _pattern(config, "rank_pattern").items()},
            {_plain(key): _alpha(value) for key, value in _pattern(config, "alpha_pattern").items()},
            bool(rslora),
        )
    except KeyError as error:
        raise ContainerError(f"{name}: lacks {error}", _PEFTS_FILE) from error
    except ValueError as error:
        raise ContainerError(f"{name}: {error}", MERGE_IN_PEFT) from error


def base_model_of(checkpoint: Checkpoint) -> str | None:
    """Return the model that an adapter was trained on; empty if its config does not say, None without a config."""
    config = _read(checkpoint)
    return None if config is None else _base_model(config)


def _read(checkpoint: Checkpoint) -> dict[str, Any] | None:
    try:
        return checkpoint.read_config(CONFIG)
    except ValueError as error:
        raise ContainerError(f"{checkpoint.name}: {CONFIG}: {error}", _PEFTS_FILE) from error


def _base_model(config: dict[str, Any]) -> str:
    return printable(str(config.get("base_model_name_or_path") or ""))[:200]


def _check_kind(name: str, config: dict[str, Any]) -> None:
    """Raise LayoutError for adapters that are more than a product of two factors."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise LayoutError(f"{name}: an adapter of the kind {printable(str(kind))[:50]}, not LoRA", MERGE_IN_PEFT)
    variants = [what for setting, what in _VARIANTS.items() if config.get(setting)]
    if variants:
        raise LayoutError(f"{name}: {first_names(variants)}: more than the sum W + scale * B @ A", MERGE_IN_PEFT)
    start = str(config.get("init_lora_weights")).lower()[:50]
    if start.startswith(_CHANGED_BASE):
        raise LayoutError(
            f"{name}: trained from {start}, which changes the model's own weights too",
            f"save it with path_initial_model_for_weight_conversion, as peft's documentation of {start} shows; "
            f"or {MERGE_IN_PEFT}",
        )


def _plain(key: str) -> str:
    """Return a key of a pattern, which PEFT takes for a regular expression, as a name or the end of one."""
    if not re.fullmatch(r"\^?([\w-]|\\?\.)+\$?", key):
        raise ValueError(
            f"the pattern {printable(key)[:100]!r} is a regular expression, which is not run; "
            "write a line for each module instead"
        )
    return key.replace("\\.", ".").removesuffix("$")


def _pattern(config: dict[str, Any], name: str) -> dict[str, Any]:
    value = config.get(name) or {}
    if not isinstance(value, dict) or len(value) > _MAX_PATTERNS:
        raise ValueError(f"{name} is not an object of at most {_MAX_PATTERNS} names")
    return value


def _rank(value: Any) -> int:
    if type(value) is not int or not 0 < value <= _MAX_RANK:
        raise ValueError(f"the rank {str(value)[:50]!r} is not a positive number")
    return value


def _alpha(value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) < 1e30:
        raise ValueError(f"the alpha {str(value)[:50]!r} is not a finite number")
    return float(value)
