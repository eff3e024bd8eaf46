"""State dicts in a checkpoint, and their tensor names without the segments that wrappers such as DDP add."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import dropwhile
from types import MappingProxyType
from typing import NamedTuple

from converter.errors import ContainerError, LayoutError, printable
from converter.tensors.tensor_info import Contents, TensorInfo

# Wrappers: name segments that torch.compile and FSDP add at any depth.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Training states nest state dicts a few levels deep.
_MAX_DEPTH = 4
# A model may be nested a few modules deep in another one. Each level copies all names.
_MAX_PREFIXES = 16


class StateDict(NamedTuple):
    """Named tensors of one dict in a file."""

    path: str  # The keys of the dict in the file, joined by dots; empty for the top level
    tensors: Mapping[str, TensorInfo]  # The tensors by name
    prefix: str | None = None  # The prefix of --prefix, without segments of wrappers
    unselected: Mapping[str, TensorInfo] = MappingProxyType({})  # The tensors outside the prefix

    def under(self, prefix: str) -> StateDict:
        """Return the state dict of the tensors whose names begin with a prefix, with or without wrappers.

        The prefix `.` means an empty one.
        """
        prefix = prefix.rstrip(".") + "." if prefix.strip(".") else ""
        selected = {
            name: tensor
            for name, tensor in self.tensors.items()
            if name.startswith(prefix) or _without_wrappers(name).startswith(prefix)
        }
        unselected = {name: tensor for name, tensor in self.tensors.items() if name not in selected}
        return StateDict(self.path, selected, _without_wrappers(prefix), unselected)


def state_dicts(contents: Contents) -> list[StateDict]:
    """Return all dicts that have named tensors, outer dicts first."""
    return list(_search(contents, "", 0))


def _search(contents: Contents, path: str, depth: int) -> Iterator[StateDict]:
    tensors = {key: value for key, value in contents.items() if isinstance(key, str) and isinstance(value, TensorInfo)}
    if tensors:
        yield StateDict(path, tensors)
    if depth < _MAX_DEPTH:
        for key, value in contents.items():
            if isinstance(value, dict):
                yield from _search(value, f"{path}.{key}" if path else str(key), depth + 1)


def largest_state_dict(candidates: list[StateDict], source: str) -> StateDict:
    """Return the state dict with the most tensors; LayoutError if several have as many."""
    num_tensors = max(len(candidate.tensors) for candidate in candidates)
    largest = [candidate for candidate in candidates if len(candidate.tensors) == num_tensors]
    if len(largest) > 1:
        paths = [printable(candidate.path) or "." for candidate in largest]
        raise LayoutError(
            f"{source}: holds {len(paths)} state dicts of {num_tensors} tensors: {', '.join(paths)}",
            f"choose one, such as --state-dict {paths[0]}",
        )
    return largest[0]


def unwrapped_names(tensors: Mapping[str, TensorInfo], source: str) -> Mapping[str, TensorInfo]:
    """Remove the segments of torch.compile, DDP and FSDP from names; ContainerError if two names become equal."""
    if not any(segment in name for name in tensors for segment in (*_WRAPPERS, "module.")):
        return tensors
    return _renamed(tensors, {name: _without_wrappers(name) for name in tensors}, source)


def _without_wrappers(name: str) -> str:
    segments = [segment for segment in name.split(".") if segment not in _WRAPPERS]
    # DistributedDataParallel adds `module` at the start. At other positions, it belongs to the model.
    return ".".join([*dropwhile(lambda segment: segment == "module", segments[:-1]), *segments[-1:]])


def without_common_prefixes(
    tensors: Mapping[str, TensorInfo], source: str
) -> Iterator[tuple[str, Mapping[str, TensorInfo]]]:
    """Yield the tensors without 0, 1, 2, ... leading name segments that all share, and the prefix that was removed."""
    prefix = ""
    for _ in range(_MAX_PREFIXES if tensors else 0):
        yield prefix, tensors
        segments = {name.partition(".")[0] for name in tensors}
        if len(segments) > 1 or any("." not in name for name in tensors):
            return
        segment = segments.pop() + "."
        prefix += segment
        tensors = _renamed(tensors, {name: name.removeprefix(segment) for name in tensors}, source)


def _renamed(tensors: Mapping[str, TensorInfo], names: dict[str, str], source: str) -> dict[str, TensorInfo]:
    """Return the tensors by new names. `TensorInfo.key` keeps the name in the file, for messages."""
    result: dict[str, TensorInfo] = {}
    for name, tensor in tensors.items():
        if names[name] in result:
            raise ContainerError(
                f"{source}: {name!r} and {result[names[name]].key!r} are both {names[name]!r} without their wrappers",
                "two models were saved into one dict: save each into a file of its own",
            )
        result[names[name]] = tensor
    return result
