"""Values that a pickle may build besides plain ones, and the check of dict keys."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

MAX_KEY_BITS = 64  # of an integer used as a key

STRINGS = frozenset({str, bytes})
_SCALARS = frozenset({float, bool, type(None)}) | STRINGS
_UNHASHABLE = frozenset({list, dict, set})


class Placeholder:
    """Stands for an object that is not created: an instance of a class, or a class or function itself.

    It holds what the pickle gives to the object and does nothing with it. Two placeholders are never equal.

    Attributes:
        name: The full name of the class or function.
        arguments: The arguments of the call that would create the object; None for a class or function.
        state: What `__setstate__` would get.
        content: The items of a subclass of dict, list or set; None for all others.
    """

    __slots__ = ("arguments", "content", "name", "state")

    def __init__(self, name: str, arguments: tuple[Any, ...] | None = None) -> None:
        self.name = name
        self.arguments = arguments
        self.state: Any = None
        self.content: Any = None


def hashable(key: Any) -> Any:
    """Return `key` if it is a scalar, else a placeholder for it; TypeError if Python cannot hash it either.

    Other keys are unsafe to hash. Deep tuples overflow the C stack. Hashes of long integers and of tuples of numbers
    can be predicted, and a dict of colliding keys takes hours to fill. Hashes of strings are randomized.
    """
    kind = type(key)
    if kind in _SCALARS or kind is Placeholder or (kind is int and key.bit_length() <= MAX_KEY_BITS):
        return key
    if kind in _UNHASHABLE:
        raise TypeError
    return Placeholder(kind.__name__, (key,))


def safe_frozenset(items: Iterable[Any] = ()) -> frozenset[Any]:
    """A frozenset of items that are safe to hash."""
    return frozenset(map(hashable, items))
