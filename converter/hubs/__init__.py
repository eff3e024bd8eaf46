"""Checkpoints on Hugging Face and ModelScope, through the hubs' own libraries.

What a user has set for them holds here too: tokens, endpoints (mirrors), caches, proxies and the offline mode. They are
imported for remote sources alone: a fifth of a second each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from converter.errors import HubError, UnreachableError
from converter.hubs.address import Address

if TYPE_CHECKING:
    from converter.hubs.repository import Repository


def open_repository(address: Address) -> tuple[Repository, list[str]]:
    """The repository at its revision, and what the user should know of how it was found.

    Where no hub was named, Hugging Face is asked first, and ModelScope if that cannot be reached. Raises HubError.
    """
    if address.hub == "ms":
        return _modelscope(address), []
    try:
        return _hugging_face(address)
    except UnreachableError as unreachable:
        if address.hub:
            raise
        try:
            # The branches are called otherwise there; what is pinned on one hub is unknown to the other.
            return _modelscope(address), [f"{unreachable.what}: taken from ModelScope instead"]
        except UnreachableError:
            raise unreachable from None
        except HubError as error:
            raise HubError(f"{unreachable.what}\n{error}") from None


def _hugging_face(address: Address) -> tuple[Repository, list[str]]:
    from converter.hubs.huggingface import HuggingFace

    found = HuggingFace(address.repository, address.revision)
    return found, found.notes


def _modelscope(address: Address) -> Repository:
    from converter.hubs.modelscope import ModelScope

    return ModelScope(address.repository, address.revision)
