"""The recipe: everything that decides what a run computes, typed, frozen and printable.

A recipe is YAML (a path, or the name of a shipped one) plus dotted overrides such as
`cluster.k=1000`. An unknown key, a wrong type or a bad choice is a `RecipeError` that names the
key and, where there is one, the nearest known name. Only `pipeline` and `launch` see a whole
Recipe; every other part is given its own section or plain values.
"""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Self, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from deepclust.errors import RecipeError
from deepclust.files import write_text
from deepclust.recipe.sections import (
    AnyMethod,
    BackboneSection,
    ClusterSection,
    Data,
    DeepClusterSection,
    DeeperClusterSection,
    InitSection,
    KeepSection,
    Section,
    SeedsSection,
    SimCLRSection,
    TrainSection,
)

M = TypeVar("M", bound=BaseModel)


class Recipe(Section):
    """The whole configuration of a run."""

    seed: int = Field(0, ge=0)
    data: Data
    backbone: BackboneSection
    method: AnyMethod = DeepClusterSection()
    cluster: ClusterSection | None = None
    seeds: SeedsSection | None = None
    train: TrainSection
    init: InitSection = InitSection()
    keep: KeepSection = KeepSection()
    # PLACES, for cluster_jobs alone, which checks them
    ray: dict[str, Any] = {}
    slurm: dict[str, Any] = {}

    @field_validator("method", mode="before")
    @classmethod
    def _default_method(cls, tree: Any) -> Any:
        return {"name": "deepcluster", **tree} if isinstance(tree, dict) else tree

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if problem := _misfit(self):
            raise ValueError(problem)
        return self

    @property
    def clustering(self) -> ClusterSection:
        """The cluster section, where there must be one."""
        assert self.cluster is not None, f"{self.method.name} does not cluster"
        return self.cluster

    @property
    def guess(self) -> float:
        """The loss of a network that knows nothing: ln of the number of answers."""
        if isinstance(self.method, SimCLRSection):
            return math.log(2 * self.train.batch - 1)
        turned = self.method.rotations if isinstance(self.method, DeeperClusterSection) else 1
        return math.log(self.clustering.k * turned)

    @property
    def clusters_inline(self) -> bool:
        """Whether rank 0 clusters itself, by default when it is the only one, or nobody does."""
        if self.cluster is None:
            return True
        where = self.cluster.where
        alone = self.train.ranks == 1 and not self.cluster.overlap
        return where in ("inline", "ranks") or (where == "auto" and alone)

    @classmethod
    def load(cls, source: str | Path, *overrides: str) -> Recipe:
        """Read a recipe (a path or a shipped name) and apply `a.b=c` overrides."""
        return cls.parse(_applied(_read(source), overrides), str(source))

    @classmethod
    def parse(cls, tree: dict[str, Any], source: str = "recipe") -> Recipe:
        """Check a tree of plain values; every problem is listed in one `RecipeError`."""
        return checked(cls, tree, source)

    def dump(self) -> str:
        """The resolved recipe as YAML; `load` gives the same recipe back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def save(self, path: Path) -> None:
        """Write the resolved recipe atomically."""
        write_text(path, self.dump())

    def replace(self, *overrides: str) -> Recipe:
        """A copy with overrides applied and checked."""
        return Recipe.parse(_applied(self.model_dump(mode="json"), overrides))

    def flat(self) -> dict[str, Any]:
        """The recipe as dotted keys, to compare two of them."""
        return dict(_flatten(self.model_dump(mode="json")))


def checked(model: type[M], tree: dict[str, Any], source: str, within: str = "") -> M:
    """A tree of plain values as a model; a `RecipeError` calls its keys `within` + key."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        lines = "\n".join(f"  {within}{_explain(item, model)}" for item in error.errors())
        raise RecipeError(f"{source} is not a valid recipe:\n{lines}") from None


PATHS = {
    *("data.shards", "data.index", "data.scratch", "data.stage"),
    *("init.weights", "init.assignments", "seeds.labels", "seeds.held_out"),
}


def _misfit(recipe: Recipe) -> str | None:
    """What is wrong between two sections, if anything is."""
    name, cluster = recipe.method.name, recipe.cluster
    if not recipe.method.clusters:
        unused = [key for key in ("cluster", "seeds") if getattr(recipe, key) is not None]
        unused += ["init.assignments"] if recipe.init.assignments else []
        if unused:
            return f"{name} does not cluster: leave {unused[0]} out (null)"
        if name == "simclr" and recipe.train.accumulate > 1:
            return "simclr contrasts whole batches: set train.accumulate=1, or more train.ranks"
        return None
    if cluster is None:
        return f"cluster: is required by method {name}"
    if name == "deepcluster" and (cluster.k < 2 or cluster.supers > 1):
        return "deepcluster needs cluster.k of 2 or more and cluster.supers=1 (or deepercluster)"
    if name == "deepercluster" and (cluster.init, cluster.min_size) != ("random", 1):
        return "deepercluster starts both levels at random: leave cluster.init and min_size out"
    if recipe.seeds and cluster.init == "two-level":
        return "seeds: a pinned clustering starts at random or by k-means++, not two-level"
    return None


def shipped() -> list[str]:
    """The names of the recipes that come with the package."""
    folder = resources.files("deepclust.recipe") / "shipped"
    return sorted(item.name[:-5] for item in folder.iterdir() if item.name.endswith(".yaml"))


def differences(old: Recipe, new: Recipe) -> dict[str, tuple[Any, Any]]:
    """The keys whose values differ, with both values."""
    before, after = old.flat(), new.flat()
    pairs = {key: (before.get(key), after.get(key)) for key in [*before, *after]}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _read(source: str | Path) -> dict[str, Any]:
    path = Path(source)
    if not path.is_file():
        name = str(source)
        if name not in shipped():
            raise RecipeError(f"no recipe {name!r}: not a file{_nearest(name, shipped())}")
        path = Path(str(resources.files("deepclust.recipe") / "shipped" / f"{name}.yaml"))
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{path} holds no recipe: expected sections such as data:, cluster:")
    return tree


def _applied(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The tree after all overrides; a method's name first, as it begins a section anew."""
    for override in sorted(overrides, key=lambda text: not text.startswith("method.name=")):
        _apply(tree, override)
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise RecipeError(f"override {override!r} is not of the form section.key=value")
    *sections, last = key.split(".")
    for section in sections:
        if tree.get(section) is None:
            tree[section] = {}
        inner = tree[section]
        if not isinstance(inner, dict):
            raise RecipeError(f"override {override!r}: {section} is a value, not a section")
        tree = inner
    if key in PATHS and text not in ("", "null", "~"):
        tree[last] = text  # a path is not YAML: "#", ":" and braces are letters in it
        return
    if key == "method.name" and tree.get(last, "deepcluster") != text:
        tree.clear()  # another method begins with its own defaults
    try:
        tree[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"override {override!r}: the value is not YAML: {error}") from None


def _explain(item: Any, model: type[BaseModel]) -> str:
    location = [str(part) for part in item["loc"]]
    if item["type"] == "union_tag_invalid":  # a section that is chosen by its name
        told, known = item["ctx"]["tag"], item["ctx"]["expected_tags"].replace("'", "")
        return f"{location[0]}.name: unknown {told!r}{_nearest(told, known.split(', '))}"
    key = ".".join(location[:1] + location[-1:] if location[0:1] == ["method"] else location)
    if item["type"] == "extra_forbidden":
        known = _fields_at(model, location[:-1])
        return f"{key}: unknown key{_nearest(location[-1], known)}"
    if item["type"] == "missing":
        return f"{key}: is required"
    message = item["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(item["input"], dict) else f" (got {item['input']!r})"
    return f"{key or 'recipe'}: {message}{shown}"


def _fields_at(model: type[BaseModel], location: list[str]) -> list[str]:
    """Known keys of a section; a part of the location is a key, or the name that chose one."""
    options: list[Any] = [model]
    for part in location:
        if len(options) > 1:
            options = [o for o in options if part in typing.get_args(_name_of(o))]
        else:
            annotation = options[0].model_fields[part].annotation
            options = [o for o in typing.get_args(annotation) if o is not types.NoneType]
            options = options or [annotation]
    return list(options[0].model_fields)


def _name_of(section: type[BaseModel]) -> Any:
    return section.model_fields["name"].annotation


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known are {', '.join(known)}"


def _flatten(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in tree.items():
        inner = isinstance(value, dict)
        pairs += _flatten(value, f"{prefix}{key}.") if inner else [(prefix + key, value)]
    return pairs
