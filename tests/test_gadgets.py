"""Every gadget is refused by name. Python's own unpickler executes them: the gadgets are real."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hostile import gadgets, pickles
from hostile.torchfiles import Raw, call, pickled

from converter.errors import ContainerError
from converter.formats.pickle_reader import unpickle
from converter.formats.torch_pickle import GLOBALS, storage_ref
from converter.formats.torchscript import _GLOBALS, _ScriptGlobals

TABLES: dict[str, Any] = {"torch": GLOBALS, "TorchScript": _ScriptGlobals(_GLOBALS)}

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
            unpickle(pickled({"model": raw}), "test", TABLES[table], storage_ref)
        assert f"the pickle refers to {name}, " in str(caught.value)
        assert "nothing of it was executed" in str(caught.value)
    assert not list(tmp_path.iterdir())


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
