"""Sharded checkpoints: hostile, contradictory or damaged ones, and unusual legal ones."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors.torch import save

from hostile.case import Accepted, Build, Case, Refused, State, sam, saved

ENDING = ".index.json"
INDEX = f"model.safetensors{ENDING}"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
KEY = "image_encoder.pos_embed"  # in the second shard

Map = dict[str, str]


def halves() -> list[State]:
    """Return a tiny SAM in two parts."""
    names = sorted(sam(), key=lambda name: (name == KEY, name))
    middle = len(names) // 2
    return [{name: sam()[name].contiguous() for name in part} for part in (names[:middle], names[middle:])]


def weight_map(names: tuple[str, str] = SHARDS) -> Map:
    return {key: name for name, part in zip(names, halves(), strict=True) for key in part}


def put_shards(folder: Path, names: tuple[str, str] = SHARDS) -> None:
    for name, part in zip(names, halves(), strict=True):
        safetensors.torch.save_file(part, folder / name)


def put_index(folder: Path, value: Any, name: str = INDEX) -> Path:
    (folder / name).write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
    return folder / name


def indexed(change: Callable[[Map], Any], **more: Any) -> Build:
    """Two good shards, and an index with a changed `weight_map`."""

    def build(folder: Path) -> Path:
        put_shards(folder)
        put_index(folder, {"weight_map": change(weight_map()), **more})
        return folder

    return build


def index(value: Any) -> Build:
    """Two good shards, and another index."""

    def build(folder: Path) -> Path:
        put_shards(folder)
        put_index(folder, value() if callable(value) else value)
        return folder

    return build


def changed(change: Callable[[Path], object], source: str = "") -> Build:
    """A good sharded checkpoint whose folder is changed."""

    def build(folder: Path) -> Path:
        indexed(dict)(folder)
        change(folder)
        return folder / source

    return build


def with_name(name: str) -> Build:
    """A checkpoint whose index has another name for the second shard."""
    return indexed(lambda known: {key: name if shard == SHARDS[1] else shard for key, shard in known.items()})


def renamed(*names: str) -> Build:
    """Good shards with other names, in the index too."""

    def build(folder: Path) -> Path:
        first, second = names
        put_shards(folder, (first, second))
        put_index(folder, {"weight_map": weight_map((first, second))})
        return folder

    return build


# ---- legal


def hub_cache(folder: Path) -> Path:
    """The layout of the hub's cache: every file is a link to a blob two folders up."""
    blobs, snapshot = folder / "blobs", folder / "snapshots" / "0123abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    put_shards(blobs)
    put_index(blobs, {"weight_map": weight_map()})
    for i, name in enumerate((*SHARDS, INDEX)):
        (blobs / name).rename(blobs / f"{i:040x}")
        (snapshot / name).symlink_to(f"../../blobs/{i:040x}")
    return snapshot


def contained(names: tuple[str, str], index: str, *writers: Callable[[State], bytes]) -> Build:
    """Shards in one container or in two."""

    def build(folder: Path) -> Path:
        for name, part, write in zip(names, halves(), writers, strict=True):
            (folder / name).write_bytes(write(part))
        put_index(folder, {"weight_map": weight_map(names)}, index)
        return folder

    return build


def legacy(state: State) -> bytes:
    return saved(state, zip=False)


BINS = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
LEGAL: dict[str, Build] = {
    "an index in UTF-16": index(json.dumps({"weight_map": weight_map()}).encode("utf-16")),
    "a folder": indexed(dict),
    "its index": changed(lambda folder: None, INDEX),
    "links as in the hub's cache": hub_cache,
    "an index in the hub's cache": lambda folder: hub_cache(folder) / INDEX,
    "a size that is a lie": indexed(dict, metadata={"total_size": 10**30, "x": [1e999, None], "\x1b[2J\n": "\x1b"}),
    "no metadata but null": indexed(dict, metadata=None),
    "an index of .safetensors that lists .bin": contained(BINS, INDEX, saved, saved),
    "an index of .safetensors that lists .bin of safetensors": contained(BINS, INDEX, save, save),
    "an index of .bin that lists .safetensors": contained(SHARDS, f"pytorch_model.bin{ENDING}", save, save),
    "zip and legacy together": contained(BINS, f"pytorch_model.bin{ENDING}", saved, legacy),
    "safetensors and zip together": contained(SHARDS, INDEX, save, saved),
    "a shard that the index does not list": changed(
        lambda folder: safetensors.torch.save_file({KEY: torch.ones(3)}, folder / "model-00003-of-00002.safetensors")
    ),
    "names with spaces and brackets": renamed("a b [1].safetensors", "é (2) %20.safetensors"),
    "no index": lambda folder: (put_shards(folder), folder)[1],
    "an index with a byte order mark and line ends of Windows": lambda folder: index(
        b"\xef\xbb\xbf" + json.dumps({"weight_map": weight_map()}, indent=2).replace("\n", "\r\n").encode()
    )(folder),
    "an index of another name": contained(SHARDS, "vision.index.fp16.json", save, save),
    "hidden names": renamed(".a", "..b"),
    "a broken pytorch_model.bin in its folder": changed(
        lambda folder: (folder / "pytorch_model.bin").write_bytes(b"x")
    ),
}

# ---- not legal

OUTSIDE = "is not a file in the index's folder"
NO_INDEX = "not an index of a sharded checkpoint"
AWAY = {
    "a folder up": "../model.safetensors",
    "a folder up in Windows' way": "..\\model.safetensors",
    "an absolute path": "/etc/passwd",
    "a path in another folder": "sub/model.safetensors",
    "a drive": "C:\\model.safetensors",
    "a path on a drive": "C:model.safetensors",
    "a stream of a file": "model.safetensors:stream",
    "a share": "\\\\server\\share\\model.safetensors",
    "a device of Windows": "\\\\.\\PhysicalDrive0",
    "the folder": ".",
    "the folder above": "..",
    "the folder above, with a space": ".. ",
    "dots": "...",
    "a name that ends in a dot": "model.safetensors.",
    "a name that ends in a space": "model.safetensors ",
    "nothing": "",
    "a name with NUL": "model\0.safetensors",
    "a name that breaks lines": "a\n::error::b",
    "a name that steers terminals": "\x1b[2J",
    "a name that runs backwards": "\u202esrotnesfas.ledom",
    "half of a surrogate pair": "\ud800",
    "a URL": "https://example.com/model.safetensors",
}


def without(state: State, *keys: str) -> State:
    return {key: tensor for key, tensor in state.items() if key not in keys}


def second(state: Callable[[State], State]) -> Build:
    """A good checkpoint, but the second shard contradicts the index."""
    return changed(lambda folder: safetensors.torch.save_file(state(halves()[1]), folder / SHARDS[1]))


def replaced(make: Callable[[Path], object]) -> Build:
    """A good checkpoint whose second shard is replaced."""

    def change(folder: Path) -> None:
        (folder / SHARDS[1]).unlink()
        make(folder / SHARDS[1])

    return changed(change)


def _swapped(folder: Path) -> None:
    first, second = (folder / name for name in SHARDS)
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)


def _many(folder: Path) -> Path:
    """An index of a hundred thousand tensors, in as many shards."""
    put_index(folder, {"weight_map": {f"layers.{i}.weight": f"model-{i}.safetensors" for i in range(100_000)}})
    return folder


def only(*names: str) -> Build:
    """A folder with several whole checkpoints."""

    def build(folder: Path) -> Path:
        for name in names:
            (folder / name).write_bytes(saved(sam()))
        return folder

    return build


def _case(folder: Path) -> None:
    (folder / SHARDS[1]).rename(folder / SHARDS[1].upper())


DOUBLE = b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'
REFUSED: dict[str, tuple[Build, tuple[str, ...]]] = {
    **{f"{what} for a shard": (with_name(name), (INDEX, repr(name), OUTSIDE)) for what, name in AWAY.items()},
    "a shard's name of 5000 characters": (with_name("x" * 5000), ("the shard 'xxx", "is missing")),
    "a shard missing": (changed(lambda folder: (folder / SHARDS[1]).unlink()), (f"'{SHARDS[1]}' is missing",)),
    "a shard in capitals": (changed(_case), (f"'{SHARDS[1]}' is missing",)),
    "a link that leads nowhere": (
        replaced(lambda path: path.symlink_to("../../blobs/0123")),
        (f"'{SHARDS[1]}' is missing",),
    ),
    "a link to itself": (replaced(lambda path: path.symlink_to(path)), (f"'{SHARDS[1]}' is missing",)),
    "a pipe for a shard": (replaced(os.mkfifo), (f"{SHARDS[1]}: is a pipe",)),
    "a folder for a shard": (replaced(Path.mkdir), (f"{SHARDS[1]}: is a folder",)),
    "a device for a shard": (replaced(lambda path: path.symlink_to("/dev/zero")), (f"{SHARDS[1]}: is a device",)),
    "a file of secrets for a shard": (
        replaced(lambda path: path.symlink_to("/etc/hostname")),
        (f"{SHARDS[1]}: text, not weights",),
    ),
    "an empty shard": (replaced(lambda path: path.write_bytes(b"")), (f"{SHARDS[1]}: an empty file",)),
    "a shard cut short": (
        replaced(lambda path: path.write_bytes(save(halves()[1])[:-9])),
        (SHARDS[1], "truncated"),
    ),
    "the index for a shard": (with_name(INDEX), (f"{INDEX}: JSON text",)),
    "one shard under two names": (
        replaced(lambda path: path.symlink_to(SHARDS[0])),
        (f"{SHARDS[1]}: '", "is in another shard too"),
    ),
    "the two shards swapped": (changed(_swapped), (SHARDS[0], f"puts it into '{SHARDS[1]}'")),
    "a tensor in two shards": (
        second(lambda state: state | {next(iter(halves()[0])): torch.ones(1)}),
        (f"{SHARDS[1]}: '{next(iter(halves()[0]))}' is in another shard too",),
    ),
    "a tensor in the wrong shard": (
        indexed(lambda known: known | {KEY: SHARDS[0]}),
        (f"{SHARDS[1]}: holds '{KEY}'", f"puts it into '{SHARDS[0]}'"),
    ),
    "a tensor in no shard": (second(lambda state: without(state, KEY)), (INDEX, f"such as '{KEY}'")),
    "a tensor that is not listed": (
        indexed(lambda known: {key: shard for key, shard in known.items() if key != KEY}),
        (f"{SHARDS[1]}: holds '{KEY}'", "does not list it"),
    ),
    "a name that steers terminals, not listed": (
        second(lambda state: state | {"\x1b[2J\n::error::": torch.ones(1)}),
        ("holds '\\x1b[2J\\n::error::'", "does not list it"),
    ),
    "an index of nothing": (index(b""), (INDEX, NO_INDEX)),
    "an index of no JSON": (index(b"{'weight_map': {}}"), (INDEX, NO_INDEX, "line 1 column 2")),
    "an index that is the weights": (index(lambda: save(sam())), (INDEX, NO_INDEX)),
    "an error page for an index": (index(b"<!doctype html>"), (INDEX, NO_INDEX)),
    "a deep index": (index(b'{"weight_map":' * 100_000), (INDEX, NO_INDEX, "deep")),
    "a name twice in an index": (index(DOUBLE), (INDEX, "duplicate name 'a'")),
    "two maps in an index": (index(b'{"weight_map": {}, "weight_map": {}}'), ("duplicate name 'weight_map'",)),
    "an index of 30 MB of lists": (index(lambda: b'{"weight_map":[' + b"[]," * 10**7 + b"[]]}"), (NO_INDEX, "values")),
    "an index of 40 MB": (index(lambda: b" " * 40_000_000 + b"{}"), (INDEX, "larger than any index")),
    "an index of a hundred thousand shards": (_many, ("the shard 'model-0.safetensors' is missing",)),
    **{
        f"the map {json.dumps(value)}": (indexed(lambda known, value=value: value), (INDEX, words))
        for value, words in (
            ([], "expected a `weight_map`"),
            (None, "expected a `weight_map`"),
            ("model.safetensors", "expected a `weight_map`"),
            ({}, "lists no files"),
            ({KEY: 3}, "a file name is not a string"),
            ({KEY: None}, "a file name is not a string"),
            ({KEY: [SHARDS[0]]}, "a file name is not a string"),
            ({KEY: {"a": "b"}}, "a file name is not a string"),
        )
    },
    "an index that is a list": (index([weight_map()]), (INDEX, "expected a `weight_map`")),
    "an index without a map": (index({"metadata": {}}), (INDEX, "expected a `weight_map`")),
    "a pipe for an index": (
        changed(lambda f: ((f / INDEX).unlink(), os.mkfifo(f / INDEX))),
        (f"{INDEX}: is a pipe",),
    ),
    "a device for an index": (
        changed(lambda f: ((f / INDEX).unlink(), (f / INDEX).symlink_to("/dev/zero"))),
        (f"{INDEX}: is a device",),
    ),
    "an index that leads nowhere": (
        changed(lambda f: ((f / INDEX).unlink(), (f / INDEX).symlink_to("../../blobs/1"))),
        (f"{INDEX}: cannot be read: No such file",),
    ),
    "several checkpoints in a folder": (
        only("a.pth", "b.bin"),
        ("several checkpoints: a.pth, b.bin", "the path of one of them"),
    ),
    "several, with names that steer terminals": (
        only("\x1b[2J\n::error::.pth", "b.pth"),
        ("several checkpoints: \\x1b[2J\\x0a::error::.pth, b.pth",),
    ),
    "a name that breaks lines in a folder": (
        lambda folder: (folder.joinpath("a\n::error::.pth").write_bytes(b""), folder)[1],
        ("a\\x0a::error::.pth: an empty file",),
    ),
    "a folder of nothing": (lambda folder: folder, ("contains no checkpoint",)),
    "a set of shards with a gap": (
        only("model-1-of-999999999.pth", "model-3-of-999999999.pth"),
        ("lacks shards: model-2-of-999999999.pth, model-4-of", "model-22-of-999999999.pth, ..."),
    ),
    "a tensor twice, without an index": (
        lambda f: (
            put_shards(f, (SHARDS[0], "a.pth")),
            (f / "a.pth").unlink(),
            (f / SHARDS[1]).hardlink_to(f / SHARDS[0]),
            f,
        )[-1],
        ("is in another shard too",),
    ),
    "a `latest` that leaves the folder": (
        changed(
            lambda f: (
                (f / INDEX).unlink(),
                *((f / name).unlink() for name in SHARDS),
                (f / "latest").write_text("../.."),
            )
        ),
        ("contains no checkpoint",),
    ),
}

CASES = [
    *(Case(f"shards: {name}", build, Accepted(sam)) for name, build in LEGAL.items()),
    *(Case(f"shards: {name}", build, Refused(words)) for name, (build, words) in REFUSED.items()),
]
