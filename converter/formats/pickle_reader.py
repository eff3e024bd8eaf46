"""Reads pickles without executing them: builds plain values, and looks globals up in a table of the caller.

Python's own Unpickler is not used. It imports globals by name, calls them, and allocates a memo of any size that the
stream requests. Here a global outside the table is an error, or a placeholder if the table makes one: calls of it give
further placeholders, and nothing is imported or run. The supported opcodes are those of protocols 0 to 5 that Python 3
and torch write.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

from converter.errors import ContainerError
from converter.formats.pickle_opcodes import ARGUMENTS, MEMORY, NEXT_STEP, RESAVE, PickleError, full_name, hostile_error
from converter.formats.pickle_values import STRINGS, Placeholder, hashable, safe_frozenset
from converter.storage.byte_range import DAMAGED

# Limits of one pickle. Real checkpoints are far below each of them: a tensor takes 200 bytes of the pickle.
MAX_PICKLE = 16 << 20  # bytes
MAX_MEMORY = 64 << 20  # bytes of all values, estimated by opcode
MAX_MARKS = 1000  # nested containers
MAX_ARGUMENTS = 1_000_000  # items passed to all calls together: many calls may copy one list


class TruncatedPickleError(ContainerError):
    """The data ends inside of the pickle."""


# By module and name. The pickle may call values that are plain functions, and placeholders; all others are opaque.
Globals = Mapping[tuple[str, str], Any]


def unpickle(
    data: bytes,
    where: str,
    globals_: Globals | None = None,
    persistent_load: Callable[[Any], Any] | None = None,
    max_memory: int = MAX_MEMORY,
) -> tuple[Any, int]:
    """Read one pickle.

    Args:
        data: The pickle; more bytes may follow it.
        where: Name of the pickle in messages.
        globals_: Values of the globals that the pickle may refer to.
        persistent_load: Converts a persistent id, a reference to data outside of the pickle.
        max_memory: Bytes that its values may take, as estimated by opcode.

    Returns:
        The value, and the position after the pickle in `data`.

    Raises:
        TruncatedPickleError: `data` ends inside of the pickle.
        ContainerError: The pickle is damaged, or refers to a global that is not in the table.
    """
    machine = _Machine(data, globals_ or {}, persistent_load, max_memory)
    try:
        return machine.run(), machine.pos + 1
    except PickleError as error:
        raise ContainerError(f"{where}: byte {machine.pos}: {error.message}", error.hint) from None
    except EOFError:
        raise TruncatedPickleError(
            f"{where}: truncated: ends inside the pickle, at byte {len(data)}", DAMAGED
        ) from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise ContainerError(
            f"{where}: byte {machine.pos}: a damaged pickle ({type(error).__name__})", DAMAGED
        ) from None


_CONTAINERS = frozenset({list, tuple, dict, set, frozenset})


class _Machine:
    """State of the pickle virtual machine: the stack, the stacks saved by MARK, and the memo."""

    __slots__ = ("arguments", "data", "globals", "max_memory", "memo", "outer", "persistent_load", "pos", "stack")

    def __init__(
        self, data: bytes, globals_: Globals, persistent_load: Callable[[Any], Any] | None, max_memory: int
    ) -> None:
        self.data, self.pos, self.max_memory = data, 0, max_memory
        self.globals, self.persistent_load = globals_, persistent_load
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.arguments = 0

    def run(self) -> Any:
        """Execute opcodes up to STOP and return the value; EOFError where the data is truncated."""
        data, pos, memory = self.data, 0, 0
        while True:
            self.pos = pos
            try:
                opcode = data[pos]
                argument, pos = ARGUMENTS[opcode](data, pos + 1)
            except (IndexError, struct.error):
                raise EOFError from None
            if opcode == _STOP:
                return self.stack.pop()
            memory += MEMORY[opcode]
            if memory > self.max_memory:
                raise PickleError(f"values of more than {self.max_memory} bytes", RESAVE)
            _HANDLERS[opcode](self, argument)

    def count_arguments(self, arguments: int) -> None:
        """Add to the number of arguments of all calls; PickleError beyond the limit."""
        self.arguments += arguments
        if self.arguments > MAX_ARGUMENTS:
            raise PickleError(f"calls with more than {MAX_ARGUMENTS} arguments in total", NEXT_STEP)

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self, count: int | None = None) -> list[Any]:
        """Remove and return the last `count` values, or those pushed since the last MARK if it is None."""
        stack = self.stack
        if count is None:
            self.stack = self.outer.pop()
            return stack
        first = len(stack) - count
        if first < 0:
            raise IndexError
        items = stack[first:]
        del stack[first:]
        return items

    def find_global(self, module: Any, name: Any) -> Any:
        """Look a global up in the table; nothing is imported."""
        if type(module) is not str or type(name) is not str:
            raise PickleError("a global without a name", DAMAGED)
        try:
            return self.globals[module, name]
        except KeyError:
            raise hostile_error(full_name(module, name)) from None

    def call(self, function: Any, arguments: Any) -> None:
        """Call a function of the table and push its result; of a placeholder, push another one."""
        if type(arguments) is not tuple:
            raise PickleError(f"a call with a {type(arguments).__name__} as arguments", DAMAGED)
        if type(function) is Placeholder:
            self.stack.append(Placeholder(function.name, arguments))
            return
        if type(function) is not FunctionType:
            raise PickleError(f"a call of a {type(function).__name__}", NEXT_STEP)
        for argument in arguments:
            if type(argument) in _CONTAINERS:
                self.count_arguments(len(argument))
            elif type(argument) in STRINGS:
                self.count_arguments(len(argument) >> 4)  # a copied byte takes a sixteenth of the memory of an item
        self.stack.append(function(*arguments))


# Executes an opcode, given the machine and the argument.
_Handler = Callable[[_Machine, Any], None]


def _unknown(m: _Machine, _: None) -> None:
    raise PickleError(f"opcode 0x{m.data[m.pos]:02x}, which no checkpoint needs", NEXT_STEP)


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
    """PROTO and FRAME: the argument has been checked and has no effect."""


@_opcode("N\x88\x89)KMJIL\x8a\x8bFG\x8cX\x8dUTVCB\x8e\x96")
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
    # POP on an empty stack removes the last mark.
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
def _put(m: _Machine, index: int) -> None:
    m.memo[index] = m.stack[-1]


@_opcode("\x94")
def _memoize(m: _Machine, _: None) -> None:
    m.memo[len(m.memo)] = m.stack[-1]


@_opcode("hjg")
def _get(m: _Machine, index: int) -> None:
    m.push(m.memo[index])


# ---- containers


def _set_items(target: dict[Any, Any], items: list[Any]) -> None:
    if len(items) % 2:
        raise PickleError("a key without a value", DAMAGED)
    pairs = iter(items)
    for key, value in zip(pairs, pairs, strict=True):
        target[hashable(key)] = value


def _dict(items: list[Any]) -> dict[Any, Any]:
    target: dict[Any, Any] = {}
    _set_items(target, items)
    return target


def _update(target: set[Any], items: list[Any]) -> None:
    target.update(map(hashable, items))


def _build_with(codes: str, build: Callable[[list[Any]], Any]) -> None:
    """Register opcodes that pop values and push a container of them."""

    @_opcode(codes)
    def handler(m: _Machine, count: int | None) -> None:
        m.push(build(m.pop(count)))


def _extend_with(codes: str, kind: type, extend: Callable[[Any, list[Any]], None]) -> None:
    """Register opcodes that pop values and add them to the container below, of type `kind`."""

    @_opcode(codes)
    def handler(m: _Machine, count: int | None) -> None:
        items, target = m.pop(count), m.stack[-1]
        if type(target) is Placeholder:
            # An object may have items of two kinds. Those of the second are ignored.
            target.content = kind() if target.content is None else target.content
            target = target.content if type(target.content) is kind else kind()
        if type(target) is not kind:
            raise PickleError(f"items for a {type(target).__name__}, which takes none", NEXT_STEP)
        extend(target, items)


_build_with("t\x85\x86\x87", tuple)
_build_with("l]", list)
_build_with("d}", _dict)
_build_with("\x91", safe_frozenset)
_extend_with("ae", list, list.extend)
_extend_with("su", dict, _set_items)
_extend_with("\x90", set, _update)


@_opcode("\x8f")
def _empty_set(m: _Machine, _: None) -> None:
    m.push(set())


# ---- globals and calls


@_opcode("c")
def _global(m: _Machine, names: tuple[str, str]) -> None:
    m.push(m.find_global(*names))


@_opcode("\x93")
def _stack_global(m: _Machine, _: None) -> None:
    name, module = m.stack.pop(), m.stack.pop()
    m.push(m.find_global(module, name))


# REDUCE and NEWOBJ: the functions of the table do not distinguish cls(*arguments) from cls.__new__(cls, *arguments).
@_opcode("R\x81")
def _reduce(m: _Machine, _: None) -> None:
    arguments, function = m.stack.pop(), m.stack.pop()
    m.call(function, arguments)


@_opcode("\x92")
def _newobj_ex(m: _Machine, _: None) -> None:
    keywords, arguments, function = m.stack.pop(), m.stack.pop(), m.stack.pop()
    m.call(function, (arguments, keywords) if type(function) is Placeholder else arguments)


@_opcode("i")
def _inst(m: _Machine, names: tuple[str, str]) -> None:
    m.call(m.find_global(*names), tuple(m.pop()))


@_opcode("o")
def _obj(m: _Machine, _: None) -> None:
    function, *arguments = m.pop()
    m.call(function, tuple(arguments))


@_opcode("b")
def _build(m: _Machine, _: None) -> None:
    state, target = m.stack.pop(), m.stack[-1]
    if type(target) is Placeholder:
        target.state = state
    elif type(target) is not dict:
        raise PickleError(f"state for a {type(target).__name__}, which takes none", NEXT_STEP)
    # The state of a dict is the `_metadata` of a state dict: version numbers of modules, ignored.


@_opcode("Q")
def _binpersid(m: _Machine, _: None) -> None:
    if m.persistent_load is None:
        raise PickleError("a reference to data outside the pickle")
    m.push(m.persistent_load(m.stack.pop()))
