"""Addresses of repositories and files on the hubs, hf://org/name[@revision][/path], and opening them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from converter.errors import UsageError
from converter.options import HubOptions

if TYPE_CHECKING:
    from converter.hub.repository import Repository

# The scheme for each value of --hub.
_SCHEME_OF_HUB = {"hf": "hf", "huggingface": "hf", "ms": "ms", "modelscope": "ms"}

# A revision has no slash, except those that Hugging Face creates (refs/pr/1).
_ADDRESS = re.compile(
    r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>refs/(pr|convert)/[\w.-]+|[^/@]+))?(/(?P<path>.*))?"
)


class Address(NamedTuple):
    """A file or a folder on a hub."""

    hub: str  # "hf" or "ms"
    repository: str  # "org/name"
    revision: str | None  # A branch, a tag or a commit; None for the main branch
    path: str  # A file or a folder in the repository; empty for its root


def is_address(source: str) -> bool:
    """Return whether SOURCE begins with a hub's scheme."""
    return source.startswith(("hf://", "ms://"))


def looks_like_repository(source: str) -> bool:
    """Return whether SOURCE has the form `org/name[@revision][/path]`."""
    return _ADDRESS.fullmatch(source) is not None


def parse_address(source: str, hub_options: HubOptions) -> Address:
    """Combine SOURCE and the hub options into an address; UsageError if they contradict each other."""
    scheme, _, rest = source.partition("://") if is_address(source) else ("", "", source)
    match = _ADDRESS.fullmatch(rest)
    if match is None:
        raise UsageError(f"{source}: expected {scheme or 'hf'}://org/name[@revision][/file]")
    if ".." in (match["path"] or "").split("/"):
        raise UsageError(f"{source}: the path leaves the repository")
    option_scheme = _scheme(hub_options.hub, "--hub") if hub_options.hub is not None else ""
    if scheme and option_scheme and scheme != option_scheme:
        raise UsageError(f"--hub {hub_options.hub}: {source} names the other hub")
    if match["revision"] and hub_options.revision and match["revision"] != hub_options.revision:
        raise UsageError(f"--revision {hub_options.revision}: {source} names another revision")
    revision = match["revision"] or hub_options.revision
    hub = scheme or option_scheme or _scheme(os.environ.get("DSOCR_HUB") or "hf", "DSOCR_HUB")
    return Address(hub, match["id"], revision, (match["path"] or "").strip("/"))


def _scheme(hub: str, setting: str) -> str:
    if hub not in _SCHEME_OF_HUB:
        raise UsageError(f"{setting} {hub}: expected hf or modelscope")
    return _SCHEME_OF_HUB[hub]


def open_repository(address: Address, is_complete: Callable[[Path], bool]) -> Repository:
    """Open a repository on the hub that its address names; no other hub is tried.

    Args:
        address: The hub, the repository and the revision.
        is_complete: Returns whether a folder in the hub's cache has all requested files.

    Raises:
        HubError: The hub refuses, or neither the hub nor its cache has the repository.
    """
    # Imported here because each library takes 0.2 s.
    if address.hub == "ms":
        from converter.hub.modelscope import ModelScopeRepository

        return ModelScopeRepository(address.repository, address.revision, is_complete)
    from converter.hub.huggingface import HuggingFaceRepository

    return HuggingFaceRepository(address.repository, address.revision, is_complete)
