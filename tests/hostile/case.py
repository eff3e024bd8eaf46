"""What a hostile or odd input is, and what the program is to do with it."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import models
import torch

State = dict[str, torch.Tensor]

# Writes an input into an empty folder. What it gives are the program's arguments after the command: SOURCE, options.
Build = Callable[[Path], Path | Sequence[str | Path]]


class Refused(NamedTuple):
    """The program ends with `code`, and its few lines on stderr hold `words`: cause (tensor, global, member), file."""

    words: tuple[str, ...]
    code: int = 3


class Accepted(NamedTuple):
    """The program converts it, exactly: to what it makes of `like`, plain tensors, when safetensors saved them.

    `words` stand on stderr. `computed` allows for torch's import, which takes memory.
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
    """The file that a canary in an input in `folder` creates, if anything runs it."""
    return folder.parent / "canary"


@functools.cache
def _sam() -> State:
    return dict(models.sam_meta().state_dict())


@functools.cache
def _clip() -> State:
    return dict(models.clip_hf_vision().state_dict())


def sam() -> State:
    """A tiny SAM in Meta's names; a dict of one's own to change, of tensors that are everybody's."""
    return dict(_sam())


def clip() -> State:
    """A tiny CLIP vision tower in transformers' names, likewise."""
    return dict(_clip())


def saved(value: object, *, zip: bool = True) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=zip)
    return buffer.getvalue()
