"""The guides: one page of Markdown for each task, shown by `deepclust guide [NAME]`."""

from __future__ import annotations

from importlib.resources import files

from deepclust.errors import RecipeError

_SUFFIX = ".md"
CHANGELOG = "changelog"  # of the package, which is read as a guide is


def names() -> list[str]:
    """Return the names of the guides in alphabetical order."""
    pages = (file.name for file in files(__name__).iterdir() if file.name.endswith(_SUFFIX))
    return sorted(name.removesuffix(_SUFFIX) for name in pages)


def read(name: str) -> str:
    """Return the text of a guide, or raise RecipeError with the names that exist."""
    if name == CHANGELOG:
        return (files("deepclust") / "CHANGELOG.md").read_text(encoding="utf-8")
    if name not in names():
        raise RecipeError(f"there is no guide {name!r}. The guides are: {', '.join(names())}.")
    return (files(__name__) / f"{name}{_SUFFIX}").read_text(encoding="utf-8")


def contents() -> str:
    """Return one line for each guide: its name and the sentence below its title."""
    lines = [f"  {name:22}{read(name).split(chr(10), 3)[2]}" for name in (*names(), CHANGELOG)]
    return "\n".join(["guides (deepclust guide NAME):", *lines])
