"""Which folders are classes: `pack --classes none|first|last|full|FILE`.

none    no labels
first   the first folder of an image's path (torchvision's ImageFolder)
last    the folder that holds the image
full    the whole path of that folder, as a/apartment_building/outdoor
FILE    one name a line, in the order of their ids: first, last or full, where all are in the file

A folder without images is never a class.
"""

from __future__ import annotations

import os
import posixpath
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from deepclust.data.pack.names import class_texts, storable
from deepclust.data.pack.tally import shown
from deepclust.errors import DataError, RecipeError

_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval"}
_PRINTED = 10


class Labels(NamedTuple):
    """A label for each image (-1: none), and the names of the classes."""

    numbers: Int32[np.ndarray, " n"]
    names: list[str] | None


def _first(file: str) -> str:
    return file.partition("/")[0] if "/" in file else ""


def _last(file: str) -> str:
    return posixpath.basename(posixpath.dirname(file))


_RULES: dict[str, Callable[[str], str]] = {
    "first": _first,
    "last": _last,
    "full": posixpath.dirname,
}


def check_classes(classes: str) -> None:
    """Raise RecipeError for what is neither a rule nor a file."""
    if classes != "none" and classes not in _RULES and not os.path.isfile(classes):
        raise RecipeError(
            f"classes {classes!r} is not none, first, last or full, and no file of class names."
        )


def labels_by_folder(files: Sequence[str], classes: str) -> Labels:
    """Label images by their folders; `classes` is one of the rules above, or a file."""
    if classes == "none":
        return Labels(np.full(len(files), -1, np.int32), None)
    if classes in _RULES:
        folders = [_RULES[classes](file) for file in files]
        return number(folders)
    names = read_names(Path(classes))
    rule = _rule_of(files, names, classes)
    ids = {name: i for i, name in enumerate(names)} | {"": -1}
    labels = [ids[storable(_RULES[rule](file))] for file in files]
    return Labels(np.array(labels, np.int32), names)


def number(words: Sequence[str]) -> Labels:
    """Number classes in the order of their names; an empty word means none."""
    names = sorted(set(words) - {""})
    ids = {name: i for i, name in enumerate(names)} | {"": -1}
    return Labels(np.array([ids[word] for word in words], np.int32), class_texts(names) or None)


def join_labels(parts: Sequence[Labels], sources: Sequence[str]) -> Labels:
    """Return the labels of several sources, one after the other: classes of one name are one.

    Raises DataError where some sources have numbers and others have names.
    """
    bare = [i for i, one in enumerate(parts) if one.names is None and (one.numbers >= 0).any()]
    named = [i for i, one in enumerate(parts) if one.names is not None]
    if bare and named:
        raise DataError(
            f"the classes of {sources[bare[0]]} are numbers, and those of {sources[named[0]]} are "
            "names. Give none (no labels), or a file of class names for all of them."
        )
    lists = [one.names or [] for one in parts if one.names is not None]
    same = all(names == lists[0] for names in lists)
    names = (lists[0] if same else sorted(set().union(*lists))) if lists else None
    ids = {name: i for i, name in enumerate(names or [])}
    columns = [
        one.numbers if one.names is None else np.array([*map(ids.get, one.names), -1])[one.numbers]
        for one in parts
    ]
    return Labels(np.concatenate(columns).astype(np.int32), names)


def read_names(path: Path) -> list[str]:
    """Read one class name a line, in the order of their ids, or raise DataError."""
    try:
        text = path.read_bytes().decode("utf-8-sig", "backslashreplace")
    except OSError as error:
        raise DataError(f"cannot read the class names in {path}: {error.strerror}.") from error
    names = [line.strip() for line in text.split("\n") if line.strip()]
    if not names:
        raise DataError(f"{path} is empty. Write one class name a line.")
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise DataError(f"{path} names {shown(name)!r} {count} times. Write every class once.")
    return names


def _rule_of(files: Sequence[str], names: list[str], classes: str) -> str:
    """Return the first rule by which the file names every class."""
    known, missing = {*names, ""}, {}
    for rule, folder_of in _RULES.items():
        lacking = (folder for file in files if (folder := storable(folder_of(file))) not in known)
        first = next(lacking, None)
        if first is None:
            return rule
        missing[rule] = shown(first)
    raise DataError(
        f"{classes} lacks the class {missing['first']!r}, which is a folder of the images. "
        "Add it, or give --classes first, last, full or none."
    )


def describe(labels: Labels) -> Iterator[str]:
    """Yield the line on the classes, and a warning if they look like the splits of a set."""
    if labels.names is None:
        count = len(np.unique(labels.numbers[labels.numbers >= 0]))
        yield f"{_count(count)} without names" if count else "no labels"
        return
    names = [shown(name) for name in labels.names]
    rest = f", ... {names[-1]}" if len(names) > _PRINTED else ""
    yield f"{_count(len(names))}: {', '.join(names[:_PRINTED])}{rest}"
    splits = [name for name in names if name.lower() in _SPLITS]
    if len(splits) > 1 or len(splits) == len(names):
        yield (
            f"warning: {', '.join(splits)} look like the splits of a data set, not like classes. "
            "Pack each on its own, or give --classes last"
        )
    without = int((labels.numbers < 0).sum())
    if without:
        yield f"images in no class: {without}"


def _count(n: int) -> str:
    return "1 class" if n == 1 else f"{n} classes"
