"""Pickles that are malicious, too large, or only unusual."""

from __future__ import annotations

import argparse
import collections
import functools
import pathlib
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy
import torch

from hostile.case import Accepted, Build, Case, Refused, State, marker, sam
from hostile.gadgets import LEADS_TO, canaries
from hostile.torchfiles import Raw, Rebuilt, as_file, call, described, legacy, named, pickled, zipped

FORMS = ("zip", "legacy")
NOTHING_RUN = "nothing of it was executed"
OURS = "a pickle, but not one that torch.save wrote"


def written(folder: Path, data: bytes) -> Path:
    path = folder / "weights.pth"
    path.write_bytes(data)
    return path


def beside(extra: Any, folder: Path, form: str = "zip", protocol: int = 2) -> Path:
    """A SAM and another value."""
    records, storages = described(sam())
    return written(folder, as_file({"model": records, "extra": extra}, storages, form, protocol))


def canary(folder: Path) -> Raw:
    return canaries(marker(folder))["os.system"]


def ignores(*names: str) -> Accepted:
    """The tensors are converted, and the objects that are ignored are named."""
    return Accepted(sam, ("not imported or run: ", *names))


def asks_for(name: str) -> Refused:
    return Refused((f"the pickle refers to {name}, ", "weights.pth: ", NOTHING_RUN))


# ---- gadgets

# One of each family; test_gadgets.py has all of them.
FAMILIES = (
    *("posix.system", "os.popen", "os.mkdir", "pty.spawn", "subprocess.Popen", "subprocess.check_output"),
    *("asyncio.unix_events._UnixSubprocessTransport._start", "multiprocessing.util.spawnv_passfds"),
    *("builtins.eval", "__builtin__.eval", "builtins.exec", "builtins.getattr", "builtins.__import__", "builtins.open"),
    *("builtins.map", "types.FunctionType", "itertools.starmap", "importlib.import_module", "runpy._run_code"),
    *("pkgutil.resolve_name", "functools.partial", "functools.reduce", "operator.methodcaller", "operator.attrgetter"),
    *("bdb.Bdb", "profile.run", "cProfile.runctx", "timeit.timeit", "trace.Trace", "pydoc.pipepager", "pydoc.locate"),
    *("code.InteractiveInterpreter", "idlelib.autocomplete.AutoComplete.get_entity", "ctypes.CDLL", "_io.open"),
    *("shutil.copyfile", "pathlib.PosixPath", "logging.config.dictConfig", "sqlite3.connect", "pickle.loads"),
    *("_pickle.loads", "yaml.unsafe_load", "numpy.testing._private.utils.runstring", "numpy.memmap"),
    *("numpy.f2py.crackfortran.getlincoef", "torch.storage._load_from_bytes", "torch.from_file"),
    *("torch.utils._config_module.ConfigModule.load_config", "torch.jit.unsupported_tensor_ops.execWrapper"),
    *("torch.utils.collect_env.run", "torch._utils._import_dotted_name", "torch._tensor._rebuild_from_type_v2"),
    *("torch.fx.experimental.symbolic_shapes.ShapeEnv.evaluate_guards_expression", "torch.save"),
)


def _family(name: str, folder: Path) -> Path:
    return beside(canaries(marker(folder))[name], folder)


def families() -> Iterable[Case]:
    for name in FAMILIES:
        yield Case(f"pickle: {name}", functools.partial(_family, name), asks_for(LEADS_TO.get(name, name)))


# ---- ways to call a gadget


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def ways(path: Path) -> dict[str, tuple[Raw, str]]:
    """Opcodes that create the file `path`, and the global in the error message."""
    shell = f"touch {path}"
    argument, system = text(shell), b"cos\nsystem\n"
    names = text("os") + text("system")
    found = {
        "GLOBAL": (system + argument + b"\x85R", "os.system"),
        "GLOBAL in protocol 0": (system + b"(V" + shell.encode() + b"\ntR", "os.system"),
        "STACK_GLOBAL": (names + b"\x93" + argument + b"\x85R", "os.system"),
        "STACK_GLOBAL of names in the memo": (
            text("system") + b"r\0\0\1\0000" + text("os") + b"j\0\0\1\0\x93" + argument + b"\x85R",
            "os.system",
        ),
        "STACK_GLOBAL of a dotted name": (
            b"\x80\x04" + text("shutil") + text("os.system") + b"\x93" + argument + b"\x85R",
            "shutil.os.system",
        ),
        "INST": (b"(" + argument + b"ios\nsystem\n", "os.system"),
        "OBJ": (b"(" + system + argument + b"o", "os.system"),
        # bytes() iterates over the map, which calls the function.
        "NEWOBJ": (
            b"cbuiltins\nbytes\ncbuiltins\nmap\n" + system + b"]" + argument + b"a\x86\x81\x85\x81",
            "builtins.map",
        ),
        "NEWOBJ_EX": (
            b"cbuiltins\nbytes\ncbuiltins\nmap\n" + system + b"]" + argument + b"a\x86}\x92\x85}\x92",
            "builtins.map",
        ),
        "BUILD": (
            b"cargparse\nNamespace\n)\x81}" + text("__setstate__") + system + b"sb" + argument + b"b",
            "os.system",
        ),
        "BUILD of a class that is allowed": (
            b"ccollections\nOrderedDict\n)R}" + text("__setstate__") + system + b"sb" + argument + b"b",
            "os.system",
        ),
        "the memo": (system + b"r\0\0\1\0000j\0\0\1\0" + argument + b"\x85R", "os.system"),
        "DUP": (system + b"20" + argument + b"\x85R", "os.system"),
        "a result that is dropped": (system + argument + b"\x85R0N", "os.system"),
        "a name that an allowed module has imported": (
            b"ccollections\n_sys\n0" + system + argument + b"\x85R",
            "collections._sys",
        ),
    }
    return {name: (Raw(opcodes), asked) for name, (opcodes, asked) in found.items()}


def _way(name: str, folder: Path) -> Path:
    return beside(ways(marker(folder))[name][0], folder)


# Opcodes that refer to something outside of the pickle, or that no checkpoint needs.
OPCODES: dict[str, tuple[bytes, str]] = {
    "EXT1": (b"\x82\x01)R", "opcode 0x82"),
    "EXT2": (b"\x83\x01\x01)R", "opcode 0x83"),
    "EXT4": (b"\x84\x01\x01\x01\x01)R", "opcode 0x84"),
    "PERSID": (b"Pos.system\n", "opcode 0x50"),
    "NEXT_BUFFER": (b"\x97", "opcode 0x97"),
    "STRING as Python 2 wrote it": (b"S'text'\n", "opcode 0x53"),
    "an opcode that there is not": (b"\xff", "opcode 0xff"),
    "protocol 6": (b"\x80\x06N", "pickle protocol 6: supported are 0 to 5"),
    "a call of a text": (text("os.system") + b")R", "a call of a str"),
    "a call of a storage's type": (b"ctorch\nFloatStorage\n)R", "a call of a DType"),
    "state for a function": (b"ccollections\nOrderedDict\n}b", "state for a function, which takes none"),
    "items for a tuple": (b")Na", "items for a tuple, which takes none"),
    "a name that is no text": (b"NN\x93", "a global without a name"),
    "a name that would steer the terminal": (
        b"cpickle.\x1b[2J\x1b]0;x\x07\nsystem\n",
        "refers to pickle.\\x1b[2J\\x1b]0;x\\x07.system,",
    ),
    "_codecs.encode other than for bytes": (call("_codecs.encode", "x", "rot13").opcodes, "a call of _codecs.encode"),
    "a persistent id that is a call": (b"cos\nsystem\n" + text("true") + b"\x85RQ", "refers to os.system"),
    "arguments that are no tuple": (b"cargparse\nNamespace\n]R", "a call with a list as arguments"),
    "a persistent id of a module": (
        b"(" + text("module") + text("x") + text("x.py") + text("import os") + text("") + b"tQ",
        "a reference to something other than a tensor's storage",
    ),
    "an unfinished dict": (b"(Nd", "a key without a value"),
    "a stack that is empty": (b"0" * 9, "a damaged pickle"),
    "a memo that is empty": (b"j\xff\xff\xff\xff", "a damaged pickle"),
    "an integer that is none": (b"Ix\n", "a damaged pickle"),
}


# ---- places of a gadget


def _in_model(change: Callable[[dict[str, Any], Raw], None], form: str, folder: Path) -> Path:
    records, storages = described(sam())
    change(records, canary(folder))
    return written(folder, as_file({"model": records}, storages, form))


def _argument(at: int, records: dict[str, Any], raw: Any) -> None:
    """An argument of the call that rebuilds the first tensor."""
    first = next(iter(records.values()))
    first.arguments = (*first.arguments[:at], raw, *first.arguments[at + 1 :])


def _storage(at: int, records: dict[str, Any], raw: Any) -> None:
    """An item of the first storage's persistent id."""
    pid = next(iter(records.values())).arguments[0]
    pid.pid = (*pid.pid[:at], raw, *pid.pid[at + 1 :])


def _parameter(records: dict[str, Any], raw: Raw) -> None:
    name, tensor = next(iter(records.items()))
    records[name] = Rebuilt(torch._utils._rebuild_parameter_with_state, tensor, False, {}, {"note": raw})


IN_MODEL: dict[str, Callable[[dict[str, Any], Raw], None]] = {
    "in place of a tensor": lambda records, raw: records.update({next(iter(records)): raw}),
    "as a tensor's name": lambda records, raw: records.update({raw: 1}),  # type: ignore[dict-item]
    "as a tensor's offset": functools.partial(_argument, 1),
    "as a tensor's backward hooks": functools.partial(_argument, 5),
    "as a tensor's metadata": functools.partial(_argument, 6),
    "in a parameter's own attributes": _parameter,
    "as a storage's type": functools.partial(_storage, 1),
    "as a storage's device": functools.partial(_storage, 3),
}


def _pickle_of_five(number: int, folder: Path) -> Path:
    """A legacy file whose nth pickle builds a value and drops it before the expected one."""
    records, storages = described(sam())
    values: list[Any] = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, records, list(storages)]
    plain = pickled(values[number - 1])
    data = plain[:2] + canary(folder).opcodes + b"0" + plain[2:]
    return written(folder, legacy(pickled(records), storages, {number: data}))


def _after_the_end(form: str, folder: Path) -> Path:
    """After the STOP of a zip's data.pkl, or after the storages of a legacy file."""
    records, storages = described(sam())
    more = pickled(canary(folder))
    if form == "zip":
        return written(folder, zipped(pickled(records) + more, storages))
    return written(folder, legacy(pickled(records), storages) + more)


def _member(name: str, folder: Path) -> Path:
    records, storages = described(sam())
    return written(folder, zipped(pickled(records), storages, {name: pickled(canary(folder))}))


_HOSTILE_BYTES = pickled(call("os.system", "true"))


def _padded(tensor: torch.Tensor) -> bytes:
    """Tensor data that starts with a pickle."""
    return (_HOSTILE_BYTES + bytes(tensor.nbytes))[: tensor.nbytes]


def _weights_that_are_a_pickle() -> State:
    state = sam()
    name, tensor = next(iter(state.items()))
    state[name] = torch.frombuffer(bytearray(_padded(tensor)), dtype=tensor.dtype).reshape(tensor.shape)
    return state


def _bare(folder: Path) -> Path:
    return written(folder, pickled({"model": sam(), "extra": canary(folder)}))


def _plain(value: Callable[[], State], folder: Path) -> Path:
    records, storages = described(value())
    return written(folder, zipped(pickled(records), storages))


def places() -> Iterable[Case]:
    for form in FORMS:
        for name, change in IN_MODEL.items():
            if form == "zip" or "hooks" in name:
                build = functools.partial(_in_model, change, form)
                yield Case(f"pickle: os.system {name}, {form}", build, asks_for("os.system"))
        build = functools.partial(_after_the_end, form)
        yield Case(f"pickle: os.system after the end, which nobody reads, {form}", build, Accepted(sam))
    for number in (1, 2, 3, 4, 5):
        expected = asks_for("os.system") if number > 1 else Refused((OURS,))
        build = functools.partial(_pickle_of_five, number)
        yield Case(f"pickle: os.system in pickle {number} of a legacy file", build, expected)
    for member in ("extra.pkl", ".data/extra.pkl", "data/extra", "code/extra.py", "version"):
        build = functools.partial(_member, member)
        yield Case(f"pickle: os.system in {member}, which nobody reads", build, Accepted(sam))
    yield Case("pickle: os.system in byteorder", functools.partial(_member, "byteorder"), Refused(("byteorder",)))
    yield Case(
        "pickle: os.system in constants.pkl",
        functools.partial(_member, "constants.pkl"),
        Refused(("a TorchScript archive of a dict, not of a module",)),
    )
    build = functools.partial(_plain, _weights_that_are_a_pickle)
    yield Case("pickle: weights whose bytes are a pickle", build, Accepted(_weights_that_are_a_pickle))
    yield Case("pickle: os.system in a pickle that is no container", _bare, Refused((OURS,)))


# ---- classes that occur in training checkpoints


def instance(name: str) -> Raw:
    """An object of a class that is not installed, in protocol 2."""
    return Raw(named(name).opcodes + b")\x81}" + text("content") + b"}sb")


def _trained() -> dict[str, Any]:
    """Plain values of a training loop."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(3)
    optimizer.step()
    return {
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "seen": {("a", "b"), 7},
        "counts": collections.Counter("a"),
    }


FOREIGN: dict[str, tuple[Any, str]] = {
    "options": (argparse.Namespace(lr=1), "argparse.Namespace"),
    "OmegaConf": (instance("omegaconf.dictconfig.DictConfig"), "omegaconf.dictconfig.DictConfig"),
    "yacs": (instance("yacs.config.CfgNode"), "yacs.config.CfgNode"),
    "mmengine": (
        instance("mmengine.logging.history_buffer.HistoryBuffer"),
        "mmengine.logging.history_buffer.HistoryBuffer",
    ),
    "a Lightning callback as a key": (
        {named("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"): {}},
        "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    ),
    "transformers' arguments": (
        instance("transformers.training_args.TrainingArguments"),
        "transformers.training_args.TrainingArguments",
    ),
    "a numpy number": (numpy.float64(0.5), "numpy._core.multiarray.scalar"),
    "a numpy array": (numpy.zeros(2), "numpy._core.multiarray._reconstruct"),
    # Of pathlib._local in Python 3.13.
    "a path": (pathlib.PurePosixPath("x"), f"{pathlib.PurePosixPath.__module__}.PurePosixPath"),
    "a defaultdict": (collections.defaultdict(int), "collections.defaultdict"),
    "a class of Python 2": (Raw(b"(i__main__\nNet\n"), "__main__.Net"),
    "an optimizer": (instance("torch.optim.sgd.SGD"), "torch.optim.sgd.SGD"),
    "a whole module": (torch.nn.ReLU(), "torch.nn.modules.activation.ReLU"),
    "a function": (torch.nn.functional.relu, "torch.nn.functional.relu"),
    "a name that would steer the terminal": (
        Raw(b"c\x1b[2J\x1b]0;x\x07\nsystem\n"),
        "\\x1b[2J\\x1b]0;x\\x07.system",
    ),
    "a name in other letters": (Raw(b"ccollecti\xd0\xbens\nOrderedDict\n"), "collecti\u043ens.OrderedDict"),
    "a name with a space": (Raw(b"ccollections \nOrderedDict\n"), "collections .OrderedDict"),
    "placeholders 20,000 deep": (Raw(b"cx\nY\nr\0\0\1\0000" + b"j\0\0\1\0)R" * 20_000 + b"\x85b" * 19_999), "x.Y"),
}


def _whole_module(form: str, folder: Path) -> Path:
    torch.save(torch.nn.Linear(2, 2), folder / "weights.pth", _use_new_zipfile_serialization=form == "zip")
    return folder / "weights.pth"


def _torch_saved(form: str, folder: Path) -> Path:
    value = {"model": sam(), **_trained()}
    torch.save(value, folder / "weights.pth", _use_new_zipfile_serialization=form == "zip")
    return folder / "weights.pth"


# ---- beyond a limit


def _nested(depth: int) -> Any:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"inner": value}
    return value


def _laughs(make: Callable[[Any], Any], value: Any, depth: int) -> Any:
    """A value nested `depth` times, doubled at each level."""
    for _ in range(depth):
        value = make(value)
    return value


def _no_data() -> Rebuilt:
    """A tensor without a storage."""
    return Rebuilt(torch._utils._rebuild_meta_tensor_no_storage, torch.float32, (1,), (1,), False)


def _colliding_tuples(count: int) -> bytes:
    """Pairs of numbers with equal hashes."""
    # CPython's tuple hash is xxHash of the items' hashes, here the numbers.
    prime1, prime2, prime5, mask = 11400714785074694791, 14029467366897019727, 2870177450012600261, 2**64 - 1
    inverse, pairs, first = pow(prime2, -1, 2**64), [], 0
    while len(pairs) < count:
        first += 1
        mixed = (prime5 + first * prime2) & mask
        mixed = (((mixed << 31) | (mixed >> 33)) & mask) * prime1 & mask
        second = (12345 - mixed) * inverse & mask
        if second < 2**61 - 1:
            pairs.append((first, second))
    assert len({hash(pair) for pair in pairs}) == 1
    return b"".join(
        b"\x8a\x08" + struct.pack("<Q", a) + b"\x8a\x08" + struct.pack("<Q", b) + b"\x86N" for a, b in pairs
    )


def _colliding_numbers(count: int) -> bytes:
    keys = (n * (2**61 - 1) for n in range(1, count))
    return b"".join(b"\x8a\x0d" + key.to_bytes(13, "little") + b"N" for key in keys)


MANY = 1 << 20
TOO_MUCH = "values of more than 67108864 bytes"
_LIST = b"(" + b"K\x01" * 30_000 + b"lr\0\0\1\0000"

# Opcodes of one value, and the expected message.
BOMBS: dict[str, tuple[Callable[[], Any], str]] = {
    "2,000 marks": (lambda: Raw(b"(" * 2000), "nested more than 1000 deep"),
    "a million lists": (lambda: Raw(b"]" * MANY), TOO_MUCH),
    "a million dicts": (lambda: Raw(b"}" * MANY), TOO_MUCH),
    "a million sets": (lambda: Raw(b"\x8f" * MANY), TOO_MUCH),
    "a million places in the memo": (lambda: Raw(b"N" + b"\x94" * MANY), TOO_MUCH),
    "two million numbers": (lambda: Raw(b"(" + b"M\xff\xff" * (2 * MANY) + b"l"), TOO_MUCH),
    "16 million numbers of one byte": (lambda: Raw(b"(" + b"N" * (16 * MANY - 9000) + b"l"), TOO_MUCH),
    "a million placeholders": (lambda: Raw(b"cx\ny\nr\0\0\1\0" + b"j\0\0\1\0)R" * MANY), TOO_MUCH),
    "more than 16 MiB": (
        lambda: Raw(b"B" + struct.pack("<I", 17 << 20) + bytes(17 << 20)),
        "the limit is 16777216",
    ),
    "10**9 dicts with a tensor": (lambda: _laughs(lambda value: [value] * 10, {"a": _no_data()}, 9), "200000 entries"),
    "copies of one list": (
        lambda: Raw(_LIST + b"(" + b"cbuiltins\nset\nj\0\0\1\0\x85R" * 100 + b"t"),
        "calls with more than 1000000 arguments in total",
    ),
    "copies of one text": (
        lambda: Raw(b"(X\0\0\x10\0" + b"a" * MANY + b"r\0\0\1\0" + b"c_codecs\nencode\nj\0\0\1\0\x85R" * 100 + b"t"),
        "calls with more than 1000000 arguments in total",
    ),
    "LONG4 of 2 GiB": (lambda: Raw(b"\x8b\xff\xff\xff\x7f"), "an integer of 2147483647 bytes"),
    "LONG4 of -1 bytes": (lambda: Raw(b"\x8b\xff\xff\xff\xff"), "an integer of -1 bytes"),
    "LONG of 100,000 digits": (lambda: Raw(b"L" + b"9" * 100_000 + b"L\n"), "an integer of 10000"),
    "GET of 100,000 digits": (lambda: Raw(b"g" + b"9" * 100_000 + b"\n"), "an integer of 100000 digits"),
    "BINUNICODE of 4 GiB": (lambda: Raw(b"X\xff\xff\xff\xff"), "truncated: ends inside the pickle"),
    "BINUNICODE8 of 2**63 bytes": (lambda: Raw(b"\x8d" + bytes(7) + b"\x80"), "truncated: ends inside the pickle"),
    "BYTEARRAY8 of 2**63 bytes": (lambda: Raw(b"\x96" + bytes(7) + b"\x80"), "truncated: ends inside the pickle"),
    "BINBYTES8 of 2**64 bytes": (lambda: Raw(b"\x8e" + b"\xff" * 8), "truncated: ends inside the pickle"),
    "a text without an end": (lambda: Raw(b"V" + b"x" * 1000), "truncated: ends inside the pickle"),
    "a name of a megabyte": (lambda: {"n" * MANY: {"a": {}}}, f"a name of {MANY} characters"),
}


def _bomb(make: Callable[[], Any], form: str, folder: Path) -> Path:
    # Without a model: its opcodes would count.
    return written(folder, as_file({"extra": make()}, {}, form))


def _long_name(folder: Path) -> Path:
    records, storages = described(sam())
    records["x" * MANY] = next(iter(records.values()))
    return written(folder, zipped(pickled(records), storages))


def _many_prefixes(folder: Path) -> Path:
    """Names with a longer common prefix than any model has."""
    records, storages = described(sam())
    prefix = "a." * 60
    return written(folder, zipped(pickled({prefix + name: record for name, record in records.items()}), storages))


def _cut(form: str, share: float, folder: Path) -> Path:
    records, storages = described(sam())
    data = pickled({"model": records})
    data = data[: int(len(data) * share)]
    return written(folder, zipped(data, storages) if form == "zip" else legacy(data, {}, {5: b""}))


def _top(value: Any, form: str, folder: Path) -> Path:
    return written(folder, as_file(value, {}, form))


# ---- unusual but valid

ODDITIES: dict[str, Callable[[], Any]] = {
    "tuples 200,000 deep": lambda: Raw(b")" + b"\x85" * 200_000),
    "lists 100,000 deep": lambda: Raw(b"]" * 100_000 + b"a" * 99_999),
    "2**60 tuples": lambda: _laughs(lambda value: (value, value), (), 60),
    "10**40 lists": lambda: _laughs(lambda value: [value] * 10, [], 40),
    "place 2**32 - 1 of the memo": lambda: Raw(b"Nr\xff\xff\xff\xff0j\xff\xff\xff\xff"),
    "FRAME of 2**64 bytes": lambda: Raw(b"\x95" + b"\xff" * 8 + b"N"),
    "another protocol midway": lambda: Raw(b"\x80\x05\x80\x00N"),
    "protocol 0's numbers, texts and containers": lambda: Raw(
        b"(lp70000\nI1\naI01\naL5L\naF1.5\naVtext\\u00e9\na(Va\nI1\ndag70000\na(I1\nI2\nta"
    ),
    "a float of 300,000 digits": lambda: Raw(b"F" + b"1" * 300_000 + b"\n"),
    "an integer of 8,000 bits": lambda: 2**8000,
    "keys of all kinds": lambda: {None: 1, b"x": 2, True: 3, -1: 4, 2**63: 5, 0.5: 6, ("a", "b"): {"c": 7}},
    "half a surrogate pair": lambda: "\ud800",
    "dicts 200 deep": lambda: _nested(200),
    "a dict in itself": lambda: Raw(b"}r\0\0\1\0" + text("a") + b"j\0\0\1\0s"),
    "2**50 dicts": lambda: _laughs(lambda value: {"a": value, "b": value}, {}, 50),
    "tuples as keys, 200,000 deep": lambda: Raw(b"})" + b"\x85" * 200_000 + b"Ns"),
    "2**40 items in a key": lambda: {_laughs(lambda v: (v, v), (), 3): 1},
    "keys that share a hash: numbers": lambda: Raw(b"}(" + _colliding_numbers(30_000) + b"u"),
    "keys that share a hash: tuples": lambda: Raw(b"}(" + _colliding_tuples(30_000) + b"u"),
    "NEWOBJ_EX of a class that is allowed": lambda: Raw(b"ccollections\nOrderedDict\n)}\x92"),
    "1.2 million losses": lambda: Raw(b"(" + (b"G" + struct.pack(">d", 0.5)) * 1_200_000 + b"l"),
    "300,000 losses by step": lambda: dict.fromkeys(range(300_000), 1),
    "state for a dict": lambda: Raw(b"}}" + text("_metadata") + b"}sb"),
}


def cases() -> Iterable[Case]:
    yield Case(
        "pickle: os.system beside a model, legacy", lambda f: beside(canary(f), f, "legacy"), asks_for("os.system")
    )
    for name, (_, asked) in ways(Path("/x")).items():
        yield Case(f"pickle: os.system by {name}", functools.partial(_way, name), asks_for(asked))
    for name, (opcodes, words) in OPCODES.items():
        build: Build = functools.partial(beside, Raw(opcodes))
        yield Case(f"pickle: {name}", build, Refused((words, "weights.pth: data.pkl: byte ")))
    for name, (value, asked) in FOREIGN.items():
        yield Case(f"pickle: {name} beside a model", functools.partial(beside, value), ignores(asked))
    for form in FORMS:
        expected = Refused(("no SAM layout fits its 2 tensors",))
        yield Case(f"pickle: a whole module, {form}", functools.partial(_whole_module, form), expected)
        yield Case(f"pickle: a training's state, {form}", functools.partial(_torch_saved, form), Accepted(sam))
        for share in (0.0, 0.1, 0.5, 0.999):
            build = functools.partial(_cut, form, share)
            yield Case(f"pickle: cut at {share:.1%}, {form}", build, Refused(("truncated",)))
        for value in ([1], None, "text", torch.Size([1])):
            kind = type(value).__name__ if not isinstance(value, torch.Size) else "tuple"
            expected = Refused((f"holds a {kind} without named tensors, not a dict", "weights_only=False"))
            yield Case(
                f"pickle: {type(value).__name__}, not a dict, {form}", functools.partial(_top, value, form), expected
            )
        expected = Refused(("contains no named tensors",))
        yield Case(f"pickle: an empty dict, {form}", functools.partial(_top, {}, form), expected)
    for name, (make, words) in BOMBS.items():
        yield Case(f"pickle: {name}", functools.partial(_bomb, make, "zip"), Refused((words,)))
    yield Case("pickle: a tensor's name of a megabyte", _long_name, Refused((f"a name of {MANY} characters",)))
    yield Case("pickle: names under 60 prefixes", _many_prefixes, Accepted(sam))
    for name, make in ODDITIES.items():
        yield Case(f"pickle: {name}", lambda folder, make=make: beside(make(), folder), Accepted(sam))
    for protocol in (1, 3, 4, 5):
        for form in FORMS:
            build = functools.partial(beside, {"seen": b"bytes"}, form=form, protocol=protocol)
            yield Case(f"pickle: protocol {protocol}, {form}", build, Accepted(sam))


CASES: list[Case] = [*families(), *cases(), *places()]
