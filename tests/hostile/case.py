"""A hostile or unusual input, and the expected behaviour of the program."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import models
import torch

State = dict[str, torch.Tensor]

# Writes an input into an empty folder. Returns the arguments after the command: SOURCE and options.
Build = Callable[[Path], Path | Sequence[str | Path]]


class Refused(NamedTuple):
    """Expect the exit code `code` and a short message that contains `words`: cause (tensor, global, member), file."""

    words: tuple[str, ...]
    code: int = 3


class Accepted(NamedTuple):
    """Expect the same output as for the plain tensors of `like` in a safetensors file.

    `words` are expected on stderr. `computed` allows the time and memory of importing torch.
    """

    like: Callable[[], State]
    words: tuple[str, ...] = ()
    computed: bool = False


class Case(NamedTuple):
    name: str
    build: Build
    expected: Refused | Accepted
    command: tuple[str, ...] = ("sam",)


def marker(folder: Path) -> Path:
    """The file that a canary in `folder` creates if it is executed."""
    return folder.parent / "canary"


@functools.cache
def _sam() -> State:
    return dict(models.sam_meta().state_dict())


@functools.cache
def _clip() -> State:
    return dict(models.clip_hf_vision().state_dict())


def sam() -> State:
    """A tiny SAM with Meta's names. The dict is new, its tensors are shared."""
    return dict(_sam())


def clip() -> State:
    """A tiny CLIP vision tower with transformers' names. The dict is new, its tensors are shared."""
    return dict(_clip())


def saved(value: object, *, zip: bool = True) -> bytes:
    """The file that torch.save writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=zip)
    return buffer.getvalue()
