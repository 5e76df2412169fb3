"""The loop calls the hooks of a method in order, with the time of the step, and freezes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from deepclust import pretrain
from deepclust.methods.base import Now
from tests.methods.cases import CASES, TOY
from tests.tiny import tiny_recipe
from tests.toys.method import Method

pytestmark = pytest.mark.slow
STEPS = 12  # of an epoch: 300 images in batches of 24


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Every call of a hook of the toy, with its argument, in order."""
    seen: list[tuple[str, Any]] = []
    for name in ("before_step", "loss", "frozen", "after_step"):
        hook = getattr(Method, name)

        def recorded(self: Method, given: Any, name: str = name, hook: Any = hook) -> Any:
            seen.append((name, given))
            return hook(self, given)

        monkeypatch.setattr(Method, name, recorded)
    return seen


def train(shards: Path, tmp_path: Path, *overrides: str) -> None:
    pretrain(
        tiny_recipe(shards, f"method.name={TOY}", *CASES[TOY], "train.epochs=1", *overrides),
        tmp_path / "run",
    )


def test_the_hooks_of_a_step_are_called_in_order(
    shards: Path, tmp_path: Path, calls: list[tuple[str, Any]]
) -> None:
    train(shards, tmp_path)
    assert [name for name, _ in calls] == ["before_step", "loss", "frozen", "after_step"] * STEPS
    times = [given for name, given in calls if name == "after_step"]
    assert times[3] == Now(step=3, epochs=3 / STEPS, progress=3 / STEPS)
    batches = [given for name, given in calls if name == "loss"]
    assert [batch.now for batch in batches] == times
    assert all((batch.labels >= 0).sum() >= 6 for batch in batches)


def test_an_accumulated_step_prepares_each_part_and_follows_once(
    shards: Path, tmp_path: Path, calls: list[tuple[str, Any]]
) -> None:
    train(shards, tmp_path, "train.accumulate=2")
    times = Counter(name for name, _ in calls)
    assert times == {"before_step": 24, "loss": 24, "frozen": 12, "after_step": 12}


def test_a_frozen_parameter_keeps_still_and_then_learns(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights: list[torch.Tensor] = []

    def follow(self: Method, now: Now) -> None:
        weights.append(self.classifier.weight.detach().clone())

    monkeypatch.setattr(Method, "after_step", follow)
    train(shards, tmp_path)
    moved = [not torch.equal(weight, weights[0]) for weight in weights]
    assert moved == [step > 2 for step in range(STEPS)]  # frozen for a fifth of the epoch
