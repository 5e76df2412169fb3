"""From a tree of plain values to a checked model: every problem with its key and the fix."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from typing_extensions import is_typeddict

from deepclust.errors import RecipeError, shown
from deepclust.recipe.named import nearest
from deepclust.recipe.plain import short

MOST_LINES = 30  # problems of one recipe that are listed
SHOULD = "Input should be "
# what pydantic adds to the place of a value that may be of several types
TYPE = re.compile(r"(constrained-)?(float|int|str)|(function-\w+|literal|tuple|dict|list)\[.*\]")
M = TypeVar("M", bound=BaseModel)


def checked(
    model: type[M],
    tree: dict[str, Any],
    source: str,
    within: str = "",
    problems: Sequence[str] = (),
) -> M:
    """Return a tree of plain values as a model.

    A RecipeError has keys `within` + key.

    `problems` are already known. With any of them, problems of the whole recipe are left out.
    """
    lines = list(problems)
    try:
        valid = model.model_validate(tree)
    except ValidationError as error:
        items = [item for item in error.errors() if item["loc"] or not problems]
        lines += [f"{within}{line}" for line in _explain(items, model)]
    except UnicodeError as error:  # pydantic compares names as UTF-8
        lines.append(f"{within or 'recipe'}: holds a name that is not UTF-8: {error}")
    if lines:
        listed = "\n".join(f"  {short(line)}" for line in lines[:MOST_LINES])
        if len(lines) > MOST_LINES:
            listed += f"\n  and {len(lines) - MOST_LINES} more"
        raise RecipeError(f"{source} is not a valid recipe:\n{listed}")
    return valid


def _explain(items: Sequence[Any], model: type[BaseModel]) -> list[str]:
    """Return a line for each key that has a problem.

    Where a key may be one of several types, all that it might be are in its line.
    """
    problems: dict[tuple[str, str], list[str]] = {}
    for item in items:
        location = [str(part) for part in item["loc"]]
        key = ".".join(part for part in location if not TYPE.fullmatch(part))
        given = item["input"]
        if isinstance(given, str | list):
            given = shown(given, key)
        got = "" if isinstance(given, dict) else f" (got {short(repr(given))})"
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message, got = f"unknown key{nearest(location[-1], _keys_at(model, location[:-1]))}", ""
        elif item["type"] == "missing":
            message, got = "is required", ""
        problems.setdefault((key, got), []).append(message)
    lines = []
    for (key, got), (first, *others) in problems.items():
        either = ", or ".join([first, *(message.removeprefix(SHOULD) for message in others)])
        lines.append(f"{key or 'recipe'}: {either}{got}")
    return lines


def _keys_at(section: Any, location: list[str]) -> list[str]:
    """Known keys of the section at a location.

    Optional sections are unions with None.
    """
    for part in location:
        inner = _keys(section)[part]
        options = [one for one in typing.get_args(inner) if one is not types.NoneType]
        section = options[0] if options else inner
    return list(_keys(section))


def _keys(section: Any) -> dict[str, Any]:
    """Return the keys of a section or of a dictionary of sections, and their types."""
    if is_typeddict(section):
        return typing.get_type_hints(section)
    return {key: field.annotation for key, field in section.model_fields.items()}
