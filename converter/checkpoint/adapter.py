"""Reads LoRA adapters of PEFT: the factors of each module, and fully trained tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import PurePath
from typing import NamedTuple

from converter.checkpoint.adapter_config import CONFIG_NAME, MERGE_IN_PEFT, base_model_of, read_adapter_config
from converter.checkpoint.folder import ADAPTER_NAMES, SWIFT_ENCODER
from converter.checkpoint.lora import Adapter, AdapterConfig, Factors
from converter.checkpoint.open import Checkpoint
from converter.checkpoint.state_dict import largest_state_dict, state_dicts, unwrapped_names
from converter.errors import LayoutError, UsageError, first_names
from converter.tensors.tensor_info import Contents, TensorInfo

_PREFIX = "base_model.model."
# Segments of names in PEFT: the factors of a module or an embedding, and the wrappers of a module.
_FACTORS = {"lora_A": "A", "lora_B": "B", "lora_embedding_A": "A", "lora_embedding_B": "B"}
_SAVED, _ORIGINAL, _BASE = "modules_to_save", "original_module", "base_layer"


class _Name(NamedTuple):
    """A tensor name of PEFT."""

    # "A" or "B" for a factor, "saved" for a fully trained tensor, "original" for its old copy, empty for others
    kind: str
    tensor: str  # The name of the tensor in the model, or the path of the module for a factor
    adapter: str = ""  # The name of the adapter in memory, such as `default`; empty in files that PEFT wrote
    is_embedding: bool = False


def with_adapter(source: Checkpoint, files: Checkpoint, adapter_name: str | None) -> Checkpoint:
    """Return a checkpoint with an adapter to merge into its encoders.

    Args:
        source: The checkpoint.
        files: The adapter. It may be the same file, if that is the state dict of a model with its adapter.
        adapter_name: The adapter of a file with several, or None.

    Raises:
        ContainerError: The adapter has no config, or a wrong one.
        LayoutError: It is not a LoRA adapter, or merging it is more than W + scale * B @ A.
        UsageError: There are several adapters, or none of this name.
    """
    is_same_file = files.name == source.name
    contents = _unwrapped(source.contents) if is_same_file else source.contents
    return replace(source, adapter=_read(files, adapter_name, is_same_file), contents=contents)


def _read(checkpoint: Checkpoint, adapter_name: str | None, with_model: bool) -> Adapter:
    """Read an adapter. With `with_model`, the state dict also contains the tensors of the model."""
    entries = state_dicts(checkpoint.contents)
    tensors = unwrapped_names(largest_state_dict(entries, checkpoint.name).tensors, checkpoint.name) if entries else {}
    if not factor_names(tensors) and base_model_of(checkpoint) is None:
        raise _no_factors(checkpoint.name)
    config = read_adapter_config(checkpoint)
    names = {key: _parse(key) for key in tensors}
    chosen = _choose(names.values(), adapter_name, checkpoint.name)
    names = {key: parsed for key, parsed in names.items() if parsed.adapter in ("", chosen)}
    # Other tensors in a file of the adapter were fully trained too, such as biases.
    kinds = ("saved",) if with_model else ("saved", "")
    fully_trained = {parsed.tensor: tensors[key] for key, parsed in names.items() if parsed.kind in kinds}
    factors = _factors(checkpoint.name, config, tensors, names)
    return Adapter(checkpoint.name, config, factors, fully_trained, checkpoint.has_config(SWIFT_ENCODER))


def factor_names(names: Iterable[str]) -> list[str]:
    """Return the names of LoRA factors, as PEFT names them."""
    return [name for name in names if not _FACTORS.keys().isdisjoint(name.split("."))]


def is_wrapped(names: Iterable[str]) -> bool:
    """Return whether the names are those of a model with its adapter, from PEFT's wrappers."""
    return any(f".{_BASE}." in name for name in names)


def _unwrapped(contents: Contents) -> Contents:
    """Return the model's tensors from the state dict of a model with its adapter, without wrappers in the names."""
    result: Contents = {}
    for key, value in contents.items():
        if isinstance(value, dict):
            result[key] = _unwrapped(value)
        elif not isinstance(value, TensorInfo):
            result[key] = value
        elif (parsed := _parse(key)).kind in ("", "original"):
            result[parsed.tensor] = value
    return result


def _parse(key: str) -> _Name:
    """Parse a tensor name of PEFT; LayoutError for names of other methods than LoRA."""
    segments = [segment for segment in key.removeprefix(_PREFIX).split(".") if segment != _BASE]
    for index, segment in enumerate(segments):
        before, after = segments[:index], segments[index + 1 :]
        if segment in _FACTORS:
            adapter = [part for part in after if part != "weight"]
            if after[-1:] == ["bias"] or len(adapter) > 1:
                raise LayoutError(f"{key!r}: no factor of LoRA as PEFT names them", MERGE_IN_PEFT)
            return _Name(_FACTORS[segment], ".".join(before), ".".join(adapter), "embedding" in segment)
        if segment == _SAVED and len(after) > 1:
            return _Name("saved", ".".join([*before, *after[1:]]), after[0])
        if segment == _ORIGINAL:
            return _Name("original", ".".join([*before, *after]))
        if segment.startswith("lora_"):
            raise LayoutError(f"{key!r}: holds {segment}, which is more than the sum W + scale * B @ A", MERGE_IN_PEFT)
    return _Name("", ".".join(segments))


def _choose(names: Iterable[_Name], wanted: str | None, file: str) -> str:
    """Return the name of the adapter to read; empty for the only adapter of a file, which has no name."""
    adapters = list(dict.fromkeys(parsed.adapter for parsed in names if parsed.adapter))
    if not adapters and wanted == PurePath(file).parent.name:
        return ""  # PEFT saves each adapter in a folder of its name.
    if wanted is not None and wanted not in adapters:
        raise UsageError(
            f"--adapter-name {wanted}: not in {file}", f"it has: {first_names(adapters) or 'one, without a name'}"
        )
    if wanted is None and len(adapters) > 1:
        what = f"holds {len(adapters)} adapters: {first_names(adapters)}"
        raise UsageError(f"{file}: {what}", f"--adapter-name {adapters[0]}")
    return wanted or next(iter(adapters), "")


def _factors(
    file: str, config: AdapterConfig, tensors: Mapping[str, TensorInfo], names: Mapping[str, _Name]
) -> dict[str, Factors]:
    """Return the factors of each module; LayoutError for a factor without its pair or of another rank."""
    pairs: dict[str, dict[str, TensorInfo]] = {}
    for key, parsed in names.items():
        if parsed.kind in ("A", "B"):
            pairs.setdefault(parsed.tensor, {})[parsed.kind] = tensors[key]
    if not pairs and not any(parsed.kind == "saved" for parsed in names.values()):
        raise _no_factors(file)
    problems = [problem for module, pair in pairs.items() for problem in _problems(module, pair, config)]
    if problems:
        more = f"\nand {len(problems) - 5} more" if len(problems) > 5 else ""
        raise LayoutError(
            f"{file}: " + "\n".join(problems[:5]) + more, f"save the adapter again, or correct its {CONFIG_NAME}"
        )
    embeddings = {parsed.tensor for parsed in names.values() if parsed.is_embedding}
    return {
        module: Factors(pair["A"], pair["B"], module in embeddings, *config.scale_of(module))
        for module, pair in pairs.items()
    }


def _no_factors(file: str) -> LayoutError:
    return LayoutError(
        f"{file}: holds no factors of LoRA under PEFT's names (lora_A, lora_B)",
        f"give the folder that PEFT wrote, with {CONFIG_NAME} and {ADAPTER_NAMES[0]}",
    )


def _problems(module: str, pair: Mapping[str, TensorInfo], config: AdapterConfig) -> list[str]:
    """Return the problems of a module's factors: one is missing, or they do not have the rank in the config."""
    if len(pair) == 1:
        kind = next(iter(pair))
        return [f"{module!r} has {kind} without {'B' if kind == 'A' else 'A'}"]
    a, b = pair["A"], pair["B"]
    rank, _, _ = config.scale_of(module)
    if len(a.shape) not in (2, 4) or len(b.shape) != len(a.shape) or not a.dtype.is_float or not b.dtype.is_float:
        return [f"{module!r} has factors A {a.dtype.name} {list(a.shape)} and B {b.dtype.name} {list(b.shape)}"]
    if (a.shape[0], b.shape[1]) != (rank, rank):
        return [f"{module!r} has factors A {list(a.shape)} and B {list(b.shape)}, but {CONFIG_NAME} says rank {rank}"]
    return []
