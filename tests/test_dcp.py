"""Folders of torch.distributed.checkpoint, written by torch: by one process, and by four that share each tensor."""

from __future__ import annotations

import functools
import multiprocessing
import re
import shlex
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import models
import pytest
import safetensors.torch
import torch
from hostile.dcp import rewrite
from memory import raw
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING
from torch.distributed.checkpoint.state_dict_saver import async_save, save

import converter
from converter.checkpoint.open import Checkpoint, open_checkpoint
from converter.errors import ContainerError, UsageError
from converter.tensors.evaluate import evaluate
from converter.tensors.lazy_tensor import byte_ranges, lazy_read
from converter.tensors.tensor_info import TensorInfo

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:.*torch.distributed.*")

WORLD = 4
FOLDERS = ("plain", "rows", "grid", "columns", "fsdp")


@functools.cache
def state() -> dict[str, Tensor]:
    """Shapes that four processes cannot share evenly, a transposed matrix, a scalar, and no rows at all."""
    torch.manual_seed(0)
    return {
        "weight": torch.randn(10, 6),
        "transposed": torch.randn(6, 8).T,
        "few": torch.randn(2, 3).bfloat16(),
        "kernel": torch.randn(4, 3, 2, 2),
        "bias": torch.randn(10),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
    }


@functools.cache
def clip() -> torch.nn.Module:
    return models.clip_hf_vision()


def _save_sharded(rank: int, port: int, folder: Path) -> None:
    """Write all sharded folders, as one of four processes."""
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    class AppState:
        def state_dict(self) -> dict[str, Any]:
            model, optimizer = get_state_dict(clip(), torch.optim.AdamW(clip().parameters()))
            return {"model": model, "optim": optimizer}

        def load_state_dict(self, state: dict[str, Any]) -> None: ...

    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    line, square = init_device_mesh("cpu", (WORLD,)), init_device_mesh("cpu", (2, WORLD // 2))

    def sharded(mesh: Any, placements: Callable[[Tensor], list[Any]]) -> dict[str, Tensor]:
        return {k: distribute_tensor(v, mesh, placements(v)) if v.dim() else v for k, v in state().items()}

    rows = sharded(line, lambda tensor: [Shard(0)])
    save({"model": rows}, checkpoint_id=folder / "rows")
    columns = sharded(line, lambda tensor: [Shard(tensor.dim() - 1)])
    saving: Any = async_save({"model": columns, "step": 7}, checkpoint_id=folder / "columns")
    saving.result()
    grid = sharded(square, lambda tensor: [Shard(1) if tensor.dim() > 1 else Replicate(), Shard(0)])
    save(dict(grid), checkpoint_id=folder / "grid")
    fully_shard(clip())
    save({"app": AppState()}, checkpoint_id=folder / "fsdp")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dcp")
    state(), clip()
    save(
        {"model": state(), "optimizer": {"state": {"m": torch.ones(2)}}, "step": 3},
        checkpoint_id=folder / "plain",
        no_dist=True,
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Forks: each new process would import torch for seconds.
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_save_sharded, args=(rank, port, folder)) for rank in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * WORLD
    return folder


def _flat(value: Any, *path: object) -> Iterator[tuple[tuple[object, ...], Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(item, *path, key)
    elif isinstance(value, Tensor | TensorInfo):
        yield path, value


def read(source: Checkpoint) -> dict[tuple[object, ...], Tensor]:
    return {path: evaluate(lazy_read(tensor)) for path, tensor in _flat(source.contents)}


@pytest.mark.parametrize("name", FOLDERS)
def test_tensors_are_those_of_dcp_to_torch_save(name: str, folders: Path, tmp_path: Path) -> None:
    dcp_to_torch_save(folders / name, tmp_path / "all.pth")
    saved = dict(_flat(torch.load(tmp_path / "all.pth")))
    wanted = {path: tensor for path, tensor in saved.items() if not {"optim", "optimizer"} & set(path)}
    opened = open_checkpoint(folders / name)
    found = read(opened)
    assert found.keys() == wanted.keys() and set(opened.containers) == {"torch DCP"}
    for path, tensor in wanted.items():
        assert (found[path].dtype, found[path].shape) == (tensor.dtype, tensor.shape)
        assert raw(found[path]) == raw(tensor)
    for path, tensor in _flat(opened.contents):
        ranges = byte_ranges(lazy_read(tensor))
        assert ranges is None or b"".join(part.read() for part in ranges) == raw(wanted[path])
    left_out = len(saved) - len(wanted)
    assert opened.notes == ((f"left out {left_out} tensors of optimizer states",) if left_out else ())


def test_rows_are_copied_and_other_shards_are_computed(folders: Path) -> None:
    def parts(name: str, key: str) -> int | None:
        contents = open_checkpoint(folders / name).contents
        ranges = byte_ranges(lazy_read(contents.get("model", contents)[key]))
        return None if ranges is None else len(ranges)

    assert parts("rows", "weight") == 4 and parts("rows", "few") == 2 and parts("rows", "scalar") == 1
    assert parts("columns", "weight") is None and parts("columns", "bias") == 4
    assert parts("grid", "weight") is None and parts("grid", "bias") == 2
    assert parts("plain", "weight") == 1 and parts("plain", "transposed") is None


def test_every_command_reads_a_folder(folders: Path, tmp_path: Path) -> None:
    source, plain, out = folders / "fsdp", tmp_path / "plain.safetensors", tmp_path / "out.safetensors"
    safetensors.torch.save_file(models.clip_hf_vision().state_dict(), plain)
    record = converter.convert(source, "clip", out=out)
    converter.convert(plain, "clip", out=tmp_path / "wanted.safetensors")
    assert out.read_bytes() == (tmp_path / "wanted.safetensors").read_bytes()
    # A tensor in four parts has one origin.
    assert len(record.converted["pre_layrnorm.bias"]) == 1
    for given in (source / ".metadata", source / "__2_0.distcp"):
        assert converter.convert(given, "clip", dry_run=True, state_dict="app.model").sources[0].name == str(source)
    with pytest.raises(UsageError, match=r"it has: app\.model \(55 tensors\)"):
        converter.convert(source, "clip", dry_run=True, state_dict="app.optim")
    loaded = converter.load(source, "clip")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in safetensors.torch.load_file(out).items())
    assert converter.inspect(source).num_tensors == 55
    assert not converter.diff(source, plain).changed
    result = converter.verify(out, source, fast=True)
    assert result.ok and {part.name: part.state for part in result.parts}["bytes"] == "done"
    tensors = safetensors.torch.load_file(out)
    tensors["pre_layrnorm.bias"][3] += 1
    safetensors.torch.save_file(tensors, out)
    assert not converter.verify(out, source, fast=True).ok


def test_folders_of_older_torch(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the fields that came later, with the names of torch 2.1, and an enumeration as Python 3.11.0 has it."""

    def age(metadata: Any) -> None:
        metadata.planner_data = None
        del metadata.storage_meta, metadata.version

    monkeypatch.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", lambda self, _: (getattr, (type(self), self.name)))
    rewrite(folders / "rows", tmp_path, age, protocol=2)
    data = (tmp_path / ".metadata").read_bytes()
    for name in (b"TensorProperties", b"MEM_FORMAT_ENCODING"):
        module = b"torch.distributed._shard.sharded_tensor.metadata"
        data, count = re.subn(
            rb"torch\.distributed\.checkpoint\.metadata\n_?%s" % name, b"%s\n%s" % (module, name), data
        )
        assert count == 1
    (tmp_path / ".metadata").write_bytes(data)
    opened = open_checkpoint(tmp_path)
    found = {path: raw(tensor) for path, tensor in read(opened).items()}
    assert found == {(f"model.{name}",): raw(tensor) for name, tensor in state().items()}
    assert not opened.ignored


def test_unfinished_folders_say_so(folders: Path, tmp_path: Path) -> None:
    rewrite(folders / "rows", tmp_path)
    (tmp_path / ".metadata").rename(tmp_path / "__0.metadata")
    with pytest.raises(ContainerError, match="each rank wrote its own metadata"):
        open_checkpoint(tmp_path)
    (tmp_path / "__0.metadata").unlink()
    with pytest.raises(ContainerError, match=r"lacks \.metadata, which .* writes last\n.*cp -r FOLDER"):
        open_checkpoint(tmp_path)


def test_a_config_next_to_the_files_is_read(folders: Path, tmp_path: Path) -> None:
    rewrite(folders / "rows", tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert open_checkpoint(tmp_path).has_config("config.json")


def test_the_step_for_shards_of_the_hugging_face_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command that the error gives joins them."""
    writer = pytest.importorskip("torch.distributed.checkpoint.hf_storage").HuggingFaceStorageWriter
    pytest.importorskip("torch.distributed.checkpoint._consolidate_hf_safetensors")
    # torch joins tensors without dimensions to zeros.
    saved = {name: tensor.contiguous() for name, tensor in state().items() if tensor.dim()}
    save(dict(saved), storage_writer=writer(str(tmp_path / "shards"), save_distributed=True), no_dist=True)
    with pytest.raises(ContainerError, match="torch's HuggingFaceStorageWriter") as caught:
        open_checkpoint(tmp_path / "shards")
    *_, code = shlex.split(caught.value.hint)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    found = read(open_checkpoint(tmp_path / "joined"))
    assert {name: raw(tensor) for (name,), tensor in found.items()} == {n: raw(t) for n, t in saved.items()}
