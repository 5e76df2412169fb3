"""Fine-tuning: it learns, is the same again, and leaves the network that it is given alone."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import numpy as np
import pytest
import torch

from deepclust import open_index
from deepclust.errors import DataError, RecipeError
from deepclust.evaluate import EVALUATORS, evaluate
from deepclust.evaluate.finetune import _batches, parse_settings
from deepclust.evaluate.frozen import FineTuning, Frozen, Images, freeze, freeze_shards
from deepclust.methods.base import Method
from deepclust.methods.embed import Embedder
from deepclust.models import build_backbone
from deepclust.recipe.sections import Data
from deepclust.trained.saved import Alone
from tests.evaluate.blobs import splits
from tests.images import make_shards

FEW = FineTuning(epochs=2, batch=20, least=1)


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> Frozen:
    folder = tmp_path_factory.mktemp("finetune")
    shards = [
        make_shards(folder / name, n=n, shards=1, classes=4, size=16)
        for name, n in (("train", 200), ("test", 60))
    ]
    data = Data(shards="", size=16, resize=16, workers=0, crop_scale=(0.5, 1.0))
    backbone = build_backbone("conv4", image_size=16, seed=3)
    cpu = torch.device("cpu")
    embed = Embedder(cast(Method, Alone.on(backbone, cpu)), data, "fp32", cpu)
    train, test = (open_index(one) for one in shards)
    return replace(
        freeze_shards(embed, train, test, data), images=Images(backbone, (train, test), data),
        finetuning=FEW,
    )  # fmt: skip


def test_it_learns_classes_and_is_the_same_again(frozen: Frozen) -> None:
    assert frozen.images is not None
    before = {k: v.clone() for k, v in frozen.images.backbone.state_dict().items()}
    torch.manual_seed(5)
    drawn = torch.random.get_rng_state()
    scores = evaluate(frozen, ["finetune", "finetune_10"])
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert scores["finetune"]["top1"] > 0.8  # of four classes
    assert scores["finetune"]["labels"] == 200
    assert scores["finetune"]["steps"] == 20
    assert scores["finetune_10"]["labels"] == 20
    after = frozen.images.backbone.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    torch.manual_seed(6)
    assert evaluate(frozen, ["finetune", "finetune_10"]) == scores


def test_it_trains_the_network_and_not_the_classifier_alone(frozen: Frozen) -> None:
    still = replace(FEW, lr=1e-12, epochs=1, head_lr=0.01)
    moved = replace(still, lr=0.05)
    low, high = (
        evaluate(replace(frozen, finetuning=one), ["finetune"])["finetune"]["top1"]
        for one in (still, moved)
    )
    assert high != low


def test_seeds_are_averaged(frozen: Frozen) -> None:
    hard = replace(FEW, epochs=1, lr=1e-4, head_lr=1e-3)
    one, two = (
        evaluate(replace(frozen, finetuning=replace(hard, seeds=seeds)), ["finetune"])["finetune"]
        for seeds in (1, 2)
    )
    assert one["spread"] == 0
    other = 2 * two["top1"] - one["top1"]
    assert two["spread"] == pytest.approx(abs(other - one["top1"]))


def test_every_row_is_in_every_pass() -> None:
    rows = list(_batches(10, 5, 4, seed=1))
    for passed in (rows[:2], rows[2:]):
        assert np.array_equal(np.sort(np.concatenate(passed)), np.arange(10))
    assert not np.array_equal(np.concatenate(rows[:2]), np.concatenate(rows[2:]))


def test_it_needs_images_and_to_be_asked_for(frozen: Frozen) -> None:
    with pytest.raises(DataError, match="features alone"):
        evaluate(freeze(*splits()), ["finetune"])
    with pytest.raises(DataError, match="1% of 200 training images are 0"):
        evaluate(frozen, ["finetune_1"])
    assert not any(name.startswith("finetune") for name in EVALUATORS)


def test_settings_are_read_from_text() -> None:
    assert parse_settings("") == FineTuning()
    assert parse_settings("epochs=3, lr=1e-3") == replace(FineTuning(), epochs=3, lr=1e-3)
    for text in ("epoch=3", "epochs=x", "epochs"):
        with pytest.raises(RecipeError, match=r"give numbers for some of epochs=10, lr=0\.01"):
            parse_settings(text)
    with pytest.raises(RecipeError, match="positive"):
        parse_settings("lr=-1")
