"""Tensors that torch never writes, and those that it rarely writes."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from hostile.case import Accepted, Case, Refused, State, sam
from hostile.pickles import FORMS, written
from hostile.torchfiles import Id, Raw, Rebuilt, as_file, described, named, opcodes, pickled, record, zipped

NAME = "image_encoder.neck.0.weight"  # 16 x 24 x 1 x 1
BIAS = "image_encoder.neck.1.bias"  # 16
KEY = "own"
DAMAGED = "the file is damaged: download or copy it again"
UNTYPED = torch.storage.UntypedStorage

Records, Storages = dict[str, Any], dict[str, bytes]


def changed(change: Callable[[Records, Storages], None], form: str, folder: Path) -> Path:
    """A SAM with changed records or storages."""
    records, storages = described(sam())
    change(records, storages)
    # torch does not save empty storages.
    ids = [made.arguments[0] for made in records.values()]
    named_ = {id_.pid[2] for id_ in ids if isinstance(id_, Id)}
    return written(folder, as_file({"model": records}, {key: storages[key] for key in storages if key in named_}, form))


def _one(values: torch.Tensor, make: Callable[[], Any], records: Records, storages: Storages) -> None:
    """One bias in a storage of its own with `values`."""
    records[BIAS] = make()
    storages[KEY] = values.contiguous().view(torch.uint8).numpy().tobytes()


def _state_with(name: str, tensor: torch.Tensor) -> State:
    return sam() | {name: tensor}


BASE = torch.randn(64, generator=torch.Generator().manual_seed(7))
GIVEN = 64 * 4


def own(*arguments: Any, **more: Any) -> Callable[[Records, Storages], None]:
    """The bias as a record of the storage BASE."""
    return functools.partial(_one, BASE, lambda: record(KEY, *arguments, **{"numel": 64, **more}))


IMPOSSIBLE = "impossible shape"
NO_NUMBERS = "a tensor of an impossible shape"
LEAVES = "but its storage has 256"
SAYS = "but data.pkl says"

# The record of a storage of 64 float32, and the expected message.
BAD: dict[str, tuple[Callable[[Records, Storages], None], str]] = {
    "a negative offset": (own((16,), (1,), -1), IMPOSSIBLE),
    "a negative size": (own((-16,), (1,)), IMPOSSIBLE),
    "a negative stride": (own((16,), (-1,), 20), IMPOSSIBLE),
    "two sizes and one stride": (own((4, 4), (1,)), IMPOSSIBLE),
    "one size and two strides": (own((16,), (1, 1)), IMPOSSIBLE),
    "an offset beyond the storage": (own((16,), (1,), 64), f"needs 320 bytes, {LEAVES}"),
    "an offset that leaves too little": (own((16,), (1,), 49), f"needs 260 bytes, {LEAVES}"),
    "a stride that leaves the storage": (own((16,), (5,)), f"needs 304 bytes, {LEAVES}"),
    "a size that leaves the storage": (own((65,), (1,)), f"needs 260 bytes, {LEAVES}"),
    "an offset of 2**63 - 1": (own((16,), (1,), 2**63 - 1), LEAVES),
    "an offset of 2**63": (own((16,), (1,), 2**63), NO_NUMBERS),
    "an offset of 2**64, which is 0 in 64 bits": (own((16,), (1,), 2**64), NO_NUMBERS),
    "an offset of 10**2000": (own((16,), (1,), 10**2000), NO_NUMBERS),
    "a stride of 2**62, which is 0 in 64 bits times 4": (own((16,), (2**62,)), LEAVES),
    "a stride of 2**64": (own((16,), (2**64,)), NO_NUMBERS),
    "sizes whose product is 2**64": (own((2**32, 2**32), (2**32, 1)), LEAVES),
    "a size of 10**30": (own((10**30,), (0,)), NO_NUMBERS),
    "a size of 10**2000 and as large a stride": (own((10**2000,), (10**2000,)), NO_NUMBERS),
    "65 dimensions": (own((1,) * 65, (1,) * 65), NO_NUMBERS),
    "1,000 strides": (own((16,), (1,) * 1000), NO_NUMBERS),
    "64 dimensions of 2**63 - 1": (own((2**63 - 1,) * 64, (0,) * 64), "repeated"),
    "a terabyte of one element": (own((2**38,), (0,)), "the shape (274877906944,) of 256 bytes repeated"),
    "a terabyte of overlapping rows": (own((2**38, 16), (0, 1)), "of 256 bytes repeated"),
    "a size that is True": (own((True,), (1,)), NO_NUMBERS),
    "a size that is a float": (own((16.0,), (1,)), NO_NUMBERS),
    "an offset that is a text": (own((16,), (1,), "0"), NO_NUMBERS),
    "more elements than the storage has": (own((16,), (1,), numel=65), SAYS),
    "fewer elements than the storage has": (own((16,), (1,), numel=63), SAYS),
    "2**62 elements": (own((16,), (1,), numel=2**62), SAYS),
    "2**64 elements": (own((16,), (1,), numel=2**64), "a storage of an impossible name or size"),
    "-1 elements": (own((16,), (1,), numel=-1), "a storage of an impossible name or size"),
    "eight bytes an item": (own((16,), (1,), storage=torch.DoubleStorage), SAYS),
    "a view in another type that leaves the storage": (
        own((33,), (1,), dtype=torch.float64),
        f"needs 264 bytes, {LEAVES}",
    ),
    "a type that is no type": (own((16,), (1,), dtype="float32"), "without a storage, an element type or a shape"),
    "a conjugated view": (own((16,), (1,), more=({"conj": True},)), "conjugated or negated view"),
    "a storage that is none": (
        lambda records, _: records.update(
            {BIAS: Rebuilt(torch._utils._rebuild_tensor_v2, 1, 0, (16,), (1,), False, {})}
        ),
        "without a storage, an element type or a shape",
    ),
}


def _terabytes(names: Iterable[str]) -> Callable[[Records, Storages], None]:
    """Tensors expanded from one element, too large only together."""

    def change(records: Records, storages: Storages) -> None:
        storages[KEY] = bytes(4)
        for name in names:
            records[name] = record(KEY, (2**24,), (0,), numel=1)

    return change


# ---- tensors that are not plain


def _quantized() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.zeros(16), 0.1, 0, torch.qint8)


def _sparse_csr() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.eye(4).to_sparse_csr()


def _nested() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


class Own(torch.Tensor):
    """A subclass of Tensor, as in fastai."""


UNUSUAL: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "meta": (lambda: torch.zeros(16, device="meta"), "not plain tensors (meta)"),
    "sparse, COO": (lambda: torch.eye(4).to_sparse(), "not plain tensors (sparse)"),
    "sparse, CSR": (_sparse_csr, "not plain tensors (sparse)"),
    "quantized": (_quantized, "not plain tensors (quantized)"),
    "complex": (lambda: torch.zeros(16, dtype=torch.complex64), "is complex64; expected a floating-point type"),
    "conjugated": (lambda: torch.zeros(16, dtype=torch.complex64).conj(), "conjugated or negated view"),
    "negated": (lambda: torch.zeros(16)._neg_view(), "conjugated or negated view"),
    "nested": (_nested, "not plain tensors (nested)"),
    "of a subclass": (lambda: torch.ones(16).as_subclass(Own), "not plain tensors (tensor of hostile.records.Own)"),
}


def _saved(make: Callable[[], State], form: str, folder: Path) -> Path:
    path = folder / "weights.pth"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(make(), path, _use_new_zipfile_serialization=form == "zip")
    return path


# ---- unusual tensors of torch.save


def _views() -> State:
    """All tensors are views of one storage, each after the other."""
    state = sam()
    flat = torch.cat([tensor.flatten() for tensor in state.values()])
    parts = flat.split([tensor.numel() for tensor in state.values()])
    return {name: part.view(state[name].shape) for name, part in zip(state, parts, strict=True)}


def _overlapping() -> State:
    """Two tensors that share half of their elements."""
    return sam() | {BIAS: BASE[:16], "image_encoder.neck.3.bias": BASE[8:24]}


def _tied() -> State:
    return sam() | {BIAS: BASE[:16], "image_encoder.neck.3.bias": BASE[:16]}


def _transposed() -> State:
    """All tensors of two dimensions or more in column-major order."""
    return {name: t.transpose(0, -1).contiguous().transpose(0, -1) for name, t in sam().items()}


def _every_other() -> State:
    return sam() | {BIAS: BASE[::2][3:19]}


def _expanded() -> State:
    return sam() | {BIAS: BASE[:1].expand(16), NAME: BASE[:24].reshape(1, 24, 1, 1).expand(16, 24, 1, 1)}


def _parameters() -> State:
    state: State = {}
    for name, tensor in sam().items():
        state[name] = torch.nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
        state[name].note = "an attribute"  # type: ignore[attr-defined]
    return state


def _with(*more: torch.Tensor) -> Callable[[], Any]:
    """A SAM and other tensors."""
    return lambda: {"model": sam(), "other": dict(enumerate(more)), "named": {str(n): t for n, t in enumerate(more)}}


PLAIN: dict[str, tuple[Callable[[], Any], Callable[[], State], bool]] = {
    "views of one storage": (_views, sam, False),
    "two that overlap": (_overlapping, _overlapping, False),
    "two that are tied": (_tied, _tied, False),
    "parameters with attributes": (_parameters, sam, False),
    "transposed in memory": (_transposed, sam, True),
    "every other element": (_every_other, _every_other, True),
    "expanded from a few elements": (_expanded, _expanded, True),
    "of no dimension and of no element, with others": (
        _with(torch.tensor(3.5), torch.empty(0), torch.empty(2, 0, 3)),
        sam,
        False,
    ),
    "of a dimension of one under any stride": (
        lambda: sam() | {BIAS: BASE.as_strided((16, 1), (1, 999))[:, 0]},
        lambda: sam() | {BIAS: BASE[:16]},
        False,
    ),
    "of bools and float8, with others": (
        _with(torch.ones(3, dtype=torch.bool), torch.ones(3).to(torch.float8_e4m3fn)),
        sam,
        False,
    ),
}


def _half(state: State) -> State:
    return {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def _untyped(records: Records, storages: Storages) -> None:
    """One bias in an untyped storage, with an element type of its own."""
    _one(
        BASE, lambda: record(KEY, (16,), (1,), 3, storage=UNTYPED, numel=GIVEN, dtype=torch.float32), records, storages
    )


def _other_type(records: Records, storages: Storages) -> None:
    """One bias in a storage of integers."""
    _one(
        BASE,
        lambda: record(KEY, (16,), (1,), storage=torch.IntStorage, numel=64, dtype=torch.float32),
        records,
        storages,
    )


def _mentioned_twice(records: Records, storages: Storages) -> None:
    """A storage referred to as float32 first and as integers later; torch uses float32."""
    _one(BASE, lambda: record(KEY, (16,), (1,), numel=64), records, storages)
    records["image_encoder.neck.3.bias"] = record(KEY, (16,), (1,), 8, storage=torch.LongStorage, numel=32)


def _old_rebuild(records: Records, storages: Storages) -> None:
    """As in torch before 0.4."""
    arguments = record(KEY, (16,), (1,), numel=64).arguments[:4]
    _one(BASE, lambda: Rebuilt(torch._utils._rebuild_tensor, *arguments), records, storages)


def _size_objects(records: Records, storages: Storages) -> None:
    made = record(KEY, (16,), (1,), numel=64)
    size = Raw(named("torch.Size").opcodes + opcodes(((16,),)) + b"R")
    made.arguments = (*made.arguments[:2], size, *made.arguments[3:])
    _one(BASE, lambda: made, records, storages)


ODD: dict[str, tuple[Callable[[Records, Storages], None], Callable[[], State]]] = {
    "in an untyped storage": (_untyped, lambda: _state_with(BIAS, BASE[3:19])),
    "in a storage of another type": (_other_type, lambda: _state_with(BIAS, BASE[:16])),
    "in a storage that is mentioned twice": (
        _mentioned_twice,
        lambda: _state_with(BIAS, BASE[:16]) | {"image_encoder.neck.3.bias": BASE[8:24]},
    ),
    "rebuilt as by torch 0.3": (_old_rebuild, lambda: _state_with(BIAS, BASE[:16])),
    "with torch.Size for a shape": (_size_objects, lambda: _state_with(BIAS, BASE[:16])),
}


def _big_endian(change: Callable[[Records, Storages], None] | None, folder: Path) -> Path:
    records, storages = described(sam())
    if change is not None:
        change(records, storages)
    swapped = {key: b"".join(data[i : i + 4][::-1] for i in range(0, len(data), 4)) for key, data in storages.items()}
    return written(folder, zipped(pickled({"model": records}), swapped, {"byteorder": b"big"}))


def cases() -> Iterable[Case]:
    for name, (change, words) in BAD.items():
        forms = FORMS if "elements" in name or "storage" in name else ("zip",)
        for form in forms:
            if form == "legacy":
                words = words.replace("data.pkl", "the pickle")
            yield Case(
                f"record: {name}, {form}", functools.partial(changed, change, form), Refused((words, "weights.pth: "))
            )
    terabyte, _ = BAD["a terabyte of one element"]
    for command in (("inspect",), ("sam", "--dry-run")):
        build = functools.partial(changed, terabyte, "zip")
        yield Case(f"record: a terabyte, {' '.join(command)}", build, Refused((repr(BIAS), "repeated")), command)
    build = functools.partial(changed, _terabytes(sam()), "legacy")
    yield Case(
        "record: gigabytes of one element in all", build, Refused(("the shape (16777216,) of 4 bytes repeated",))
    )
    for name, (make, words) in UNUSUAL.items():
        for form in FORMS:
            build = functools.partial(_saved, lambda make=make: sam() | {BIAS: make()}, form)
            yield Case(
                f"record: {name}, {form}",
                build,
                Refused((words,)),
            )
    for name, (value, like, computed) in PLAIN.items():
        for form in FORMS:
            build = functools.partial(_saved, value, form)
            yield Case(f"record: {name}, {form}", build, Accepted(like, computed=computed))
    for name, (change, like) in ODD.items():
        for form in FORMS if "mentioned" in name or "torch" in name else ("zip",):
            yield Case(f"record: {name}, {form}", functools.partial(changed, change, form), Accepted(like))
    yield Case("record: big-endian", functools.partial(_big_endian, None), Accepted(sam, computed=True))
    yield Case(
        "record: big-endian, of another type than its storage",
        functools.partial(_big_endian, _untyped),
        Refused((repr(BIAS), "big-endian, with another element type than its storage")),
    )


CASES: list[Case] = list(cases())
