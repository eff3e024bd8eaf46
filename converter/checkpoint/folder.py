"""The checkpoint in a folder: a weights file, an index of shards, or all shards of a set without an index."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatch
from itertools import islice
from pathlib import PurePath

from converter.checkpoint.file_kinds import is_by_product
from converter.errors import ContainerError, DsocrError, printable
from converter.formats.dcp_files import METADATA, SUFFIX
from converter.formats.unrecognized import REPACK, format_of_name

# The file to use in a folder is the first of these that exists, in the order of transformers and open_clip.
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
_INDEX = re.compile(r"(.+)\.index(\.[\w-]+)?\.json")
# Names that transformers and open_clip give to the weights of a folder, shards included. The folder's config describes
# such a file even where other checkpoints are in the folder.
_DESCRIBED = re.compile(
    r"(open_clip_)?(model|pytorch_model|adapter_model)(-[0-9]+-of-[0-9]+)?(\.safetensors|\.bin)(\.index(\.[\w-]+)?\.json)?"
)
_SHARD = re.compile(r"(.*)-(\d{1,9})-of-(\d{1,9})(\..+)")
_UNFINISHED = (".aria2", ".incomplete", ".crdownload", ".part", ".partial")
# Checkpoints in several files that are read together: a pattern of one of their names, what it is, the next step.
_DISTRIBUTED = (
    (
        "model_world_size_*_rank_*.pt",
        "a checkpoint of verl, which splits each tensor",
        "merge it: python -m verl.model_merger merge --backend fsdp --local_dir FOLDER --target_dir merged\n"
        "or give FOLDER/huggingface, if it has weights",
    ),
    (
        "shard-[0-9]*-model-[0-9]*-of-*.safetensors",
        "shards of torch's HuggingFaceStorageWriter, which splits each tensor",
        'join them: python -c "import glob, os, safetensors; '
        "import torch.distributed.checkpoint._consolidate_hf_safetensors as c; os.makedirs('joined'); "
        "c.consolidate_safetensors_files('FOLDER', 'joined', {k: 1 for f in glob.glob('FOLDER/*.safetensors') "
        "for k in safetensors.safe_open(f, 'pt').keys()})\"",
    ),
    (
        "*zero_pp_rank_*_model_states.pt",
        "a checkpoint of DeepSpeed ZeRO-3, which splits each tensor",
        "gather it, in the folder above, where DeepSpeed wrote this script: python zero_to_fp32.py . gathered",
    ),
    (
        "mp_rank_01_model_states.pt",
        "a checkpoint of several model-parallel ranks, which may split tensors",
        "merge the ranks with the program that trained it; where it does not split the vision encoder, give "
        "mp_rank_00_model_states.pt",
    ),
)
# Number of names in a message. Some repositories have hundreds of checkpoints.
MAX_SHOWN = 20


def has_weight_suffix(name: str) -> bool:
    """Return whether a file name ends as those of weights do, in any case."""
    return name.lower().endswith(WEIGHT_SUFFIXES)


def is_index(name: str) -> bool:
    """Return whether a file name is that of an index of shards, such as `model.safetensors.index.fp16.json`."""
    match = _INDEX.fullmatch(name)
    return match is not None and format_of_name(match[1]) is None


def count_shards(name: str) -> int:
    """Return how many shards a checkpoint has, by the name of one of them; 1 for all other names."""
    match = _SHARD.fullmatch(name)
    return int(match[3]) if match else 1


def is_checkpoint(name: str) -> bool:
    """Return whether a file name may be that of a checkpoint, and is not one that trainers write next to it."""
    return is_index(name) or (has_weight_suffix(name) and not is_by_product(name))


def is_dcp(names: Iterable[str]) -> bool:
    """Return whether a folder has a checkpoint of torch.distributed.checkpoint, and none that is preferred."""
    found = set(names)
    is_part = METADATA in found or any(name.endswith(SUFFIX) for name in found)
    return is_part and not found.intersection(STANDARD_NAMES)


def _is_port(name: str) -> bool:
    """Return whether a file is one of llama.cpp, which is made of other weights: those are preferred."""
    return name.lower().endswith(".gguf")


def holds_checkpoint(names: Collection[str]) -> bool:
    """Return whether a folder has a checkpoint, or a part of one, by the names of its files."""
    return is_dcp(names) or any(map(is_checkpoint, names))


def is_searched(folder: str) -> bool:
    """Return whether a folder of this name may hold a model: not states of an optimizer, or files of git."""
    return not folder.startswith((".", "optim")) and not folder.endswith("_universal")


def is_described(name: str, used: Collection[str], files: Iterable[str]) -> bool:
    """Return whether a config in a folder is that of the checkpoint `name`.

    Args:
        name: The checkpoint.
        used: The names of all its files.
        files: The names of all files in the folder.
    """
    others = [other for other in files if is_checkpoint(other) and not _is_port(other) and other not in used]
    return not others or _DESCRIBED.fullmatch(name) is not None


def choose_checkpoint(
    files: Iterable[str], folders: Iterable[str], where: str, error: type[DsocrError] = ContainerError
) -> list[str]:
    """Return the name of the weights file or of the index in a folder, or the names of all shards of a set.

    Args:
        files: Names of all files in the folder.
        folders: Names of the folders in it, for messages.
        where: The folder, for messages.
        error: The exception to raise if there is no checkpoint, or more than one candidate.
    """
    ordered = sorted(files)
    for name in STANDARD_NAMES:
        if name in ordered:
            return [name]
    for pattern, kind, step in _DISTRIBUTED:
        if any(fnmatch(name, pattern) for name in ordered):
            raise error(f"{where}: {kind}", step.replace("FOLDER", where))
    candidates = _candidates([name for name in ordered if not _is_port(name)]) or _candidates(ordered)
    if not candidates:
        raise error(*_nothing(ordered, sorted(folders), where))
    if len(candidates) > 1:
        shown = [printable(names[0]) if len(names) == 1 else _set_name(names[0]) for names in candidates]
        several = error(f"{where}: contains several checkpoints: {_listed(shown)}", _choice(ordered, where))
        single = [names[0] for names in candidates if len(names) == 1 and names[0] not in ADAPTER_NAMES]
        several.choices = where, [f"{where}/{name}" for name in single]
        raise several
    if missing := _missing_shards(candidates[0]):
        raise error(f"{where}: lacks shards: {_listed(missing)}", "download the rest of the checkpoint")
    return candidates[0]


def _candidates(files: Sequence[str]) -> list[list[str]]:
    """Return the checkpoints among the files. The shards of an index are not listed."""
    indexes = [[name] for name in files if is_index(name)]
    sets: dict[object, list[str]] = {}
    for name in files:
        if is_index(name) or not is_checkpoint(name):
            continue
        match = _SHARD.fullmatch(name)
        sets.setdefault((match[1], len(match[2]), match[3], match[4]) if match else name, []).append(name)
    return indexes + [names for names in sets.values() if not (indexes and _SHARD.fullmatch(names[0]))]


def _choice(files: Sequence[str], where: str) -> str:
    """Return the next step for a folder with several checkpoints; trainers write some next to a LoRA adapter."""
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
    matches = [match for match in map(_SHARD.fullmatch, shards) if match]
    if not matches:
        return []
    head, digits, total, tail = matches[0].groups()
    present = {int(match[2]) for match in matches}
    first = 0 if 0 in present else 1
    absent = (number for number in range(first, first + int(total)) if number not in present)
    return [f"{head}-{number:0{len(digits)}}-of-{total}{tail}" for number in islice(absent, MAX_SHOWN + 1)]


def _set_name(shard: str) -> str:
    return printable(_SHARD.sub(r"\1-*-of-\3\4", shard))


def _nothing(files: Sequence[str], folders: Sequence[str], where: str) -> tuple[str, str]:
    """Return the message and the hint for a folder without a checkpoint."""
    unfinished = [name for name in files if name.endswith(_UNFINISHED)]
    if unfinished:
        return f"{where}: contains an unfinished download: {_listed(unfinished)}", "download the checkpoint again"
    if not files and not folders:
        return f"{where}: is an empty folder: contains no checkpoint", "the download was not finished: start it again"
    if "data.pkl" in files and "data" in folders:
        return f"{where}: an unpacked file of torch.save", REPACK
    for name in (*files, *folders, PurePath(where).name):
        known = format_of_name(name)
        if known is not None:
            return f"{where}: contains no checkpoint; {printable(name)} is {known.kind}", known.step
    by_products = [name for name in files if has_weight_suffix(name)]
    found = f"; {_listed(by_products)}: written by a trainer, without weights" if by_products else ""
    hint = f"looked for {', '.join((*STANDARD_NAMES[:4], *(f'*{suffix}' for suffix in WEIGHT_SUFFIXES)))}"
    if folders:
        hint += f"\nif it is in one of its folders, give that: {_listed(folders)}"
    return f"{where}: contains no checkpoint{found}", hint


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(printable, names[:MAX_SHOWN])) + (", ..." if len(names) > MAX_SHOWN else "")
