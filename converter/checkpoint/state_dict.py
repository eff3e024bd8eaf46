"""State dicts in a checkpoint, and their names without those that wrappers such as DDP add."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile
from typing import NamedTuple

from converter.errors import ContainerError, LayoutError, printable
from converter.tensors.tensor_info import Contents, TensorInfo

# Name segments that torch.compile and FSDP add at any depth.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Training states nest state dicts a few levels deep.
_MAX_DEPTH = 4
# Models are a few modules deep in others. The names of all tensors are copied for each level.
_MAX_PREFIXES = 16


class StateDict(NamedTuple):
    """Named tensors of one dict in a file; `path` is the dotted keys of the dict, empty at the top."""

    path: str
    tensors: dict[str, TensorInfo]


def state_dicts(contents: Contents) -> list[StateDict]:
    """Return every dict that has named tensors, outermost first."""
    return list(_search(contents, "", 0))


def _search(contents: Contents, path: str, depth: int) -> Iterator[StateDict]:
    tensors = {key: value for key, value in contents.items() if isinstance(key, str) and isinstance(value, TensorInfo)}
    if tensors:
        yield StateDict(path, tensors)
    if depth < _MAX_DEPTH:
        for key, value in contents.items():
            if isinstance(value, dict):
                yield from _search(value, f"{path}.{key}" if path else str(key), depth + 1)


def largest_state_dict(entries: list[StateDict], source: str) -> StateDict:
    """Return the state dict with most tensors; LayoutError if several have as many."""
    most = max(len(entry.tensors) for entry in entries)
    rivals = [entry for entry in entries if len(entry.tensors) == most]
    if len(rivals) > 1:
        paths = [printable(entry.path) or "." for entry in rivals]
        raise LayoutError(
            f"{source}: holds {len(paths)} state dicts of {most} tensors: {', '.join(paths)}",
            f"choose one, such as --state-dict {paths[0]}",
        )
    return rivals[0]


def unwrapped_names(tensors: dict[str, TensorInfo], source: str) -> dict[str, TensorInfo]:
    """Remove the segments of torch.compile, DDP and FSDP from names; ContainerError if two names become equal."""
    if not any(segment in name for name in tensors for segment in (*_WRAPPERS, "module.")):
        return tensors
    return _renamed(tensors, {name: _without_wrappers(name) for name in tensors}, source)


def _without_wrappers(name: str) -> str:
    segments = [segment for segment in name.split(".") if segment not in _WRAPPERS]
    # DistributedDataParallel adds `module` in front; further in it may be the model's own.
    wrappers = sum(1 for _ in takewhile(lambda segment: segment == "module", segments[:-1]))
    return ".".join(segments[wrappers:])


def without_common_prefixes(tensors: dict[str, TensorInfo], source: str) -> Iterator[tuple[str, dict[str, TensorInfo]]]:
    """Yield the prefix removed and the tensors, with one more of their common leading segments removed each time."""
    prefix = ""
    for _ in range(_MAX_PREFIXES if tensors else 0):
        yield prefix, tensors
        heads = {name.partition(".")[0] for name in tensors}
        if len(heads) > 1 or any("." not in name for name in tensors):
            return
        head = heads.pop() + "."
        prefix += head
        tensors = _renamed(tensors, {name: name.removeprefix(head) for name in tensors}, source)


def _renamed(tensors: dict[str, TensorInfo], names: dict[str, str], source: str) -> dict[str, TensorInfo]:
    """Rename tensors; their `key`, which messages show, stays the one in the file."""
    result: dict[str, TensorInfo] = {}
    for name, tensor in tensors.items():
        if names[name] in result:
            raise ContainerError(
                f"{source}: {name!r} and {result[names[name]].key!r} are both {names[name]!r} without their wrappers",
                "two models were saved into one dict: save each into a file of its own",
            )
        result[names[name]] = tensor
    return result
