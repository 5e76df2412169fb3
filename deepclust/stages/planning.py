"""The plan of a segment: from the round's clusters, from all samples, or with a share of labels."""

from __future__ import annotations

from functools import partial

import numpy as np
from jaxtyping import Int8

from deepclust.data.plan import EpochPlan
from deepclust.data.shards.index import Index
from deepclust.methods.base import Targets
from deepclust.recipe import Recipe
from deepclust.run.checkpoint import State
from deepclust.stages.schedule import Timeline


def plan_segment(
    recipe: Recipe,
    index: Index,
    read: str,
    timeline: Timeline,
    state: State,
    targets: Targets | None,
) -> EpochPlan:
    """Uniform over the round's clusters; without a clustering all samples are one.

    With `seeds.share` every batch has its share of labelled samples, uniform over their clusters.
    `read`: by offset, or by block of shards, for which the plan walks through them in lanes.
    """
    ids = targets.assignments[0] if targets else _usable(index)
    lanes = timeline.lanes if read == "block" else None
    build = partial(
        EpochPlan.build, seed=recipe.seed, epoch=state.segment, mode=recipe.method.mode,
        lanes=lanes, blocks=index.bases,
    )  # fmt: skip
    batch, steps, part = recipe.train.batch, timeline.steps(state), _labelled(recipe, lanes or 1)
    if targets is None or targets.labelled is None or part == 0:
        return build(ids, global_batch=batch, steps=steps)
    steps = steps or int((ids >= 0).sum()) // batch
    labels = np.full(len(ids), -1, np.int32)
    labels[targets.labelled] = ids[targets.labelled]
    labelled = build(labels, global_batch=part, steps=steps, purpose="labelled")
    return build(ids, global_batch=batch - part, steps=steps).mixed(labelled, lanes)


def _labelled(recipe: Recipe, lanes: int) -> int:
    """Labelled samples of a batch, as many for each lane; of a share never none, and never all."""
    share, batch = recipe.seeds.share if recipe.seeds else 0.0, recipe.train.batch
    wanted = max(round(share * batch / lanes), int(share > 0)) * lanes
    return min(wanted, batch - lanes)


def _usable(index: Index) -> Int8[np.ndarray, " n"]:
    """0 for every sample, -1 for those that the index excludes."""
    labels = np.zeros(len(index), np.int8)
    labels[list(index.excluded)] = -1
    return labels
