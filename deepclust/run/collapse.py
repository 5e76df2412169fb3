"""What the signs of collapse in a run's metrics say: which values are bad, in words.

The signs are computed by `methods.parts.monitors`. The limits lie between what healthy and
collapsed runs showed on handwritten digits. Spread: .45 to .95, and .07 at most. Entropy of the
mean target: .4 to 1, and .13 at most. Mean entropy: .1 to .95, and .995 at least. Prototypes used:
.24 to .95, and one of 30 or more. Of ten prototypes a single one is a tenth: of so few the other
signs tell.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

LINES = 5  # of metrics, over which a sign is averaged: a single one may be chance


class Sign(NamedTuple):
    """A scalar of the metrics, the test that it fails, and what that means."""

    key: str
    is_bad: Callable[[float], bool]
    text: str


SIGNS = (
    Sign(
        "spread",
        lambda value: value < 0.1,
        "all images have nearly the same projection (spread {:.3f}, healthy above 0.4): the "
        "network has collapsed. Start again with a lower train.lr, or more train.warmup.",
    ),
    Sign(
        "entropy_of_mean",
        lambda value: value < 0.15,
        "nearly all images have one target (entropy of the mean target {:.3f} of ln k): the "
        "network has collapsed. Start again with a lower train.lr, or softer targets.",
    ),
    Sign(
        "mean_entropy",
        lambda value: value > 0.99,
        "the targets are nearly uniform (mean entropy {:.3f} of ln k), so there is nothing to "
        "learn from them. Start again with sharper targets: a smaller method.epsilon (swav) or "
        "method.teacher_temperature (dino).",
    ),
    Sign(
        "prototypes_used",
        lambda value: value < 0.05,
        "nearly all images are nearest to the same few prototypes (used: {:.3f} of those that a "
        "batch can use): the others learn nothing. Start again with a lower train.lr, more "
        "train.warmup, or fewer prototypes.",
    ),
)
KEYS = tuple(sign.key for sign in SIGNS)


def collapsed(lines: Iterable[Mapping[str, Any]]) -> str | None:
    """Return what the last lines of metrics say about a collapse, or None if all is well.

    It is too early to say before there are `LINES` of them.
    """
    last = list(lines)[-LINES:]
    sign = bad_sign(last)
    return None if sign is None else sign.text.format(_mean(last, sign.key))


def bad_sign(lines: Iterable[Mapping[str, Any]]) -> Sign | None:
    """Return the first sign that is bad in the last lines of metrics."""
    last = list(lines)[-LINES:]
    means = ((sign, _mean(last, sign.key)) for sign in SIGNS)
    return next((sign for sign, mean in means if mean is not None and sign.is_bad(mean)), None)


def _mean(last: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """Return the mean of a scalar, or None where there are too few."""
    values = [line[key] for line in last if line.get(key) is not None]
    return sum(values) / LINES if len(values) == LINES else None


class Watch:
    """What the metrics of an attempt say about a collapse, said once when it begins."""

    def __init__(self) -> None:
        self._last: deque[dict[str, Any]] = deque(maxlen=LINES)
        self._said: str | None = None

    def note(self, line: dict[str, Any]) -> str | None:
        """Take the next line of metrics; return a sentence if a sign of collapse begins."""
        self._last.append(line)
        sign = bad_sign(self._last)
        begins = sign is not None and sign.key != self._said
        self._said = sign.key if sign else None
        return collapsed(self._last) if begins else None
