"""Values that a pickle may build besides plain ones, and the check of dict keys."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from converter.formats.pickle_opcodes import NEXT_STEP, PickleError

MAX_KEY = 64  # items of a tuple used as a key
MAX_KEY_BITS = 64  # of an integer used as a key

STRINGS = frozenset({str, bytes})
_SCALARS = frozenset({float, bool, type(None)}) | STRINGS


class Refused(NamedTuple):
    """A global that is known but not supported, with the reason for the message."""

    reason: str


class Node:
    """An inert object of a foreign class: the name of the class, and the state that BUILD sets."""

    __slots__ = ("name", "state")

    def __init__(self, name: str) -> None:
        self.name = name
        self.state: Any = None


def hashable(key: Any) -> Any:
    """Return `key` if it is a scalar or a short tuple of strings, else raise PickleError.

    Other keys are unsafe to hash. Deep tuples overflow the C stack. Hashes of long integers and of tuples of numbers
    can be predicted, and a dict of colliding keys takes hours to fill. Hashes of strings are randomized.
    """
    kind = type(key)
    if kind in _SCALARS or (kind is int and key.bit_length() <= MAX_KEY_BITS):
        return key
    if kind is tuple and len(key) <= MAX_KEY and all(type(item) in STRINGS for item in key):
        return key
    if kind is int:
        raise PickleError(f"an integer of {key.bit_length()} bits as a key", NEXT_STEP)
    raise PickleError(f"a {type(key).__name__} as a key", NEXT_STEP)


def safe_frozenset(items: Iterable[Any] = ()) -> frozenset[Any]:
    """A frozenset of items that are safe to hash, else PickleError."""
    return frozenset(map(hashable, items))
