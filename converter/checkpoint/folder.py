"""Chooses the checkpoint in a folder: a weights file, an index of shards, or a set of shards without an index."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from itertools import islice
from pathlib import PurePath

from converter.checkpoint.file_kinds import is_by_product, kind_of
from converter.errors import ContainerError, DsocrError, printable
from converter.formats.dcp_files import METADATA, SUFFIX
from converter.formats.unrecognized import REPACK, format_of_name

# The first of these that exists in a folder is used, in the order of transformers and open_clip.
STANDARD_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
# The LoRA adapter that PEFT writes, and the encoder and projector that ms-swift's lora_llm writes next to it.
ADAPTER_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
SWIFT_ENCODER = "vit.safetensors"
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pth.tar", ".pt", ".bin", ".ckpt", ".gguf")
# The number of names in a message: some repositories have hundreds of checkpoints.
MAX_SHOWN = 20


def has_weight_suffix(name: str) -> bool:
    """Return whether a file name has a suffix of weights; case does not matter."""
    return name.lower().endswith(WEIGHT_SUFFIXES)


def is_index(name: str) -> bool:
    """Return whether a file name is that of an index of shards, such as `model.safetensors.index.fp16.json`."""
    head, _, tail = name.rpartition(".index.")
    is_json = tail == "json" or (tail.endswith(".json") and tail.count(".") == 1)
    return bool(head) and is_json and format_of_name(head) is None


def _match_shard(name: str) -> re.Match[str] | None:
    return re.fullmatch(r"(.*)-(\d{1,9})-of-(\d{1,9})(\..+)", name) if "-of-" in name else None


def count_shards(name: str) -> int:
    """Return the number of shards in the name of one of them; 1 for all other names."""
    match = _match_shard(name)
    return int(match[3]) if match else 1


def is_checkpoint(name: str) -> bool:
    """Return whether a file may be a checkpoint by its name; False for files that trainers write next to one."""
    return is_index(name) or (has_weight_suffix(name) and not is_by_product(name))


def is_dcp(names: Iterable[str]) -> bool:
    """Return whether a folder has a checkpoint of torch.distributed.checkpoint, and no file of a standard name."""
    files = set(names)
    has_dcp_files = METADATA in files or any(name.endswith(SUFFIX) for name in files)
    return has_dcp_files and files.isdisjoint(STANDARD_NAMES)


def _without_gguf(names: Iterable[str]) -> list[str]:
    """Leave out files of llama.cpp: the weights that they were converted from are preferred."""
    return [name for name in names if not name.lower().endswith(".gguf")]


def holds_checkpoint(names: Collection[str]) -> bool:
    """Return whether a folder has a checkpoint or a part of one, by the names of its files."""
    return is_dcp(names) or any(map(is_checkpoint, names))


def may_hold_checkpoint(folder: str) -> bool:
    """Return whether a folder may have a checkpoint by its name; False for optimizer states and files of git."""
    return not folder.startswith((".", "optim")) and not folder.endswith("_universal")


def config_applies(used: Sequence[str], files: Iterable[str]) -> bool:
    """Return whether a config in a folder describes a checkpoint in the same folder.

    It does if there is no other checkpoint, or if the name is one that transformers or open_clip read with the config.

    Args:
        used: The names of the checkpoint's files; the index, if there is one, comes first.
        files: The names of all files in the folder.
    """
    others = [name for name in _without_gguf(files) if is_checkpoint(name) and name not in used]
    names = (
        r"(open_clip_)?(model|pytorch_model|adapter_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index(\.[\w-]+)?\.json)?"
    )
    return not others or re.fullmatch(names, used[0]) is not None


def choose_checkpoint(
    files: Iterable[str], folders: Iterable[str], where: str, error: type[DsocrError] = ContainerError
) -> list[str]:
    """Return the name of the weights file or of the index in a folder, or the names of all shards of a set.

    Args:
        files: Names of all files in the folder.
        folders: Names of the subfolders, for messages.
        where: The folder, for messages.
        error: The exception to raise if there is no checkpoint, or more than one candidate.
    """
    ordered = sorted(files)
    for name in STANDARD_NAMES:
        if name in ordered:
            return [name]
    for kind in filter(None, map(kind_of, ordered)):
        if kind.step:
            raise error(f"{where}: each file holds {kind.what}", kind.step.replace("FOLDER", where))
    candidates = _candidates(_without_gguf(ordered)) or _candidates(ordered)
    if not candidates:
        raise error(*_no_checkpoint_message(ordered, sorted(folders), where))
    if len(candidates) > 1:
        shown = [names[0] if len(names) == 1 else re.sub(r"-\d+-of-", "-*-of-", names[0]) for names in candidates]
        several = error(f"{where}: contains several checkpoints: {_listed(shown)}", _choice_hint(ordered, where))
        single_files = [names[0] for names in candidates if len(names) == 1 and names[0] not in ADAPTER_NAMES]
        several.choices = where, [f"{where}/{name}" for name in single_files]
        raise several
    if missing := _missing_shards(candidates[0]):
        raise error(f"{where}: lacks shards: {_listed(missing)}", "download the rest of the checkpoint")
    return candidates[0]


def _candidates(files: Sequence[str]) -> list[list[str]]:
    """Return the files of each checkpoint. With an index, all shards are assumed to be its own and left out."""
    indexes = [[name] for name in files if is_index(name)]
    sets: dict[object, list[str]] = {}
    for name in files:
        if is_index(name) or not is_checkpoint(name):
            continue
        match = _match_shard(name)
        # Shards of one set have the same name but for their number, which has as many digits.
        key = (match[1], len(match[2]), match[3], match[4]) if match else name
        sets.setdefault(key, []).append(name)
    return indexes + [names for names in sets.values() if not (indexes and _match_shard(names[0]))]


def _choice_hint(files: Sequence[str], where: str) -> str:
    """Return the next step for a folder with several checkpoints, one of which may be a LoRA adapter."""
    adapters = [name for name in files if name in ADAPTER_NAMES]
    if not adapters:
        return "give the path of one of them"
    if SWIFT_ENCODER in files:
        return (
            f"{SWIFT_ENCODER} holds the trained vision encoder (ms-swift): give {where}/{SWIFT_ENCODER}; "
            f"{adapters[0]} is a LoRA adapter of the language model"
        )
    return f"give the path of one of them; {adapters[0]} is a LoRA adapter: --lora {where} merges it into its model"


def _missing_shards(shards: Sequence[str]) -> list[str]:
    """Return the names of the first shards that a set without an index lacks."""
    matches = [match for match in map(_match_shard, shards) if match]
    if not matches:
        return []
    head, digits, total, tail = matches[0].groups()
    present = {int(match[2]) for match in matches}
    first = 0 if 0 in present else 1
    absent = (number for number in range(first, first + int(total)) if number not in present)
    return [f"{head}-{number:0{len(digits)}}-of-{total}{tail}" for number in islice(absent, MAX_SHOWN + 1)]


def _no_checkpoint_message(files: Sequence[str], folders: Sequence[str], where: str) -> tuple[str, str]:
    """Return the message and the hint for a folder without a checkpoint."""
    unfinished = [
        name
        for name in files
        if name.endswith((".aria2", ".incomplete", ".crdownload", ".download", ".part", ".partial", ".tmp"))
    ]
    if unfinished:
        return f"{where}: contains an unfinished download: {_listed(unfinished)}", "download the checkpoint again"
    if not files and not folders:
        return f"{where}: is an empty folder: contains no checkpoint", "if it is a download, start it again"
    if "data.pkl" in files and "data" in folders:
        return f"{where}: an unpacked file of torch.save", REPACK
    for name in (*files, *folders, PurePath(where).name):
        known = format_of_name(name)
        if known is not None:
            return f"{where}: contains no checkpoint; {printable(name)} is {known.kind}", known.step
    by_products = [name for name in files if has_weight_suffix(name)]
    remark = f"; {_listed(by_products)}: written by a trainer, without weights" if by_products else ""
    hint = f"looked for {', '.join((*STANDARD_NAMES[:4], *(f'*{suffix}' for suffix in WEIGHT_SUFFIXES)))}"
    if searched := list(filter(may_hold_checkpoint, folders)):
        hint += f"\nif it is in one of its folders, give that: {_listed(searched)}"
    return f"{where}: contains no checkpoint{remark}", hint


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(printable, names[:MAX_SHOWN])) + (", ..." if len(names) > MAX_SHOWN else "")
