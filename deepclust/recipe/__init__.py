"""The recipe: the typed configuration of a run, read without torch.

The names are imported when first used, so that a method's `config.py` can import
`deepclust.recipe.sections` while `recipe.py` is being read.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepclust.recipe.overrides import HUBS, PATHS
    from deepclust.recipe.recipe import Recipe, differences, shipped
    from deepclust.recipe.validate import checked

_HOMES = {"HUBS": "overrides", "PATHS": "overrides", "checked": "validate"}

__all__ = ["HUBS", "PATHS", "Recipe", "checked", "differences", "shipped"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'deepclust.recipe' has no attribute {name!r}")
    home = importlib.import_module(f"deepclust.recipe.{_HOMES.get(name, 'recipe')}")
    return getattr(home, name)
