"""What a user calls a place on a hub."""

from __future__ import annotations

import re
from typing import NamedTuple

from converter.errors import UsageError

SCHEMES = ("hf", "ms")
# What --hub takes, spelt out or as in an address.
_HUBS = {"hf": "hf", "huggingface": "hf", "ms": "ms", "modelscope": "ms"}

# hf://org/name[@revision][/path]. A revision with slashes is one that Hugging Face makes itself (refs/pr/1).
_ADDRESS = re.compile(
    r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>refs/(pr|convert)/[\w.-]+|[^/@]+))?(/(?P<path>.*))?"
)


class HubOptions(NamedTuple):
    """What a user says of remote sources: the options --revision, --hub and --download."""

    revision: str | None = None
    hub: str | None = None
    download: bool = False


class Address(NamedTuple):
    """A place on a hub: `hub` is hf, ms or, where the user has not said, empty; `path` a file, a folder or empty."""

    hub: str
    repository: str
    revision: str | None
    path: str


def is_address(source: str) -> bool:
    """Whether SOURCE names a hub by its scheme."""
    return source.partition("://")[0] in SCHEMES and "://" in source


def looks_like_repository(source: str) -> bool:
    """Whether SOURCE could be `org/name[@revision][/file]`, where no such file exists here."""
    return _ADDRESS.fullmatch(source) is not None


def parse(source: str, hub_options: HubOptions) -> Address:
    """The address that SOURCE and the options give together; UsageError where they disagree."""
    scheme, found, rest = source.partition("://") if is_address(source) else ("", "", source)
    match = _ADDRESS.fullmatch(rest)
    if match is None:
        raise UsageError(f"{source}: expected {scheme or 'hf'}://org/name[@revision][/file]")
    if ".." in (match["path"] or "").split("/"):
        raise UsageError(f"{source}: the path leaves the repository")
    if hub_options.hub is not None and hub_options.hub not in _HUBS:
        raise UsageError(f"--hub {hub_options.hub}: expected hf or modelscope")
    chosen = _HUBS[hub_options.hub] if hub_options.hub is not None else ""
    if found and chosen and chosen != scheme:
        raise UsageError(f"--hub {hub_options.hub}: {source} names the other hub")
    if match["revision"] and hub_options.revision and match["revision"] != hub_options.revision:
        raise UsageError(f"--revision {hub_options.revision}: {source} names another revision")
    revision = match["revision"] or hub_options.revision
    return Address(scheme or chosen, match["id"], revision, (match["path"] or "").strip("/"))
