"""The recipe: everything that decides what a run computes, typed, frozen and printable.

A recipe is YAML (a path, or the name of a shipped one) plus dotted overrides such as
`cluster.k=1000`. An unknown key, a wrong type or a bad choice is a `RecipeError`. It names the key
and, where there is one, the nearest known name. The section of a method or a term is chosen by
its name, from the tables in `deepclust.methods`.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import Field, create_model, model_validator
from typing_extensions import TypedDict

from deepclust.errors import DataError, RecipeError, holds_secrets, shown
from deepclust.files import atomic_file, path_of, read_bytes, write_text
from deepclust.recipe.beside import NotifySection, TrackerName
from deepclust.recipe.chosen import Terms, choose_sections, default_method
from deepclust.recipe.declare import Cost
from deepclust.recipe.misfit import misfit
from deepclust.recipe.named import nearest
from deepclust.recipe.overrides import apply_overrides
from deepclust.recipe.plain import MOST_TEXT, SHOWN, check, flatten, parse, short
from deepclust.recipe.sealed import seal
from deepclust.recipe.sections import (
    PLACES,
    BackboneSection,
    ClusterSection,
    Data,
    InitSection,
    KeepSection,
    MethodSection,
    Section,
    SeedsSection,
    TermSection,
    TrainSection,
)
from deepclust.recipe.validate import checked


class Recipe(Section):
    """The whole configuration of a run.

    `parse` returns an instance of a subclass in which `method` and `terms` have the sections of the
    method and the terms that were chosen.
    """

    seed: int = Field(0, ge=0)
    data: Data
    backbone: BackboneSection
    method: MethodSection
    terms: dict[str, TermSection] = {}
    cluster: ClusterSection | None = None
    seeds: SeedsSection | None = None
    train: TrainSection
    init: InitSection = InitSection()
    keep: KeepSection = KeepSection()
    notify: NotifySection | None = None
    track: tuple[TrackerName, ...] = Field(
        (), description="trackers that show the run: tensorboard, mlflow, wandb"
    )
    # PLACES, for cluster_jobs alone, which checks them
    ray: dict[str, Any] = {}
    slurm: dict[str, Any] = {}

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if problem := misfit(self):
            raise ValueError(problem)
        return self

    def __repr__(self) -> str:
        k = "" if self.cluster is None else f", k={self.cluster.k}"
        return f"Recipe({self.method.name}, {self.backbone.name}{k}, {self.train.epochs} epochs)"

    @property
    def clustering(self) -> ClusterSection:
        """The cluster section, where there must be one."""
        assert self.cluster is not None, f"{self.method.name} does not cluster"
        return self.cluster

    @property
    def assigns(self) -> bool:
        """Whether every image has a cluster: that of a round, or the method's own answer."""
        return self.cluster is not None or self.method.answers != "nothing"

    @property
    def chance_loss(self) -> float:
        """The loss of a network that has learnt nothing."""
        return self.method.chance_loss(self)

    def cost(self, width: int) -> Cost:
        """Return what the method and its terms take, for features of this width."""
        terms = (term.cost(self, width) for term in self.terms.values())
        return sum(terms, self.method.cost(self, width))

    @property
    def uses_labels(self) -> bool:
        """Whether the method or a term takes the labels of `seeds` in every batch."""
        terms = any(term.uses_labels for term in self.terms.values())
        return self.method.labels != "unused" or terms

    @property
    def seeds_judge(self) -> bool:
        """Whether the labels of `seeds` are for evaluation alone: nothing is trained on them."""
        refresh = self.method.round
        pins = refresh is not None and refresh.kind == "k-means"
        return self.seeds is not None and not (pins or self.uses_labels)

    @property
    def clusters_inline(self) -> bool:
        """Whether the ranks cluster themselves (or nobody does), without a cluster worker."""
        if self.cluster is None:
            return True
        where = self.cluster.where
        alone = self.train.ranks == 1 and not self.cluster.overlap
        return where in ("inline", "ranks") or (where == "auto" and alone)

    @classmethod
    def load(cls, source: str | Path, *overrides: str) -> Recipe:
        """Read a recipe (a path or a shipped name) and apply `a.b=c` overrides."""
        return cls.parse(
            apply_overrides(read_tree(source), overrides, default_method()), str(source)
        )

    @classmethod
    def parse(cls, tree: Any, source: str = "recipe") -> Recipe:
        """Check a tree of plain values: a dict of sections.

        One `RecipeError` lists every problem.
        """
        if not isinstance(tree, dict):
            kind = type(tree).__name__
            raise RecipeError(f"{short(source)} is a {kind}, not a dict of sections: data, train")
        check(tree, short(source))
        for place in PLACES:  # of any values, which are checked where they are used
            check(tree.get(place), f"{short(source)}: {place}", strict=True)
        tree, sections, problems = choose_sections(tree)
        return checked(_recipe_with(*sections), tree, source, problems=problems)

    def dump(self) -> str:
        """Return the resolved recipe as YAML.

        `load` gives the same recipe back.
        """
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def show(self) -> str:
        """Return the resolved recipe as YAML for people, without the secrets in it."""
        return yaml.safe_dump(shown(self.model_dump(mode="json")), sort_keys=False)

    def save(self, path: Path) -> None:
        """Write the resolved recipe atomically, for its owner alone where it holds secrets.

        Its first line shows whether it was changed since (see `sealed`).
        """
        text = seal(self.dump())
        if not holds_secrets(self.model_dump(mode="json")):
            write_text(path, text)
            return
        with atomic_file(path) as partial:
            handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(handle, "w", encoding="utf-8") as file:
                file.write(text)
        logging.getLogger("deepclust").warning("%s holds secrets, so only you can read it", path)

    def replace(self, *overrides: str) -> Recipe:
        """Return a copy with overrides applied and checked."""
        return Recipe.parse(
            apply_overrides(self.model_dump(mode="json"), overrides, default_method())
        )

    def flat(self) -> dict[str, Any]:
        """Return the recipe as dotted keys, to compare two of them."""
        return dict(flatten(self.model_dump(mode="json")))


@cache
def _recipe_with(method: type[MethodSection], terms: Terms) -> type[Recipe]:
    """Recipe with the sections of one method and some terms, so that errors name their keys."""
    sections = TypedDict("Terms", dict(terms), total=False)  # type: ignore[misc]  # noqa: UP013
    fields: Any = {"method": (method, ...), "terms": (sections, {})}
    return create_model("Recipe", __base__=Recipe, **fields)


def shipped() -> list[str]:
    """Return the names of the recipes that come with the package."""
    folder = resources.files("deepclust.recipe") / "shipped"
    return sorted(item.name[:-5] for item in folder.iterdir() if item.name.endswith(".yaml"))


def differences(old: Recipe, new: Recipe) -> dict[str, tuple[Any, Any]]:
    """Return the keys whose values differ, with both values."""
    before, after = old.flat(), new.flat()
    pairs = {key: (before.get(key), after.get(key)) for key in [*before, *after]}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def read_tree(source: str | Path) -> dict[str, Any]:
    """Return a recipe (a path or a shipped name) as plain values, unchecked."""
    path = path_of(source, "recipe")
    if not _is_file(path):
        name = str(source)[:SHOWN]
        if name not in shipped():
            raise RecipeError(f"no recipe {name!r}: not a file{nearest(name, shipped())}")
        path = Path(str(resources.files("deepclust.recipe") / "shipped" / f"{name}.yaml"))
    try:
        text = read_bytes(path, 4 * MOST_TEXT).decode("utf-8")
    except (DataError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read as a recipe: {error}") from None
    tree = parse(text, str(path))
    if not isinstance(tree, dict):
        raise RecipeError(f"{path} is not a recipe: expected sections such as data:, cluster:")
    return tree


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as error:
        raise RecipeError(f"no recipe {str(path)[:SHOWN]!r}: {error.strerror}") from None
    except ValueError:  # a NUL in the name
        return False
