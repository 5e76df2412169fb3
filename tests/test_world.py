from __future__ import annotations

import numpy as np

from deepclust.world import World, derive, generator


def test_a_purpose_gives_one_number_and_another_purpose_another() -> None:
    assert derive(1, "view", 2) == derive(1, "view", 2)
    others = [derive(2, "view", 2), derive(1, "view", 3), derive(1, "head", 2), derive(1, "view2")]
    assert len({derive(1, "view", 2), *others}) == 5


def test_derived_numbers_fill_the_range_of_63_bits() -> None:
    numbers = np.array([derive(0, "n", i) for i in range(2000)], np.float64) / 2.0**63
    assert 0 <= numbers.min() < 0.01
    assert 0.99 < numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.03


def test_generators_of_one_purpose_agree() -> None:
    assert generator(3, "x").integers(1 << 40) == generator(3, "x").integers(1 << 40)


def test_a_queue_hands_out_every_number_once_and_a_new_world_starts_anew() -> None:
    world = World()
    assert [world.ticket("a"), world.ticket("b"), world.ticket("a")] == [0, 0, 1]
    assert World().ticket("a") == 0
