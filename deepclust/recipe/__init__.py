"""The recipe: the typed configuration of a run. Nothing here imports torch.

The names are imported when first used, so that a method's `config.py` can import
`deepclust.recipe.sections` while `recipe.py` is being read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepclust.recipe.recipe import PATHS, Recipe, checked, differences, shipped

__all__ = ["PATHS", "Recipe", "checked", "differences", "shipped"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'deepclust.recipe' has no attribute {name!r}")
    from deepclust.recipe import recipe

    return getattr(recipe, name)
