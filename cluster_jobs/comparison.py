"""Whether the scores of a run beat those of its baselines, in a sentence for status and report."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from cluster_jobs.evaluations import Score

OWN = "this_network"  # as in deepclust.evaluate.baselines, which imports torch
ENOUGH = 100  # steps before which a loss or a score says nothing about a run
JUDGED_BY = ("knn", "linear")  # evaluators whose baselines are compared
BASELINES = {  # by their names in the scores: majority has one score for all evaluators
    "pixels {}": "pixels", "random_weights {}": "random weights", "random {}": "random weights",
    "majority": "the commonest class",
}  # fmt: skip


class Comparison(NamedTuple):
    """Whether a score is above every baseline, a sentence that says so, and what to do."""

    good: bool
    text: str
    advice: str


def judge(scores: list[Score], is_late: Callable[[int | None], bool]) -> Comparison | None:
    """Return what the newest scores say, the worst of it first; None where that is nothing.

    `scores` are the newest first. A difference inside of both 95 % intervals is none. `is_late`
    says whether a step is late enough to judge a run by it.
    """
    judged = [one for one in scores if one.measure == "top1"]  # some evaluations have no labels
    newest = [one for one in judged if one.source == judged[0].source]
    top1 = {one.evaluator: one for one in newest}
    results = []
    for evaluator in JUDGED_BY:
        same = top1.get(f"baseline {OWN} {evaluator}")  # on the rows of the baselines
        own, beside = same or top1.get(evaluator), _baselines(top1, evaluator)
        if own is not None and beside and is_late(own.step):
            results.append(_compared(own, beside))
    known = [result for result in results if result is not None]
    return min(known, key=lambda one: one.good, default=None)


def _baselines(top1: dict[str, Score], evaluator: str) -> Iterable[tuple[str, Score]]:
    """Return the baselines of an evaluator, each with what it is called in a sentence."""
    names = {f"baseline {name}".format(evaluator): text for name, text in BASELINES.items()}
    return [(text, top1[name]) for name, text in names.items() if name in top1]


def _compared(own: Score, beside: Iterable[tuple[str, Score]]) -> Comparison | None:
    """Return what is said of a score beside those of baselines: None where it is inside of one."""
    text, best = max(beside, key=lambda one: one[1].value)
    (low, high), (best_low, best_high) = (
        (one.value, one.value) if one.interval is None else one.interval for one in (own, best)
    )
    numbers = (
        f"{own.evaluator.split()[-1]} top-1 is {own.value:.1%}, and {best.value:.1%} for {text}"
    )
    if high < best_low:
        advice = (
            ". The features are not worth using: lower train.lr, train longer, or use more images."
        )
        return Comparison(False, f"Worse than {text}: {numbers}", advice)
    if low > best_high:
        return Comparison(True, f"Better than every baseline: {numbers}", ".")
    return None
