"""Checkpoints on Hugging Face and ModelScope, through the hubs' own libraries.

What a user has set for them holds here too: tokens, endpoints (mirrors), caches, proxies and the offline mode. They are
imported for remote sources alone: a fifth of a second each.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from converter.errors import HubError, UnreachableError
from converter.hub.address import Address

if TYPE_CHECKING:
    from converter.hub.repository import Repository


def open_repository(address: Address, holds: Callable[[Path], bool]) -> Repository:
    """The repository at its revision; its notes tell how it was found.

    Where no hub was named, Hugging Face is asked first, and ModelScope if that cannot be reached. Raises HubError.
    `holds` tells of a repository's folder in a hub's cache whether all that is wanted is there.
    """
    if address.hub == "ms":
        return _modelscope(address, holds)
    from converter.hub.huggingface import HuggingFace

    try:
        return HuggingFace(address.repository, address.revision, holds)
    except UnreachableError as unreachable:
        if address.hub:
            raise
        try:
            # The branches are called otherwise there; what is pinned on one hub is unknown to the other.
            found = _modelscope(address, holds)
        except UnreachableError as other:
            raise UnreachableError(f"{unreachable.what}, and {other.what}", unreachable.why) from None
        except HubError as error:
            raise HubError(f"{unreachable.what}", f"{error}") from None
        found.notes.insert(0, f"{unreachable.what}: taken from ModelScope instead")
        return found


def _modelscope(address: Address, holds: Callable[[Path], bool]) -> Repository:
    from converter.hub.modelscope import ModelScope

    return ModelScope(address.repository, address.revision, holds)
