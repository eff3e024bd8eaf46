"""Every kind of output is read and written on Linux, and where Linux's own calls are absent, with the same bytes."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import models
import pytest
import torch
from test_encoder_command import deepseek_ocr, save

import converter
from converter.errors import ContainerError, OutputError
from converter.reports import write as write_report
from converter.storage.local_file import LocalFile

pytestmark = pytest.mark.usefixtures("system")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("portable")
    torch.manual_seed(0)
    torch.save(models.sam_meta().state_dict(), path / "sam.pth")
    torch.save(models.clip_hf().state_dict(), path / "clip.pt")
    save(path / "ocr", deepseek_ocr())
    # A folder that holds folders is not replaced.
    shutil.rmtree(path / "ocr" / "assets")
    converter.encoder(path / "ocr", out=path / "encoder.safetensors")
    return path


def write_file(sources: Path, folder: Path, force: bool) -> None:
    converter.convert(sources / "sam.pth", "sam", out=folder / "a.safetensors", force=force)


def write_pth(sources: Path, folder: Path, force: bool) -> None:
    converter.convert(sources / "clip.pt", "clip", out=folder / "a.pth", force=force)


def write_computed(sources: Path, folder: Path, force: bool) -> None:
    converter.convert(sources / "sam.pth", "sam", out=folder / "a.safetensors", dtype="float16", force=force)


def write_records(sources: Path, folder: Path, force: bool) -> None:
    records = [folder / "a.json", folder / "a.md"]
    converter.convert(sources / "sam.pth", "sam", out=folder / "a.safetensors", record=records, force=force)


def write_folder(sources: Path, folder: Path, force: bool) -> None:
    converter.convert(sources / "sam.pth", "sam", to="sam-hf", full_model=True, out=folder / "a", force=force)


def write_copy(sources: Path, folder: Path, force: bool) -> None:
    converter.encoder(sources / "encoder.safetensors", into=sources / "ocr", out=folder / "a", force=force)


def write_mapping(sources: Path, folder: Path, force: bool) -> None:
    converter.derive(sources / "sam.pth", "deepencoder-sam", out=folder / "a.yaml", force=force)


def write_page(sources: Path, folder: Path, force: bool) -> None:
    write_report(folder / "a.html", b"a page")


KINDS = [
    write_file,
    write_pth,
    write_computed,
    write_records,
    write_folder,
    write_copy,
    write_mapping,
    write_page,
]
# What each writes on Linux, which is the first to run.
EXPECTED: dict[str, dict[str, str]] = {}


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("write", KINDS, ids=lambda write: write.__name__)
def test_outputs(write: Callable[[Path, Path, bool], None], system: str, sources: Path, tmp_path: Path) -> None:
    """New, refused, replaced, and over what a killed run left."""
    write(sources, tmp_path, False)
    written = digests(tmp_path)
    assert written and EXPECTED.setdefault(write.__name__, written) == written
    if write is not write_page:
        with pytest.raises(OutputError, match="exists already"):
            write(sources, tmp_path, False)
    for path in [path for path in tmp_path.rglob("*") if path.is_file()]:
        path.write_bytes(b"old")
    for path in list(tmp_path.iterdir()):
        (tmp_path / f".{path.name}.part").write_bytes(b"half")
    write(sources, tmp_path, True)
    assert digests(tmp_path) == written


def test_a_folder_is_replaced_over_what_a_killed_run_left(sources: Path, tmp_path: Path) -> None:
    write_folder(sources, tmp_path, False)
    written = digests(tmp_path)
    (tmp_path / "a").rename(tmp_path / ".a.part.old")
    (tmp_path / ".a.part").mkdir()
    (tmp_path / ".a.part" / "config.json").write_text("half")
    with pytest.raises(OutputError, match="exists already"):
        write_folder(sources, tmp_path, False)
    assert digests(tmp_path) == written
    write_folder(sources, tmp_path, True)
    assert digests(tmp_path) == written


def test_a_folder_comes_back_where_the_new_one_is_gone(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run may take the temporary folder for that of a killed run where there are no locks."""
    write_folder(sources, tmp_path, False)
    written, rename = digests(tmp_path), Path.rename

    def removed(path: Path, target: Path) -> Path:
        if path.name == ".a.part":
            shutil.rmtree(path)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", removed)
    # Where folders are exchanged in one step, nothing is renamed, and there is no error.
    with suppress(OutputError):
        write_folder(sources, tmp_path, True)
    assert digests(tmp_path) == written


def test_an_error_leaves_the_old_output(sources: Path, tmp_path: Path) -> None:
    def change(what: str, done: int, total: int) -> None:
        with source.open("ab") as file:
            file.write(b"more")

    source = tmp_path / "sam.pth"
    source.write_bytes((sources / "sam.pth").read_bytes())
    for out in (tmp_path / "a.safetensors", tmp_path / "a"):
        options = {"to": "sam-hf"} if out.suffix == "" else {}
        source.write_bytes((sources / "sam.pth").read_bytes())
        converter.convert(source, "sam", out=out, **options)  # type: ignore[arg-type]
        before = digests(tmp_path)
        with pytest.raises(ContainerError, match="changed while it was being read"):
            converter.convert(source, "sam", out=out, force=True, on_progress=change, **options)  # type: ignore[arg-type]
        source.write_bytes((sources / "sam.pth").read_bytes())
        assert digests(tmp_path) == before


def test_tensors_in_memory(sources: Path) -> None:
    """Writing to a tensor that is mapped does not reach the file."""
    before = (sources / "sam.pth").read_bytes()
    first, second = (converter.load(sources / "sam.pth", "sam") for _ in range(2))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])
        tensor.zero_()
    assert (sources / "sam.pth").read_bytes() == before


def test_reads_at_any_offset(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(range(256)) * 20_000)
    file = LocalFile(tmp_path / "x")
    buffer = memoryview(bytearray(3_000_000))
    file.readinto(buffer, 1_000)
    assert bytes(buffer) == (tmp_path / "x").read_bytes()[1_000:3_001_000]
    assert file.read(5, 3) == bytes([5, 6, 7])
    with pytest.raises(ContainerError, match="truncated"):
        file.readinto(buffer, file.size - 1)
    file.close()
