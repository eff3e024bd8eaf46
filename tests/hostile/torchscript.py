"""TorchScript archives, whose code is never run."""

from __future__ import annotations

import functools
import io
import warnings
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import models
import torch
from torch import nn

from hostile.case import Accepted, Build, Case, Refused, State, clip, marker, sam
from hostile.gadgets import canaries
from hostile.pickles import asks_for, text, written
from hostile.torchfiles import Raw, pickled


class Part(nn.Module):
    """A module of arbitrary submodules and attributes that computes nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Restores(Part):
    """A module that restores its state by code, which torch.jit.load runs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    @torch.jit.export
    def __getstate__(self) -> tuple[torch.Tensor, bool]:
        return self.weight, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]) -> None:
        while True:
            print("canary")


def tree(state: State) -> Part:
    """Nested modules with the state dict `state`: floats are parameters, others are buffers."""
    root = Part()
    for name, tensor in state.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, Part())
            module = getattr(module, part)
        if tensor.is_floating_point():
            module.register_parameter(last, nn.Parameter(tensor))
        else:
            module.register_buffer(last, tensor)
    return root


def saved(module: nn.Module, how: str) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = (
            torch.jit.script(module) if how == "script" else torch.jit.trace(module, torch.ones(1), check_trace=False)
        )
        buffer = io.BytesIO()
        torch.jit.save(made, buffer)
    return buffer.getvalue()


@functools.cache
def scripted() -> dict[str, bytes]:
    """The members of a SAM's archive."""
    with zipfile.ZipFile(io.BytesIO(saved(tree(sam()), "script"))) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def archived(folder: Path, members: dict[str, bytes]) -> Path:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            method = zipfile.ZIP_DEFLATED if len(data) > 1 << 20 else zipfile.ZIP_STORED
            archive.writestr(zipfile.ZipInfo(name), data, method)
    return written(folder, buffer.getvalue())


def changed(change: Callable[[str, bytes, Path], bytes | None], folder: Path) -> Path:
    """A SAM's archive with changed members; None removes a member."""
    made = {name: change(name, data, folder) for name, data in scripted().items()}
    return archived(folder, {name: data for name, data in made.items() if data is not None})


def code(replace: Callable[[bytes, Path], bytes | None]) -> Build:
    """All source text changed."""
    return functools.partial(
        changed, lambda name, data, folder: replace(data, folder) if name.endswith(".py") else data
    )


def member(ending: str, replace: Callable[[bytes, Path], bytes | None]) -> Build:
    return functools.partial(
        changed, lambda name, data, folder: replace(data, folder) if name.endswith(ending) else data
    )


def _script(make: Callable[[], nn.Module], how: str, folder: Path) -> Path:
    return written(folder, saved(make(), how))


# ---- hand-written archives

CLASS = b"class M(Module):\n  __parameters__ = [%b]\n  __buffers__ = []\n"


def by_hand(data: bytes, source: bytes, more: dict[str, bytes], folder: Path) -> Path:
    members = {"data.pkl": data, "constants.pkl": pickled(()), "code/__torch__.py": source} | more
    return archived(folder, {f"m/{name}": content for name, content in members.items()})


def instance(name: str, state: Any) -> Raw:
    module, _, last = name.rpartition(".")
    return Raw(text(module) + text(last) + b"\x93)\x81" + pickled(state)[2:-1] + b"b")


def _deep(depth: int) -> Raw:
    opened = b"c__torch__\nM\n)\x81}" + text("a")
    return Raw(opened * depth + b"N" + b"sb" * depth)


def _many_classes(count: int) -> Raw:
    """`count` modules of `count` classes in one source file."""
    parts = b"".join(text(f"m{n}") + f"c__torch__\nC{n}\n)\x81}}b".encode("latin1") for n in range(count))
    return Raw(b"c__torch__\nM\n)\x81}(" + parts + b"ub")


SELF = Raw(b"c__torch__\nM\n)\x81r\0\0\1\0}" + text("a") + b"j\0\0\1\0sb")

# data.pkl's value, the source text, other members, and the expected message.
BY_HAND: dict[str, tuple[Callable[[], Any], Callable[[], bytes], dict[str, Callable[[], bytes]], str]] = {
    "a module in itself": (lambda: SELF, lambda: CLASS % b"", {}, "nested more than 100 deep"),
    "modules 900 deep": (lambda: _deep(900), lambda: CLASS % b"", {}, "nested more than 100 deep"),
    "a class whose name leaves the archive": (
        lambda: instance("__torch__./../../../etc.passwd", {}),
        lambda: CLASS % b"",
        {},
        "no member 'm/code/__torch__",
    ),
    "a class whose name would write a line": (
        lambda: instance("__torch__.M\nerror: x\x1b[2J", {}),
        lambda: CLASS % b"",
        {},
        "a TorchScript module without parameters",
    ),
    "a class of the name `.*`": (
        lambda: instance("__torch__.(a+)+$", {}),
        lambda: CLASS % b"",
        {},
        "without parameters",
    ),
    "a class that is not in its file": (
        lambda: instance("__torch__.N", {}),
        lambda: CLASS % b"",
        {},
        "without parameters",
    ),
    "a class without a file": (
        lambda: instance("__torch__.a.b.N", {}),
        lambda: CLASS % b"",
        {},
        "no member 'm/code/__torch",
    ),
    "another class, which looks like torch's": (
        lambda: instance("__torch__x.M", {}),
        bytes,
        {},
        "refers to __torch__x.M",
    ),
    "16 MiB of code": (
        lambda: instance("__torch__.M", {}),
        lambda: (CLASS % b"") + b"#" * (16 << 20),
        {},
        "the limit is 4194304",
    ),
    "many files of 3 MiB of code": (
        lambda: instance("__torch__.M", {f"m{n}": instance(f"__torch__.f{n}.M", {}) for n in range(20)}),
        lambda: CLASS % b"",
        {f"code/__torch__/f{n}.py": lambda: (CLASS % b"") + b"#" * (3 << 20) for n in range(20)},
        "the limit is",
    ),
    "20,000 classes in one file": (
        lambda: _many_classes(20_000),
        lambda: (CLASS % b"") + b"".join(b"class C%d(Module):\n  __parameters__ = []\n" % n for n in range(20_000)),
        {},
        "without parameters",
    ),
    "code of half-open lists": (
        lambda: instance("__torch__.M", {"a": 1}),
        lambda: b"class M(Module):\n" + b"  __parameters__ = [" * 100_000 + b"\n",
        {},
        "without parameters",
    ),
    "a name of a megabyte": (
        lambda: instance("__torch__.M", {"n" * (1 << 20): instance("__torch__.M", {})}),
        lambda: CLASS % b"",
        {},
        "a name of 1048577 characters",
    ),
    "a state that is a list": (
        lambda: instance("__torch__.M", [1]),
        lambda: CLASS % b"",
        {},
        "'__torch__.M' restores itself",
    ),
    "a setstate, oddly spaced": (
        lambda: instance("__torch__.M", {}),
        lambda: CLASS % b"" + b"  def   __setstate__ (self, state: Any) -> None:\n    pass\n",
        {},
        "'__torch__.M' restores itself by code (__setstate__)",
    ),
}


def _by_hand(name: str, folder: Path) -> Path:
    value, source, more, _ = BY_HAND[name]
    return by_hand(pickled(value()), source(), {key: make() for key, make in more.items()}, folder)


# ---- valid archives


def _openai() -> State:
    """OpenAI's CLIP, whose archive has three numbers besides the weights."""
    visual = {f"visual.{name}": tensor for name, tensor in models.open_clip().visual.state_dict().items()}
    numbers = {"input_resolution": 56, "context_length": 8, "vocab_size": 99}
    return visual | {name: torch.tensor(number) for name, number in numbers.items()}


def _tied() -> nn.Module:
    root = tree(sam())
    neck = root.image_encoder.neck  # type: ignore[union-attr]
    setattr(neck, "3", getattr(neck, "1"))
    return root


def _tied_state() -> State:
    state = sam()
    for kind in ("weight", "bias"):
        state[f"image_encoder.neck.3.{kind}"] = state[f"image_encoder.neck.1.{kind}"]
    return state


HOSTILE_CODE = b"""import os
os.system('touch %b')
raise SystemExit
)]} def (
"""


def cases() -> Iterable[Case]:
    for how in ("script", "trace"):
        yield Case(f"torchscript: SAM, {how}", functools.partial(_script, lambda: tree(sam()), how), Accepted(sam))
        build = functools.partial(_script, lambda: tree(_openai()), how)
        yield Case(f"torchscript: OpenAI's CLIP, {how}", build, Accepted(_openai), ("clip",))
        build = functools.partial(_script, lambda: tree(clip()), how)
        yield Case(f"torchscript: CLIP in transformers' names, {how}", build, Accepted(clip), ("clip",))
    yield Case(
        "torchscript: a module in two places", functools.partial(_script, _tied, "script"), Accepted(_tied_state)
    )
    yield Case(
        "torchscript: a setstate that never ends",
        functools.partial(_script, lambda: nn.Sequential(tree(sam()), Restores()), "script"),
        Refused(("Restores' restores itself by code (__setstate__)", "nothing of it was executed")),
    )
    append = code(lambda data, folder: data + HOSTILE_CODE % str(marker(folder)).encode())
    yield Case("torchscript: code that calls the system, and is none", append, Accepted(sam))
    gone = code(lambda data, folder: None)
    yield Case("torchscript: no code", gone, Refused(("no member 'archive/code/__torch__",)))
    yield Case(
        "torchscript: code that is no text",
        code(lambda data, folder: b"\xff\xfe\0" * 99),
        Refused(("without parameters",)),
    )
    yield Case("torchscript: code of another's", code(lambda data, folder: b""), Refused(("without parameters",)))
    constants = member("constants.pkl", lambda data, folder: pickled(canaries(marker(folder))["os.system"]))
    yield Case("torchscript: os.system in constants.pkl, which nobody reads", constants, Accepted(sam))
    debug = member(".debug_pkl", lambda data, folder: pickled(canaries(marker(folder))["os.system"]))
    yield Case("torchscript: os.system in .debug_pkl, which nobody reads", debug, Accepted(sam))
    called = member(
        "/data.pkl", lambda data, folder: data[:2] + canaries(marker(folder))["os.system"].opcodes + b"0" + data[2:]
    )
    yield Case("torchscript: os.system in data.pkl", called, asks_for("os.system"))
    yield Case(
        "torchscript: no data.pkl",
        member("/data.pkl", lambda data, folder: None),
        Refused(("a zip archive, but not one",)),
    )
    short = member("/data/0", lambda data, folder: data[:-4])
    yield Case("torchscript: a short storage", short, Refused(("archive/data/0", "but data.pkl says")))
    yield Case(
        "torchscript: no storage",
        member("/data/0", lambda data, folder: None),
        Refused(("no member 'archive/data/0'",)),
    )
    for name, (*_, words) in BY_HAND.items():
        yield Case(f"torchscript: {name}", functools.partial(_by_hand, name), Refused((words, "weights.pth: ")))


CASES: list[Case] = list(cases())
