"""The names of a data set as text that every reader takes: the keys of samples, and classes."""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from deepclust.data.pack.tally import Tally

_SAFE = re.compile(r"[\w/-]")
_PLAIN = re.compile(r"[\w/-]*", re.ASCII)
SAME_NAME = "with another file of the same name: the keys end in ~EXTENSION or ~HASH"


def storable(name: str) -> str:
    r"""Return a file's name as valid text: bytes that are not UTF-8 become \xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def class_texts(names: Sequence[str]) -> list[str]:
    """Return the names of classes as valid text, where two never become the same."""
    texts = [storable(name) for name in names]
    counts = Counter(texts)
    return [
        text if counts[text] == 1 else f"{text}~{_hash(name)}"
        for text, name in zip(texts, names, strict=True)
    ]


def keys_of(files: Sequence[str], tally: Tally) -> list[str]:
    """Return a readable key for each file: its relative path without the extension.

    All but letters, their marks, digits, "_", "-" and "/" becomes "_" (a dot would end the key).
    Files that become equal by this get "~" and their extension, if that tells them apart, else "~"
    and a hash of their path. They are counted.
    """
    plain = [plain_key(file) for file in files]
    counts = Counter(plain)
    twice = {key for key, count in counts.items() if count > 1}
    by_extension = Counter(
        _with_extension(k, f) for k, f in zip(plain, files, strict=True) if k in twice
    )
    seen: Counter[str] = Counter()
    keys = []
    for key, file in zip(plain, files, strict=True):
        if key in twice:
            tally.add(SAME_NAME, file)
            longer = _with_extension(key, file)
            alone = by_extension[longer] == 1 and longer != f"{key}~"
            key = longer if alone else f"{key}~{_hash(file, seen[file])}"
            seen[file] += 1
        keys.append(key)
    return keys


def plain_key(file: str) -> str:
    """Return a readable key for a path: what cannot be in a key is '_'."""
    stem = posixpath.splitext(posixpath.normpath(file))[0]
    if not _PLAIN.fullmatch(stem):
        stem = "".join(c if _is_kept(c) else "_" for c in stem)
    return stem.lstrip("_/") or "image"


def _is_kept(c: str) -> bool:
    return bool(_SAFE.match(c)) or unicodedata.category(c).startswith("M")


def _with_extension(key: str, file: str) -> str:
    return f"{key}~{re.sub('[^a-z0-9]', '_', posixpath.splitext(file)[1][1:].lower())}"


def _hash(file: str, repeated: int = 0) -> str:
    """Return a short hash of a path; one that is listed again has another."""
    data = os.fsencode(file) + (b"\0%d" % repeated if repeated else b"")
    return hashlib.blake2b(data, digest_size=6).hexdigest()
