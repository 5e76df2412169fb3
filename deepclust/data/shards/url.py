"""A shard in object storage as a value: its URL, name and folder.

A URL may contain credentials (user:password@, a signed ?query). They are used for reading, and
`str` leaves them out of messages (`deepclust.errors`). Nothing here opens anything.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias
from urllib.parse import unquote, urlsplit

from deepclust.errors import DataError, redact, remember

__all__ = ["Source", "Url", "common_folder", "is_url", "names_of", "redact"]

_URL = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.-]*://")
_HTTP = ("http", "https")


def is_url(text: str | Path) -> bool:
    """Return whether this is a URL and not a path."""
    return _URL.match(os.fspath(text)) is not None


@dataclass(frozen=True)
class Url:
    """A file or folder behind a URL, with its `size` in bytes (-1 while unknown).

    Like a `Path` it has a name, a parent and `/`, and can be put into a message. Unlike a `Path`
    it cannot be opened by accident.
    """

    text: str
    size: int = -1

    def __post_init__(self) -> None:
        """Keep its secrets out of whatever a library says about it."""
        if "@" in self.text or "?" in self.text:
            remember(self.text)

    def __str__(self) -> str:
        """Return the URL without its secrets."""
        return redact(self.text)

    __repr__ = __str__

    def __truediv__(self, name: str) -> Url:
        """Return a file of this folder, with the folder's signed query."""
        place, query = self._split()
        return Url(f"{place.rstrip('/')}/{name}{query}")

    @property
    def protocol(self) -> str:
        """The part before ://, in lower case."""
        return self.text.partition("://")[0].lower()

    @property
    def over_http(self) -> bool:
        """Whether a web server answers, where "?" begins a query and "%20" is a space."""
        return self.protocol in _HTTP

    @property
    def name(self) -> str:
        """The base name, as on a disk."""
        last = self._split()[0].rstrip("/").rpartition("/")[2]
        name = unquote(last) if self.over_http else last
        if "/" in name or "\0" in name:
            raise DataError(f"{self}: {name!r} is not a valid name for a shard. Rename it.")
        return name

    @property
    def parent(self) -> Url:
        """Its folder."""
        place, query = self._split()
        return Url(place.rstrip("/").rpartition("/")[0] + query)

    @property
    def has_parent(self) -> bool:
        """Whether this is below the root of its host or bucket."""
        return self._split()[0].rstrip("/").count("/") > 2

    def _split(self) -> tuple[str, str]:
        """Return the URL up to its query, and the query with its "?"."""
        try:
            query = urlsplit(self.text).query if self.over_http else ""
        except ValueError as error:  # such as "http://[::1/x.tar"
            raise DataError(f"{self} is not a URL: {error}. Correct it.") from error
        return (self.text.partition("?")[0], f"?{query}") if query else (self.text, "")


Source: TypeAlias = Path | Url


def common_folder(shards: Sequence[Source]) -> Source:
    """Return the deepest folder that holds all shards, the place of dataset.json and index."""
    first = shards[0].parent
    if isinstance(first, Path):
        return Path(os.path.commonpath([str(shard.parent) for shard in shards]))
    folder = first
    while any(not f"{shard}".startswith(f"{folder}/") for shard in shards) and folder.has_parent:
        folder = folder.parent
    return folder


def names_of(shards: Sequence[Source]) -> list[str]:
    """Return the names by which an index knows shards, in their order.

    They are the base names. Files of which two share one have their paths below the common folder.
    """
    names = [shard.name for shard in shards]
    folder = common_folder(shards)
    if len(set(names)) == len(names) or isinstance(folder, Url):
        return names
    return [os.path.relpath(str(shard), folder) for shard in shards]
