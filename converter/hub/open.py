"""Opening a repository on the hub that an address names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from converter.hub.address import Address
from converter.hub.repository import Repository


def open_repository(address: Address, is_complete: Callable[[Path], bool]) -> Repository:
    """Open a repository at its revision; no other hub is asked if this one cannot be reached.

    Args:
        address: The hub, the repository and the revision.
        is_complete: Whether a folder in a hub's cache has all requested files.

    Raises:
        UnreachableError: Neither the hub nor its cache has the repository.
        HubError: The hub refuses.
    """
    # Imported here: each library takes a fifth of a second.
    if address.hub == "ms":
        from converter.hub.modelscope import ModelScope

        return ModelScope(address.repository, address.revision, is_complete)
    from converter.hub.huggingface import HuggingFace

    return HuggingFace(address.repository, address.revision, is_complete)
