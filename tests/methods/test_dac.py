"""DAC's thresholds and 46 epochs, its pairs, its loss in closed form, and blobs that it finds."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepclust.clustering.statistics import accuracy
from deepclust.errors import RecipeError
from deepclust.methods.base import Batch, Now, Setting
from deepclust.methods.dac.config import Config
from deepclust.methods.dac.method import Method, label_features, pair_loss, select
from deepclust.models.backbone import Backbone
from deepclust.optim.optimizers import Optimizers
from deepclust.recipe.sections import TrainSection
from deepclust.stages.build import parameter_groups
from deepclust.world import ALONE, World
from tests.methods.cases import batch, method, recipe
from tests.ranks import on_ranks

UPPER, LOWER = torch.tensor(0.95), torch.tensor(0.455)


def loss_of(own: Tensor, upper: Tensor = UPPER, lower: Tensor = LOWER) -> Tensor:
    return pair_loss(own, ALONE, upper, lower)[0]


def test_lambda_grows_by_99_ten_thousandths_an_epoch_and_the_thresholds_meet_after_46() -> None:
    config = Config(clusters=10)
    for epoch in range(46):
        upper, lower = config.thresholds(epoch)
        assert upper == pytest.approx(0.95 - 0.0099 * epoch, abs=1e-12)
        assert lower == pytest.approx(0.455 + 0.00099 * epoch, abs=1e-12)
        assert lower <= upper
    upper, lower = config.thresholds(46)
    assert lower > upper
    assert config.most_epochs == 46


@pytest.mark.parametrize("keys", [
    ["method.eta=0.1"], ["method.eta=0.00123"], ["method.upper=0.99", "method.lower=0.8"],
    ["method.upper=1", "method.lower=0"],
])  # fmt: skip
def test_the_last_epoch_is_the_one_before_the_thresholds_cross(keys: list[str]) -> None:
    config = recipe("dac", *keys).method
    assert isinstance(config, Config)
    last, first_past = (config.thresholds(config.most_epochs + i) for i in (-1, 0))
    assert last[0] >= last[1]
    assert first_past[0] < first_past[1]


def test_more_epochs_than_thresholds_are_refused_and_both_fixes_work() -> None:
    recipe("dac", "train.epochs=46")
    for epochs in (47, 200, 1000):
        with pytest.raises(RecipeError, match="meet after 46 epochs") as caught:
            recipe("dac", f"train.epochs={epochs}")
        (slower,) = re.findall(r"method.eta=(\S+)", str(caught.value))
        given = recipe("dac", f"train.epochs={epochs}", f"method.eta={slower}").method
        assert isinstance(given, Config)
        assert given.most_epochs == epochs
    with pytest.raises(RecipeError, match="must be less than upper"):
        recipe("dac", "method.lower=0.96")


def test_a_threshold_belongs_to_the_epoch_that_a_step_is_in() -> None:
    one = method(recipe("dac"))
    assert isinstance(one, Method)
    for epochs in (0.0, 0.99, 1.0, 44.999, 45.0):
        expected = one.config.thresholds(int(epochs))
        assert one.thresholds(Now(epochs=epochs)).tolist() == pytest.approx(expected)


def test_the_share_of_selected_pairs_never_falls_for_fixed_features() -> None:
    own = label_features(3 * torch.randn(200, 6, generator=torch.Generator().manual_seed(0)))
    thresholds = map(Config(clusters=6).thresholds, range(46))
    told = [pair_loss(own, ALONE, *torch.tensor(pair))[1]["selected"] for pair in thresholds]
    shares = [float(share) for share in told]
    assert shares == sorted(shares)
    assert shares[0] < shares[-1]
    assert shares[-1] > 0.99


def test_sharp_answers_have_similarities_of_0_or_1_and_a_cost_that_is_finite() -> None:
    answers = torch.eye(4)[[0, 0, 1, 3, 3]]
    own = label_features(1000 * answers)
    similarities = own @ own.T
    assert set(similarities.unique().tolist()) == {0.0, 1.0}
    alike, apart = select(similarities, UPPER, LOWER)
    assert torch.equal(alike, ~apart)
    assert float(loss_of(own)) == pytest.approx(0, abs=2e-6)
    wrong = own.clone().requires_grad_()
    cost = loss_of(wrong, torch.tensor(0.0), torch.tensor(-1.0))  # all count as of one cluster
    cost.backward()
    assert float(cost.detach()) == pytest.approx(16 / 20 * -math.log(1e-6), rel=1e-4)
    assert bool(torch.isfinite(wrong.grad).all())


def test_a_label_feature_is_the_exponential_of_the_logits_scaled_to_length_1() -> None:
    logits = torch.randn(5, 7, dtype=torch.float64)
    expected = F.normalize((logits - logits.max(1, keepdim=True).values).exp())
    torch.testing.assert_close(label_features(logits), expected.float())


def test_the_loss_is_the_mean_cross_entropy_of_the_selected_pairs() -> None:
    own = label_features(2 * torch.randn(30, 5, generator=torch.Generator().manual_seed(1)))
    costs = []
    for i in range(30):
        for j in range(30):
            s = float(own[i] @ own[j])
            if i != j and s >= 0.95:
                costs.append(-math.log(min(s, 1 - 1e-6)))
            elif i != j and s < 0.455:
                costs.append(-math.log(1 - s))
    loss, told = pair_loss(own, ALONE, UPPER, LOWER)
    assert float(loss) == pytest.approx(np.mean(costs), rel=1e-4)
    assert float(told["selected"]) == pytest.approx(len(costs) / (30 * 29))


def test_where_no_pair_is_sure_nothing_is_learned_and_nothing_breaks() -> None:
    own = F.normalize(torch.tensor([[1.0, 0.5], [0.5, 1.0]])).requires_grad_()  # s = 0.8
    cost = loss_of(own)
    cost.backward()
    assert float(cost.detach()) == 0
    assert not own.grad.any()


def shares(world: World) -> list[float]:
    rows = label_features(2 * torch.randn(30, 5, generator=torch.Generator().manual_seed(1)))
    told = pair_loss(rows.chunk(world.size)[world.rank], world, UPPER, LOWER)[1]
    return [float(told["selected"]), float(told["alike"])]


def test_ranks_count_the_pairs_of_the_whole_batch() -> None:
    assert on_ranks(3, shares) == [shares(ALONE)] * 3


def test_the_clusters_are_the_argmax_of_what_the_loss_works_on() -> None:
    of = recipe("dac")
    one, given = method(of), batch(of)
    output = one.loss(given)
    assert output.features is not None
    assert output.logits is not None
    assert torch.equal(one.classify(output.features), output.logits)
    assert output.logits.shape == (24, 12)
    assert float(output.logits.detach().min()) >= 0


@pytest.mark.parametrize("seed", range(2))
def test_blobs_in_eight_dimensions_are_found(seed: int) -> None:
    draws = np.random.default_rng(seed)
    centres, classes = draws.normal(size=(4, 8)), draws.integers(0, 4, 512)
    centres *= 10 / np.linalg.norm(centres, axis=1, keepdims=True)
    rows = (centres[classes] + draws.normal(size=(512, 8))).astype(np.float32)
    one = method_on_rows(8, clusters=4, seed=seed)
    optimizers = Optimizers(
        parameter_groups(one),
        TrainSection(epochs=46, optimizer="adamw", lr=0.003, weight_decay=0),
    )
    images = torch.from_numpy(rows)[:, :, None, None]
    order = torch.Generator().manual_seed(seed)
    for epoch in range(46):
        for part in torch.randperm(len(rows), generator=order).split(128):
            given = replace(EMPTY, sample_ids=part, crops=(images[part],), now=Now(epochs=epoch))
            one(given)["loss"].backward()
            optimizers.step()
    found = one.eval().classify(one.embed(images)).argmax(1)
    assert accuracy(found.numpy(), classes) >= 0.99


NONE = torch.empty(0, dtype=torch.int64)
EMPTY = Batch(NONE, (), NONE, NONE.view(0, 0), NONE)


def method_on_rows(width: int, clusters: int, seed: int) -> Method:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(width, 32), nn.BatchNorm1d(32), nn.ReLU())
    backbone = Backbone(net, name="rows", dim=32, image_size=1)
    return Method(backbone, Setting(Config(clusters=clusters), None, seed, ALONE)).train()
