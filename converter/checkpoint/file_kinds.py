"""Recognizes files in the folder of a training by their names."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from converter.errors import natural_sort_key, printable
from converter.formats.unrecognized import format_of_name


class FileKind(NamedTuple):
    """A kind of file."""

    patterns: str  # Patterns of names, separated by spaces
    what: str  # The content of such a file
    is_by_product: bool = False  # Whether trainers write it next to the weights, with a name that weights could have
    step: str = ""  # The next step for a folder of such files, which cannot be read


@dataclass
class FolderFiles:
    """Files of a folder whose names differ only in numbers."""

    name: str  # The path in the folder; of several files, with `*` for each number
    count: int
    nbytes: int  # The size of all files
    what: str  # The content of the files; empty if their names do not show it
    is_read: bool  # Whether `inspect` reports the tensors in one of them


_MAX_FILES = 10_000
# The first match is used.
KINDS = (
    # By-products.
    FileKind("training_args.*", "the arguments of the training", True),
    FileKind("optimizer.* optimizer[_-]* optim.* optim_* *_optim_states.pt", "states of the optimizer", True),
    FileKind("*scheduler.*", "the state of the learning rate's schedule", True),
    FileKind("rng_state* random_states*", "states of random number generators", True),
    FileKind("*scaler.*", "the state of the gradient scaler", True),
    FileKind("sampler.* sampler_* dataloader*", "the position in the training data", True),
    FileKind("extra_state_*", "states of schedule and random number generators (verl)", True),
    FileKind("recipe_state*", "states of optimizer and data (torchtune)", True),
    # Parts of checkpoints.
    FileKind(".metadata *.metadata", "the metadata of a DCP checkpoint"),
    FileKind("*.distcp", "tensors of a DCP checkpoint"),
    FileKind(
        "*zero_pp_rank_*_model_states.pt",
        "a part of each tensor (DeepSpeed ZeRO-3)",
        step="gather it, in the folder above, where DeepSpeed wrote this script: python zero_to_fp32.py . gathered",
    ),
    FileKind(
        "mp_rank_01_model_states.pt",
        "weights of one of several model-parallel ranks, which may split tensors (DeepSpeed)",
        step="merge the ranks with the program that trained it; where it does not split the vision encoder, give "
        "mp_rank_00_model_states.pt",
    ),
    FileKind("mp_rank_*_model_states.pt", "weights and training state (DeepSpeed)"),
    FileKind(
        "model_world_size_*_rank_*.pt",
        "a part of each tensor (verl)",
        step="merge it: python -m verl.model_merger merge --backend fsdp --local_dir FOLDER --target_dir merged\n"
        "or give FOLDER/huggingface, if it has weights",
    ),
    FileKind(
        "shard-[0-9]*-model-[0-9]*-of-*.safetensors",
        "a part of each tensor (torch's HuggingFaceStorageWriter)",
        step='join them: python -c "import glob, os, safetensors; '
        "import torch.distributed.checkpoint._consolidate_hf_safetensors as c; os.makedirs('joined'); "
        "c.consolidate_safetensors_files('FOLDER', 'joined', {k: 1 for f in glob.glob('FOLDER/*.safetensors') "
        "for k in safetensors.safe_open(f, 'pt').keys()})\"",
    ),
    FileKind("adapter_model.safetensors adapter_model.bin", "a LoRA adapter"),
    FileKind("vit.safetensors", "the vision encoder and projector next to an adapter (ms-swift)"),
    FileKind("*.index.json *.index.*.json", "an index of shards"),
    FileKind("*-[0-9]*-of-[0-9]*.*", "a shard of weights"),
    FileKind("*.ckpt", "weights and training state (Lightning)"),
    FileKind("*.safetensors *.pth *.pth.tar *.pt *.bin", "weights"),
    # Settings.
    FileKind("config.json open_clip_config.json", "the config of the model"),
    FileKind("adapter_config.json", "the config of the adapter"),
    FileKind("generation_config.json", "settings of text generation"),
    FileKind("*processor_config.json", "settings of image processing"),
    FileKind(
        "tokenizer* vocab.json merges.txt special_tokens_map.json added_tokens.json chat_template*", "the tokenizer"
    ),
    FileKind("latest latest_* latest-*", "the name of the newest step"),
    FileKind("zero_to_*.py", "DeepSpeed's script that gathers the weights"),
    FileKind("trainer_state.json logging.jsonl args.json *.tfevents* metrics.csv hparams.yaml", "logs and settings"),
    FileKind("*.py", "code"),
    FileKind("README.md *.md", "text"),
)


def kind_of(name: str) -> FileKind | None:
    """Return the kind of a file by its name; None for other names."""
    lower = name.lower()
    return next((kind for kind in KINDS if any(fnmatch(lower, pattern) for pattern in kind.patterns.split())), None)


def list_folder(folder: Path, read: Collection[str] = ()) -> list[FolderFiles]:
    """Describe the files in a local folder and in its subfolders.

    Args:
        folder: The folder.
        read: The paths of the files whose tensors are reported.
    """
    groups: dict[str, list[Path]] = {}
    for path in islice(_files_in(folder), _MAX_FILES):
        # The digits of an element type, such as bf16, are not replaced.
        pattern = re.sub(r"(?<![0-9])(?<!bf)(?<!fp)[0-9]+", "*", str(path.relative_to(folder)))
        groups.setdefault(pattern, []).append(path)
    listed = [
        FolderFiles(
            printable(name if len(paths) > 1 else str(paths[0].relative_to(folder))),
            len(paths),
            sum(path.lstat().st_size for path in paths),
            describe(min(paths).name),
            any(str(path) in read for path in paths),
        )
        for name, paths in groups.items()
    ]
    return sorted(listed, key=lambda files: natural_sort_key(files.name))


def _files_in(folder: Path) -> Iterator[Path]:
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(where, name) for name in names)


def is_by_product(name: str) -> bool:
    """Return whether trainers write a file of this name next to the weights."""
    kind = kind_of(name)
    return bool(kind and kind.is_by_product)


def by_product_step(path: str) -> str:
    """Return the next step for a file that trainers write next to the weights; empty for other files."""
    name = Path(path).name
    return f"by its name it holds {describe(name)}: convert the weights next to it" if is_by_product(name) else ""


def describe(name: str) -> str:
    """Return the content or format of a file by its name; empty if the name does not show it."""
    kind, known = kind_of(name), format_of_name(name)
    return kind.what if kind else known.kind if known else ""
