"""How little is fetched: bytes that left the server, on checkpoints of true size.

Their encoders' bytes are patterned, each word by its place, and the rest of the files are holes: 1.2 GB of disk at
most, made in seconds, and no byte can come from a wrong place unnoticed.
"""

from __future__ import annotations

import json
import os
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from command import run
from hubserver import Faults, HubServer, Repo, Request, environment, hub_server
from inventories import Inventory, inventories, sparse
from isal import isal_zlib

from converter.checkpoint.open import open_checkpoint

_CHUNK = 16 << 20


class Checkpoint(NamedTuple):
    """A file on the hubs, the inventory it is made from, and its encoders by family."""

    repository: str
    file: str
    inventory: str
    encoders: dict[str, Encoder]


class Encoder(NamedTuple):
    """What the names of its tensors begin with, and how many bytes a conversion takes of them."""

    prefix: str
    nbytes: int


DEEPSEEK_OCR = Checkpoint(
    "deepseek-ai/DeepSeek-OCR",
    "model-00001-of-000001.safetensors",
    "deepseek-ocr",
    {"sam": Encoder("model.sam_model.", 191_138_304), "clip": Encoder("model.vision_model.", 606_355_456)},
)
# Without `post_layernorm`, which the DeepEncoder does not have.
CLIP_BIN = Checkpoint(
    "openai/clip-vit-large-patch14",
    "pytorch_model.bin",
    "clip-hf",
    {"clip": Encoder("vision_model.", 1_212_712_968)},
)
SAM_PTH = Checkpoint("org/sam", "sam_vit_b_01ec64.pth", "sam-meta", {"sam": Encoder("image_encoder.", 358_683_648)})
CHECKPOINTS = pytest.mark.parametrize("checkpoint", [DEEPSEEK_OCR, CLIP_BIN, SAM_PTH], ids=lambda it: it.inventory)


# Files ------------------------------------------------------------------------------------------------------------


def hollow(path: Path, inventory: Inventory) -> Path:
    """The file of an inventory with holes for data: safetensors, or the zip that torch.save makes."""
    if path.suffix == ".safetensors":
        return sparse(path, inventory)
    state = {name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, (dtype, shape) in inventory.items()}
    with torch.serialization.skip_data():
        torch.save(state, path)
    return path


def patterned(path: Path, checkpoint: Checkpoint) -> Path:
    """The same with the encoders filled, and all checksums right."""
    hollow(path, inventories()[checkpoint.inventory])
    source = open_checkpoint(path)
    prefixes = tuple(encoder.prefix for encoder in checkpoint.encoders.values())
    storages = {key: tensor.storage for key, tensor in source.contents.items()}
    checksums = {}
    with path.open("r+b") as file:
        for key, storage in storages.items():
            start, end = storage.offset, storage.offset + storage.length
            generated = key.startswith(prefixes)
            checksums[storage.name] = fill(file.fileno(), start, end) if generated else zeros(end - start)
    source.close()
    if path.suffix != ".safetensors":
        set_checksums(path, checksums)
    return path


def fill(fd: int, start: int, end: int) -> int:
    """Have each word of 8 bytes hold its own place in the file; the bytes' CRC-32."""
    crc = 0
    for low in range(start - start % 8, end, _CHUNK):
        words = torch.arange(low // 8, -(-min(low + _CHUNK, end) // 8), dtype=torch.int64).numpy()
        segment = memoryview(words).cast("B")[max(start - low, 0) : end - low]
        os.pwrite(fd, segment, max(start, low))
        crc = isal_zlib.crc32(segment, crc)
    return crc


def zeros(length: int) -> int:
    """The CRC-32 of that many zeros."""
    nothing, crc = bytes(min(length, _CHUNK)), 0
    for at in range(0, length, _CHUNK):
        crc = isal_zlib.crc32(nothing[: length - at], crc)
    return crc


def set_checksums(path: Path, checksums: dict[str, int]) -> None:
    """Write members' CRC-32s into a zip's directory, where torch left zeros when it skipped their data."""
    with zipfile.ZipFile(path) as archive, path.open("r+b") as file:
        at = archive.start_dir
        for member in archive.infolist():
            if member.filename in checksums:
                os.pwrite(file.fileno(), struct.pack("<L", checksums[member.filename]), at + 16)
            at += 46 + len(member.orig_filename.encode()) + len(member.extra) + len(member.comment)


# Runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder that does not keep its gigabytes until pytest removes it, three runs later."""
    yield tmp_path
    for path in tmp_path.iterdir():
        if path.is_file():
            path.unlink()


def command(*args: object, cwd: Path, server: HubServer | None = None) -> str:
    """What the program prints on stdout, run with the hubs' libraries led to `server`."""
    done = run(*args, cwd=cwd, TMPDIR=str(cwd), **(environment(server, cwd / "hubs") if server else {}))
    assert done.returncode == 0, done.stderr
    return done.stdout


def served(checkpoint: Checkpoint, path: Path) -> Repo:
    # Their digests are of no use to reads by range, and would take seconds to make.
    return Repo(
        checkpoint.repository, {checkpoint.file: path, "config.json": b"{}"}, sha256={checkpoint.file: "5" * 64}
    )


@pytest.mark.parametrize("hub", ["hf", "ms"])
@CHECKPOINTS
def test_metadata_takes_little(checkpoint: Checkpoint, hub: str, tmp_path: Path) -> None:
    path = hollow(tmp_path / checkpoint.file, inventories()[checkpoint.inventory])
    source = f"{hub}://{checkpoint.repository}/{checkpoint.file}"
    for arguments in (
        ["inspect", source, "--json"],
        *([family, source, "--dry-run"] for family in checkpoint.encoders),
    ):
        with hub_server([served(checkpoint, path)]) as server:
            out = command(*arguments, cwd=tmp_path, server=server)
            assert server.sent < 2 << 20
        if arguments[0] == "inspect":
            assert {found["family"] for found in json.loads(out)["layouts"]} == set(checkpoint.encoders)


@pytest.mark.parametrize(
    ("checkpoint", "hub"),
    [(DEEPSEEK_OCR, "hf"), (SAM_PTH, "ms")],
    ids=lambda it: it.inventory if isinstance(it, Checkpoint) else it,
)
def test_the_encoder_alone_is_fetched(checkpoint: Checkpoint, hub: str, folder: Path) -> None:
    path = patterned(folder / checkpoint.file, checkpoint)
    source = f"{hub}://{checkpoint.repository}"
    total = 0
    with hub_server([served(checkpoint, path)]) as server:
        for family, encoder in checkpoint.encoders.items():
            before = server.sent
            command(family, source, "-o", "fetched", cwd=folder, server=server)
            sent = server.sent - before
            assert encoder.nbytes < sent <= 1.02 * encoder.nbytes
            total += sent

            command(family, path, "-o", "other", cwd=folder)
            # The headers differ: they name the source, with its hub and commit.
            assert same(folder / "fetched", folder / "other", data_alone=True)

            asked = len(server.requests)
            server.faults = Faults(drop_every=10)
            command(family, source, "-o", "other", "--force", cwd=folder, server=server)
            server.faults = Faults()
            assert any(cut_short(request) for request in server.requests[asked:])
            assert same(folder / "fetched", folder / "other")
            (folder / "fetched").unlink()
            (folder / "other").unlink()
    if checkpoint is DEEPSEEK_OCR:
        assert total <= 0.121 * path.stat().st_size


def same(one: Path, other: Path, data_alone: bool = False) -> bool:
    """Whether two safetensors files hold the same bytes, at the same places of their data."""
    with one.open("rb") as first, other.open("rb") as second:
        for file in (first, second) if data_alone else ():
            file.seek(struct.unpack("<Q", file.read(8))[0], os.SEEK_CUR)
        while segment := first.read(_CHUNK):
            if segment != second.read(_CHUNK):
                return False
        return not second.read(1)


def cut_short(request: Request) -> bool:
    """Whether a range was left before its end."""
    if not request.range or request.status != 206:
        return False
    first, last = request.range.removeprefix("bytes=").split("-")
    return request.sent <= int(last) - int(first)
