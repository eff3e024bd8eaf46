"""Training states as trainers write them: the weights are read, all other objects are inert and named."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import io
import ipaddress
import itertools
import logging
import pathlib
import random
import re
import urllib.parse
import uuid
import zoneinfo
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import numpy
import pytest
import torch
from command import run
from loaders_oracle import assert_same, opened
from torch import nn

import converter
from converter.tensors.tensor_info import FileContents


class Strategy(str, enum.Enum):
    STEPS = "steps"


class Mode(enum.Flag):
    A = 1
    B = 2


class Attributes(dict[str, Any]):
    """Hyperparameters of Lightning."""

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value


class Ordered(collections.OrderedDict[str, Any]):
    pass


@dataclasses.dataclass
class Arguments:
    lr: float = 1e-3
    folder: pathlib.Path = pathlib.Path("/runs")
    strategy: Strategy = Strategy.STEPS


@dataclasses.dataclass(slots=True)
class Slots:
    steps: int = 1


class Batch(collections.namedtuple("Batch", "inputs size")):
    __slots__ = ()


class Outer:
    class Inner:
        pass

    def method(self) -> None:
        pass


def set_state(target: Any, state: dict[str, Any]) -> None:
    target.__dict__.update(state)


class WithSetter:
    """State by a function, and items of two kinds."""

    def append(self, item: Any) -> None:
        pass

    def __setitem__(self, key: Any, item: Any) -> None:
        pass

    def __reduce__(self) -> Any:
        return WithSetter, (), {"a": 1}, iter([1, 2]), iter({"b": 3}.items()), set_state


class NewArguments:
    def __new__(cls, *_: Any, **__: Any) -> NewArguments:
        return object.__new__(cls)

    def __getnewargs_ex__(self) -> Any:
        return (1,), {"rates": [2]}


class Registry:
    """An object that refers to itself."""

    def __init__(self) -> None:
        self.items: dict[str, Any] = {"me": self}
        self.items["all"] = self.items


def optimizer() -> torch.optim.Optimizer:
    weights = nn.Parameter(torch.ones(3))
    made = torch.optim.AdamW([weights])
    made.state[weights] = {"step": torch.tensor(1.0), "exp_avg": torch.ones(3)}
    return made


def lightning() -> dict[str, Any]:
    return {
        "pytorch-lightning_version": "2.5",
        "hyper_parameters": Attributes(lr=1, namespace=argparse.Namespace(net=Attributes(depth=1))),
        "callbacks": {
            "ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(1.0), "dirpath": Path("x")}
        },
        "optimizer_states": [optimizer().state_dict()],
        "lr_schedulers": [torch.optim.lr_scheduler.LambdaLR(optimizer(), lambda step: 1.0).state_dict()],
    }


# By name: the value, and what is named as ignored.
STATES: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "Lightning": (lightning, ["Attributes", "argparse.Namespace"]),
    "transformers' training arguments": (Arguments, ["Arguments", "Strategy"]),
    "mmengine": (
        lambda: {"message_hub": {"log": argparse.Namespace(history=numpy.arange(3))}, "meta": {"seed": numpy.int64(1)}},
        ["argparse.Namespace", "scalar"],
    ),
    "fairseq": (lambda: {"cfg": {"model": argparse.Namespace(arch="x")}, "optimizer_history": [{}]}, ["Namespace"]),
    "DeepSpeed": (
        lambda: {"param_shapes": [collections.OrderedDict(a=torch.Size([2]))], "sparse_tensor_module_names": set()},
        [],
    ),
    "GradScaler": (lambda: [torch.amp.GradScaler("cpu"), torch.amp.GradScaler("cpu").state_dict()], ["GradScaler"]),
    "optimizers": (lambda: [optimizer(), optimizer().state_dict()], ["AdamW"]),
    "tensors as keys": (lambda: {torch.ones(2): 1, torch.tensor(3): {"exp_avg": 1}}, []),
    "sizes, devices and types": (
        lambda: [torch.Size([1, 2]), torch.device("cpu"), torch.bfloat16, torch.strided],
        [],
    ),
    "generators": (
        lambda: [
            *(torch.get_rng_state(), torch.Generator().manual_seed(1), random.getstate(), random.Random(1)),
            *(numpy.random.get_state(), numpy.random.RandomState(1), numpy.random.default_rng(1)),
        ],
        ["numpy.random._pickle", "random.Random"],
    ),
    "enums": (lambda: {Strategy.STEPS: 1, "flags": [Mode.A, re.IGNORECASE]}, ["Strategy", "Mode", "re.RegexFlag"]),
    "classes of containers": (
        lambda: [Ordered(a=1), Batch(1, 2), collections.Counter("aab"), collections.ChainMap({"a": 1})],
        ["Ordered", "Batch", "collections.ChainMap"],
    ),
    "dataclasses": (lambda: [Arguments(), Slots()], ["Arguments", "Slots"]),
    "functions": (
        lambda: [len, functools.partial(nn.init.normal_, std=0.02), nn.functional.gelu, numpy.mean],
        ["len", "functools.partial", "torch.nn.init.normal_", "numpy.mean"],
    ),
    "methods and nested classes": (lambda: [Outer().method, Outer.Inner, Outer.Inner()], ["Outer"]),
    "states set by functions": (lambda: [WithSetter(), NewArguments()], ["WithSetter", "set_state", "NewArguments"]),
    "objects in themselves": (Registry, ["Registry"]),
    "buffers": (lambda: [io.BytesIO(b"x"), io.StringIO("x"), bytearray(b"x")], ["_io.BytesIO", "_io.StringIO"]),
    "dates": (
        lambda: [datetime.datetime(2024, 1, 1, tzinfo=zoneinfo.ZoneInfo("UTC")), datetime.timedelta(1)],
        ["datetime.datetime", "zoneinfo.ZoneInfo", "datetime.timedelta"],
    ),
    "numbers": (
        lambda: [decimal.Decimal("1.5"), fractions.Fraction(1, 2), uuid.UUID(int=1), 1j, 2**200, itertools.count(3)],
        ["decimal.Decimal", "fractions.Fraction", "uuid.UUID", "itertools.count"],
    ),
    "addresses": (
        lambda: [Path("x"), urllib.parse.urlparse("http://a/b"), ipaddress.ip_address("::1")],
        ["pathlib.PosixPath", "ParseResult", "ipaddress.IPv6Address"],
    ),
    "numpy's types": (
        lambda: {
            numpy.str_("key"): [numpy.bool_(True), numpy.complex64(1j), numpy.datetime64("2020-01-01"), numpy.float32],
            "arrays": [numpy.zeros(2, [("a", "i4")]), numpy.array([1, "a"], object), numpy.ma.array([1], mask=[0])],
        },
        ["scalar", "numpy.dtype", "numpy.float32"],
    ),
    "modules": (
        lambda: [nn.CrossEntropyLoss(), torch.optim.swa_utils.AveragedModel(nn.Linear(1, 1))],
        ["CrossEntropyLoss", "AveragedModel"],
    ),
    "the rest": (
        lambda: [re.compile("x"), logging.getLogger("x"), ValueError("x"), slice(1), ..., type(None), int],
        ["re._compile", "logging.getLogger", "ValueError"],
    ),
    "tensors of other kinds": (
        lambda: {
            "jagged": torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged),
            "storage": torch.ones(2).untyped_storage(),
            "packed": nn.utils.rnn.pack_sequence([torch.ones(2)]),
            "scale": torch.ones(2).to(torch.float8_e8m0fnu),
        },
        ["PackedSequence"],
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["protocol 2", "protocol 5", "legacy"])
@pytest.mark.parametrize("name", STATES)
def test_weights_are_read_and_other_objects_named(name: str, form: str, tmp_path: Path) -> None:
    make, named = STATES[name]
    value = {"state_dict": {"a": torch.randn(2, 3), "b": torch.ones(1)}, "other": make(), "epoch": 3}
    options = {"pickle_protocol": 5 if form == "protocol 5" else 2, "_use_new_zipfile_serialization": form != "legacy"}
    torch.save(value, tmp_path / "x", **options)
    contents = opened(tmp_path / "x", "torch legacy" if form == "legacy" else "torch zip")
    assert isinstance(contents, FileContents)
    assert_same(contents["state_dict"], value["state_dict"])
    assert contents["epoch"] == 3
    for each in named:
        assert any(each in ignored for ignored in contents.ignored), (each, contents.ignored)


def test_verification_reaches_into_lists(tmp_path: Path) -> None:
    """A state dict of a list is compared with itself, not with another one of the list."""
    first = dict(models.sam_meta().state_dict())
    value = {"folds": [first, {name: tensor + 1 for name, tensor in first.items()}]}
    torch.save(value, tmp_path / "folds.pth")
    out = tmp_path / "out.safetensors"
    converter.convert(tmp_path / "folds.pth", "sam", state_dict="folds.1", out=out)
    for path, verdict in (("folds.1", "partly verified"), ("folds.0", "not verified")):
        arguments = ("--source", "folds.pth", "--state-dict", path, "--fast")
        done = run("out.safetensors", *arguments, cwd=tmp_path, program="dsocr-verify")
        assert done.stdout.startswith(verdict) and done.returncode == (verdict == "not verified")
