"""Which column of a method's logits stands for which class of the seeds, as its run directory says.

A method that answers classes has a column for each class, in the order of `labels.json`, and
perhaps free ones behind them. One that answers clusters while seeds pin them has the classes of the
pinned clusters, as the last round wrote them. Class means (`nearest_mean.py`) have a column for
each class, whatever the method was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from deepclust.errors import DataError
from deepclust.files import fits
from deepclust.methods.base import Method
from deepclust.models import Backbone
from deepclust.recipe import Recipe
from deepclust.run import labels
from deepclust.run.directory import Run, has_file
from deepclust.run.round_files import read_facts
from deepclust.trained.nearest_mean import NearestMean


@dataclass(frozen=True)
class Columns:
    """The classes, and the position among them of every column of the logits, -1 for a free one.

    `labels` are the labels of each class in training, None where an old run does not say.
    """

    classes: tuple[str, ...]
    class_of: Int64[np.ndarray, " k"]
    labels: tuple[int, ...] | None

    @property
    def names(self) -> list[str]:
        """The name of every column: its class, or its number as a cluster."""
        named = enumerate(self.class_of.tolist())
        return [f"cluster {j}" if c < 0 else self.classes[c] for j, c in named]


def columns_of(run: Run, recipe: Recipe, method: Method) -> Columns | str:
    """Return the columns of a run's answers, or a sentence on why it answers no classes.

    Raises `DataError` for a record that is damaged.
    """
    if isinstance(method, NearestMean):
        return Columns(method.names, np.arange(len(method.names)), method.labels)
    name = recipe.method.name
    if recipe.method.answers == "nothing":
        return f"method {name} has no classifier"
    if recipe.seeds is None or recipe.seeds_judge:
        return f"{run.path} was trained without labelled seeds"
    if any(one.startswith(f"{part}.") for one in method.owned() for part in parts_of(method)):
        return f"the classifier of {name} is spread over the ranks of {run.path}"
    if recipe.method.answers == "classes":
        return _trained(run, method)
    if recipe.method.round is not None and recipe.method.round.levels > 1:
        return f"the answers of {name} are super-clusters and turns, not classes"
    return _pinned(run, method)


def _trained(run: Run, method: Method) -> Columns | str:
    kept, k = labels.read(run), _width(method)
    if kept is None or not kept.classes:
        return f"{run.path} does not say which classes its labels have: an older version wrote it"
    if len(kept.classes) > k:
        raise DataError(f"{run.path} has {len(kept.classes)} classes and answers {k}")
    numbers = np.arange(k)
    class_of = np.where(numbers < len(kept.classes), numbers, -1)
    return Columns(kept.classes, class_of, kept.counts)


def _pinned(run: Run, method: Method) -> Columns | str:
    """Return the classes of the pinned clusters of the last round."""
    stage = run.round(run.rounds()[-1]) / "centroids" if run.rounds() else run.path
    if not has_file(stage, "prototypes.json"):
        return f"no round of {run.path} was seeded yet"
    facts = read_facts(stage, "prototypes.json")
    if not facts.get("pinned"):
        return f"the last round of {run.path} pins no clusters to classes (seeds.release_after)"
    classes, clusters = facts.get("classes"), facts.get("clusters")
    class_of = np.full(_width(method), -1)
    try:
        names = tuple(str(name) for name in classes or ())
        counts = np.zeros(len(names), np.int64)
        for one in clusters or ():
            if not all(fits(one[key], int) and one[key] >= 0 for key in ("cluster", "class_id")):
                raise IndexError
            class_of[one["cluster"]] = one["class_id"]
            counts[one["class_id"]] += one["labelled"]
    except (LookupError, TypeError, ValueError):
        raise DataError(f"{stage / 'prototypes.json'} is damaged: copy it back") from None
    return Columns(names, class_of, tuple(counts.tolist()))


def _width(method: Method) -> int:
    """Return the number of logits, of features of zeros."""
    return try_answer(method).shape[1]


def parts_of(method: Method) -> list[str]:
    """Return the modules that make logits of features: the outermost ones that `answer` calls.

    The backbone is not among them, though a method asks it for its activation.
    """
    called: set[str] = set()

    def note(name: str) -> Callable[[nn.Module, object], None]:
        return lambda module, inputs: called.add(name)

    inside = [n for n, m in method.named_modules() if isinstance(m, Backbone)]
    hooks = [
        module.register_forward_pre_hook(note(name))
        for name, module in method.named_modules()
        if name and not any(f"{name}.".startswith(f"{one}.") for one in inside)
    ]
    try_answer(method)
    for hook in hooks:
        hook.remove()
    return sorted(name for name in called if not any(name.startswith(f"{one}.") for one in called))


@torch.no_grad()
def try_answer(method: Method) -> Float[Tensor, "2 k"]:
    """Return the logits of two fixed rows of features, in evaluation mode."""
    random = torch.Generator().manual_seed(0)
    device, training = next(method.backbone.parameters()).device, method.training
    rows = torch.randn(2, method.backbone.dim, generator=random).to(device)
    logits = method.eval().answer(rows)
    method.train(training)
    return logits
