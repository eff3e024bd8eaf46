"""Fixtures of several test files."""

from __future__ import annotations

import gc
import mmap
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command import script

from converter.storage import atomic_output

# Tiny tensors run slower with more threads. Before torch is imported, here and in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_finish() -> None:
    """Keep what was imported out of garbage collection, which would go through all of it every few seconds."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def unsynced() -> Iterator[None]:
    """Do not wait for the disk: thousands of files are written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield


@pytest.fixture(scope="session")
def sam_base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """SAM-base at true size, as Meta saves it. Tests link it to a folder of theirs."""
    folder = tmp_path_factory.mktemp("true-size")
    yield script("make_checkpoints").make(folder, ["sam-b"])["sam-b"]
    # Gigabytes that pytest would keep.
    shutil.rmtree(folder)


@pytest.fixture(params=["linux", "portable"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The system as it is, and once more without what Windows and macOS lack."""
    if request.param == "portable":
        remove_linux_calls(monkeypatch)
    return str(request.param)


def remove_linux_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove calls that another system lacks, and refuse what Windows refuses."""
    for name in ("preadv", "pread", "pwrite", "posix_fadvise", "O_NONBLOCK"):
        monkeypatch.delattr(os, name)
    for name in ("MAP_PRIVATE", "MAP_NORESERVE", "PROT_READ", "PROT_WRITE"):
        monkeypatch.delattr(mmap, name, raising=False)
    monkeypatch.setattr(atomic_output, "fcntl", None)
    monkeypatch.setattr(atomic_output, "_exchange", lambda one, other: False)
    for name in ("rename", "replace", "unlink"):
        monkeypatch.setattr(os, name, _refusing(getattr(os, name), is_open, "the file is open"))
    # shutil removes folders by descriptors of them, where the system has them.
    monkeypatch.setattr("shutil._use_fd_functions", False)
    monkeypatch.setattr(os, "open", _refusing(os.open, os.path.isdir, "folders cannot be opened"))


def _refusing(real: Callable[..., Any], refused: Callable[[Any], bool], why: str) -> Callable[..., Any]:
    def call(path: Any, *args: Any, **options: Any) -> Any:
        if refused(path):
            raise PermissionError(13, why, str(path))
        return real(path, *args, **options)

    return call


def is_open(path: Any) -> bool:
    """Whether this process has a file open; Linux's way of knowing."""
    names = {os.path.realpath(entry.path) for entry in os.scandir("/proc/self/fd")}
    return Path(path).is_file() and os.path.realpath(path) in names
