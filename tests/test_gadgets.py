"""Every gadget is refused by name, and inert under any other. Python's own unpickler executes them: they are real."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile import gadgets, pickles
from hostile.case import sam
from hostile.torchfiles import Raw, as_file, call, described, pickled

import converter
from converter.errors import ContainerError
from converter.formats.pickle_gadgets import is_gadget
from converter.formats.pickle_reader import unpickle
from converter.formats.registry import open_file
from converter.formats.torch_pickle import TorchGlobals, storage_ref
from converter.formats.torchscript import _GLOBALS, _ScriptGlobals
from converter.storage.local_file import LocalFile
from converter.tensors.tensor_info import Contents, FileContents

TABLES: dict[str, Callable[[], Any]] = {"torch": TorchGlobals, "TorchScript": lambda: _ScriptGlobals(_GLOBALS)}

# Loads each pickle in a new process, which the gadget may damage.
VICTIM = """
import os, pickle, signal, sys
import numpy.f2py.crackfortran, torch
for path in sys.argv[1:]:
    child = os.fork()
    if not child:
        signal.alarm(30)
        try:
            pickle.loads(open(path, "rb").read())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.parametrize("table", TABLES)
def test_every_gadget_is_refused_by_name(table: str, tmp_path: Path) -> None:
    found = gadgets.canaries(tmp_path / "canary") | {name: call(name, "true") for name in gadgets.OTHERS.split()}
    for name, raw in found.items():
        with pytest.raises(ContainerError) as caught:
            unpickle(pickled({"model": raw}), "test", TABLES[table](), storage_ref)
        refused = gadgets.LEADS_TO.get(name, name) if table == "torch" else name
        refused = "os.system" if "rebuild_from_type" in name else refused
        assert f"the pickle refers to {refused}, " in str(caught.value)
        assert "nothing of it was executed" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_names_of_training_states_are_no_gadgets() -> None:
    for name in gadgets.HARMLESS.split():
        module, _, attribute = name.rpartition(".")
        assert not is_gadget(module, attribute), name


@pytest.mark.parametrize(
    ("opcodes", "refused"),
    [
        # A method of an object is called; the test of training states has methods that are not.
        (b"cx\nY\n)RX\3\0\0\0run\x86R)R", "builtins.getattr"),
        (b"cx\nos\nX\6\0\0\0system\x86R", "builtins.getattr, x.os.system"),
        (b"ctorch\nhub\nX\4\0\0\0load\x86R", "builtins.getattr, torch.hub.load"),
        (b"cx\nY\nX\x09\0\0\0os.system\x86R", "builtins.getattr"),
        (b"X\1\0\0\0xX\6\0\0\0format\x86R", "builtins.getattr"),
        (b")R", "builtins.getattr"),
    ],
)
def test_getattr_leads_to_no_gadget(opcodes: bytes, refused: str) -> None:
    with pytest.raises(ContainerError) as caught:
        unpickle(b"\x80\2cbuiltins\ngetattr\n" + opcodes + b".", "test", TorchGlobals())
    assert f"the pickle refers to {refused}, which no checkpoint needs" in str(caught.value)


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_gadgets_of_unknown_names_are_inert(form: str, tmp_path: Path) -> None:
    """The defence is not the table: all gadgets that it misses are placeholders, and the tensors are the same."""
    records, storages = described(sam())
    reference = tmp_path / "reference.pth"
    reference.write_bytes(as_file(records, storages, form))
    hidden = [gadgets.renamed(raw) for raw in gadgets.canaries(tmp_path / "canary").values()]
    contents = open_file(LocalFile(pickles.beside(hidden, tmp_path, form)))[1]
    assert isinstance(contents, FileContents) and len(contents.ignored) >= len(hidden) - 2
    assert all(name.startswith("unknown_") for name in contents.ignored)
    assert tensors_of(contents["model"]) == tensors_of(open_file(LocalFile(reference))[1])
    record = converter.convert(tmp_path / "weights.pth", "sam", out=tmp_path / "out.safetensors")
    assert any("unknown_os.system" in note for note in record.notes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.safetensors", "reference.pth", "weights.pth"]


def tensors_of(contents: Contents) -> dict[str, tuple[Any, ...]]:
    """Types, shapes and bytes."""
    return {name: (tensor.dtype, tensor.shape, tensor.storage.read()) for name, tensor in contents.items()}


def executed(make: Any, names: list[str], folder: Path) -> set[str]:
    """The names of the pickles that create their file when Python loads them."""
    for name in names:
        made: Raw = make(folder / f"{name}.canary")[name]
        (folder / f"{name}.pkl").write_bytes(pickled(made))
    paths = [str(folder / f"{name}.pkl") for name in names]
    subprocess.run([sys.executable, "-c", VICTIM, *paths], stdin=subprocess.DEVNULL, capture_output=True, cwd=folder)
    return {name for name in names if (folder / f"{name}.canary").exists()}


def test_gadgets_work_in_python(tmp_path: Path) -> None:
    names = [name for name in gadgets.canaries(tmp_path) if name in (*pickles.FAMILIES, "os.system")]
    # The first two take seconds to import; Python may be installed without idlelib.
    without = ("torch.fx", "torch.jit", *(() if importlib.util.find_spec("idlelib") else ("idlelib",)))
    names = [name for name in names if not name.startswith(without)]
    assert executed(gadgets.canaries, names, tmp_path) == set(names)


def test_ways_to_call_work_in_python(tmp_path: Path) -> None:
    def make(path: Path) -> dict[str, Raw]:
        return {name.replace(" ", "-"): raw for name, (raw, _) in pickles.ways(path).items()}

    names = list(make(tmp_path))
    assert executed(make, names, tmp_path) == set(names)
