"""Decodes the argument that follows each opcode of a pickle, protocols 0 to 5.

The grammar is that of the standard library's `pickletools`. `pickle_reader` executes the opcodes.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Any

from converter.errors import ContainerError

MAX_INT_BYTES = 1024
MAX_INT_DIGITS = 2466  # the same number in decimal
MAX_SHOWN_NAME = 200  # characters of the name of a global

# The next step for a file whose weights another program wrote as something that is not read here.
RESAVE = (
    "where you trust the file, save its weights alone, which runs code of the file: "
    'torch.save(torch.load(PATH, map_location="cpu", weights_only=False)["state_dict"], "weights.pth"), '
    "with .state_dict() in place of [...] where PATH holds a whole module"
)
# The same for a dict of numpy arrays, with `d` as the dict.
_TRUSTED = "it holds numpy arrays; where you trust the file, save tensors, which runs code of the file:"
_SAVE_ARRAYS = (
    "d = d.get('model') or d.get('state_dict') or d; torch.save({k: torch.as_tensor(v) for k, v in d.items() "
    "if hasattr(v, 'shape')}, 'weights.pth')"
)
RESAVE_ARRAYS = f"{_TRUSTED} d = torch.load(PATH, map_location='cpu', weights_only=False); {_SAVE_ARRAYS}"
UNPICKLE_ARRAYS = f"{_TRUSTED} d = pickle.load(open(FILE, 'rb'), encoding='latin1'); {_SAVE_ARRAYS}"
NEXT_STEP = f"nothing of it was executed\n{RESAVE}"
# The module of the functions that make numpy arrays, before and after numpy 2, and from protocol 5 on.
ARRAYS = rb"numpy(\._?core)?\.(multiarray|numeric)"
HOSTILE = (
    "nothing of it was executed\n"
    "do not trust this file: pickle.load, and torch.load with weights_only=False, would run its code"
)


def resave_step(head: bytes) -> str:
    """Return the next step for a pickle that is too large, from its first bytes."""
    return RESAVE_ARRAYS if re.search(ARRAYS, head) else RESAVE


class PickleError(ContainerError):
    """The pickle is damaged or refused at the current opcode. `unpickle` adds the position to the message."""


def hostile_error(*names: str) -> PickleError:
    """Return the error for a pickle that refers to functions by these full names."""
    return PickleError(f"the pickle refers to {', '.join(names)}, which no checkpoint needs", HOSTILE)


def full_name(module: str, name: str) -> str:
    """Return a name for messages. `repr`: the name may contain control characters."""
    return repr(f"{module}.{name}"[:MAX_SHOWN_NAME])[1:-1]


# Takes the data and the position after the opcode. Returns the argument and the position after it. Raises IndexError or
# struct.error where the data is truncated.
ArgumentReader = Callable[[bytes, int], tuple[Any, int]]


def _constant(value: Any) -> ArgumentReader:
    """An opcode without an argument in the data; it always has this value."""

    def read(data: bytes, pos: int) -> tuple[Any, int]:
        return value, pos

    return read


def _byte(data: bytes, pos: int) -> tuple[int, int]:
    return data[pos], pos + 1


def _number(format: str) -> ArgumentReader:
    layout = struct.Struct(format)

    def read(data: bytes, pos: int) -> tuple[Any, int]:
        return layout.unpack_from(data, pos)[0], pos + layout.size

    return read


def _protocol(data: bytes, pos: int) -> tuple[int, int]:
    version, end = _byte(data, pos)
    if version > 5:
        raise PickleError(f"pickle protocol {version}: 0 to 5 are known", "save it again with pickle_protocol=2")
    return version, end


def _take(data: bytes, pos: int, length: int) -> tuple[bytes, int]:
    end = pos + length
    if end > len(data):
        raise IndexError
    return data[pos:end], end


def _bytes(format: str) -> ArgumentReader:
    """Bytes, preceded by their count."""
    length = _number(format)

    def read(data: bytes, pos: int) -> tuple[bytes, int]:
        count, pos = length(data, pos)
        return _take(data, pos, count)

    return read


def _long(format: str) -> ArgumentReader:
    """A little-endian signed integer, preceded by its count of bytes."""
    length = _number(format)

    def read(data: bytes, pos: int) -> tuple[int, int]:
        count, pos = length(data, pos)
        if not 0 <= count <= MAX_INT_BYTES:
            raise PickleError(f"an integer of {count} bytes", NEXT_STEP)
        digits, pos = _take(data, pos, count)
        return int.from_bytes(digits, "little", signed=True), pos

    return read


def _line(data: bytes, pos: int) -> tuple[bytes, int]:
    end = data.find(b"\n", pos)
    if end < 0:
        raise IndexError
    return data[pos:end], end + 1


def _names(data: bytes, pos: int) -> tuple[tuple[str, str], int]:
    """A module and a name in it, one line each."""
    line, pos = _line(data, pos)
    module = str(line, "utf-8")
    line, pos = _line(data, pos)
    return (module, str(line, "utf-8")), pos


def _converted(convert: Callable[[bytes], Any], encoded: ArgumentReader) -> ArgumentReader:
    """A value converted from bytes."""

    def read(data: bytes, pos: int) -> tuple[Any, int]:
        raw, pos = encoded(data, pos)
        return convert(raw), pos

    return read


def _decimal(text: bytes) -> int:
    if len(text) > MAX_INT_DIGITS:
        raise PickleError(f"an integer of {len(text)} digits", NEXT_STEP)
    return int(text)


def _decimal_or_bool(text: bytes) -> int:
    # Protocol 0 writes a bool as 00 or 01.
    return text == b"01" if text in (b"00", b"01") else _decimal(text)


def _decimal_long(text: bytes) -> int:
    return _decimal(text.removesuffix(b"L"))


def _text(data: bytes) -> str:
    # Strings of Python 2 are bytes; torch decodes them as UTF-8, too.
    return str(data, "utf-8", "surrogatepass")


def _raw_unicode(data: bytes) -> str:
    return str(data, "raw-unicode-escape")


_ARGUMENTS: dict[str, ArgumentReader] = {
    "\x80": _protocol,
    "\x95": _number("<Q"),  # length of a frame
    "N": _constant(None),
    "\x88": _constant(True),
    "\x89": _constant(False),
    ")": _constant(()),
    # Numbers.
    "K": _byte,
    "M": _number("<H"),
    "J": _number("<i"),
    "I": _converted(_decimal_or_bool, _line),
    "L": _converted(_decimal_long, _line),
    "\x8a": _long("<B"),
    "\x8b": _long("<i"),
    "F": _converted(float, _line),
    "G": _number(">d"),
    # Strings and bytes.
    "\x8c": _converted(_text, _bytes("<B")),
    "X": _converted(_text, _bytes("<I")),
    "\x8d": _converted(_text, _bytes("<Q")),
    "U": _converted(_text, _bytes("<B")),
    "T": _converted(_text, _bytes("<I")),
    "V": _converted(_raw_unicode, _line),
    "C": _bytes("<B"),
    "B": _bytes("<I"),
    "\x8e": _bytes("<Q"),
    "\x96": _bytes("<Q"),
    # Indices of the memo.
    "q": _byte,
    "r": _number("<I"),
    "p": _converted(_decimal, _line),
    "h": _byte,
    "j": _number("<I"),
    "g": _converted(_decimal, _line),
    # Number of stack items for a container; None for all since the last MARK.
    "]": _constant(0),
    "}": _constant(0),
    "\x85": _constant(1),
    "\x86": _constant(2),
    "\x87": _constant(3),
    "a": _constant(1),
    "s": _constant(2),
    # Globals.
    "c": _names,
    "i": _names,
}

# By opcode; unknown opcodes have no argument.
ARGUMENTS = [_ARGUMENTS.get(chr(code), _constant(None)) for code in range(256)]

# Bytes of memory that an opcode takes for its value and the reference to it. The smallest limits the time as well: no
# pickle has more than four million opcodes.
_MEMORY: dict[str, int] = {
    "FGMJIL\x8a\x8b": 40,
    "\x8cX\x8dUTVCB\x8e\x96": 64,
    "t\x85\x86\x87l]": 72,
    "d}sqrp\x94": 96,
    "c\x93R\x81\x92io(Q": 128,
    "\x8f\x91": 256,
}
MEMORY = [next((size for codes, size in _MEMORY.items() if chr(code) in codes), 16) for code in range(256)]
