"""Decodes the arguments of pickle opcodes, protocols 0 to 5, by the grammar of the standard library's `pickletools`."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from converter.errors import ContainerError

_MAX_INT_BYTES = 1024
_MAX_INT_DIGITS = 2466  # the same number in decimal
_T = TypeVar("_T")
_MAX_SHOWN_NAME = 200  # characters of the name of a global

# A regular expression for the modules whose functions make numpy arrays, in all versions of numpy and pickle.
ARRAYS = rb"numpy(\._?core)?\.(multiarray|numeric)"

# The next steps: for weights that cannot be read, for numpy arrays in files of torch.save and of pickle.dump, for a
# pickle that is refused, and for a hostile pickle.
RESAVE = (
    "where you trust the file, save its weights alone, which runs code of the file: "
    'torch.save(torch.load(PATH, map_location="cpu", weights_only=False)["state_dict"], "weights.pth"), '
    "with .state_dict() in place of [...] where PATH holds a whole module"
)
_RESAVE_ARRAYS = (
    "it holds numpy arrays; where you trust the file, save tensors, which runs code of the file: d = {}; "
    "d = d.get('model') or d.get('state_dict') or d; torch.save({{k: torch.as_tensor(v) for k, v in d.items() "
    "if hasattr(v, 'shape')}}, 'weights.pth')"
)
UNPICKLE_ARRAYS = _RESAVE_ARRAYS.format("pickle.load(open(FILE, 'rb'), encoding='latin1')")
NEXT_STEP = f"nothing of it was executed\n{RESAVE}"
_HOSTILE = (
    "nothing of it was executed\n"
    "do not trust this file: pickle.load, and torch.load with weights_only=False, would run its code"
)


def resave_step(head: bytes) -> str:
    """Return the next step for a pickle that is too large, from its first bytes."""
    load = "torch.load(PATH, map_location='cpu', weights_only=False)"
    return _RESAVE_ARRAYS.format(load) if re.search(ARRAYS, head) else RESAVE


class PickleError(ContainerError):
    """A pickle that is damaged or refused at the current opcode. `unpickle` adds the position to the message."""


def hostile_error(*names: str) -> PickleError:
    """Return the error for a pickle that refers to functions by these full names."""
    return PickleError(f"the pickle refers to {', '.join(names)}, which no checkpoint needs", _HOSTILE)


def full_name(module: str, name: str) -> str:
    """Return a name for messages. `repr`: the name may contain control characters."""
    return repr(f"{module}.{name}"[:_MAX_SHOWN_NAME])[1:-1]


# Takes the data and the position after the opcode; returns the argument and the position after it. Raises IndexError or
# struct.error if the data is truncated.
ArgumentReader = Callable[[bytes, int], tuple[Any, int]]


def _constant(value: Any) -> ArgumentReader:
    """Return a reader for opcodes whose argument is constant and not in the data."""
    return lambda data, pos: (value, pos)


def _byte(data: bytes, pos: int) -> tuple[int, int]:
    return data[pos], pos + 1


def _protocol(data: bytes, pos: int) -> tuple[int, int]:
    if data[pos] > 5:
        raise PickleError(f"pickle protocol {data[pos]}: supported are 0 to 5", "save it again with pickle_protocol=2")
    return data[pos], pos + 1


def _number(format: str) -> ArgumentReader:
    layout = struct.Struct(format)
    return lambda data, pos: (layout.unpack_from(data, pos)[0], pos + layout.size)


def _counted(format: str, convert: Callable[[bytes], Any] = bytes, limit: int | None = None) -> ArgumentReader:
    """Return a reader of bytes that follow their count; `limit` is the largest count for integers."""
    layout = struct.Struct(format)

    def read(data: bytes, pos: int) -> tuple[Any, int]:
        (count,) = layout.unpack_from(data, pos)
        start = pos + layout.size
        if limit is not None and not 0 <= count <= limit:
            raise PickleError(f"an integer of {count} bytes", NEXT_STEP)
        if start + count > len(data):
            raise IndexError
        return convert(data[start : start + count]), start + count

    return read


def _line(convert: Callable[[bytes], Any]) -> ArgumentReader:
    """Return a reader that converts the bytes up to the end of the line."""

    def read(data: bytes, pos: int) -> tuple[Any, int]:
        end = data.find(b"\n", pos)
        if end < 0:
            raise IndexError
        return convert(data[pos:end]), end + 1

    return read


def _names(data: bytes, pos: int) -> tuple[tuple[str, str], int]:
    """Read a module and the name of a global in it, one line each."""
    read = _line(bytes.decode)
    module, pos = read(data, pos)
    name, pos = read(data, pos)
    return (module, name), pos


def _decimal(text: bytes) -> int:
    if len(text) > _MAX_INT_DIGITS:
        raise PickleError(f"an integer of {len(text)} digits", NEXT_STEP)
    return int(text)


def _decimal_or_bool(text: bytes) -> int:
    # Protocol 0 writes a bool as 00 or 01.
    return text == b"01" if text in (b"00", b"01") else _decimal(text)


def _text(data: bytes) -> str:
    # Strings of Python 2 are bytes; torch decodes them as UTF-8, too.
    return str(data, "utf-8", "surrogatepass")


def _little_endian(data: bytes) -> int:
    return int.from_bytes(data, "little", signed=True)


# The argument readers by opcodes; a key may consist of several. Other opcodes have no argument.
_ARGUMENTS: dict[str, ArgumentReader] = {
    "\x80": _protocol,
    "\x95": _number("<Q"),  # length of a frame
    "\x88": _constant(True),
    "\x89": _constant(False),
    ")": _constant(()),
    # Numbers, and indices of the memo.
    "Kqh": _byte,
    "M": _number("<H"),
    "J": _number("<i"),
    "rj": _number("<I"),
    "G": _number(">d"),
    "I": _line(_decimal_or_bool),
    "L": _line(lambda text: _decimal(text.removesuffix(b"L"))),
    "F": _line(float),
    "pg": _line(_decimal),
    "\x8a": _counted("<B", _little_endian, _MAX_INT_BYTES),
    "\x8b": _counted("<i", _little_endian, _MAX_INT_BYTES),
    # Strings and bytes.
    "\x8cU": _counted("<B", _text),
    "XT": _counted("<I", _text),
    "\x8d": _counted("<Q", _text),
    "V": _line(lambda text: str(text, "raw-unicode-escape")),
    "C": _counted("<B"),
    "B": _counted("<I"),
    "\x8e\x96": _counted("<Q"),
    # Number of stack items for a container; None for all since the last MARK.
    "]}\x8f": _constant(0),
    "\x85a": _constant(1),
    "\x86s": _constant(2),
    "\x87": _constant(3),
    # Globals.
    "ci": _names,
}

# The bytes of memory for the value of an opcode and the reference to it. The default also limits the time: at most four
# million opcodes fit.
_MEMORY: dict[str, int] = {
    "FGMJIL\x8a\x8b": 40,
    "\x8cX\x8dUTVCB\x8e\x96": 64,
    "t\x85\x86\x87l]": 72,
    "d}sqrp\x94": 96,
    "c\x93R\x81\x92io(Q": 128,
    "\x8f\x91": 256,
}


def by_opcode(table: Mapping[str, _T], default: _T) -> list[_T]:
    """Return a list of values by opcode from a table, each of whose keys consists of one or more opcodes."""
    values = [default] * 256
    for codes, value in table.items():
        for code in codes:
            values[ord(code)] = value
    return values


ARGUMENTS, MEMORY = by_opcode(_ARGUMENTS, _constant(None)), by_opcode(_MEMORY, 16)
