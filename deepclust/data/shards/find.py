"""Turn what a user gives as shards into files: a folder, a tar, a pattern, or a list of these.

Each may be a path or a URL (s3://, https://, ...), whose bytes `remote.py` reads. Nothing is
unpickled and nothing goes through a shell. The `pipe:` form of WebDataset is always refused, as
`WDS_SECURE=1` does there. Files that look like shards and are not read are counted by `beside`.
"""

from __future__ import annotations

import fnmatch
import glob
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from deepclust.data.shards import remote
from deepclust.data.shards.left_out import Tally, listed
from deepclust.data.shards.url import Source, Url, common_folder, is_url, names_of, redact
from deepclust.errors import DataError, RecipeError
from deepclust.files import path_of

__all__ = ["Shards", "beside", "common_folder", "described", "expand", "is_folder"]

# a mapping gives sources weights
Shards: TypeAlias = str | Path | Sequence[str | Path] | Mapping[str, float]

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"^(\d+)\.\.(\d+)$")
_GLOB = re.compile(r"[*?[]")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_UNPACK = {".gz": "gunzip", ".tgz": "gunzip", ".bz2": "bunzip2", ".xz": "unxz", ".zst": "unzstd"}
_MOST_SHARDS = 1 << 20  # that one pattern may name
_MOST_LOOKED_AT = 20_000  # names in subfolders, in the search for further shards


def expand(shards: Shards) -> list[Source]:
    """Return the full paths of a folder, a file, a pattern, or each of a list of these.

    A pattern has braces, "dir/train-{000000..000009}.tar", or is a glob, "dir/**/*.tar". Of a
    folder these are its *.tar, or if it has none, those of its subfolders. A URL that ends in .tar
    is a shard, any other URL a folder that the storage lists. Sizes of URLs are requested here.
    Shards are ordered by name (`url.names_of`), so moving the folder changes no sample id.

    Raises DataError when nothing matches, a shard is missing, unreachable or given twice, two URLs
    share a base name, or a pipe is given.
    """
    return [shard for shard, _ in numbered(shards)]


def numbered(shards: Shards) -> list[tuple[Source, int]]:
    """Return what `expand` does, each with the number of what it was given by."""
    given = enumerate(texts(shards))
    pairs = [(shard, number) for number, text in given for shard in _expand_one(text)]
    if not pairs:
        raise DataError("data.shards is an empty list. Give a folder, or a pattern.")
    if len({isinstance(shard, Url) for shard, _ in pairs}) > 1:
        raise DataError(f"{described(shards)}: give either paths or URLs, not both.")
    names = names_of([shard for shard, _ in pairs])
    _check_unique(names, [shard for shard, _ in pairs])
    return [pairs[i] for i in sorted(range(len(pairs)), key=names.__getitem__)]


def described(shards: Shards) -> str:
    """Return what was given as shards for a message, without the secrets of URLs."""
    return listed(map(redact, texts(shards)))


def is_remote(shards: Shards) -> bool:
    """Return whether some of the shards are behind a URL."""
    return any(map(is_url, texts(shards)))


def is_folder(shards: Shards) -> bool:
    """Return whether this is one folder on a disk."""
    return isinstance(shards, str | Path) and Path(shards).is_dir()


def beside(shards: Shards) -> Tally:
    """Count what lies in the given folders, looks like a shard, and is not read."""
    left = Tally()
    for text in texts(shards):
        if not is_url(text) and Path(text).is_dir():
            _count_beside(Path(text), left)
    return left


def texts(shards: Shards) -> list[str]:
    """Return what was given, as a list; raises `RecipeError` for anything else."""
    if isinstance(shards, str | os.PathLike):
        shards = [shards]
    if not isinstance(shards, Sequence | Mapping):
        raise RecipeError(f"shards={shards!r} is not a path, pattern or URL, and no list of these")
    for one in shards:
        path_of(one, "shards")
    return [os.fspath(one) for one in shards]  # a Path would make "s3:/x" of "s3://x"


def _expand_one(text: str) -> list[Source]:
    if text.startswith(("pipe:", "file:", "local:")):
        raise DataError(
            f"shards {redact(repr(text))}: pipes are not supported, and a file is given by its "
            "plain path. Give a folder, a pattern like 'dir/train-{000000..000009}.tar', or a URL "
            "(s3://, https://)."
        )
    if is_url(text):
        return list(_remote_shards(text))
    path = Path(text)
    try:
        paths = _in_folder(path) if path.is_dir() else list(_matches(text))
    except OSError as error:
        place = error.filename or text
        raise DataError(f"cannot read the folder or shard {place}: {error.strerror}.") from error
    return [shard.absolute() for shard in paths]


def _remote_shards(text: str) -> Iterator[Url]:
    """Yield the shards of a URL, or of every URL that its braces make, with their sizes."""
    urls = [Url(one) for one in _capped(text)]
    plain = [url for url in urls if url.name.endswith(".tar") and "*" not in url.name]
    yield from remote.with_sizes(plain)
    for place in (url for url in urls if url not in plain):
        by_glob = "*" in place.name
        folder = place.parent if by_glob else place
        names = place.name if by_glob else "*"
        shards = [u for u in remote.list_folder(folder) if fnmatch.fnmatchcase(u.name, names)]
        if not shards:
            raise DataError(
                f"no shards (*.tar) are listed in {place}. For a server that cannot list, give a "
                "pattern like 'https://host/dir/train-{000000..000009}.tar'."
            )
        yield from remote.with_sizes(shards)


def _in_folder(folder: Path) -> list[Path]:
    """Return the *.tar of a folder, else its *.TAR, else the *.tar of its subfolders."""
    names = [entry.name for entry in _entries(folder)]
    shards = [folder / name for name in names if name.endswith(".tar")]
    shards = shards or [folder / name for name in names if name.lower().endswith(".tar")]
    shards = shards or list(_nested(folder))
    if not shards:
        raise DataError(f"no shards (*.tar) in {folder}. {_advice(names)}")
    return shards


def has_shards(folder: Path) -> bool:
    """Return whether a folder, or one below it, holds a *.tar."""
    names = (entry.name for entry in _entries(folder))
    in_it = any(name.lower().endswith(".tar") for name in names)
    return in_it or next(_nested(folder), None) is not None


def _nested(folder: Path, most: int | None = None) -> Iterator[Path]:
    """Yield the *.tar in subfolders, each folder once, though links may lead in circles.

    After `most` names the search ends.
    """
    seen, waiting, looked_at = {_identity(folder)}, [folder], 0
    while waiting and (most is None or looked_at < most):
        place = waiting.pop()
        for entry in _entries(place):
            looked_at += 1
            if entry.is_dir():
                inner = _identity(Path(entry.path))
                waiting += [] if inner in seen else [Path(entry.path)]
                seen.add(inner)
            elif entry.name.endswith(".tar") and place != folder:
                yield Path(entry.path)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """Return the entries of a folder by name, without hidden ones."""
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not entry.name.startswith(".")]
    return sorted(visible, key=lambda entry: entry.name)


def _identity(folder: Path) -> tuple[int, int]:
    about = folder.stat()
    return about.st_dev, about.st_ino


def _count_beside(folder: Path, left: Tally) -> None:
    names = [entry.name for entry in _entries(folder)]
    for name in names:
        if name.endswith(_COMPRESSED):
            left.add("compressed shard: unpack it", name)
    plain = [name for name in names if name.endswith(".tar")]
    for name in names if plain else ():
        if name.lower().endswith(".tar") and name not in plain:
            left.add("shard in capitals: rename it to .tar", name)
    if any(name.lower().endswith(".tar") for name in names):
        try:
            for path in _nested(folder, _MOST_LOOKED_AT):
                where = str(path.relative_to(folder))
                left.add("shard in a subfolder: give FOLDER/**/*.tar", where)
        except OSError as error:  # it is not ours to read
            left.add("subfolder that cannot be read", str(error.filename))


def _advice(names: list[str]) -> str:
    compressed = [name for name in names if name.endswith(_COMPRESSED)]
    if compressed:
        program = _UNPACK[Path(compressed[0]).suffix]
        return f"Unpack the compressed ones first, for example `{program} {compressed[0]}`."
    return "There are no images either. `deepclust pack SOURCE OUT` makes shards of archives."


def _matches(pattern: str) -> Iterator[Path]:
    """Yield the files of a pattern with braces or stars, or of a plain path."""
    if Path(pattern).exists():
        yield Path(pattern)
        return
    for name in _capped(pattern):
        if Path(name).is_dir():
            yield from _in_folder(Path(name))
        elif _GLOB.search(name) and not Path(name).exists():
            yield from _globbed(name)
        elif Path(name).is_file():
            yield Path(name)
        else:
            raise _missing(name, pattern)


def _globbed(pattern: str) -> list[Path]:
    """Return the files that match a glob; if some of them are *.tar, only those."""
    paths = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
    for path in paths:
        if path.is_symlink() and not path.exists():
            raise _missing(str(path), pattern)
    files = [path for path in paths if path.is_file()]
    shards = [path for path in files if path.suffix.lower() == ".tar"]
    if not shards:
        raise DataError(
            f"no *.tar matches {pattern}"
            + (f", only {listed(path.name for path in files)}" if files else "")
            + ". Give a folder of *.tar, or a pattern like 'dir/**/*.tar'."
        )
    return shards


def _missing(name: str, pattern: str) -> DataError:
    of = "" if name == pattern else f" (required by the pattern {pattern})"
    if Path(name).is_symlink():
        return DataError(
            f"shard {name}{of} is a link to {os.readlink(name)}, which is not there. Fetch the "
            "data that it stands for (for example with `git annex get`), or remove the link."
        )
    return DataError(
        f"no shard {name}{of}. Give a folder of *.tar or of images, or a pattern like "
        "'dir/train-{000000..000009}.tar'."
    )


def choices(text: str) -> list[str]:
    """Return the paths that a pattern with braces makes, or the path that is there as it is."""
    try:
        return [text] if is_url(text) or Path(text).exists() else _capped(text)
    except (OSError, ValueError):
        return [text]


def _capped(pattern: str) -> list[str]:
    """Return what the braces of a pattern make; raise DataError if that is too much to be meant."""
    names = list(itertools.islice(_expand_braces(pattern), _MOST_SHARDS + 1))
    if len(names) > _MOST_SHARDS:
        raise DataError(f"{redact(pattern)} names more than {_MOST_SHARDS} shards.")
    return names


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
    if len(last) > 18 or not 0 <= int(last) - int(first) < _MOST_SHARDS:
        raise DataError(
            f"{{{inside}}} names no shards, or more than {_MOST_SHARDS}. Give the numbers of the "
            "first and the last shard, such as {000000..000146}."
        )
    for number in range(int(first), int(last) + 1):
        yield str(number).zfill(len(first))


def _check_unique(names: Sequence[str], shards: Sequence[Source]) -> None:
    name, count = Counter(names).most_common(1)[0]
    if count == 1:
        return
    places = {str(shard) for shard, its in zip(shards, names, strict=True) if its == name}
    if len(places) == 1:
        raise DataError(f"shard {min(places)} is given {count} times. Give every shard once.")
    raise DataError(
        f"two shards are called {name} ({listed(sorted(places))}), but behind URLs a shard's base "
        "name must be unique. Rename one."
    )
