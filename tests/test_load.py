"""`converter.load`: what convert would write, bit by bit, without a file."""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import os
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import models
import pytest
import safetensors.torch
import torch
from command import inside
from hubserver import Repo, environment, hub_server
from memory import raw, stored
from test_oracles import LAYOUTS, SAVERS, State, save_legacy, save_safetensors, save_sharded, save_zip

import converter
from converter.api.load import load
from converter.errors import ContainerError, MappingError, UsageError
from converter.output.memory import Loader
from converter.storage.local_file import LocalFile
from converter.tensors.lazy_tensor import lazy_read
from converter.tensors.ops import Split, apply_op


def check_same(found: State, expected: State) -> None:
    """Equal in every bit, and in memory of their own."""
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert found[name].is_contiguous(), name
        assert raw(found[name]) == raw(tensor), name
    spans = sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in found.values() if tensor.nbytes)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def written(source: Path | str, family: str, folder: Path, **options: object) -> State:
    """What convert makes of it, in the order of the file."""
    out = folder / "written.safetensors"
    converter.convert(source, family, out=out, force=True, **options)  # type: ignore[arg-type]
    found = safetensors.torch.load_file(out)
    data = out.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return {name: found[name] for name in header if name != "__metadata__"}


@pytest.mark.parametrize("container", SAVERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_from_every_container(layout: str, container: str, tmp_path: Path) -> None:
    family, _, make = LAYOUTS[layout]
    (tmp_path / "source").mkdir()
    source = SAVERS[container](make()[0], tmp_path / "source")
    check_same(load(source, family), written(source, family, tmp_path))


@pytest.mark.parametrize(
    "options",
    [{"to": "clip-timm"}, {"to": "clip-hf"}, {"to": "clip-openai"}, {"dtype": "bfloat16"}, {"image_size": 112}],
    ids=str,
)
def test_options_are_those_of_convert(options: dict[str, object], tmp_path: Path) -> None:
    source = save_zip(models.open_clip().state_dict(), tmp_path)
    check_same(load(source, "clip", **options), written(source, "clip", tmp_path, **options))  # type: ignore[arg-type]


def test_torchs_own_name_of_a_type_is_taken(tmp_path: Path) -> None:
    source = save_zip(models.clip_hf().state_dict(), tmp_path)
    check_same(load(source, "clip", dtype=torch.float16), written(source, "clip", tmp_path, dtype="float16"))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*deprecated")
def test_torchscript(tmp_path: Path) -> None:
    image = torch.zeros(1, 3, models.CLIP_IMAGE, models.CLIP_IMAGE)
    torch.jit.trace(models.clip_hf().vision_model, image, strict=False).save(tmp_path / "clip.pt")
    check_same(load(tmp_path / "clip.pt", "clip"), written(tmp_path / "clip.pt", "clip", tmp_path))


@pytest.mark.parametrize("format", ["safetensors", "pth"])
def test_a_converted_file_is_loaded_as_it_is(format: str, tmp_path: Path) -> None:
    source, out = save_zip(models.clip_hf().state_dict(), tmp_path), tmp_path / f"out.{format}"
    expected = written(source, "clip", tmp_path)
    converter.convert(source, "clip", out=out, format=format)
    check_same(load(out, "clip"), expected)
    assert converter.convert(out, "clip", out=tmp_path / f"again.{format}").unchanged


def test_what_is_lacking_comes_from_another_checkpoint(tmp_path: Path) -> None:
    hf = save_safetensors(models.clip_hf().state_dict(), tmp_path)
    converter.convert(hf, "clip", out=tmp_path / "deep.safetensors")
    options = {"to": "clip-hf", "fill_from": hf}
    found = load(tmp_path / "deep.safetensors", "clip", **options)  # type: ignore[arg-type]
    check_same(found, written(tmp_path / "deep.safetensors", "clip", tmp_path, **options))
    with pytest.raises(MappingError, match="--fill-from"):
        load(tmp_path / "deep.safetensors", "clip", to="clip-hf")


# Maps -------------------------------------------------------------------------------------------------------------


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("save", [save_zip, save_safetensors, save_sharded], ids=lambda save: save.__name__)
def test_tensors_outlive_their_file_and_never_change_it(save: Callable[[State, Path], Path], tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    source = save(models.clip_hf().state_dict(), tmp_path / "source")
    files = [path for path in (tmp_path / "source").iterdir() if path.is_file()]
    # What other tests have left is not to be closed in between.
    gc.collect()
    before, descriptors = {path: path.read_bytes() for path in files}, open_files()
    found, again = load(source, "clip"), load(source, "clip")
    expected = written(source, "clip", tmp_path)
    for tensor in found.values():
        tensor.zero_()
    assert {path: path.read_bytes() for path in files} == before
    check_same(again, expected)
    assert not any(tensor.any() for tensor in found.values())
    for path in files:
        path.unlink()
    gc.collect()
    check_same(again, expected)
    del found, again, tensor
    gc.collect()
    assert open_files() == descriptors


def test_nothing_of_an_unfused_tensor_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in the wanted layout: its header alone is read, however large its tensors."""
    converter.convert(save_zip(models.clip_hf().state_dict(), tmp_path), "clip", out=tmp_path / "deep.safetensors")
    reads, original = [], LocalFile.readinto

    def counting(self: LocalFile, buffer: memoryview, offset: int) -> None:
        reads.append(len(buffer))
        original(self, buffer, offset)

    monkeypatch.setattr(LocalFile, "readinto", counting)
    found = load(tmp_path / "deep.safetensors", "clip")
    data = sum(tensor.nbytes for tensor in found.values())
    assert sum(reads) < (tmp_path / "deep.safetensors").stat().st_size - data + 100


def test_a_file_larger_than_memory_is_mapped(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(4 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    LocalFile(path).map().close()


def test_unaligned_tensors_are_copied(tmp_path: Path) -> None:
    """The format does not pad between tensors: one byte before them, and each is across words."""
    state = {name: tensor.clone() for name, tensor in models.clip_hf_vision().state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "aligned.safetensors")
    data = (tmp_path / "aligned.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    moved = (length + 1).to_bytes(8, "little") + data[8 : 8 + length] + b" " + data[8 + length :]
    (tmp_path / "model.safetensors").write_bytes(moved)
    found = load(tmp_path / "model.safetensors", "clip")
    check_same(found, written(tmp_path / "aligned.safetensors", "clip", tmp_path))
    assert all(tensor.data_ptr() % tensor.itemsize == 0 for tensor in found.values())


def test_tied_tensors_are_told_apart(tmp_path: Path) -> None:
    state = dict(models.clip_hf_vision().state_dict())
    state["encoder.layers.1.layer_norm1.weight"] = state["encoder.layers.0.layer_norm1.weight"]
    source = save_zip(state, tmp_path)
    check_same(load(source, "clip"), written(source, "clip", tmp_path))


def test_a_slice_of_a_computed_tensor_keeps_no_more_than_itself() -> None:
    turned = lazy_read(stored(torch.randn(4, 6).T))
    found = Loader(torch.device("cpu"), False)
    for part in apply_op(Split(3), (turned,)):
        assert found(part).untyped_storage().nbytes() == 2 * 4 * 4


def test_a_strange_device_is_named() -> None:
    with pytest.raises(UsageError, match="device gpu"):
        load("anything", "clip", device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="device cuda"):
            load("anything", "clip", device="cuda")


def test_another_device_is_where_they_arrive(tmp_path: Path) -> None:
    source = save_zip(models.clip_hf().state_dict(), tmp_path)
    found = load(source, "clip", device=torch.device("meta"))
    assert {tensor.device.type for tensor in found.values()} == {"meta"}


# Checks -----------------------------------------------------------------------------------------------------------


def flip(path: Path, member: str) -> None:
    """One bit of a member's first byte of data."""
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo(member).header_offset
    data = bytearray(path.read_bytes())
    name, extra = struct.unpack_from("<HH", data, start + 26)
    data[start + 30 + name + extra] ^= 1
    path.write_bytes(data)


def damaged(tmp_path: Path, name: str) -> Path:
    state = models.clip_hf_vision().state_dict()
    path = save_zip(state, tmp_path)
    flip(path, f"weights/data/{list(state).index(name)}")
    return path


def test_what_is_read_is_checked(tmp_path: Path) -> None:
    path = damaged(tmp_path, "encoder.layers.1.self_attn.k_proj.weight")
    with pytest.raises(ContainerError, match="CRC-32"):
        load(path, "clip")


def test_what_is_mapped_is_checked_when_asked_for(tmp_path: Path) -> None:
    path = damaged(tmp_path, "pre_layrnorm.weight")
    load(path, "clip")
    with pytest.raises(ContainerError, match="CRC-32"):
        load(path, "clip", check=True)


def test_a_source_that_changes_midway_is_an_error(tmp_path: Path) -> None:
    source = save_zip(models.clip_hf().state_dict(), tmp_path)

    def grow(what: str, done: int, total: int) -> None:
        if done == 1:
            with source.open("ab") as file:
                file.write(b"more")

    with pytest.raises(ContainerError, match="changed while it was being read"):
        load(source, "clip", on_progress=grow)


# Elsewhere --------------------------------------------------------------------------------------------------------


def test_of_a_remote_source_the_needed_bytes_are_fetched(tmp_path: Path) -> None:
    state = models.sam_meta().state_dict()
    files = {}
    for save in (save_zip, save_legacy, save_safetensors):
        folder = tmp_path / save.__name__
        folder.mkdir()
        save(state, folder)
        (files[f"org/{save.__name__}"],) = folder.iterdir()
    local = written(files["org/save_zip"], "sam", tmp_path)
    expected = {name: hashlib.sha256(raw(tensor)).hexdigest() for name, tensor in local.items()}
    with hub_server([Repo(name, {file.name: file}) for name, file in files.items()]) as server:
        for number, name in enumerate(files):
            calls: list[tuple[str, int, int]] = []
            with inside(tmp_path, environment(server, tmp_path)):
                found = load(f"hf://{name}", "sam", on_progress=lambda *progress: calls.append(progress))  # noqa: B023
                assert {key: hashlib.sha256(raw(tensor)).hexdigest() for key, tensor in found.items()} == expected
            # Files this small came whole when their ends were read, but for safetensors, of which one end is.
            assert bool(calls) == (number == 2)
    what, fetched, needed = calls[-1]
    assert what.startswith("fetching") and fetched == needed


def test_neither_the_package_nor_a_mistake_waits_for_torch() -> None:
    code = """
import sys, converter.api.load as loading
from converter.errors import UsageError
try:
    loading.load("x", "clip", to="nowhere")
except UsageError:
    assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


PEAK = """
import sys
from converter.api.load import load
status = lambda key: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) << 10
import torch
import converter.output.memory
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = status("VmRSS")
found = load(sys.argv[1], "clip")
lazily = status("VmHWM") - before
for tensor in found.values():
    torch.aminmax(tensor)
print(lazily, status("VmHWM") - before, sum(tensor.nbytes for tensor in found.values()))
"""


@pytest.fixture(scope="module")
def true_size(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Six layers of CLIP-L under transformers' names, its vision tower alone."""
    from inventories import inventories

    folder = tmp_path_factory.mktemp("true")
    inventory = inventories()["clip-hf"]
    state = {
        name: torch.full(shape, 0.5, dtype=getattr(torch, dtype))
        for name, (dtype, shape) in inventory.items()
        if re.match(r"vision_model\.(?!encoder\.layers\.([6-9]|\d\d)\.)", name)
    }
    torch.save(state, folder / "clip.bin")
    yield folder / "clip.bin"
    (folder / "clip.bin").unlink()


def test_memory_of_a_fused_clip_l(true_size: Path) -> None:
    """Fused tensors alone are held at first; when all were used, what the tensors have and nothing twice."""
    done = subprocess.run([sys.executable, "-c", PEAK, true_size], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lazily, used, nbytes = map(int, done.stdout.split())
    fused = 6 * (3 * 1024 * 1024 + 3 * 1024) * 4
    assert fused <= lazily < fused + (64 << 20)
    assert nbytes * 0.99 < used < nbytes + (64 << 20)
