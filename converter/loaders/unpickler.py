"""A pickle reader that runs nothing: it builds plain values, and for any global what its caller's table gives.

Python's own Unpickler is not used: it imports by name, calls what it imported, and makes a memo as large as a stream
asks for. Here a name that is not in the table ends the reading. Opcodes are those of protocols 0 to 5 that Python 3
and torch write for plain data; their meanings are in the standard library's `pickletools`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any, NamedTuple

from converter.errors import ContainerError

# The bounds of what a stream may ask for. Real checkpoints stay far below each: a tensor takes 200 bytes, 40 opcodes.
MAX_PICKLE = 16 << 20  # bytes
MAX_OPCODES = 1_000_000  # each may make an object of 80 bytes, of which one byte of the stream is enough
MAX_MARKS = 1000  # containers open at once
MAX_ARGUMENTS = 1_000_000  # items given to calls in all: one list may be given to many, and copied
MAX_KEY = 64  # items of a tuple that is a key
MAX_KEY_BITS = 64  # of a number that is a key
MAX_INT_BYTES = 1024
MAX_INT_DIGITS = 2466  # the same number in decimal

NEXT_STEP = (
    "nothing of it was executed\n"
    "where you trust the file, save its weights alone: torch.save(model.state_dict(), 'weights.pth')"
)


class Refused(NamedTuple):
    """Stands in a table of globals for a name that is known and cannot be read, with the reason in words."""

    reason: str


class Node:
    """An object of a class that is not ours: only the class's name and the state that BUILD gave it."""

    __slots__ = ("name", "state")

    def __init__(self, name: str) -> None:
        self.name = name
        self.state: Any = None


class TruncatedPickleError(ContainerError):
    """The bytes given end before the pickle does."""


class PickleError(Exception):
    """What is wrong with the stream at the current opcode; `unpickle` says where that is."""


# Our own plain functions are called with the stream's arguments; anything else is a value that stands for the name.
Globals = Mapping[tuple[str, str], Any]


def unpickle(
    data: bytes,
    where: str,
    globals_: Globals | None = None,
    persistent_load: Callable[[Any], Any] | None = None,
    start: int = 0,
) -> tuple[Any, int]:
    """The value pickled in `data` from `start` on, and the position after it; `where` is what messages call it."""
    machine = _Machine(data, start, globals_ or {}, persistent_load)
    try:
        return machine.run(), machine.pos
    except PickleError as error:
        raise ContainerError(f"{where}: byte {machine.at}: {error}") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError, struct.error) as error:
        if machine.pos > len(data):
            raise TruncatedPickleError(
                f"{where}: truncated: ends inside the pickle, at byte {len(data)}\ndownload or copy the file again"
            ) from None
        raise ContainerError(
            f"{where}: byte {machine.at}: a damaged pickle ({type(error).__name__})\ndownload or copy the file again"
        ) from None


class _Machine:
    """The state of one reading: a stack, outer stacks set aside by MARK, and the memo."""

    __slots__ = ("arguments", "at", "data", "globals", "memo", "outer", "persistent_load", "pos", "stack")

    def __init__(
        self, data: bytes, start: int, globals_: Globals, persistent_load: Callable[[Any], Any] | None
    ) -> None:
        self.data, self.pos, self.at = data, start, start
        self.globals, self.persistent_load = globals_, persistent_load
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.arguments = 0

    def run(self) -> Any:
        data, handlers = self.data, _HANDLERS
        for _ in range(MAX_OPCODES):
            self.at = at = self.pos
            # Moved before the byte is read, here and below: a position beyond the data tells truncation from damage.
            self.pos = at + 1
            opcode = data[at]
            if opcode == _STOP:
                return self.stack.pop()
            handlers[opcode](self)
        raise PickleError(f"more than {MAX_OPCODES} opcodes\n{NEXT_STEP}")

    def spend(self, arguments: int) -> None:
        self.arguments += arguments
        if self.arguments > MAX_ARGUMENTS:
            raise PickleError(f"calls with more than {MAX_ARGUMENTS} arguments in all\n{NEXT_STEP}")

    def take(self, length: int) -> bytes:
        start = self.pos
        self.pos = end = start + length
        if end > len(self.data):
            raise IndexError
        return self.data[start:end]

    def line(self) -> bytes:
        end = self.data.find(b"\n", self.pos)
        if end < 0:
            end = len(self.data)
        return self.take(end + 1 - self.pos)[:-1]

    def number(self, layout: struct.Struct) -> Any:
        start = self.pos
        self.pos = start + layout.size
        return layout.unpack_from(self.data, start)[0]

    def pop_mark(self) -> list[Any]:
        """The values pushed since the last MARK."""
        items = self.stack
        self.stack = self.outer.pop()
        return items


_U8, _U16, _U32, _U64 = struct.Struct("<B"), struct.Struct("<H"), struct.Struct("<I"), struct.Struct("<Q")
_I32, _F64 = struct.Struct("<i"), struct.Struct(">d")
_STOP = ord(".")

_Handler = Callable[[_Machine], None]


def _unknown(m: _Machine) -> None:
    raise PickleError(f"opcode 0x{m.data[m.at]:02x}, which no checkpoint needs\n{NEXT_STEP}")


_HANDLERS: list[_Handler] = [_unknown] * 256


def _opcode(code: str) -> Callable[[_Handler], _Handler]:
    def register(handler: _Handler) -> _Handler:
        _HANDLERS[ord(code)] = handler
        return handler

    return register


def _constant(code: str, value: Any) -> None:
    def push(m: _Machine) -> None:
        m.stack.append(value)

    _HANDLERS[ord(code)] = push


_constant("N", None)
_constant("\x88", True)
_constant("\x89", False)
_constant(")", ())


# ---- protocol, memo and stack


@_opcode("\x80")
def _proto(m: _Machine) -> None:
    version = m.take(1)[0]
    if version > 5:
        raise PickleError(f"pickle protocol {version}: 0 to 5 are known\nsave it again with pickle_protocol=2")


@_opcode("\x95")
def _frame(m: _Machine) -> None:
    m.take(8)  # a hint for readers of streams


@_opcode("(")
def _mark(m: _Machine) -> None:
    if len(m.outer) >= MAX_MARKS:
        raise PickleError(f"nested more than {MAX_MARKS} deep\n{NEXT_STEP}")
    m.outer.append(m.stack)
    m.stack = []


@_opcode("0")
def _pop(m: _Machine) -> None:
    # Popping past a mark drops the mark.
    if m.stack:
        m.stack.pop()
    else:
        m.pop_mark()


@_opcode("1")
def _pop_mark(m: _Machine) -> None:
    m.pop_mark()


@_opcode("2")
def _dup(m: _Machine) -> None:
    m.stack.append(m.stack[-1])


@_opcode("q")
def _binput(m: _Machine) -> None:
    pos = m.pos
    m.pos = pos + 1
    m.memo[m.data[pos]] = m.stack[-1]


@_opcode("r")
def _long_binput(m: _Machine) -> None:
    m.memo[m.number(_U32)] = m.stack[-1]


@_opcode("p")
def _put(m: _Machine) -> None:
    m.memo[_decimal(m.line())] = m.stack[-1]


@_opcode("\x94")
def _memoize(m: _Machine) -> None:
    m.memo[len(m.memo)] = m.stack[-1]


@_opcode("h")
def _binget(m: _Machine) -> None:
    pos = m.pos
    m.pos = pos + 1
    m.stack.append(m.memo[m.data[pos]])


@_opcode("j")
def _long_binget(m: _Machine) -> None:
    m.stack.append(m.memo[m.number(_U32)])


@_opcode("g")
def _get(m: _Machine) -> None:
    m.stack.append(m.memo[_decimal(m.line())])


# ---- numbers


def _decimal(text: bytes) -> int:
    if len(text) > MAX_INT_DIGITS:
        raise PickleError(f"an integer of {len(text)} digits\n{NEXT_STEP}")
    return int(text)


@_opcode("K")
def _binint1(m: _Machine) -> None:
    pos = m.pos
    m.pos = pos + 1
    m.stack.append(m.data[pos])


@_opcode("M")
def _binint2(m: _Machine) -> None:
    m.stack.append(m.number(_U16))


@_opcode("J")
def _binint(m: _Machine) -> None:
    m.stack.append(m.number(_I32))


@_opcode("I")
def _int(m: _Machine) -> None:
    text = m.line()
    # Protocol 0 has no other way to write a bool.
    m.stack.append(text == b"01" if text in (b"00", b"01") else _decimal(text))


@_opcode("L")
def _long(m: _Machine) -> None:
    m.stack.append(_decimal(m.line().removesuffix(b"L")))


def _long_of(m: _Machine, length: int) -> None:
    if not 0 <= length <= MAX_INT_BYTES:
        raise PickleError(f"an integer of {length} bytes\n{NEXT_STEP}")
    m.stack.append(int.from_bytes(m.take(length), "little", signed=True))


@_opcode("\x8a")
def _long1(m: _Machine) -> None:
    _long_of(m, m.number(_U8))


@_opcode("\x8b")
def _long4(m: _Machine) -> None:
    _long_of(m, m.number(_I32))


@_opcode("F")
def _float(m: _Machine) -> None:
    m.stack.append(float(m.line()))


@_opcode("G")
def _binfloat(m: _Machine) -> None:
    m.stack.append(m.number(_F64))


# ---- text and bytes; Python 2 wrote its texts as bytes, which torch too takes for UTF-8


def _lengthed(code: str, length: struct.Struct, *, text: bool) -> None:
    def push(m: _Machine) -> None:
        data = m.take(m.number(length))
        m.stack.append(str(data, "utf-8", "surrogatepass") if text else data)

    _HANDLERS[ord(code)] = push


_lengthed("\x8c", _U8, text=True)
_lengthed("X", _U32, text=True)
_lengthed("\x8d", _U64, text=True)
_lengthed("U", _U8, text=True)
_lengthed("T", _U32, text=True)
_lengthed("C", _U8, text=False)
_lengthed("B", _U32, text=False)
_lengthed("\x8e", _U64, text=False)


@_opcode("V")
def _unicode(m: _Machine) -> None:
    m.stack.append(str(m.line(), "raw-unicode-escape"))


# ---- containers


@_opcode("t")
def _tuple(m: _Machine) -> None:
    items = tuple(m.pop_mark())
    m.stack.append(items)


@_opcode("\x85")
def _tuple1(m: _Machine) -> None:
    m.stack[-1] = (m.stack[-1],)


@_opcode("\x86")
def _tuple2(m: _Machine) -> None:
    second, first = m.stack.pop(), m.stack.pop()
    m.stack.append((first, second))


@_opcode("\x87")
def _tuple3(m: _Machine) -> None:
    third, second, first = m.stack.pop(), m.stack.pop(), m.stack.pop()
    m.stack.append((first, second, third))


@_opcode("]")
def _empty_list(m: _Machine) -> None:
    m.stack.append([])


@_opcode("l")
def _list(m: _Machine) -> None:
    items = m.pop_mark()
    m.stack.append(items)


@_opcode("a")
def _append(m: _Machine) -> None:
    item = m.stack.pop()
    _target(m, list).append(item)


@_opcode("e")
def _appends(m: _Machine) -> None:
    items = m.pop_mark()
    _target(m, list).extend(items)


@_opcode("}")
def _empty_dict(m: _Machine) -> None:
    m.stack.append({})


@_opcode("d")
def _dict(m: _Machine) -> None:
    items = m.pop_mark()
    target: dict[Any, Any] = {}
    _set_items(target, items)
    m.stack.append(target)


@_opcode("s")
def _setitem(m: _Machine) -> None:
    value, key = m.stack.pop(), m.stack.pop()
    _set_items(_target(m, dict), [key, value])


@_opcode("u")
def _setitems(m: _Machine) -> None:
    items = m.pop_mark()
    _set_items(_target(m, dict), items)


@_opcode("\x8f")
def _empty_set(m: _Machine) -> None:
    m.spend(8)  # it takes as much as eight arguments, and more than other objects
    m.stack.append(set())


@_opcode("\x90")
def _additems(m: _Machine) -> None:
    items = m.pop_mark()
    _target(m, set).update(map(hashable, items))


@_opcode("\x91")
def _frozenset(m: _Machine) -> None:
    items = m.pop_mark()
    m.stack.append(frozenset(map(hashable, items)))


def _target(m: _Machine, kind: type) -> Any:
    """What the items just popped go into; only our own plain containers take any."""
    target = m.stack[-1]
    if type(target) is not kind:
        raise PickleError(f"items for a {type(target).__name__}, which takes none\n{NEXT_STEP}")
    return target


_TEXTS = frozenset({str, bytes})
_SCALARS = frozenset({float, bool, type(None)}) | _TEXTS
_ITEMS = frozenset({list, tuple, dict, set, frozenset})


def hashable(key: Any) -> Any:
    """`key`, if it is a scalar or a short tuple of texts.

    Nothing else may be hashed: deep tuples overflow the C stack, and of long numbers and tuples of numbers one can
    write down any number that share a hash, which a dict takes hours to tell apart. Texts have secret hashes.
    """
    kind = type(key)
    if kind in _SCALARS or (kind is int and key.bit_length() <= MAX_KEY_BITS):
        return key
    if kind is tuple and len(key) <= MAX_KEY and all(type(item) in _TEXTS for item in key):
        return key
    if kind is int:
        raise PickleError(f"an integer of {key.bit_length()} bits as a key\n{NEXT_STEP}")
    raise PickleError(f"a {type(key).__name__} as a key\n{NEXT_STEP}")


def _set_items(target: dict[Any, Any], items: list[Any]) -> None:
    if len(items) % 2:
        raise PickleError("a key without a value\ndownload or copy the file again")
    pairs = iter(items)
    for key, value in zip(pairs, pairs, strict=True):
        target[hashable(key)] = value


# ---- globals: looked up in the table, never imported


def _find(m: _Machine, module: Any, name: Any) -> Any:
    if type(module) is not str or type(name) is not str:
        raise PickleError("a global without a name\ndownload or copy the file again")
    try:
        found = m.globals[module, name]
    except KeyError:
        found = Refused("which weights do not need")
    if isinstance(found, Refused):
        # repr: a name may hold what a terminal would obey.
        full = repr(f"{module}.{name}"[:200])[1:-1]
        raise PickleError(f"the pickle asks for {full}, {found.reason}\n{NEXT_STEP}")
    return found


def _call(m: _Machine, function: Any, arguments: Any) -> None:
    if type(function) is not FunctionType or type(arguments) is not tuple:
        raise PickleError(f"a call of a {type(function).__name__}\n{NEXT_STEP}")
    for argument in arguments:
        if type(argument) in _ITEMS:
            m.spend(len(argument))
        elif type(argument) in _TEXTS:
            m.spend(len(argument) >> 4)  # in bytes they take a sixteenth of what items do
    m.stack.append(function(*arguments))


@_opcode("c")
def _global(m: _Machine) -> None:
    module, name = str(m.line(), "utf-8"), str(m.line(), "utf-8")
    m.stack.append(_find(m, module, name))


@_opcode("\x93")
def _stack_global(m: _Machine) -> None:
    name, module = m.stack.pop(), m.stack.pop()
    m.stack.append(_find(m, module, name))


@_opcode("R")
def _reduce(m: _Machine) -> None:
    arguments, function = m.stack.pop(), m.stack.pop()
    _call(m, function, arguments)


_HANDLERS[0x81] = _reduce  # NEWOBJ: cls.__new__(cls, *arguments), which to our functions is the same


@_opcode("i")
def _inst(m: _Machine) -> None:
    module, name = str(m.line(), "utf-8"), str(m.line(), "utf-8")
    function, arguments = _find(m, module, name), tuple(m.pop_mark())
    _call(m, function, arguments)


@_opcode("o")
def _obj(m: _Machine) -> None:
    function, *arguments = m.pop_mark()
    _call(m, function, tuple(arguments))


@_opcode("b")
def _build(m: _Machine) -> None:
    state, target = m.stack.pop(), m.stack[-1]
    if type(target) is Node:
        target.state = state
    elif type(target) is not dict:
        raise PickleError(f"state for a {type(target).__name__}, which takes none\n{NEXT_STEP}")
    # A dict's is the `_metadata` of a state dict, version numbers of its modules: no part of the weights.


@_opcode("Q")
def _binpersid(m: _Machine) -> None:
    if m.persistent_load is None:
        raise PickleError("a reference to data outside the pickle")
    m.stack.append(m.persistent_load(m.stack.pop()))
