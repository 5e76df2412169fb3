from __future__ import annotations

import pytest

from deepclust.optim.schedule import learning_rate, weight_decay
from deepclust.recipe.sections import TrainSection


def train(**changes: object) -> TrainSection:
    return TrainSection.model_validate({"epochs": 10, "lr": 0.1, "weight_decay": 0.04, **changes})


@pytest.mark.parametrize(
    ("schedule", "epochs", "factor"),
    [("constant", 9.9, 1.0), ("cosine", 0.0, 1.0), ("cosine", 5.0, 0.5), ("cosine", 10.0, 0.0)],
)
def test_the_rate_follows_its_schedule(schedule: str, epochs: float, factor: float) -> None:
    assert learning_rate(train(schedule=schedule), epochs) == pytest.approx(0.1 * factor)


def test_step_lowers_the_rate_at_its_epochs() -> None:
    config = train(schedule="step", steps_at=[4, 8])
    rates = [learning_rate(config, epochs) for epochs in (3, 4, 8)]
    assert rates == pytest.approx([0.1, 0.01, 0.001])


def test_warm_up_rises_to_the_full_rate() -> None:
    rates = [learning_rate(train(warmup=2), quarter / 4) for quarter in range(12)]
    assert rates == sorted(rates)
    assert 0 < rates[0] < 0.001
    assert rates[-1] == 0.1


def test_a_cosine_ends_at_lr_end() -> None:
    config = train(schedule="cosine", lr_end=0.02)
    rates = [learning_rate(config, epochs) for epochs in (0, 5, 10, 12)]
    assert rates == pytest.approx([0.1, 0.06, 0.02, 0.02])


def test_weight_decay_is_constant_or_a_cosine_to_its_end() -> None:
    assert {weight_decay(train(), epochs) for epochs in (0, 3.3, 10)} == {0.04}
    decays = [weight_decay(train(weight_decay_end=0.4), epochs) for epochs in (0, 5, 10)]
    assert decays == pytest.approx([0.04, 0.22, 0.4])
    assert weight_decay(train(weight_decay_end=0.0), 10) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr_end": 0.01}, "lr_end belongs to schedule=cosine"),
        ({"optimizer": "adamw", "nesterov": True}, "adamw has no nesterov momentum"),
        ({"betas": (0.9, 1.0)}, "betas are two numbers"),
    ],
)
def test_impossible_settings_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(**changes)
