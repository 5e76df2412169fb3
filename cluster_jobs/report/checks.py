"""Checks of a clustering run: what users ask about it, answered in sentences.

Each check returns a result, or None where it is too early or cannot be known. The limits are rules
of thumb that colour a sentence and stop nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import NamedTuple

from cluster_jobs.comparison import ENOUGH, judge
from cluster_jobs.report.facts import Facts
from deepclust.run.collapse import KEYS, LINES, collapsed

JUDGES = 30  # held-out labels, fewer of which judge nothing
STUCK = 0.97  # of a guess: no better than a guess
CROWDED = 0.2  # share of the images in one cluster
LOST = 0.001  # share of the samples that could not be used
UNSETTLED = 0.05  # fall of the NMI between rounds


class Check(NamedTuple):
    """Whether something is good, and a sentence that says why."""

    good: bool
    text: str


def checks(facts: Facts) -> list[Check]:
    """Return the results of all checks for which it is not too early."""
    table: tuple[Callable[[Facts], Check | None], ...] = (
        beats_baselines, knows_seeds, learns, spread_out, balanced, settles, filled, whole,
    )  # fmt: skip
    return [result for check in table if (result := check(facts)) is not None]


def beats_baselines(facts: Facts) -> Check | None:
    """Check whether the newest scores are above those of pixels, random weights and majority.

    It is too early before `ENOUGH` steps, unless the run has ended.
    """
    result = judge(facts.scores, lambda step: _is_late(facts, step))
    return None if result is None else Check(result.good, result.text + result.advice)


def knows_seeds(facts: Facts) -> Check | None:
    """Check a seeded run by its held-out labels, if enough of them were left."""
    seeds = facts.seeds or {}
    counts = [sum(row) for row in seeds.get("confusion") or []][: len(seeds.get("classes") or [])]
    share, n = seeds.get("accuracy"), sum(counts)
    if share is None or n < JUDGES:
        return None
    guess = max(counts) / n
    noise = 2 * sqrt(guess * (1 - guess) / n)  # two standard errors of a guess
    text = f"Of {n:,} held-out labels {share:.1%} are nearest to a prototype of their class"
    if share <= guess:
        return Check(
            False,
            f"{text}, no more than the commonest class has, {guess:.1%}. Check the labels, or "
            "raise seeds.pin_from so that features are better when labels seed them.",
        )
    if share <= guess + noise:
        return None
    return Check(True, f"{text}; the commonest class has {guess:.1%}.")


def _is_late(facts: Facts, step: int | None) -> bool:
    """Return whether a step is late enough to judge a run; an unknown one is taken to be."""
    return step is None or step >= ENOUGH or facts.status.state == "SUCCEEDED"


def _losses(facts: Facts) -> list[float]:
    """Return the losses that can be judged: of rounds, or of lines where there are no rounds.

    A round has a fresh classifier, so the mean of its first steps is that of a guess. The newest
    round counts when it has seen `ENOUGH` steps, or the run has ended. Nothing counts before the
    warm-up is over.
    """
    last = facts.train[-1] if facts.train else {}
    epoch = last.get("epoch")
    warm = epoch is None or epoch >= facts.recipe.train.warmup
    if not warm or not _is_late(facts, last.get("step")):
        return []
    if not facts.rounds:
        return [one["loss"] for one in facts.train if one["loss"] is not None]
    trained = [one for one in facts.rounds if one["loss"] is not None]
    if trained and not _is_late(facts, _steps_of(facts, trained[-1].get("round"))):
        trained = trained[:-1]
    return [one["loss"] for one in trained]


def _steps_of(facts: Facts, number: int | None) -> int | None:
    """Return over how many steps the metrics of a round go, None where they do not say."""
    steps = [one["step"] for one in facts.train if one.get("round") == number and "step" in one]
    return steps[-1] - steps[0] if number is not None and steps else None


def learns(facts: Facts) -> Check | None:
    """Check whether the network beats a guess, whose loss is ln of the number of answers."""
    trained = _losses(facts)
    if not trained:
        return None
    loss, guess = trained[-1], facts.guess
    if loss > STUCK * guess:
        smaller = "" if facts.recipe.cluster is None else ", or a smaller cluster.k"
        return Check(
            False,
            f"The loss, {loss:.2f}, is still that of a guess, {guess:.2f}: the network does not "
            f"learn. Try another train.lr{smaller}.",
        )
    return Check(True, f"The loss, {loss:.2f}, is below that of a guess, {guess:.2f}.")


def spread_out(facts: Facts) -> Check | None:
    """Check that images have answers of their own: the signs of collapse in the metrics."""
    if not any(line.get(key) is not None for line in facts.train[-LINES:] for key in KEYS):
        return None
    text = collapsed(facts.train)
    if text is not None:
        return Check(False, text[0].upper() + text[1:])
    return Check(True, "The network has not collapsed: images have answers of their own.")


def balanced(facts: Facts) -> Check | None:
    """Check that no cluster holds far more images than the others, in any head."""
    if knows_seeds(facts) is not None:  # the sizes of seeded clusters are those of classes
        return None
    shares = [one["largest_share"] for one in facts.heads or facts.rounds[-1:]]
    if not shares or None in shares:
        return None
    share, even = max(shares), 1 / facts.recipe.clustering.k
    text = f"The largest cluster holds {share:.1%} of the images; an even share is {even:.2%}."
    if share > max(CROWDED, 5 * even):
        return Check(
            False, f"{text} The clustering is collapsing: start again with a lower train.lr."
        )
    return Check(True, text)


def settles(facts: Facts) -> Check | None:
    """Check whether consecutive rounds agree more and more."""
    agreed = [one["nmi_previous"] for one in facts.rounds if one["nmi_previous"] is not None]
    if not agreed:
        return None
    if len(agreed) == 1:
        return Check(True, f"The last two rounds agree to NMI {agreed[0]:.2f}; it should rise.")
    text = f"Agreement of consecutive rounds went from NMI {agreed[0]:.2f} to {agreed[-1]:.2f}"
    if agreed[-1] < agreed[0] - UNSETTLED:
        return Check(False, f"{text}: the clusters do not settle. Lower train.lr.")
    return Check(True, f"{text}.")


def filled(facts: Facts) -> Check | None:
    """Check whether k-means had to fill clusters that no image was nearest to."""
    forced = facts.rounds[-1]["forced"] if facts.rounds else 0
    if not forced:
        return None
    return Check(
        forced <= 0.01 * facts.recipe.clustering.k,
        f"{forced:,} images were moved into clusters that had none. "
        "If there are many, the images have fewer kinds than cluster.k.",
    )


def whole(facts: Facts) -> Check | None:
    """Check whether samples had to be left out."""
    if not facts.rounds or facts.rounds[-1]["excluded"] is None:
        return None
    excluded, n = facts.rounds[-1]["excluded"], facts.rounds[-1]["n"]
    if not excluded:
        return Check(True, f"All {n:,} samples are in a cluster.")
    return Check(
        excluded <= LOST * n,
        f"{excluded:,} of {n:,} samples could not be used. The table of deepclust assignments "
        "lists them with the reasons.",
    )
