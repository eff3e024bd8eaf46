"""A pickle reader that runs nothing: it builds plain values, and for any global what its caller's table gives.

Python's own Unpickler is not used: it imports by name, calls what it imported, and makes a memo as large as a stream
asks for. Here a name that is not in the table ends the reading. Opcodes are those of protocols 0 to 5 that Python 3
and torch write for plain data.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any, NamedTuple

from converter.errors import ContainerError
from converter.formats.pickle_opcodes import ARGUMENTS, NEXT_STEP, PickleError

# The bounds of what a stream may ask for. Real checkpoints stay far below each: a tensor takes 200 bytes, 40 opcodes.
MAX_PICKLE = 16 << 20  # bytes
MAX_OPCODES = 1_000_000  # each may make an object of 80 bytes, of which one byte of the stream is enough
MAX_MARKS = 1000  # containers open at once
MAX_ARGUMENTS = 1_000_000  # items given to calls in all: one list may be given to many, and copied
MAX_KEY = 64  # items of a tuple that is a key
MAX_KEY_BITS = 64  # of a number that is a key


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


# Our own plain functions are called with the stream's arguments; anything else is a value that stands for the name.
Globals = Mapping[tuple[str, str], Any]


def unpickle(
    data: bytes,
    where: str,
    globals_: Globals | None = None,
    persistent_load: Callable[[Any], Any] | None = None,
) -> tuple[Any, int]:
    """The value pickled in `data`, and the position after it; `where` is what messages call it.

    `globals_` has what stands for a module's name; `persistent_load` makes an object of what the stream says of data
    that lie outside. ContainerError for whatever is damaged or not in the table, TruncatedPickleError where `data` end.
    """
    machine = _Machine(data, globals_ or {}, persistent_load)
    try:
        return machine.run(), machine.at + 1
    except PickleError as error:
        raise ContainerError(f"{where}: byte {machine.at}: {error}") from None
    except EOFError:
        raise TruncatedPickleError(
            f"{where}: truncated: ends inside the pickle, at byte {len(data)}", "download or copy the file again"
        ) from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise ContainerError(
            f"{where}: byte {machine.at}: a damaged pickle ({type(error).__name__})", "download or copy the file again"
        ) from None


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
        raise PickleError(f"an integer of {key.bit_length()} bits as a key", NEXT_STEP)
    raise PickleError(f"a {type(key).__name__} as a key", NEXT_STEP)


class _Machine:
    """The state of one reading: a stack, outer stacks set aside by MARK, and the memo."""

    __slots__ = ("arguments", "at", "data", "globals", "memo", "outer", "persistent_load", "stack")

    def __init__(self, data: bytes, globals_: Globals, persistent_load: Callable[[Any], Any] | None) -> None:
        self.data, self.at = data, 0
        self.globals, self.persistent_load = globals_, persistent_load
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.arguments = 0

    def run(self) -> Any:
        """The value that the pickle leaves; EOFError where the data end before it does."""
        data, at = self.data, 0
        for _ in range(MAX_OPCODES):
            self.at = at
            try:
                opcode = data[at]
                argument, at = ARGUMENTS[opcode](data, at + 1)
            except (IndexError, struct.error):
                raise EOFError from None
            if opcode == _STOP:
                return self.stack.pop()
            _HANDLERS[opcode](self, argument)
        raise PickleError(f"more than {MAX_OPCODES} opcodes", NEXT_STEP)

    def spend(self, arguments: int) -> None:
        """Count what calls are given; PickleError once it is too much."""
        self.arguments += arguments
        if self.arguments > MAX_ARGUMENTS:
            raise PickleError(f"calls with more than {MAX_ARGUMENTS} arguments in all", NEXT_STEP)

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self, count: int | None = None) -> list[Any]:
        """The last `count` values or, of None, those pushed since the last MARK."""
        items = self.stack
        if count is None:
            self.stack = self.outer.pop()
            return items
        first = len(items) - count
        if first < 0:
            raise IndexError
        taken = items[first:]
        del items[first:]
        return taken

    def find(self, module: Any, name: Any) -> Any:
        """What the table has for a global, which is never imported."""
        if type(module) is not str or type(name) is not str:
            raise PickleError("a global without a name", "download or copy the file again")
        try:
            found = self.globals[module, name]
        except KeyError:
            found = Refused("which weights do not need")
        if isinstance(found, Refused):
            # repr: a name may hold what a terminal would obey.
            full = repr(f"{module}.{name}"[:200])[1:-1]
            raise PickleError(f"the pickle asks for {full}, {found.reason}", NEXT_STEP)
        return found

    def call(self, function: Any, arguments: Any) -> None:
        """Push what one of our own functions returns."""
        if type(function) is not FunctionType or type(arguments) is not tuple:
            raise PickleError(f"a call of a {type(function).__name__}", NEXT_STEP)
        for argument in arguments:
            if type(argument) in _ITEMS:
                self.spend(len(argument))
            elif type(argument) in _TEXTS:
                self.spend(len(argument) >> 4)  # in bytes they take a sixteenth of what items do
        self.stack.append(function(*arguments))


# Given the machine and the opcode's argument.
_Handler = Callable[[_Machine, Any], None]


def _unknown(m: _Machine, _: None) -> None:
    raise PickleError(f"opcode 0x{m.data[m.at]:02x}, which no checkpoint needs", NEXT_STEP)


_STOP = ord(".")
_HANDLERS: list[_Handler] = [_unknown] * 256


def _opcode(codes: str) -> Callable[[_Handler], _Handler]:
    def register(handler: _Handler) -> _Handler:
        for code in codes:
            _HANDLERS[ord(code)] = handler
        return handler

    return register


# ---- values, stack and memo


@_opcode("\x80\x95")
def _skip(m: _Machine, _: int) -> None:
    """The protocol, which has been checked, and frames are for other readers."""


@_opcode("N\x88\x89)KMJIL\x8a\x8bFG\x8cX\x8dUTVCB\x8e")
def _push(m: _Machine, value: Any) -> None:
    m.stack.append(value)


@_opcode("(")
def _mark(m: _Machine, _: None) -> None:
    if len(m.outer) >= MAX_MARKS:
        raise PickleError(f"nested more than {MAX_MARKS} deep", NEXT_STEP)
    m.outer.append(m.stack)
    m.stack = []


@_opcode("0")
def _pop(m: _Machine, _: None) -> None:
    # Popping past a mark drops the mark.
    if m.stack:
        m.stack.pop()
    else:
        m.pop()


@_opcode("1")
def _pop_mark(m: _Machine, _: None) -> None:
    m.pop()


@_opcode("2")
def _dup(m: _Machine, _: None) -> None:
    m.push(m.stack[-1])


@_opcode("qrp")
def _put(m: _Machine, place: int) -> None:
    m.memo[place] = m.stack[-1]


@_opcode("\x94")
def _memoize(m: _Machine, _: None) -> None:
    m.memo[len(m.memo)] = m.stack[-1]


@_opcode("hjg")
def _get(m: _Machine, place: int) -> None:
    m.push(m.memo[place])


# ---- containers


def _set_items(target: dict[Any, Any], items: list[Any]) -> None:
    if len(items) % 2:
        raise PickleError("a key without a value", "download or copy the file again")
    pairs = iter(items)
    for key, value in zip(pairs, pairs, strict=True):
        target[hashable(key)] = value


def _dict(items: list[Any]) -> dict[Any, Any]:
    target: dict[Any, Any] = {}
    _set_items(target, items)
    return target


def _frozenset(items: list[Any]) -> frozenset[Any]:
    return frozenset(map(hashable, items))


def _update(target: set[Any], items: list[Any]) -> None:
    target.update(map(hashable, items))


def _made(codes: str, make: Callable[[list[Any]], Any]) -> None:
    """These push a container of the values they take."""

    @_opcode(codes)
    def handler(m: _Machine, count: int | None) -> None:
        m.push(make(m.pop(count)))


def _filled(codes: str, kind: type, fill: Callable[[Any, list[Any]], None]) -> None:
    """These put the values they take into the container below; only our own plain ones take any."""

    @_opcode(codes)
    def handler(m: _Machine, count: int | None) -> None:
        items, target = m.pop(count), m.stack[-1]
        if type(target) is not kind:
            raise PickleError(f"items for a {type(target).__name__}, which takes none", NEXT_STEP)
        fill(target, items)


_made("t\x85\x86\x87", tuple)
_made("l]", list)
_made("d}", _dict)
_made("\x91", _frozenset)
_filled("ae", list, list.extend)
_filled("su", dict, _set_items)
_filled("\x90", set, _update)


@_opcode("\x8f")
def _empty_set(m: _Machine, _: None) -> None:
    m.spend(8)  # it takes as much as eight arguments, and more than other objects
    m.push(set())


# ---- globals: looked up in the table, never imported


@_opcode("c")
def _global(m: _Machine, names: tuple[str, str]) -> None:
    m.push(m.find(*names))


@_opcode("\x93")
def _stack_global(m: _Machine, _: None) -> None:
    name, module = m.stack.pop(), m.stack.pop()
    m.push(m.find(module, name))


# NEWOBJ, \x81, is cls.__new__(cls, *arguments): to our functions the same.
@_opcode("R\x81")
def _reduce(m: _Machine, _: None) -> None:
    arguments, function = m.stack.pop(), m.stack.pop()
    m.call(function, arguments)


@_opcode("i")
def _inst(m: _Machine, names: tuple[str, str]) -> None:
    m.call(m.find(*names), tuple(m.pop()))


@_opcode("o")
def _obj(m: _Machine, _: None) -> None:
    function, *arguments = m.pop()
    m.call(function, tuple(arguments))


@_opcode("b")
def _build(m: _Machine, _: None) -> None:
    state, target = m.stack.pop(), m.stack[-1]
    if type(target) is Node:
        target.state = state
    elif type(target) is not dict:
        raise PickleError(f"state for a {type(target).__name__}, which takes none", NEXT_STEP)
    # A dict's is the `_metadata` of a state dict, version numbers of its modules: no part of the weights.


@_opcode("Q")
def _binpersid(m: _Machine, _: None) -> None:
    if m.persistent_load is None:
        raise PickleError("a reference to data outside the pickle")
    m.push(m.persistent_load(m.stack.pop()))
