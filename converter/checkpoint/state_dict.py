"""Finding the state dict in what a file holds, and the names it would have without the wrappers around its model."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile
from typing import NamedTuple

from converter.errors import ContainerError, LayoutError, printable
from converter.tensors.tensor_info import Contents, TensorInfo

# Segments that torch.compile and FSDP put into names, wherever the wrapped module sits.
_INNER = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Training states nest a few levels; nothing deeper is a state dict.
_DEEPEST = 4
# Models lie a few modules deep in others; the names of all tensors are copied for each.
_MOST_PREFIXES = 16


class StateDict(NamedTuple):
    """Named tensors at one place in a file: `path` is the keys that lead there, dotted; empty at the top."""

    path: str
    tensors: dict[str, TensorInfo]


def state_dicts(contents: Contents) -> list[StateDict]:
    """Every dict in a file that holds tensors under names, outermost first."""
    return list(_search(contents, "", 0))


def _search(contents: Contents, path: str, depth: int) -> Iterator[StateDict]:
    tensors = {key: value for key, value in contents.items() if isinstance(key, str) and isinstance(value, TensorInfo)}
    if tensors:
        yield StateDict(path, tensors)
    if depth < _DEEPEST:
        for key, value in contents.items():
            if isinstance(value, dict):
                yield from _search(value, f"{path}.{key}" if path else str(key), depth + 1)


def largest_state_dict(entries: list[StateDict], source: str) -> StateDict:
    """The one that holds most tensors; LayoutError where several do."""
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
    """The tensors by names without what torch.compile, DDP and FSDP add; ContainerError where two become one."""
    if not any(segment in name for name in tensors for segment in (*_INNER, "module.")):
        return tensors
    return _renamed(tensors, {name: _without_wrappers(name) for name in tensors}, source)


def _without_wrappers(name: str) -> str:
    segments = [segment for segment in name.split(".") if segment not in _INNER]
    # DistributedDataParallel adds this to the whole model's names; further in it may be the model's own word.
    wrappers = sum(1 for _ in takewhile(lambda segment: segment == "module", segments[:-1]))
    return ".".join(segments[wrappers:])


def without_common_prefixes(tensors: dict[str, TensorInfo], source: str) -> Iterator[tuple[str, dict[str, TensorInfo]]]:
    """The tensors with their common leading segments removed, one more each time, and the prefix removed so far."""
    prefix = ""
    for _ in range(_MOST_PREFIXES if tensors else 0):
        yield prefix, tensors
        heads = {name.partition(".")[0] for name in tensors}
        if len(heads) > 1 or any("." not in name for name in tensors):
            return
        head = heads.pop() + "."
        prefix += head
        tensors = _renamed(tensors, {name: name.removeprefix(head) for name in tensors}, source)


def _renamed(tensors: dict[str, TensorInfo], names: dict[str, str], source: str) -> dict[str, TensorInfo]:
    """The tensors under new names; their `key` stays the one in the file, which is what messages show."""
    result: dict[str, TensorInfo] = {}
    for name, tensor in tensors.items():
        if names[name] in result:
            raise ContainerError(
                f"{source}: {name!r} and {result[names[name]].key!r} are both {names[name]!r} without their wrappers",
                "two models were saved into one dict: save each into a file of its own",
            )
        result[names[name]] = tensor
    return result
