"""How much work a recipe is: steps, rounds and checkpoints, exact, by the run's own timeline."""

from __future__ import annotations

import math
from dataclasses import dataclass

from deepclust.recipe import Recipe
from deepclust.run.state import State
from deepclust.stages.schedule import Timeline


@dataclass(frozen=True)
class Counts:
    """What a run does. `pairs` are the centroids that each row is compared with, by level."""

    samples: int
    steps: int
    segments: int  # stretches of training from one plan
    rounds: int
    extractions: int
    checkpoints: int
    iterations: int
    pairs: tuple[float, ...]


def count(recipe: Recipe, samples: int) -> Counts:
    """Return the counts of a run over so many usable samples."""
    timeline = Timeline.of(recipe, samples)
    steps, segments, rounds = _walk(timeline)
    cluster, refresh = recipe.cluster, recipe.method.round
    final = cluster is not None and refresh is not None and cluster.final
    extractions = 0
    if refresh is not None:
        banked = refresh.source == "bank"
        extractions = (min(1, rounds) if banked else rounds) + int(final)
    every = timeline.checkpoint
    each = every.count * (timeline.epoch_steps if every.unit == "epoch" else 1)
    return Counts(
        samples=samples,
        steps=steps,
        segments=segments,
        rounds=rounds + int(final),
        extractions=extractions,
        checkpoints=1 + math.ceil(steps / max(1, each)),
        iterations=0 if cluster is None else cluster.iterations + 1,
        pairs=() if cluster is None else centroids_of_a_row(recipe),
    )


def _walk(timeline: Timeline) -> tuple[int, int, int]:
    """Return the steps, segments and rounds of a run, as the pipeline goes."""
    state, rounds = State(), 0
    while not timeline.finished(state):
        if timeline.refresh_due(state):
            rounds += 1
            state = state.in_round(timeline.round_of(state))
        steps = timeline.steps(state) or timeline.epoch_steps
        samples = state.samples + steps * timeline.batch
        state = State(state.step + steps, state.segment, steps, state.round, samples)
        state = state.after_segment()
    return state.step, state.segment, rounds


def centroids_of_a_row(recipe: Recipe) -> tuple[float, ...]:
    """Return the centroids a row is compared with: in two levels, those of its super-cluster."""
    cluster, refresh = recipe.clustering, recipe.method.round
    heads = 1 if refresh is None else refresh.heads
    if cluster.supers > 1:
        return (float(cluster.supers), cluster.k / cluster.supers)
    return (float(cluster.k),) * heads
