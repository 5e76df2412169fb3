"""Labels of several classes: the text of a label names them with `|` between, as cat|dog.

So an index has one label for each sample as ever, whose name lists classes. A lone `|` names no
class: the image is known to show none. An empty text gives the image none, as ever.
"""

from __future__ import annotations

from collections.abc import Iterable

SEPARATOR = "|"


def join_names(names: Iterable[str]) -> str:
    """Return the text of a set of class names: each once, in alphabetical order."""
    return SEPARATOR.join(sorted({name.strip() for name in names} - {""})) or SEPARATOR


def names_in(text: str) -> list[str]:
    """Return the classes that a label names: one, unless there are separators in it."""
    return [name for part in text.split(SEPARATOR) if (name := part.strip())]


def is_set(text: str) -> bool:
    """Return whether a label is of several classes, or of none."""
    return SEPARATOR in text
