"""Evaluation of any weights: an exported file, other people's checkpoints, a library's.

What `init.weights` takes (`models/start_weights.py`) can be measured too. Our exports say what
network they are of, and how images are read. Of others `--backbone` and `--size` say it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from cluster_jobs.results.baselines import Beside, baselines
from cluster_jobs.results.layers import check_layers, layer_scores
from cluster_jobs.results.shards import open_measured, with_labels
from deepclust.errors import DeepclustError
from deepclust.evaluate import Scores, evaluate, find_evaluator
from deepclust.evaluate.frozen import Images, freeze_shards
from deepclust.launch.role import cores
from deepclust.models import start_weights
from deepclust.trained.weights import Network, fresh_of, weights_embedder

log = logging.getLogger("deepclust")
BASELINES = Beside()
NO_RUN = "weights alone have no labelled seeds. Evaluate the run that they are of"


def is_weights(source: str) -> bool:
    """Return whether a source is a file or the name of weights in a library, not a run."""
    return start_weights.is_named(source) or Path(source).is_file()


def evaluate_weights(
    source: str,
    train: str,
    test: str,
    network: Network,
    names: Iterable[str] | None = None,
    emit: Callable[[str], None] = log.warning,
    beside: Beside = BASELINES,
) -> Scores:
    """Evaluate weights on labelled shards as `evaluate_run` does, and return the scores.

    Nothing is recorded. Raises `RecipeError` where the network is not known or the weights are not
    of it, and `DataError` for a file that cannot be read.
    """
    names = None if names is None else list(names)
    for name in names or ():
        find_evaluator(name)
    embedder, taken = weights_embedder(source, network)
    emit(f"note: {taken}")
    workers = min(embedder.data.readers(), cores())
    embedder = replace(embedder, data=embedder.data.model_copy(update={"workers": workers}))
    data = with_labels(embedder.data, beside.labels)
    if beside.layers:
        check_layers(embedder)
    with open_measured(train, data) as index, open_measured(test, data) as test_index:
        frozen = freeze_shards(embedder, index, test_index, data)
        images = Images(embedder.method.trunk, (index, test_index), data)
        frozen = replace(
            frozen, seeds_missing=NO_RUN, answers_missing=NO_RUN, images=images,
            finetuning=beside.finetuning,
        )  # fmt: skip
        for note in frozen.notes:
            emit(f"note: {note}")
        scores = evaluate(frozen, names, emit)
        if beside.layers:
            scores["layers"] = layer_scores(frozen, (index, test_index), embedder, emit)
        if beside.baselines:
            try:
                scores["baselines"] = baselines(
                    frozen, (index, test_index), lambda: fresh_of(embedder), names, None, emit
                )
            except (DeepclustError, OSError) as error:
                emit(f"warning: there are no baselines: {error}")
    return scores
