"""Bootstrap intervals: of the width that theory gives, and the same from the same seed."""

from __future__ import annotations

import numpy as np
import pytest

from deepclust.evaluate.interval import bootstrap, with_interval


def test_the_interval_of_a_share_is_as_wide_as_that_of_a_binomial() -> None:
    hits = np.arange(1000) % 4 == 0
    low, high = bootstrap(hits, 0)
    assert (high - low) / 2 == pytest.approx(1.96 * np.sqrt(0.25 * 0.75 / 1000), rel=0.1)
    assert low < 0.25 < high


def test_the_interval_of_numbers_is_as_wide_as_that_of_a_mean() -> None:
    each = np.random.default_rng(0).random(400)
    low, high = bootstrap(each, 0)
    assert (high - low) / 2 == pytest.approx(1.96 * each.std() / 20, rel=0.1)


def test_the_seed_gives_the_interval_and_nothing_else_does() -> None:
    hits = np.arange(50) % 3 == 0
    assert bootstrap(hits, 0) == bootstrap(np.sort(hits), 0) != bootstrap(hits, 1)
    assert dict(with_interval("top1", hits, 0)) == {"top1": 0.34, "interval": bootstrap(hits, 0)}


def test_what_is_always_right_or_wrong_has_no_width() -> None:
    assert bootstrap(np.ones(9, bool), 0) == [1.0, 1.0]
    assert bootstrap(np.zeros(1, bool), 0) == [0.0, 0.0]
