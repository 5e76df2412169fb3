"""How much work a recipe is: steps, rounds and checkpoints, exact, by the run's own timeline."""

from __future__ import annotations

from dataclasses import dataclass

from deepclust.recipe import Recipe
from deepclust.recipe.sections import Cadence
from deepclust.run.state import State
from deepclust.stages.schedule import MOST_BANK, MOST_QUERIES, QUERIES, Timeline


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
    evaluations: int  # by `train.evaluate`
    evaluated: int  # images of each, if all have labels
    pairs: tuple[float, ...]


def count(recipe: Recipe, samples: int) -> Counts:
    """Return the counts of a run over so many usable samples."""
    timeline = Timeline.of(recipe, samples)
    steps, segments, rounds, saved = _walk(timeline)
    cluster, refresh = recipe.cluster, recipe.method.round
    final = cluster is not None and refresh is not None and cluster.final
    extractions = 0
    if refresh is not None:
        banked, drawn = refresh.source == "bank", refresh.first == "balanced"
        extractions = (min(1, rounds) if banked else rounds - drawn) + int(final)
    scored = _due(timeline.evaluate, timeline.epoch_steps, steps)
    return Counts(
        samples=samples,
        steps=steps,
        segments=segments,
        rounds=rounds + int(final),
        extractions=extractions,
        checkpoints=len(saved | _due(timeline.checkpoint, timeline.epoch_steps, steps)),
        iterations=0 if cluster is None else cluster.iterations + 1,
        evaluations=len(scored),
        evaluated=_evaluated(recipe, samples),
        pairs=() if cluster is None else centroids_of_a_row(recipe),
    )


def _walk(timeline: Timeline) -> tuple[int, int, int, set[int]]:
    """Return the steps, segments and rounds of a run, and the steps that a round or end saves."""
    state, rounds, saved = State(), 0, set[int]()
    while not timeline.finished(state):
        if timeline.refresh_due(state):
            rounds += 1
            saved.add(state.step)
            state = state.in_round(timeline.round_of(state))
        if timeline.round_ahead(state) is not None:
            saved.add(state.step)
        steps = timeline.steps(state) or timeline.epoch_steps
        samples = state.samples + steps * timeline.batch
        state = State(state.step + steps, state.segment, steps, state.round, samples)
        state = state.after_segment()
    return state.step, state.segment, rounds, saved | {state.step}


def _due(every: Cadence | None, epoch_steps: int, steps: int) -> set[int]:
    """Return the steps of a run at which a cadence is due; the last one is, of any."""
    if every is None:
        return set()
    each = every.count * (epoch_steps if every.unit == "epoch" else 1)
    return {*range(each, steps, max(1, each)), steps}


def _evaluated(recipe: Recipe, samples: int) -> int:
    """Return the images of an evaluation: all that are embedded for its bank and its queries."""
    if recipe.train.evaluate is None:
        return 0
    if recipe.train.evaluate_data is not None:  # the most that it takes
        return min(samples, MOST_BANK) + MOST_QUERIES
    queries = min(int(QUERIES * samples), MOST_QUERIES)
    return min(samples - queries, MOST_BANK) + queries


def centroids_of_a_row(recipe: Recipe) -> tuple[float, ...]:
    """Return the centroids a row is compared with: in two levels, those of its super-cluster."""
    cluster, refresh = recipe.clustering, recipe.method.round
    heads = 1 if refresh is None else refresh.heads
    if cluster.supers > 1:
        return (float(cluster.supers), cluster.k / cluster.supers)
    return (float(cluster.k),) * heads
