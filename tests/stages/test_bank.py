"""Rounds from the bank: no image is read for them, and they are those of a fresh extraction."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from deepclust import Recipe, pretrain
from deepclust.errors import RequeueWanted
from deepclust.launch.start import resume
from deepclust.run.directory import Run
from deepclust.run.round_files import read_excluded
from tests.images import draw, encode, write_tar
from tests.tiny import assert_same_run, stop_at, tiny_recipe

STILL = [  # every crop is the whole image, and nothing learns
    "data.crop_scale=[1, 1]", "data.crop_ratio=[1, 1]", "data.flip=0", "method.layers=1",
    "backbone.name=tests.toys.plain_backbone", "train.lr=1e-12", "keep.features=9",
]  # fmt: skip


def recipe(shards: Path, *overrides: str) -> Recipe:
    return tiny_recipe(
        shards, "method={name: deepcluster-v2, hidden: 32, out: 16}", "cluster.dim=256", *overrides
    )


def features(run: Run, number: int) -> list[np.ndarray]:
    files = sorted((run.round(number) / "features").glob("rows*.npy"))
    return [np.load(file).astype(np.float32) for file in files]


def test_the_bank_is_a_fresh_extraction_when_weights_stand_still(
    shards: Path, tmp_path: Path
) -> None:
    pretrain(recipe(shards, *STILL, "train.ranks=2"), tmp_path / "run")
    run = Run(tmp_path / "run")
    (extracted,), banks = features(run, 0), features(run, 1)
    assert len(banks) == 2  # a row for each full-size crop
    for rows in banks:
        np.testing.assert_allclose(rows, extracted, atol=2e-3)  # float16
    names = [event["event"] for event in run.events()]
    assert names.count("extracted") == 1
    assert names.count("features") == 2


def test_seeds_have_equal_prototypes_in_all_heads(shards: Path, tmp_path: Path) -> None:
    seeds = "seeds={labels: shards, per_class: 5}"
    pretrain(recipe(shards, "method.heads=3", seeds), tmp_path / "run")
    for number in (0, 1):
        stage = Run(tmp_path / "run").round(number) / "centroids"
        first, *others = np.load(stage / "centroids.npy")
        for other in others:
            np.testing.assert_array_equal(other[:4], first[:4])
            assert (other[4:] != first[4:]).any()


@pytest.fixture(scope="module")
def one_bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with a sample that no reader can decode."""
    folder = tmp_path_factory.mktemp("bad")
    pngs = [encode(draw(i, 16, 16, label=i % 4)) for i in range(120)]
    pngs[5] = b"no image"
    write_tar(folder / "a-000000.tar", [(f"{i:04d}.png", png) for i, png in enumerate(pngs)])
    return folder


def test_a_lost_first_pass_is_made_again_and_bad_samples_stay_excluded(
    one_bad: Path, tmp_path: Path
) -> None:
    of = recipe(one_bad, "keep.features=0", "train.log=1", "train.epochs=3")
    pretrain(of, tmp_path / "straight")
    with pytest.raises(RequeueWanted):
        pretrain(of, tmp_path / "stopped", stop_at(2))
    for folder in Run(tmp_path / "stopped").checkpoints()[1:]:
        shutil.rmtree(folder)  # as if it had been killed before the first one
    resume(tmp_path / "stopped")
    assert_same_run(tmp_path / "stopped", tmp_path / "straight")
    run = Run(tmp_path / "stopped")
    assert [event["event"] for event in run.events()].count("extracted") == 2
    for number in run.rounds():
        excluded = read_excluded(run.round(number) / "assignments")
        assert list(excluded) == [5]
        assert "0005" in excluded[5]


def test_assignments_of_another_run_are_a_start_and_the_bank_is_filled_all_the_same(
    shards: Path, tmp_path: Path
) -> None:
    pretrain(recipe(shards, "train.epochs=1"), tmp_path / "one")
    start = f"init.assignments={tmp_path / 'one/rounds/0000'}"
    pretrain(recipe(shards, start), tmp_path / "two")
    run = Run(tmp_path / "two")
    assert [event["event"] for event in run.events()].count("extracted") == 1
    assert all(read_excluded(run.round(n) / "assignments") == {} for n in (0, 1))
