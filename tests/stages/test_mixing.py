"""Mixup and cutmix of labelled rows: against a loop, for any number of ranks, and where few are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torch import Tensor

from deepclust import Recipe, open_index
from deepclust.data.read.loader import Loader
from deepclust.data.shards.index import Index
from deepclust.errors import RecipeError
from deepclust.methods.base import Batch, Now
from deepclust.recipe.sections import MixSection
from deepclust.run.checkpoint import State
from deepclust.seeds.table import SeedTable
from deepclust.stages.batches import Feed
from deepclust.stages.mixing import certain, draw, mix_images, mix_labels, partners
from deepclust.stages.schedule import Timeline
from deepclust.world import World, derive
from tests.methods.cases import NAMES_OF, recipe

BOTH = "seeds.mix={mixup: 1, cutmix: 1, chance: 0.8}"
EVERY = np.arange(0, 300, 15)
TABLE = SeedTable(EVERY, (EVERY // 15 % 4).astype(np.int32), list(NAMES_OF))
STATE = State(step=15, segment=1, offset=3)


def read(
    index: Index, of: Recipe, rank: int = 0, ranks: int = 1, table: SeedTable = TABLE
) -> list[Batch]:
    """Two steps of a rank's batches, from step 3 of segment 1 on."""
    feed = Feed(of, index, "offset", World(rank, ranks), table)
    plan = feed.plan(Timeline.of(of, len(index)), STATE, None, steps=5)
    loader = Loader(index, 0)
    stream = loader.stream(feed.requests(plan, None, STATE))
    batches = [feed.to_batch(loaded, None, STATE.segment, Now()) for loaded in stream]
    loader.close()
    return batches


def mixing(*overrides: str) -> Recipe:
    return recipe("suave", "seeds.share=0.5", "data.jitter=[0.4, 0.4, 0, 0]", *overrides)


@pytest.fixture
def index(shards: Path) -> Index:
    return open_index(shards)


def of_config(of: Recipe) -> MixSection:
    assert of.seeds is not None
    assert of.seeds.mix is not None
    return of.seeds.mix


def by_hand(of: Recipe, plain: Batch, positions: np.ndarray) -> tuple[list[Tensor], Tensor]:
    """Crops and classes of a global batch, mixed row by row and pixel by pixel."""
    key = derive(derive(of.seed, "view", STATE.segment), "mix")
    drawn = draw(of_config(of), key, positions)
    known = [row for row in range(24) if plain.labels[row] >= 0]
    crops, soft = [crop.clone() for crop in plain.crops], torch.zeros(24, 4)
    for place, row in enumerate(known):
        mate = known[place + 1 if place % 2 == 0 else place - 1]
        own, other = int(plain.labels[row]), int(plain.labels[mate])
        soft[row, own] = 1.0
        if not drawn.mixed[row]:
            continue
        weight = float(drawn.weights[row])
        for crop, before in zip(crops, plain.crops, strict=True):
            side, (top, bottom, left, right) = crop.shape[-1], drawn.edges[row]
            if not drawn.boxed[row]:
                crop[row] = weight * before[row] + (1 - weight) * before[mate]
                continue
            for y in range(int(top * side), int(bottom * side)):
                for x in range(int(left * side), int(right * side)):
                    crop[row, :, y, x] = before[mate, :, y, x]
        if drawn.boxed[row]:
            changed = int((crops[0][row] == plain.crops[0][mate]).all(0).sum())
            weight = 1 - changed / crops[0].shape[-1] ** 2
        soft[row] = 0
        soft[row, own] += weight
        soft[row, other] += 1 - weight
    return crops, soft


def test_rows_are_mixed_as_a_loop_over_pixels_mixes_them(index: Index) -> None:
    of = mixing(BOTH)
    batches, plain = read(index, of), read(index, mixing())
    kinds = set()
    for step, (one, before) in enumerate(zip(batches, plain, strict=True)):
        positions = (STATE.offset + step) * 24 + np.arange(24)
        crops, soft = by_hand(of, before, positions)
        for crop, expected in zip(one.crops, crops, strict=True):
            torch.testing.assert_close(crop, expected, atol=1e-6, rtol=1e-6)
        assert one.soft is not None
        torch.testing.assert_close(one.soft, soft, atol=1e-6, rtol=0)
        assert torch.equal(one.labelled, before.labels >= 0)
        share, label = soft.max(1)
        assert torch.equal(one.labels, label.where(share > 0.9999, -1))
        kinds |= set((one.labels - before.labels).tolist())
    assert len(kinds) > 2  # some labelled rows are mixed, and some are not


@pytest.mark.parametrize(("ranks", "accumulate"), [(2, 1), (3, 1), (1, 2), (2, 3)])
def test_ranks_and_parts_have_the_same_mixed_rows(
    index: Index, ranks: int, accumulate: int
) -> None:
    """Also where one of a pair is in another rank's part: 5 labelled rows, an odd number."""
    keys = f"train.ranks={ranks}", f"train.accumulate={accumulate}", "seeds.share=0.2"
    of = recipe("supervised", BOTH, "terms={}", *keys)
    (whole, *_), parts = read(index, of.replace("train.ranks=1", "train.accumulate=1")), [
        part for rank in range(ranks) for part in read(index, of, rank, ranks)[:accumulate]
    ]  # fmt: skip
    for name in ("sample_ids", "labels", "soft"):
        together = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(together, getattr(whole, name)), name
    assert torch.equal(torch.cat([part.crops[0] for part in parts]), whole.crops[0])
    assert whole.soft is not None
    assert int((whole.soft.max(1)[0] < 1).sum() - (whole.soft.sum(1) == 0).sum()) > 2


def test_weights_are_beta_and_boxes_have_the_area_that_the_classes_say() -> None:
    positions = np.arange(4000)
    sums = draw(MixSection(mixup=0.4), 3, positions)
    assert kstest(sums.weights, "beta", (0.4, 0.4)).pvalue > 0.01
    assert sums.mixed.all()
    assert not sums.boxed.any()
    drawn = draw(MixSection(cutmix=1.0, mixup=1.0, chance=0.3, switch=0.25), 3, positions)
    assert abs(drawn.mixed.mean() - 0.3) < 0.03
    assert abs(drawn.boxed.mean() - 0.25) < 0.03
    dark, bright = torch.zeros(1, 3, 20, 20), torch.ones(1, 3, 20, 20)
    rows, others = torch.cat([dark.expand(4000, -1, -1, -1), bright]), np.full(4000, 4000)
    left = 1 - mix_images(rows, others, drawn).mean((1, 2, 3))
    np.testing.assert_allclose(left.numpy(), drawn.shares(20), atol=1e-6)
    soft = mix_labels(np.append(np.zeros(4000, int), 1), others, drawn.shares(20), 3)
    torch.testing.assert_close(soft.sum(1), torch.ones(4000))
    torch.testing.assert_close(soft[:, 0], left)


def test_partners_are_pairs_and_the_last_of_an_odd_number_takes_the_one_before() -> None:
    known = np.array([True, False, True, True, False, True, True])
    assert partners(known).tolist() == [2, -1, 0, 5, -1, 3, 5]
    assert partners(np.array([False, True])).tolist() == [-1, -1]
    assert partners(np.zeros(3, bool)).tolist() == [-1, -1, -1]


def test_a_row_of_one_class_has_it_as_its_label_whichever_image_it_came_from() -> None:
    soft = mix_labels(
        np.array([0, 1, 1, -1, 2]), np.array([1, 2, -1, -1, 0]), np.array([0, 0.3, 1, 1, 0.6]), 3
    )
    assert certain(soft).tolist() == [1, 1, 1, -1, -1]


def test_one_label_a_batch_or_a_chance_of_zero_leaves_every_bit_as_it_was(index: Index) -> None:
    for keys in (["seeds.share=0.01", BOTH], ["seeds.mix={mixup: 1, chance: 0}"]):
        mixed = read(index, mixing(*keys))
        plain = read(index, mixing(*keys, "seeds.mix=null"))
        for one, before in zip(mixed, plain, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one.crops, before.crops, strict=True))
            assert torch.equal(one.labels, before.labels)
            assert one.soft is not None
            assert torch.equal(one.soft.sum(1) > 0, before.labels >= 0)


def test_lighter_crops_are_for_labelled_rows_alone_wherever_colours_are_computed(
    index: Index,
) -> None:
    light = ["seeds.crop_scale=[0.9, 1.0]", "seeds.colour=0"]
    lights = [read(index, mixing(f"data.colour_on={on}", *light)) for on in ("workers", "device")]
    one, before = lights[0][0], read(index, mixing())[0]
    rows = before.labels >= 0
    for a, b, c in zip(one.crops, before.crops, lights[1][0].crops, strict=True):
        assert torch.equal(a[~rows], b[~rows])
        assert not torch.equal(a[rows], b[rows])
        assert torch.equal(a, c)


@pytest.mark.parametrize(("name", "key", "words"), [
    ("suave", "seeds.mix={chance: 0.5}", "set mixup or cutmix"),
    ("suave", "seeds.mix={mixup: -1}", "greater than or equal to 0"),
    ("suave", "seeds.crop_scale=[0.5, 0.1]", "from a small positive number"),
    ("suave", "seeds.colour=2", "less than or equal to 1"),
    ("tests.toys.method", "seeds.mix={mixup: 1}", "takes no mixture of two classes as a target"),
    ("deepcluster", "seeds={labels: s, share: 0.5, mix: {cutmix: 1}}", "leave it out"),
    ("deepcluster", "seeds={labels: s, crop_scale: [0.5, 1]}", "crop_scale: no batch of deepclu"),
    ("deepcluster", "seeds={labels: s, colour: 0.5}", "seeds.colour: no batch"),
])  # fmt: skip
def test_what_cannot_be_mixed_is_refused_with_what_can(name: str, key: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        recipe(name, key)
