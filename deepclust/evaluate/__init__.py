"""What frozen features are worth, measured on labels that training never saw.

Each evaluator is a generator of (name, value) on arrays; `evaluate_features` checks the labels once
and runs those that are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

import numpy as np
from jaxtyping import Float, Int

from deepclust.errors import DataError, RecipeError
from deepclust.evaluate.clusters import clusters
from deepclust.evaluate.knn import knn
from deepclust.evaluate.linear import linear

Evaluator: TypeAlias = Callable[..., Iterator[tuple[str, float]]]
Labelled: TypeAlias = tuple[Float[np.ndarray, "n d"], Int[np.ndarray, " n"] | None]

EVALUATORS: dict[str, Evaluator] = {"knn": knn, "linear": linear, "clusters": clusters}


def evaluate_features(
    train: Labelled,
    test: Labelled,
    names: Iterable[str] = tuple(EVALUATORS),
    seed: int = 0,
    dim: int = 64,
) -> dict[str, dict[str, float]]:
    """Run evaluators on (features [n, d], labels [n]) of both splits: {"knn": {"top1": ...}, ...}.

    `dim`: directions that the whitening of `clusters` keeps, a run's `cluster.dim`.

    Raises `DataError` for labels that are missing (None or -1), rows that are not finite, fewer
    than two classes, or splits whose widths differ; `RecipeError` for an unknown evaluator.
    """
    names = list(names)
    for name in names:
        if name not in EVALUATORS:
            raise RecipeError(f"unknown evaluator {name!r}; choose from {', '.join(EVALUATORS)}")
    train_x, train_y = _checked("train", *train)
    test_x, test_y = _checked("test", *test)
    if train_x.shape[1] != test_x.shape[1]:
        raise DataError(
            f"training features have {train_x.shape[1]} columns and test features "
            f"{test_x.shape[1]}. Extract both with the same backbone."
        )
    if train_y.min() == train_y.max():
        raise DataError(
            f"all {len(train_y)} training rows have label {train_y[0]}: nothing to tell apart. "
            "Evaluate on shards with two classes or more."
        )
    data = (train_x, train_y, test_x, test_y)
    own = {"clusters": {"dim": dim}}
    return {name: dict(EVALUATORS[name](*data, seed=seed, **own.get(name, {}))) for name in names}


def _checked(
    split: str, x: Float[np.ndarray, "n d"], y: Int[np.ndarray, " n"] | None
) -> tuple[Float[np.ndarray, "n d"], Int[np.ndarray, " n"]]:
    """The rows and labels of a split, fit to be evaluated on; or why not, and what to do."""
    fix = "Pack them from class folders, add a KEY.cls to each sample, or name other shards."
    if y is None:
        raise DataError(f"the {split} shards have no labels, and evaluation needs them. {fix}")
    if len(x) != len(y) or len(x) == 0:
        raise DataError(
            f"{split}: {len(x)} rows of features and {len(y)} labels. "
            "Evaluation takes one label a row and at least one row: extract the features again."
        )
    missing = np.flatnonzero(y < 0)
    if len(missing):
        raise DataError(
            f"{len(missing)} of the {len(y)} {split} samples have no label, the first of them row "
            f"{missing[0]}. {fix}"
        )
    broken = np.flatnonzero(~np.isfinite(x.sum(1, dtype=np.float64)))
    if len(broken):
        raise DataError(
            f"{len(broken)} {split} rows are not finite, the first of them row {broken[0]}. "
            "Leave out the samples that extraction excluded (features/excluded.parquet)."
        )
    return x, y
