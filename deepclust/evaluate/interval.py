"""How sure a score is: the 95 % interval of a mean over the test images, by the bootstrap.

The percentile interval of Efron, "Bootstrap methods: another look at the jackknife", 1979. A
resample is the counts of its distinct values, which are multinomial. So no rows are drawn, and an
interval of a million images costs as much as one of a hundred.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Shaped

from deepclust.world import generator

RESAMPLES = 2_000
COUNTS = 2**22  # held at a time
INTERVAL = "interval"  # the name of the interval of the score before it


def with_interval(
    name: str, each: Shaped[np.ndarray, " n"], seed: int
) -> Iterator[tuple[str, float | list[float]]]:
    """Yield the mean of what each test image scores, under its name, and its "interval"."""
    yield name, float(each.mean())
    yield INTERVAL, bootstrap(each, seed)


def bootstrap(each: Shaped[np.ndarray, " n"], seed: int) -> list[float]:
    """Return the 2.5th and 97.5th percentile of the means of resamples, drawn from the seed."""
    values, counts = np.unique(np.asarray(each, np.float64), return_counts=True)
    random, n = generator(seed, "evaluate", "bootstrap"), len(each)
    size, means = max(1, COUNTS // len(values)), []
    for start in range(0, RESAMPLES, size):
        drawn = random.multinomial(n, counts / n, size=min(size, RESAMPLES - start))
        means.append(drawn @ values / n)
    low, high = np.percentile(np.concatenate(means), (2.5, 97.5))
    return [float(low), float(high)]
