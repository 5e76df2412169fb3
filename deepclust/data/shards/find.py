"""Turn what a user gives as shards into files: a folder, one tar, or a brace pattern.

Each may be a path or a URL (s3://, https://, ...), whose bytes `remote.py` reads. Nothing is
unpickled and nothing goes through a shell. The `pipe:` form of WebDataset is always refused, as
`WDS_SECURE=1` does there.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from deepclust.data.shards import remote
from deepclust.data.shards.url import Source, Url, common_folder, is_url
from deepclust.errors import DataError

__all__ = ["common_folder", "expand"]

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"^(\d+)\.\.(\d+)$")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def expand(shards: str | Path) -> list[Source]:
    """Return the full paths of a folder, a file or a pattern "dir/train-{000000..000009}.tar".

    A URL that ends in .tar is a shard, any other URL a folder that the storage lists. Their sizes
    are requested here. Shards are ordered by base name, so moving the folder changes no sample id.

    Raises DataError when nothing matches, a shard is missing or unreachable, two shards share a
    base name, or a pipe is given.
    """
    text = os.fspath(shards)
    if text.startswith(("pipe:", "file:", "local:")):
        raise DataError(
            f"shards {text!r}: pipes are not supported, and a file is given by its plain path. "
            "Give a folder, a pattern like 'dir/train-{000000..000009}.tar', or a URL (s3://, https://)."
        )
    if is_url(text):
        return _with_unique_names(list(_remote_shards(text)))
    path = Path(text)
    paths = _in_folder(path) if path.is_dir() else list(_matches(text))
    return _with_unique_names([shard.absolute() for shard in paths])


def _remote_shards(text: str) -> Iterator[Url]:
    """Yield the shards of a URL, or of every URL that its braces make, with their sizes."""
    urls = [Url(one) for one in _expand_braces(text)]
    yield from remote.with_sizes(url for url in urls if url.name.endswith(".tar"))
    for folder in (url for url in urls if not url.name.endswith(".tar")):
        listed = remote.list_folder(folder)
        if not listed:
            raise DataError(
                f"no shards (*.tar) are listed in {folder}. For a server that cannot list, give a "
                "pattern like 'https://host/dir/train-{000000..000009}.tar'."
            )
        yield from remote.with_sizes(listed)


def _in_folder(folder: Path) -> list[Path]:
    try:
        names = sorted(entry.name for entry in os.scandir(folder))
    except OSError as error:
        raise DataError(f"cannot read the folder {folder}: {error.strerror}.") from error
    visible = [name for name in names if not name.startswith(".")]
    shards = [folder / name for name in visible if name.endswith(".tar")]
    if not shards:
        raise DataError(f"no shards (*.tar) in {folder}. {_advice(visible)}")
    return shards


def _advice(names: list[str]) -> str:
    compressed = [name for name in names if name.endswith(_COMPRESSED)]
    if compressed:
        return f"Unpack the compressed ones first, for example `gunzip {compressed[0]}`."
    return "`deepclust pack SOURCE OUT` makes shards from an image folder or a data set."


def _matches(pattern: str) -> Iterator[Path]:
    names = [pattern] if Path(pattern).exists() else _expand_braces(pattern)
    for name in names:
        if not Path(name).is_file():
            raise DataError(
                f"no shard {name}"
                + ("" if name == pattern else f" (required by the pattern {pattern})")
                + ". Give a folder of *.tar, or a pattern like 'dir/train-{000000..000009}.tar'."
            )
        yield Path(name)


def _expand_braces(pattern: str) -> Iterator[str]:
    """Expand {000..009} (zero-padded like its ends) and {a,b} from the left, as a shell does."""
    match = _BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    before, after = pattern[: match.start()], pattern[match.end() :]
    for choice in _choices(match[1]):
        for rest in _expand_braces(after):
            yield f"{before}{choice}{rest}"


def _choices(inside: str) -> Iterator[str]:
    numbers = _RANGE.match(inside)
    if numbers is None:
        yield from inside.split(",")
        return
    first, last = numbers.groups()
    for number in range(int(first), int(last) + 1):
        yield str(number).zfill(len(first))


def _with_unique_names(shards: Sequence[Source]) -> list[Source]:
    counts = Counter(shard.name for shard in shards)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        where = ", ".join(str(shard) for shard in shards if shard.name == twice[0])
        raise DataError(
            f"two shards are called {twice[0]} ({where}), but a shard's base name must be unique. "
            "Rename one."
        )
    return sorted(shards, key=lambda shard: shard.name)
