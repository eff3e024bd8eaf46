"""Single bits that a disk, a cable or a memory turned: in a .pth, whose members have checksums, each is caught."""

from __future__ import annotations

import io
import random
from pathlib import Path

import models
import pytest
import torch

import converter
from converter.errors import ContainerError, DsocrError
from converter.formats.zip_directory import read_directory
from converter.storage.local_file import LocalFile

FLIPS = 120


@pytest.fixture(scope="module")
def checkpoint() -> bytes:
    """A SAM encoder: all of its tensors are converted. What is left out is not read, and so not checked."""
    state = {name: value for name, value in models.sam_meta().state_dict().items() if name.startswith("image_encoder.")}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


class Disk:
    """A checkpoint on a disk that turns a bit."""

    def __init__(self, data: bytes, folder: Path) -> None:
        self.data, self.source, self.out = data, folder / "sam.pth", folder / "out.safetensors"
        self.source.write_bytes(data)
        members = read_directory(LocalFile(self.source))
        # Where each tensor's bytes are, by the name of their member.
        self.stored = [
            (name, storage.offset, storage.offset + storage.length)
            for name, storage in members.items()
            if "/data/" in name and storage.length
        ]

    def convert(self, bit: int | None = None) -> bytes:
        """What the conversion writes with a bit of the file turned; its errors pass."""
        data = bytearray(self.data)
        if bit is not None:
            data[bit // 8] ^= 1 << bit % 8
        self.source.write_bytes(data)
        converter.convert(self.source, "sam", out=self.out)
        written = self.out.read_bytes()
        self.out.unlink()
        return written


def test_every_flipped_bit_of_a_stored_tensor_is_caught(checkpoint: bytes, tmp_path: Path) -> None:
    disk, chance = Disk(checkpoint, tmp_path), random.Random(6)
    caught = 0
    for i in range(FLIPS):
        # Each tensor in turn, for the largest hold most of the bytes.
        name, begin, end = disk.stored[i % len(disk.stored)]
        with pytest.raises(ContainerError, match=rf"{name}: its bytes do not match .* CRC-32"):
            disk.convert(chance.randrange(begin * 8, end * 8))
        assert [path.name for path in tmp_path.iterdir()] == ["sam.pth"]
        caught += 1
    assert caught == FLIPS


def test_a_flipped_bit_elsewhere_is_refused_or_changes_nothing(checkpoint: bytes, tmp_path: Path) -> None:
    """In the pickle, the directory, members' own headers, the bytes between them: names, sizes, offsets, dates."""
    disk, chance = Disk(checkpoint, tmp_path), random.Random(6)
    held = {at for _, begin, end in disk.stored for at in range(begin, end)}
    drop_rest = [at for at in range(len(checkpoint)) if at not in held]
    expected = disk.convert()
    refused = same = 0
    for _ in range(FLIPS // 2):
        try:
            assert disk.convert(chance.choice(drop_rest) * 8 + chance.randrange(8)) == expected
            same += 1
        except DsocrError:
            refused += 1
        assert [path.name for path in tmp_path.iterdir()] == ["sam.pth"]
    # Both happen, often: padding and dates are nobody's, and the pickle has a checksum.
    assert refused + same == FLIPS // 2 and min(refused, same) > FLIPS / 20
