"""The linear probe of every layer of a network, beside the scores of its features."""

from __future__ import annotations

from collections.abc import Callable

from deepclust.data.shards.index import Index
from deepclust.errors import DeepclustError
from deepclust.evaluate import Scores, evaluate
from deepclust.evaluate.baselines import remeasured
from deepclust.evaluate.frozen import Frozen
from deepclust.evaluate.layers import layers_of
from deepclust.methods.embed import Embedder

MOST_ROWS = 5_000  # of each split: 180 MB of 9,000 numbers


def check_layers(embedder: Embedder) -> None:
    """Raise `RecipeError` for a network whose layers are not known, before anything is measured."""
    next(layers_of(embedder.method.trunk, embedder))


def layer_scores(
    frozen: Frozen,
    indexes: tuple[Index, Index],
    embedder: Embedder,
    emit: Callable[[str], None],
) -> Scores:
    """Return {"conv1": {"top1": ...}, ...}, of at most MOST_ROWS images of each split.

    There is one pass over the images for each layer, so that the rows of one exist at a time. A
    layer that cannot be probed is left out, and `emit` is given the reason.
    """
    scores: Scores = {}
    for name, embed in layers_of(embedder.method.trunk, embedder):
        try:
            layer = remeasured(frozen, indexes, embedder.data, embed, MOST_ROWS)
            probed = evaluate(layer, ["linear"])["linear"]
        except DeepclustError as error:
            emit(f"layer {name}: {error}")
            continue
        counts = {
            "dim": float(layer.train.features.shape[1]),
            "rows": float(len(layer.train.labels)),
        }
        scores[name] = {**probed, **counts}
    return scores
