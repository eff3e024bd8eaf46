from __future__ import annotations

import json
import os
import resource
import signal
import stat
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import torch
from inventories import Inventory
from memory import Memory, expr, raw, stored

import converter
from converter.errors import ContainerError, OutputError
from converter.formats.safetensors import write_safetensors
from converter.formats.torch_zip import write_pth
from converter.storage.atomic_output import atomic_file, write_all
from converter.storage.byte_range import ByteRange
from converter.storage.stream import BUFFER, BackgroundWriter, Copier
from converter.tensors.dtypes import BY_NAME
from converter.tensors.lazy_tensor import cast, lazy_read, nbytes
from converter.tensors.ops import Fuse, Permute, Split, apply_op
from converter.tensors.serialize import Outputs

pytestmark = pytest.mark.usefixtures("system")

WRITERS = ["safetensors", "pth"]


def write(path: Path, outputs: Outputs, format: str, *, force: bool = False) -> list[int]:
    """The plan written to `path`; the counts of bytes reported as progress."""
    counts: list[int] = []
    with atomic_file(path, force) as fd:
        if format == "pth":
            write_pth(fd, outputs, counts.append)
        else:
            write_safetensors(fd, outputs, {"format": "pt", "tool": "test"}, counts.append)
    return counts


def load(path: Path, format: str) -> dict[str, torch.Tensor]:
    if format == "pth":
        loaded = torch.load(path, weights_only=True)
        assert isinstance(loaded, dict)
        return loaded
    return safetensors.torch.load_file(path)


def all_types() -> dict[str, torch.Tensor]:
    """A tensor of every element type, and of unusual shapes."""
    numbers = torch.arange(60).reshape(3, 20)
    tensors = {name: numbers.to(getattr(torch, name)) for name in BY_NAME}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), "one": torch.ones(1, 1, 1)}
    tensors["caf\u00e9.weight"] = torch.randn(5)
    # Larger than the buffer, and no multiple of it.
    tensors["large"] = torch.arange(BUFFER // 4 * 3 + 7, dtype=torch.int32)
    return tensors


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert raw(found[name]) == raw(tensor), name


@pytest.mark.parametrize("format", WRITERS)
def test_its_own_library_reads_what_was_written(format: str, tmp_path: Path) -> None:
    tensors = all_types()
    write(tmp_path / "out", {name: expr(tensor) for name, tensor in tensors.items()}, format)
    assert_same(load(tmp_path / "out", format), tensors)


@pytest.mark.parametrize("format", WRITERS)
def test_copied_and_computed_tensors_lie_side_by_side(format: str, tmp_path: Path) -> None:
    a, b = torch.randn(300, 400), torch.randn(300, 400)
    (fused,) = apply_op(Fuse(2), (expr(a), expr(b)))
    (turned,) = apply_op(Permute((1, 0)), (expr(a),))
    rounded = cast(expr(b), "bfloat16")
    first, second = apply_op(Split(2), (expr(b),))
    outputs = {"second": second, "turned": turned, "fused": fused, "rounded": rounded, "first": first}
    counts = write(tmp_path / "out", outputs, format)
    assert_same(
        load(tmp_path / "out", format),
        {"second": b[150:], "turned": a.T, "fused": torch.cat([a, b]), "rounded": b.bfloat16(), "first": b[:150]},
    )
    assert sum(counts) == sum(map(nbytes, outputs.values()))


def test_a_pth_can_be_mapped(tmp_path: Path) -> None:
    tensors = all_types()
    path = tmp_path / "out.pth"
    write(path, {name: expr(tensor) for name, tensor in tensors.items()}, "pth")
    assert_same(torch.load(path, weights_only=True, mmap=True), tensors)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        for info in archive.infolist():
            archive.fp.seek(info.header_offset + 26)  # type: ignore[union-attr]
            lengths = archive.fp.read(4)  # type: ignore[union-attr]
            name, extra = int.from_bytes(lengths[:2], "little"), int.from_bytes(lengths[2:], "little")
            assert (info.header_offset + 30 + name + extra) % 64 == 0
            assert info.compress_type == zipfile.ZIP_STORED


def test_safetensors_headers_are_padded_and_hold_the_metadata(tmp_path: Path) -> None:
    for length in range(8):
        write(tmp_path / "out", {"x" * (length + 1): expr(torch.ones(2))}, "safetensors", force=True)
        data = (tmp_path / "out").read_bytes()
        size = int.from_bytes(data[:8], "little")
        assert size % 8 == 0
        assert json.loads(data[8 : 8 + size])["__metadata__"] == {"format": "pt", "tool": "test"}


@pytest.mark.parametrize("format", WRITERS)
def test_repeated_runs_give_the_same_bytes(format: str, tmp_path: Path) -> None:
    tensors = all_types()
    for name in ("first", "second"):
        write(tmp_path / name, {key: expr(tensor) for key, tensor in tensors.items()}, format)
        time.sleep(0.01)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def damaged_outputs(part: bool) -> Outputs:
    """A good tensor and one whose storage does not match its checksum, whole or of which the undamaged part is used."""
    value = lazy_read(stored(torch.randn(BUFFER, 2), damaged=True))
    return {"good": expr(torch.ones(10)), "bad": apply_op(Split(2), (value,))[0] if part else value}


@pytest.mark.parametrize("format", WRITERS)
@pytest.mark.parametrize("part", [False, True])
def test_a_flipped_bit_leaves_no_file_and_keeps_the_old_one(format: str, part: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ContainerError, match=r"memory: x: its bytes do not match .* CRC-32"):
        write(out, damaged_outputs(part), format)
    assert list(tmp_path.iterdir()) == []
    out.write_text("what stood here before")
    with pytest.raises(ContainerError, match="CRC-32"):
        write(out, damaged_outputs(part), format, force=True)
    assert list(tmp_path.iterdir()) == [out]
    assert out.read_text() == "what stood here before"


def test_parts_of_one_storage_have_it_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = stored(torch.arange(12.0))
    reads = 0
    original = Memory.readinto

    def counting(self: Memory, buffer: memoryview, offset: int) -> None:
        nonlocal reads
        reads += len(buffer)
        original(self, buffer, offset)

    monkeypatch.setattr(Memory, "readinto", counting)
    copier = Copier(lambda full: memoryview(full.obj), lambda count: None)
    for start in (0, 16, 32):
        copier.copy([ByteRange(whole.storage, start, 16)])
    assert reads == 2 * whole.nbytes


@pytest.mark.parametrize("format", WRITERS)
def test_a_source_that_ends_too_early_leaves_nothing(format: str, tmp_path: Path) -> None:
    tensor = stored(torch.ones(4))
    tensor.storage.file.data = b"short"  # type: ignore[attr-defined]
    with pytest.raises(ContainerError, match="truncated"):
        write(tmp_path / "out", {"x": lazy_read(tensor)}, format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_umask_is_respected(mask: int, tmp_path: Path) -> None:
    old = os.umask(mask)
    try:
        write(tmp_path / "out", {"x": expr(torch.ones(1))}, "safetensors")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o666 & ~mask


def test_a_file_that_appears_meanwhile_is_left_as_it_is(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OutputError, match="was created meanwhile"), atomic_file(out, False) as fd:
        os.write(fd, b"new")
        out.write_text("theirs")
    assert out.read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_whatever_interrupts_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error), atomic_file(tmp_path / "out", False) as fd:
        os.write(fd, b"half of it")
        raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", WRITERS)
def test_ctrl_c_during_a_copy_leaves_nothing_and_no_thread(format: str, tmp_path: Path) -> None:
    threads = threading.active_count()

    def interrupt(count: int) -> None:
        signal.raise_signal(signal.SIGINT)

    # A shell starts background jobs with this signal ignored, and Python leaves it so.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / "out", False) as fd:
            outputs = {"x": expr(torch.zeros(BUFFER * 4))}
            if format == "pth":
                write_pth(fd, outputs, interrupt)
            else:
                write_safetensors(fd, outputs, {}, interrupt)
    finally:
        signal.signal(signal.SIGINT, before)
    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() == threads


def test_nothing_but_the_whole_file_is_ever_seen_under_its_name(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    with atomic_file(out, False) as fd:
        os.write(fd, b"half")
        assert not out.exists()
        assert [path.suffix for path in tmp_path.iterdir()] == [".part"]
    assert out.read_bytes() == b"half"


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """Files cannot grow beyond this: a write across it is cut short, the next one fails, as on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize("format", WRITERS)
@pytest.mark.parametrize("short", [1, 10, 21, 23, 300, 2 * BUFFER])
def test_no_room_for_the_last_bytes_is_an_error(format: str, short: int, tmp_path: Path) -> None:
    outputs = {"x": expr(torch.ones(BUFFER))}
    write(tmp_path / "out", outputs, format)
    full = (tmp_path / "out").stat().st_size
    (tmp_path / "out").unlink()
    with pytest.raises(OutputError, match="could not be written: File too large"), file_size_limit(full - short):
        write(tmp_path / "out", outputs, format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", WRITERS)
def test_a_full_disk_is_an_error(format: str) -> None:
    fd = os.open("/dev/full", os.O_RDWR)
    try:
        with pytest.raises(OSError, match="No space left"):
            if format == "pth":
                write_pth(fd, {"x": expr(torch.ones(BUFFER))}, lambda count: None)
            else:
                write_safetensors(fd, {"x": expr(torch.ones(BUFFER))}, {}, lambda count: None)
    finally:
        os.close(fd)


def test_an_error_of_the_writing_thread_is_raised_where_it_is_waited_for(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "x", os.O_RDONLY | os.O_CREAT)
    try:
        with pytest.raises(OSError, match="Bad file descriptor"), BackgroundWriter(fd) as writer:
            writer.exchange(memoryview(bytearray(b"one buffer, and no more to follow")))
        with pytest.raises(OSError, match="Bad file descriptor"), BackgroundWriter(fd) as writer:
            for _ in range(100):
                writer.exchange(memoryview(bytearray(8)))
            pytest.fail("a hundred buffers were taken")
        with pytest.raises(ZeroDivisionError), BackgroundWriter(fd) as writer:
            writer.exchange(memoryview(bytearray(8)))
            raise ZeroDivisionError
    finally:
        os.close(fd)
    assert all(thread.name != "writer" for thread in threading.enumerate())


def test_buffers_are_written_in_order_while_the_next_are_filled(tmp_path: Path) -> None:
    path = tmp_path / "x"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    sizes = [BUFFER, 1, 5, BUFFER - 1, 0, 3] * 4
    with BackgroundWriter(fd) as writer:
        buffer = memoryview(bytearray(BUFFER))
        for number, size in enumerate(sizes):
            buffer[:size] = bytes([number]) * size
            buffer = writer.exchange(buffer[:size])
            assert len(buffer) == BUFFER
    os.close(fd)
    assert path.read_bytes() == b"".join(bytes([number]) * size for number, size in enumerate(sizes))


def test_a_write_that_is_cut_short_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fd = os.open(tmp_path / "x", os.O_WRONLY | os.O_CREAT)
    whole_write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: whole_write(fd, data[:3]))
    write_all(fd, memoryview(b"0123456789"))
    os.close(fd)
    assert (tmp_path / "x").read_bytes() == b"0123456789"


TINY: Inventory = {
    "class_embedding": ("float32", (4,)),
    "positional_embedding": ("float32", (5, 4)),
    "conv1.weight": ("float32", (4, 3, 2, 2)),
    **{f"ln_pre.{param}": ("float32", (4,)) for param in ("weight", "bias")},
    **{
        f"transformer.resblocks.{layer}.{name}": ("float32", shape)
        for layer in (0, 1)
        for name, shape in {
            **{f"ln_{n}.{param}": (4,) for n in (1, 2) for param in ("weight", "bias")},
            "attn.in_proj_weight": (12, 4),
            "attn.in_proj_bias": (12,),
            "attn.out_proj.weight": (4, 4),
            "attn.out_proj.bias": (4,),
            "mlp.c_fc.weight": (16, 4),
            "mlp.c_fc.bias": (16,),
            "mlp.c_proj.weight": (4, 16),
            "mlp.c_proj.bias": (4,),
        }.items()
    },
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tiny CLIP under OpenAI's names."""
    torch.manual_seed(0)
    path = tmp_path / "source.safetensors"
    safetensors.torch.save_file({name: torch.randn(shape) for name, (_, shape) in TINY.items()}, path)
    return path


@pytest.mark.parametrize("format", WRITERS)
def test_convert_writes_what_its_record_says(source: Path, tmp_path: Path, format: str) -> None:
    record = converter.convert(str(source), "clip", out=tmp_path / "out", format=format)
    before, after = safetensors.torch.load_file(source), load(tmp_path / "out", format)
    assert record.written
    assert sum(tensor.nbytes for tensor in after.values()) == record.nbytes
    assert set(after) == set(record.converted)
    for name in after.keys() - record.generated.keys():
        (key,) = record.converted[name]
        assert raw(after[name]) == raw(before[key])
    assert after["embeddings.position_ids"].tolist() == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("format", WRITERS)
def test_an_existing_file_is_replaced_only_by_force(source: Path, tmp_path: Path, format: str) -> None:
    out = tmp_path / "out"
    out.write_text("old")
    with pytest.raises(OutputError, match="exists already"):
        converter.convert(str(source), "clip", out=out, format=format)
    assert out.read_text() == "old"
    converter.convert(str(source), "clip", out=out, format=format, force=True)
    assert "embeddings.position_ids" in load(out, format)


@pytest.mark.parametrize("how", ["same", "dotted", "hard link", "symbolic link", "linked folder"])
def test_the_source_itself_is_never_the_output(source: Path, tmp_path: Path, how: str) -> None:
    out = tmp_path / "out.safetensors"
    if how == "same":
        out = source
    elif how == "dotted":
        out = tmp_path / ".." / tmp_path.name / source.name
    elif how == "hard link":
        out.hardlink_to(source)
    elif how == "symbolic link":
        out.symlink_to(source)
    else:
        (tmp_path / "folder").symlink_to(tmp_path)
        out = tmp_path / "folder" / source.name
    before = source.read_bytes()
    with pytest.raises(OutputError, match="is the source itself"):
        converter.convert(str(source), "clip", out=out, force=True)
    assert source.read_bytes() == before


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda out: out.mkdir(), "is a folder"),
        (lambda out: (out.parent / "file").write_text(""), "there is no folder"),
    ],
)
def test_a_path_that_cannot_become_a_file_is_refused(source: Path, make: object, complaint: str) -> None:
    out = source.parent / "out"
    make(out)  # type: ignore[operator]
    target = out if out.is_dir() else source.parent / "file" / "out"
    with pytest.raises(OutputError, match=complaint):
        converter.convert(str(source), "clip", out=target, force=True)


def test_a_source_that_changes_midway_gives_no_output(source: Path, tmp_path: Path) -> None:
    def grow(what: str, done: int, total: int) -> None:
        with source.open("ab") as file:
            file.write(b"more")

    with pytest.raises(ContainerError, match="changed while it was being read"):
        converter.convert(str(source), "clip", out=tmp_path / "out", on_progress=grow)
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("format", WRITERS)
def test_progress_ends_at_all_bytes(source: Path, tmp_path: Path, format: str) -> None:
    counts: list[tuple[int, int]] = []

    def tell(what: str, done: int, total: int) -> None:
        counts.append((done, total))

    record = converter.convert(str(source), "clip", out=tmp_path / "out", format=format, on_progress=tell)
    assert {total for _, total in counts} == {record.nbytes}
    assert counts == sorted(counts)
    assert counts[-1][0] == record.nbytes
