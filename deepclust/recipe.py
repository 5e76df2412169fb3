"""The recipe: everything that decides what a run computes, typed, frozen and printable.

A recipe is YAML (a path, or the name of a shipped one) plus dotted overrides such as
`cluster.k=1000`. An unknown key, a wrong type or a bad choice is a `RecipeError` that names the
key and, where there is one, the nearest known name. Only `pipeline` and `launch` see a whole
Recipe; every other part is given its own section or plain values.
"""

from __future__ import annotations

import difflib
import types
import typing
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from deepclust.errors import RecipeError
from deepclust.files import write_text


@dataclass(frozen=True)
class Cadence:
    """How often something happens: every `count` epochs or steps."""

    count: int
    unit: Literal["epoch", "step"]


class Section(BaseModel):
    """A part of the recipe: frozen, and an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )


class Data(Section):
    """Which images, and how they are looked at."""

    shards: str = Field(description="folder of tar shards, or a brace pattern")
    index: str | None = Field(None, description="where the index lies, if not beside the shards")
    size: int = Field(224, ge=8, description="side of the square that the backbone sees, pixels")
    resize: int | None = Field(None, ge=8, description="short side before the centre crop, pixels")
    crop_scale: tuple[float, float] = Field((0.08, 1.0), description="area of a training crop")
    crop_ratio: tuple[float, float] = Field((3 / 4, 4 / 3), description="its width / height")
    flip: float = Field(0.5, ge=0, le=1, description="chance of a horizontal flip")
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    workers: int = Field(4, ge=0, description="reader processes per rank; 0 = in the rank itself")
    read: Literal["auto", "offset", "block"] = "auto"
    scratch: str | None = Field(None, description="node-local folder for block reading")
    extract_batch: int = Field(256, ge=1, description="images per forward pass of extraction")
    max_pixels: int = Field(178_956_970, ge=1, description="larger images are refused unread")
    max_bad: float = Field(0.01, ge=0, le=1, description="share of unreadable images that fails")

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        for name in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} goes from a small positive number to a larger one")
        if self.short_side < self.size:
            raise ValueError(f"resize {self.short_side} is smaller than the crop, size {self.size}")
        if min(self.std) <= 0:
            raise ValueError("std must be positive")
        return self

    @property
    def short_side(self) -> int:
        """`resize`, or the usual 256 for 224 in proportion."""
        return self.resize if self.resize is not None else round(self.size * 256 / 224)


class BackboneSection(Section):
    """Which network; the names are listed in `deepclust.models.BACKBONES`."""

    name: str
    sobel: bool = Field(False, description="see two Sobel gradients instead of colour")


class MethodSection(Section):
    """Which method, and its own choices."""

    name: Literal["deepcluster"] = "deepcluster"
    head: Literal["reset", "match", "centroids"] = Field(
        "reset", description="what a new round does to the classifier"
    )
    sampling: Literal["exact", "paper"] = Field("exact", description="uniform cluster sampling")


class ClusterSection(Section):
    """Whitening and k-means."""

    k: int = Field(ge=2, description="number of clusters")
    dim: int = Field(256, ge=1, description="dimensions kept by the whitening")
    iterations: int = Field(20, ge=1)
    every: str = Field("1 epoch", description='"n epochs" or "n steps" between rounds')
    until: int | None = Field(None, ge=1, description="no new round from this epoch on")
    init: Literal["random", "k-means++", "two-level"] = "random"
    empty: Literal["split", "relocate"] = "split"
    min_size: int = Field(1, ge=1, description="members that every cluster ends with")
    backend: Literal["auto", "torch", "faiss"] = "auto"
    where: Literal["auto", "inline", "worker", "gang"] = Field(
        "auto",
        description="auto: inline at one rank, else the cluster worker's own process; "
        "gang: all ranks together, each with its part of the rows",
    )
    overlap: bool = Field(False, description="k-means while the gang trains on; a round later")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="of k-means")
    max_share: float = Field(0.9, gt=0, le=1, description="a larger cluster is a collapse")

    @field_validator("every")
    @classmethod
    def _every(cls, text: str) -> str:
        parse_cadence(text)
        return text

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.overlap and self.where in ("inline", "gang"):
            raise ValueError(
                "overlap needs the cluster worker, a process of its own: leave where at auto"
            )
        return self


class TrainSection(Section):
    """The optimisation."""

    epochs: int = Field(ge=1)
    batch: int = Field(256, ge=1, description="samples per optimizer step, over all ranks")
    ranks: int = Field(1, ge=1)
    accumulate: int = Field(1, ge=1, description="parts in which a rank's share is computed")
    lr: float = Field(0.05, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(1e-5, ge=0)
    head_lr: float | None = Field(None, gt=0, description="the head's, constant; default: lr")
    head_momentum: float = Field(0.0, ge=0, lt=1)
    schedule: Literal["constant", "step", "cosine"] = "constant"
    steps_at: tuple[float, ...] = Field((), description="epochs at which `step` lowers the rate")
    step_factor: float = Field(0.1, gt=0, le=1)
    warmup: float = Field(0.0, ge=0, description="epochs of linear warm-up")
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(None, ge=1, description="CPU threads per rank; recorded at start")
    checkpoint: str = Field("1 epoch", description='"n epochs" or "n steps" between checkpoints')
    log: int = Field(20, ge=1, description="steps between two lines of metrics")
    timeout: float = Field(1800.0, gt=0, description="seconds a collective may wait for a rank")

    @field_validator("checkpoint")
    @classmethod
    def _checkpoint(cls, text: str) -> str:
        parse_cadence(text)
        return text

    @model_validator(mode="after")
    def _divides(self) -> Self:
        parts = self.ranks * self.accumulate
        if self.batch % parts:
            raise ValueError(
                f"batch {self.batch} cannot be shared by {self.ranks} ranks in {self.accumulate} "
                f"parts; choose a multiple of {parts}"
            )
        return self


class InitSection(Section):
    """What a new run starts from, instead of random weights and a first clustering."""

    weights: str | None = Field(None, description="a run, a checkpoint, or an exported backbone")
    assignments: str | None = Field(None, description="a round of another run")


class KeepSection(Section):
    """How much of the past stays on disk; assignments are all kept."""

    features: int = Field(1, ge=0)
    checkpoints: int = Field(3, ge=1)


class Recipe(Section):
    """The whole configuration of a run."""

    seed: int = Field(0, ge=0)
    data: Data
    backbone: BackboneSection
    method: MethodSection = MethodSection()
    cluster: ClusterSection
    train: TrainSection
    init: InitSection = InitSection()
    keep: KeepSection = KeepSection()

    @property
    def clusters_inline(self) -> bool:
        """Whether rank 0 clusters itself: by default when it is the only one."""
        where = self.cluster.where
        alone = self.train.ranks == 1 and not self.cluster.overlap
        return where in ("inline", "gang") or (where == "auto" and alone)

    @classmethod
    def load(cls, source: str | Path, *overrides: str) -> Recipe:
        """Read a recipe (a path or a shipped name) and apply `a.b=c` overrides."""
        tree = _read(source)
        for override in overrides:
            _apply(tree, override)
        return cls.parse(tree, str(source))

    @classmethod
    def parse(cls, tree: dict[str, Any], source: str = "recipe") -> Recipe:
        """Check a tree of plain values; every problem is listed in one `RecipeError`."""
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            lines = "\n".join(f"  {_explain(item, cls)}" for item in error.errors())
            raise RecipeError(f"{source} is not a valid recipe:\n{lines}") from None

    def dump(self) -> str:
        """The resolved recipe as YAML; `load` gives the same recipe back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def save(self, path: Path) -> None:
        """Write the resolved recipe atomically."""
        write_text(path, self.dump())

    def replace(self, *overrides: str) -> Recipe:
        """A copy with overrides applied and checked."""
        tree = self.model_dump(mode="json")
        for override in overrides:
            _apply(tree, override)
        return Recipe.parse(tree)

    def flat(self) -> dict[str, Any]:
        """The recipe as dotted keys, to compare two of them."""
        return dict(_flatten(self.model_dump(mode="json")))


PATHS = {"data.shards", "data.index", "data.scratch", "init.weights", "init.assignments"}


def parse_cadence(text: str) -> Cadence:
    """`"1 epoch"`, `"3 epochs"`, `"200 steps"` as a Cadence."""
    number, _, unit = text.strip().partition(" ")
    if number.isdigit() and int(number) > 0 and unit in ("epoch", "epochs", "step", "steps"):
        return Cadence(int(number), "epoch" if unit.startswith("epoch") else "step")
    raise ValueError(f'{text!r} is not a cadence; write "1 epoch", "3 epochs" or "200 steps"')


def shipped() -> list[str]:
    """The names of the recipes that come with the package."""
    folder = resources.files("deepclust") / "recipes"
    return sorted(item.name[:-5] for item in folder.iterdir() if item.name.endswith(".yaml"))


def differences(old: Recipe, new: Recipe) -> dict[str, tuple[Any, Any]]:
    """The keys whose values differ, with both values."""
    before, after = old.flat(), new.flat()
    return {key: (before[key], after[key]) for key in before if before[key] != after[key]}


def _read(source: str | Path) -> dict[str, Any]:
    path = Path(source)
    if not path.is_file():
        name = str(source)
        if name not in shipped():
            raise RecipeError(f"no recipe {name!r}: not a file{_nearest(name, shipped())}")
        path = Path(str(resources.files("deepclust") / "recipes" / f"{name}.yaml"))
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{path} holds no recipe: expected sections such as data:, cluster:")
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
    try:
        tree[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"override {override!r}: the value is not YAML: {error}") from None


def _explain(item: Any, model: type[BaseModel]) -> str:
    location = [str(part) for part in item["loc"]]
    key = ".".join(location) or "recipe"
    if item["type"] == "extra_forbidden":
        known = _fields_at(model, location[:-1])
        return f"{key}: unknown key{_nearest(location[-1], known)}"
    if item["type"] == "missing":
        return f"{key}: is required"
    message = item["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" + (
        "" if isinstance(item["input"], dict) else f" (got {item['input']!r})"
    )


def _fields_at(model: type[BaseModel], location: list[str]) -> list[str]:
    for part in location:
        annotation: Any = model.model_fields[part].annotation
        if isinstance(annotation, types.UnionType):
            annotation = typing.get_args(annotation)[0]
        model = annotation
    return list(model.model_fields)


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
