"""`deepclust list`: what a recipe can name, read from the texts that say it, without torch.

Methods and terms are described by the first lines of their modules, and recipes by their headers.
Backbones have the comments of their table, and keys the sections of the recipe.
"""

from __future__ import annotations

import ast
import re
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

from pydantic import BaseModel

from deepclust.errors import RecipeError
from deepclust.methods import METHODS
from deepclust.methods.terms import TERMS
from deepclust.recipe.named import nearest, section_of
from deepclust.recipe.recipe import Recipe, shipped
from deepclust.recipe.sections import MethodSection, Section, TermSection

CITED = re.compile(  # authors, perhaps a title, and the year
    r'(?:[A-Z][\w-]+(?:, | and )?)+(?: et al\.)?,? "[^"]+"[^."]*?(?:19|20)\d\d'
    r"|[A-Z][\w-]+ et al\., [\w ]*?(?:19|20)\d\d"
)
OTHERS = (  # backbones that are in no table of ours
    ("timm/NAME", "any network of timm, with the extra deepclust[timm]"),
    ("PACKAGE.MODULE", "a module of yours with build(channels, image_size)"),
)


@dataclass(frozen=True)
class Item:
    """Something that a recipe can name: what it is, and the paper that it is from, or ""."""

    name: str
    what: str
    paper: str = ""


def items(kind: str, pattern: str = "") -> list[Item]:
    """Return the items of a kind of KINDS whose name or description has the pattern in it.

    Upper and lower case are the same. Raises `RecipeError` for another kind, and where nothing has
    the pattern.
    """
    if kind not in KINDS:
        raise RecipeError(f"no list of {kind!r}{nearest(kind, KINDS)}")
    every = list(KINDS[kind]())
    chosen = [one for one in every if pattern.lower() in f"{one.name} {one.what}".lower()]
    if not chosen:
        hint = nearest(pattern, [one.name for one in every])
        hint = hint if "did you mean" in hint else f": deepclust list {kind} shows all"
        raise RecipeError(f"none of the {kind} has {pattern!r}{hint}")
    return chosen


def lines(chosen: list[Item]) -> Iterator[str]:
    """Yield a line for each item."""
    width = max(len(one.name) for one in chosen)
    for one in chosen:
        yield f"{one.name:{width}}  {one.what}{f' ({one.paper})' if one.paper else ''}"


def _recipes() -> Iterator[Item]:
    for name in shipped():
        text = (files("deepclust") / "recipe" / "shipped" / f"{name}.yaml").read_text("utf-8")
        header = [line[1:].strip() for line in text.splitlines() if line.startswith("#")]
        whole = " ".join(header[: header.index("")] if "" in header else header)
        cited = CITED.search(whole)
        what = whole[: cited.start()] if cited else whole.split(". ")[0]
        what = what.strip().removesuffix("the method of").rstrip(":,. ")
        yield Item(name, what, cited.group() if cited else "")


def _methods() -> Iterator[Item]:
    return (_described(name, path, "method.py") for name, path in METHODS.items())


def _terms() -> Iterator[Item]:
    return (_described(name, path, "term.py") for name, path in TERMS.items())


def _described(name: str, package: str, module: str) -> Item:
    """Return what the first lines of a part's module say."""
    file: Traversable = files("deepclust")
    for part in [*package.split(".")[1:], module]:
        file = file / part
    text = ast.get_docstring(ast.parse(file.read_text("utf-8"))) or ""
    cited = CITED.search(" ".join(text.split()))
    what = " ".join(text.split("\n\n")[0].split())
    return Item(name, what.rstrip("."), cited.group() if cited else "")


def _backbones() -> Iterator[Item]:
    """Yield the names of the table in `models/catalog.py`, which is read, not imported."""
    text, what = (files("deepclust") / "models" / "catalog.py").read_text("utf-8"), ""
    table = text[text.index("BACKBONES: ") :]
    for line in table[: table.index("\n}")].splitlines():
        if line.strip().startswith("#"):
            what = line.strip("# ")
        elif name := re.match(r'\s+"([^"]+)":', line):
            yield Item(name[1], what)
    yield from (Item(*one) for one in OTHERS)


def _keys() -> Iterator[Item]:
    yield from _of_section("", Recipe, skip=("method", "terms"))
    for name in METHODS:
        config = section_of(name, METHODS, MethodSection)
        yield from _of_section("method.", config, f"{name}: ", skip=("name",))
    for name in TERMS:
        config = section_of(name, TERMS, TermSection)
        yield from _of_section(f"terms.{name}.", config, skip=("name",))


def _of_section(
    prefix: str, section: type[BaseModel], note: str = "", skip: tuple[str, ...] = ()
) -> Iterator[Item]:
    """Yield the keys of a section, and of the sections in it."""
    for key, field in section.model_fields.items():
        if key in skip:
            continue
        inner = [one for one in _types(field.annotation) if issubclass(one, Section)]
        if inner:
            yield from _of_section(f"{prefix}{key}.", inner[0], note)
            continue
        default = "required" if field.is_required() else f"default {field.get_default()}"
        what = f"{field.description}; " if field.description else ""
        yield Item(f"{prefix}{key}", f"{note}{what}{default}")


def _types(annotation: Any) -> list[type]:
    parts = typing.get_args(annotation) or (annotation,)
    return [part for part in parts if isinstance(part, type)]


KINDS: dict[str, Callable[[], Iterator[Item]]] = {
    "recipes": _recipes,
    "methods": _methods,
    "terms": _terms,
    "backbones": _backbones,
    "keys": _keys,
}
