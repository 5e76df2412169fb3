"""Two moons with six labels each: both terms of SuperCM draw the right boundary between them."""

from __future__ import annotations

import pytest

from tools.bench import two_moons


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_vat_and_the_clustering_module_tell_two_moons_apart(seed: int) -> None:
    trained = two_moons.train("vat and cm", seed, two_moons.SETUPS["more"])
    assert two_moons.accuracy(trained) >= 0.99
