"""Opens a repository on a hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from converter.hub.address import Address
from converter.hub.repository import Repository


def open_repository(address: Address, is_complete: Callable[[Path], bool]) -> Repository:
    """Open a repository on the hub that its address names; no other hub is tried.

    Args:
        address: The hub, the repository and the revision.
        is_complete: Returns whether a folder in a hub's cache has all requested files.

    Raises:
        UnreachableError: Neither the hub nor its cache has the repository.
        HubError: The hub refuses.
    """
    # Imported here because each library takes 0.2 s.
    if address.hub == "ms":
        from converter.hub.modelscope import ModelScopeRepository

        return ModelScopeRepository(address.repository, address.revision, is_complete)
    from converter.hub.huggingface import HuggingFaceRepository

    return HuggingFaceRepository(address.repository, address.revision, is_complete)
