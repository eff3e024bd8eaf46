"""Reads pickles without executing them: builds plain values, and looks up globals in the caller's table.

Python's own Unpickler is not used. It imports globals by name, calls them, and allocates a memo of any size that the
stream requests. Here a global that is not in the table is an error, or a placeholder if the table provides one. Calling
a placeholder gives another placeholder; nothing is imported or run. The supported opcodes are those that Python 3 and
torch write.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from types import FunctionType
from typing import Any

from converter.errors import ContainerError
from converter.formats.pickle_opcodes import (
    ARGUMENTS,
    MEMORY,
    NEXT_STEP,
    RESAVE,
    PickleError,
    by_opcode,
    full_name,
    hostile_error,
)
from converter.storage.byte_range import DAMAGED

# Limits of one pickle. Real checkpoints are far below each of them: a tensor takes 200 bytes of the pickle.
MAX_PICKLE = 16 << 20  # bytes
MAX_MEMORY = 64 << 20  # bytes of all values, estimated by opcode
MAX_MARKS = 1000  # nested containers
_MAX_ARGUMENTS = 1_000_000  # items passed to all calls together: many calls may copy one list
_MAX_KEY_BITS = 64  # of an integer used as a key

_STRINGS = frozenset({str, bytes})
_SCALARS = frozenset({float, bool, type(None)}) | _STRINGS
_UNHASHABLE = frozenset({list, dict, set})
_CONTAINERS = _UNHASHABLE | {tuple, frozenset}


class Placeholder:
    """Stands for an object that is not created: an instance of a class, or a class or function itself.

    It holds the object's data in the pickle and does nothing with it. Two placeholders are never equal.
    """

    __slots__ = ("arguments", "content", "name", "state")

    def __init__(self, name: str, arguments: tuple[Any, ...] | None = None) -> None:
        self.name = name  # the full name of the class or function
        self.arguments = arguments  # of the call that would create the object; None for a class or function
        self.state: Any = None  # what `__setstate__` would get
        self.content: Any = None  # the items of a subclass of dict, list or set; None for all others


def hashable(key: Any) -> Any:
    """Return a key of a dict if it is a scalar, else a placeholder; TypeError for keys that Python cannot hash.

    Other keys are unsafe to hash. Deep tuples overflow the C stack. Hashes of long integers and of tuples of numbers
    can be predicted, and a dict of colliding keys takes hours to fill. Hashes of strings are randomized.
    """
    kind = type(key)
    if kind in _SCALARS or kind is Placeholder or (kind is int and key.bit_length() <= _MAX_KEY_BITS):
        return key
    if kind in _UNHASHABLE:
        raise TypeError
    return Placeholder(kind.__name__, (key,))


def safe_frozenset(items: Iterable[Any] = ()) -> frozenset[Any]:
    """Return a frozenset of items that are safe to hash."""
    return frozenset(map(hashable, items))


class TruncatedPickleError(ContainerError):
    """The data ends inside the pickle."""


# Values by module and name. A pickle can call plain functions and placeholders; all other values are only passed on.
Globals = Mapping[tuple[str, str], Any]


def unpickle(
    data: bytes,
    where: str,
    globals_: Globals | None = None,
    persistent_load: Callable[[Any], Any] | None = None,
    max_memory: int = MAX_MEMORY,
) -> tuple[Any, int]:
    """Read one pickle; return the value, and the position after the pickle.

    Args:
        data: The pickle; more bytes may follow it.
        where: Name of the pickle in messages.
        globals_: Values of the globals that the pickle may refer to.
        persistent_load: Converts a persistent id, a reference to data outside of the pickle.
        max_memory: Bytes that its values may take, as estimated by opcode.

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
        """Execute opcodes up to STOP and return the value; EOFError if the data is truncated."""
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

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def take(self, count: int | None = None) -> list[Any]:
        """Remove and return the last `count` values, or with None, all values since the last MARK."""
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

    def mark(self, _: None) -> None:
        if len(self.outer) >= MAX_MARKS:
            raise PickleError(f"nested more than {MAX_MARKS} deep", NEXT_STEP)
        self.outer.append(self.stack)
        self.stack = []

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def find_global(self, module: Any, name: Any) -> Any:
        """Look up a global in the table; nothing is imported."""
        if type(module) is not str or type(name) is not str:
            raise PickleError("a global without a name", DAMAGED)
        try:
            return self.globals[module, name]
        except KeyError:
            raise hostile_error(full_name(module, name)) from None

    def call(self, function: Any, arguments: Any) -> None:
        """Push the result of a function of the table, or for a placeholder, a new placeholder."""
        if type(arguments) is not tuple:
            raise PickleError(f"a call with a {type(arguments).__name__} as arguments", DAMAGED)
        if type(function) is Placeholder:
            self.stack.append(Placeholder(function.name, arguments))
            return
        if type(function) is not FunctionType:
            raise PickleError(f"a call of a {type(function).__name__}", NEXT_STEP)
        for argument in arguments:
            if type(argument) in _CONTAINERS:
                self.arguments += len(argument)
            elif type(argument) in _STRINGS:
                self.arguments += len(argument) >> 4  # a copied byte takes a sixteenth of the memory of an item
            if self.arguments > _MAX_ARGUMENTS:
                raise PickleError(f"calls with more than {_MAX_ARGUMENTS} arguments in total", NEXT_STEP)
        self.stack.append(function(*arguments))

    def newobj_ex(self, _: None) -> None:
        function, arguments, keywords = self.take(3)
        self.call(function, (arguments, keywords) if type(function) is Placeholder else arguments)

    def obj(self, _: None) -> None:
        function, *arguments = self.take()
        self.call(function, tuple(arguments))

    def build(self, _: None) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is Placeholder:
            target.state = state
        elif type(target) is not dict:
            raise PickleError(f"state for a {type(target).__name__}, which takes none", NEXT_STEP)
        # The state of a dict is the `_metadata` of a state dict: version numbers of modules, ignored.

    def binpersid(self, _: None) -> None:
        if self.persistent_load is None:
            raise PickleError("a reference to data outside the pickle")
        self.push(self.persistent_load(self.stack.pop()))


# A function that executes an opcode, given the machine and the opcode's argument.
_Handler = Callable[[_Machine, Any], object]


def _building(make: Callable[[list[Any]], Any]) -> _Handler:
    """Return the handler of opcodes that pop values and push the container that `make` returns for them."""
    return lambda machine, count: machine.push(make(machine.take(count)))


def _extending(kind: type, extend: Callable[[Any, list[Any]], Any]) -> _Handler:
    """Return the handler of opcodes that pop values and add them to the container below them, of type `kind`."""

    def handler(machine: _Machine, count: int | None) -> None:
        items, target = machine.take(count), machine.stack[-1]
        if type(target) is Placeholder:
            # An object may have items of two kinds. Those of the second are ignored.
            target.content = kind() if target.content is None else target.content
            target = target.content if type(target.content) is kind else kind()
        if type(target) is not kind:
            raise PickleError(f"items for a {type(target).__name__}, which takes none", NEXT_STEP)
        extend(target, items)

    return handler


def _set_items(target: dict[Any, Any], items: list[Any]) -> None:
    """Set the items of a dict, given as alternating keys and values."""
    if len(items) % 2:
        raise PickleError("a key without a value", DAMAGED)
    for key, value in zip(items[::2], items[1::2], strict=True):
        target[hashable(key)] = value


def _make_dict(items: list[Any]) -> dict[Any, Any]:
    result: dict[Any, Any] = {}
    _set_items(result, items)
    return result


def _update_set(target: set[Any], items: list[Any]) -> None:
    target.update(map(hashable, items))


def _refuse(machine: _Machine, _: None) -> None:
    raise PickleError(f"opcode 0x{machine.data[machine.pos]:02x}, which no checkpoint needs", NEXT_STEP)


_STOP = ord(".")
# Handlers of opcodes; the names in comments are those of `pickletools`.
_BY_OPCODES: dict[str, _Handler] = {
    "\x80\x95": lambda m, _: None,  # PROTO, FRAME: the argument has been checked and has no effect
    # Constants, numbers and strings.
    "N\x88\x89)KMJIL\x8a\x8bFG\x8cX\x8dUTVCB\x8e\x96": _Machine.push,
    # Stack and memo.
    "(": _Machine.mark,
    "0": lambda m, _: m.take(1 if m.stack else None),  # POP, which removes the last mark if the stack is empty
    "1": lambda m, _: m.take(),  # POP_MARK
    "2": lambda m, _: m.push(m.stack[-1]),  # DUP
    "qrp": _Machine.put,
    "\x94": lambda m, _: m.put(len(m.memo)),  # MEMOIZE
    "hjg": lambda m, index: m.push(m.memo[index]),  # BINGET, LONG_BINGET, GET
    # Containers.
    "t\x85\x86\x87": _building(tuple),
    "l]": _building(list),
    "d}": _building(_make_dict),
    "\x8f": _building(set),  # EMPTY_SET
    "\x91": _building(safe_frozenset),
    "ae": _extending(list, list.extend),
    "su": _extending(dict, _set_items),
    "\x90": _extending(set, _update_set),
    # Globals and calls. For functions of the table, cls(*arguments) and cls.__new__(cls, *arguments) are the same.
    "c": lambda m, names: m.push(m.find_global(*names)),  # GLOBAL
    "\x93": lambda m, _: m.push(m.find_global(*m.take(2))),  # STACK_GLOBAL
    "R\x81": lambda m, _: m.call(*m.take(2)),  # REDUCE, NEWOBJ
    "\x92": _Machine.newobj_ex,
    "i": lambda m, names: m.call(m.find_global(*names), tuple(m.take())),  # INST
    "o": _Machine.obj,
    "b": _Machine.build,
    "Q": _Machine.binpersid,
}
_HANDLERS: list[_Handler] = by_opcode(_BY_OPCODES, _refuse)
