"""YAML from anybody to a tree of plain values of a bounded size, or a `RecipeError`.

YAML can name dates, bytes, sets and Python's own numbers without end. It can hold a value in
itself, and a few lines can stand for billions of values. A recipe needs none of that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from deepclust.errors import RecipeError

MOST_TEXT = 2**18  # letters; our own reader takes 5 s for them
MOST_VALUES = 20_000
MOST_LEVELS = 30
LARGEST = 2**63
SHOWN = 200  # letters of what a user wrote, in a message
PLAIN = (str, int, float, bool, type(None))


def parse(text: str, source: str) -> Any:
    """Return the tree of a YAML text; `source` is what a message calls it."""
    if len(text) > MOST_TEXT:
        raise RecipeError(f"{source} has {len(text):,} letters, more than {MOST_TEXT:,}")
    try:
        tree = yaml.load(text, _Loader)  # a SafeLoader
    except _DoubledKey as error:
        raise RecipeError(f"{source} {error}") from None
    except Exception as error:  # its constructors raise what Python raises for a value
        why = short(f"{type(error).__name__}: {error}")
        raise RecipeError(f"{source} is not YAML: {why}") from None
    check(tree, source, strict=True)
    return tree


_TRUTH, _TEXT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:str"


class _DoubledKey(Exception):
    """A mapping has a key twice; YAML forbids it, and the last would win in silence."""


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: dict[Any, Any]) -> yaml.MappingNode:
        """Compose a mapping whose keys are each there once."""
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.tag == _TRUTH:  # YAML reads the key "on" as true
                key.tag = _TEXT
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in lines and key.value != "<<":  # two merges lose nothing
                raise _DoubledKey(
                    f"has the key {short(repr(key.value))} twice in one section, in lines "
                    f"{lines[name]} and {line}: leave one of them out"
                )
            lines[name] = line
        return node


def check(tree: Any, source: str, *, strict: bool = False) -> None:
    """Raise RecipeError for a tree that is too large or too deep, or holds a number too large.

    `strict`: for a value that is none of YAML's plain ones, and a key that is not a text.
    """
    count = 0
    stack: list[tuple[Any, tuple[str, ...]]] = [(tree, ())]
    while stack:
        value, place = stack.pop()
        # before they are put on the stack: a few lines of aliases can stand for billions
        count += len(value) if isinstance(value, Mapping | list | tuple) else 0
        if count > MOST_VALUES:
            raise RecipeError(f"{source} holds more than {MOST_VALUES:,} values")
        if len(place) > MOST_LEVELS:
            raise RecipeError(f"{source}: {short('.'.join(place))} has too many levels")
        if problem := _problem(value, strict):
            raise RecipeError(f"{source}: {short('.'.join(place)) or 'it'} {problem}")
        if isinstance(value, Mapping):
            stack += [(one, (*place, str(key)[:SHOWN])) for key, one in value.items()]
        elif isinstance(value, list | tuple):
            stack += [(one, (*place, str(i))) for i, one in enumerate(value)]


def _problem(value: Any, strict: bool) -> str | None:
    """Return what is wrong with a value itself, not with those in it."""
    if isinstance(value, int) and abs(value) >= LARGEST:
        return "is a number that is too large"
    if isinstance(value, str) and len(value) > MOST_TEXT:
        return f"has {len(value):,} letters"
    if not strict:
        return None
    if isinstance(value, dict):
        wrong = next((key for key in value if not isinstance(key, str)), None)
        return None if wrong is None else f"has the key {short(repr(wrong))}, which is not a text"
    if not isinstance(value, (*PLAIN, list)):
        return f"is a {type(value).__name__}: put it in quotes if it is a text"
    return None


def flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return the values of a tree by dotted keys."""
    pairs: list[tuple[str, Any]] = []
    for key, value in tree.items():
        inner = isinstance(value, Mapping)
        pairs += flatten(value, f"{prefix}{key}.") if inner else [(f"{prefix}{key}", value)]
    return pairs


def short(text: str) -> str:
    """Return a text of one length for messages, its middle left out where it is long."""
    return text if len(text) <= 2 * SHOWN else f"{text[:SHOWN]} ... {text[-SHOWN:]}"
