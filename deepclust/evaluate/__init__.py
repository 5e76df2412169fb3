"""What frozen features are worth, measured on labels that pretraining never used.

An evaluator is a generator `f(frozen)` of (name, value), where a value is a number or a `Table`.
`EVALUATORS` is the table of ours, and `ON_REQUEST` has those that run when they are named. A name
with a dot is a module that holds one in its function `evaluate`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias, cast

from deepclust.errors import DataError, DeepclustError, RecipeError
from deepclust.evaluate.classifier import classifier
from deepclust.evaluate.clusters import clusters, spherical_clusters
from deepclust.evaluate.finetune import finetune, finetune_1, finetune_10
from deepclust.evaluate.frozen import DIM, Frozen, Labelled, Skipped, Value, freeze
from deepclust.evaluate.knn import knn
from deepclust.evaluate.linear import linear
from deepclust.evaluate.low_shot import low_shot_1, low_shot_10
from deepclust.evaluate.multi_label import multi_label
from deepclust.evaluate.nearest_prototype import prototypes
from deepclust.evaluate.retrieval import retrieval
from deepclust.evaluate.sgd import linear_sgd
from deepclust.files import import_named

Evaluator: TypeAlias = Callable[[Frozen], Iterator[tuple[str, Value]]]
Scores: TypeAlias = dict[str, dict[str, Any]]  # values by evaluator and name, as JSON has them

EVALUATORS: dict[str, Evaluator] = {
    "knn": knn,
    "linear": linear,
    "low_shot_1": low_shot_1,
    "low_shot_10": low_shot_10,
    "retrieval": retrieval,
    "clusters": clusters,
    "spherical_clusters": spherical_clusters,
    "prototypes": prototypes,
    "classifier": classifier,
}

ON_REQUEST: dict[str, Evaluator] = {  # these train, or need other labels: not among all
    "multi_label": multi_label,
    "linear_sgd": linear_sgd,
    "finetune": finetune,
    "finetune_1": finetune_1,
    "finetune_10": finetune_10,
}


def evaluate(
    frozen: Frozen,
    names: Iterable[str] | None = None,
    emit: Callable[[str], None] = lambda text: None,
) -> Scores:
    """Run evaluators (default: all of `EVALUATORS`) and return {"knn": {"top1": ...}, ...}.

    Each fails alone: one that cannot measure these features is left out, and `emit` is given the
    reason. Raises `RecipeError` for an unknown name, and what the first one raised when all of them
    failed: `DataError` where it cannot measure these features.
    """
    wanted = list(EVALUATORS) if names is None else list(names)
    chosen = {name: find_evaluator(name) for name in wanted}
    scores: Scores = {}
    failures: list[DeepclustError] = []
    for name, evaluator in chosen.items():
        try:
            scores[name] = dict(evaluator(frozen))
        except Exception as error:  # the others' scores must not be lost by what one does
            failures.append(_failure(name, error))
            emit(f"{name} is not evaluated: {error or type(error).__name__}")
    if failures and not scores:
        raise failures[0]
    return scores


def _failure(name: str, error: Exception) -> DeepclustError:
    """Return the error of an evaluator as one of ours, with its name."""
    kind, text = DeepclustError, f"{type(error).__name__}: {error}"
    if isinstance(error, Skipped):
        kind, text = DataError, str(error)
    elif isinstance(error, DeepclustError):
        kind, text = type(error), str(error)
    failure = kind(f"{name} cannot be evaluated: {text}")
    failure.__cause__ = error
    return failure


def evaluate_features(
    train: Labelled,
    test: Labelled,
    names: Iterable[str] | None = None,
    seed: int = 0,
    dim: int = DIM,
) -> Scores:
    """Evaluate (features [n, d], labels [n]) of both splits as `evaluate` does.

    `dim`: directions that the whitening of `clusters` keeps, a run's `cluster.dim`.

    Raises `DataError` for missing labels (None or -1), rows that are not finite, fewer than two
    classes, and splits of different widths.
    """
    return evaluate(freeze(train, test, seed, dim), names)


def find_evaluator(name: str) -> Evaluator:
    """Return the evaluator of a name in `EVALUATORS`, or of a module's name, which has a dot."""
    known = {**EVALUATORS, **ON_REQUEST}
    if name in known:
        return known[name]
    if "." not in name:
        raise RecipeError(
            f"unknown evaluator {name!r}; choose from {', '.join(known)}, or name a module "
            "(package.module) with a function evaluate(frozen)"
        )
    evaluator = getattr(import_named(name), "evaluate", None)
    if not callable(evaluator):
        raise RecipeError(f"the module {name} has no function evaluate(frozen); write one")
    return cast(Evaluator, evaluator)
