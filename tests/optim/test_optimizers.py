from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from deepclust.optim.optimizers import Optimizers, Schedule
from deepclust.recipe.sections import TrainSection
from tests.tiny import tiny_recipe


def config(tmp_path: Path, *overrides: str) -> TrainSection:
    return tiny_recipe(tmp_path, "train.epochs=10", "train.lr=0.1", *overrides).train


def stepped(settings: TrainSection) -> tuple[Optimizers, nn.Linear, nn.Linear]:
    body, head = nn.Linear(3, 4), nn.Linear(4, 5)
    optimizers = Optimizers(
        {"body": list(body.parameters()), "head": list(head.parameters())}, settings
    )
    head(body(torch.ones(2, 3))).square().sum().backward()
    optimizers.step()
    return optimizers, body, head


def momenta(optimizers: Optimizers, name: str) -> dict[str, torch.Tensor]:
    return {
        str(number): buffer for group, number, _, buffer in optimizers.buffers() if group == name
    }


def test_a_new_head_forgets_its_momentum_and_the_body_keeps_its_own(tmp_path: Path) -> None:
    optimizers, _, _ = stepped(config(tmp_path, "train.head_momentum=0.9"))
    optimizers.renew_head(torch.ones(5, dtype=torch.bool))
    assert momenta(optimizers, "head") == {}
    assert len(momenta(optimizers, "body")) == 2


def test_kept_rows_keep_their_momentum_and_new_rows_have_none(tmp_path: Path) -> None:
    optimizers, _, _ = stepped(config(tmp_path, "train.head_momentum=0.9"))
    before = momenta(optimizers, "head")["0"].clone()
    fresh = torch.tensor([True, False, True, False, False])
    optimizers.renew_head(fresh)
    after = momenta(optimizers, "head")["0"]
    assert torch.equal(after[~fresh], before[~fresh])
    assert not after[fresh].any()


def test_momentum_survives_a_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    settings = config(tmp_path, "train.head_momentum=0.9")
    optimizers, body, head = stepped(settings)
    groups = {"body": list(body.parameters()), "head": list(head.parameters())}
    restored = Optimizers(groups, settings)
    restored.load_state({name: momenta(optimizers, name) for name in ("body", "head")})
    assert torch.equal(momenta(restored, "body")["1"], momenta(optimizers, "body")["1"])


def test_the_schedule_moves_the_body_and_not_the_head(tmp_path: Path) -> None:
    optimizers, _, _ = stepped(config(tmp_path, "train.head_lr=0.5"))
    assert optimizers.set_rate(0.5) == 0.05
    rates = {name: o.param_groups[0]["lr"] for name, o in optimizers.by_name.items()}
    assert rates == {"body": 0.05, "head": 0.5}


@pytest.mark.parametrize(
    ("schedule", "epochs", "factor"),
    [("constant", 9.9, 1.0), ("cosine", 0.0, 1.0), ("cosine", 5.0, 0.5), ("cosine", 10.0, 0.0)],
)
def test_the_schedule_counts_in_samples(
    tmp_path: Path, schedule: str, epochs: float, factor: float
) -> None:
    found = Schedule(config(tmp_path, f"train.schedule={schedule}"), epoch=1000)
    assert found.factor(int(epochs * 1000)) == pytest.approx(factor)


def test_step_lowers_the_rate_at_its_epochs(tmp_path: Path) -> None:
    settings = config(tmp_path, "train.schedule=step", "train.steps_at=[4, 8]")
    factors = [Schedule(settings, 100).factor(epoch * 100) for epoch in (3, 4, 8)]
    assert factors == pytest.approx([1, 0.1, 0.01])


def test_warm_up_rises_to_the_full_rate(tmp_path: Path) -> None:
    schedule = Schedule(config(tmp_path, "train.warmup=2"), epoch=1000)
    factors = [schedule.factor(samples) for samples in range(0, 3000, 250)]
    assert factors == sorted(factors)
    assert 0 < factors[0] < 0.01
    assert factors[-1] == 1.0
