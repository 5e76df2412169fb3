"""Class means of real runs: of the labelled images, kept, made again, and what they refuse."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from deepclust import load_classifier, open_index, pretrain
from deepclust.data.shards.index import Index
from deepclust.errors import DataError, DiskError, RecipeError, RunDiffersError
from deepclust.evaluate.frozen import embed_samples
from deepclust.files import file_hash
from deepclust.methods.embed import Embedder
from deepclust.run.directory import Run
from deepclust.seeds.table import load
from deepclust.trained import class_means
from deepclust.trained.again import export_again
from deepclust.trained.class_means import answering, at_end, by_means, kept
from deepclust.trained.nearest_mean import NearestMean
from deepclust.trained.nearest_mean import class_means as means_of
from deepclust.trained.saved import embedder_of, newest
from tests.methods.cases import CASES
from tests.tiny import tiny_recipe, tiny_shards

FILE = "class_means/00000012.safetensors"


def opened(path: Path) -> tuple[Run, Embedder, int]:
    """A run, its newest network and the step of its weights."""
    run = Run(path)
    saved = newest(run, print)
    return run, embedder_of(run, saved), saved.state.step


@pytest.fixture
def copy(judged: dict[str, Path], tmp_path: Path) -> Path:
    """A run of SimCLR to write to."""
    return Path(shutil.copytree(judged["simclr"], tmp_path / "run"))


@pytest.mark.parametrize("name", ["simclr", "swav", "sela"])
def test_a_run_ends_with_the_means_of_its_labelled_images(
    name: str, judged: dict[str, Path], shards: Path
) -> None:
    run, embedder, step = opened(judged[name])
    method = kept(run, embedder.method.trunk, step)
    assert method is not None
    assert method.names == tuple(f"class {i}" for i in range(4))
    assert method.labels == (5,) * 4
    index, recipe = open_index(shards), run.recipe
    assert recipe.seeds is not None
    table = load(index, recipe.seeds, recipe.seed).table
    rows, _ = embed_samples(embedder, index, recipe.data, table.sample_ids)
    torch.testing.assert_close(method.means.means, means_of(rows, table.classes, table.names).means)


def test_what_is_missing_is_made_again_with_the_same_bytes(copy: Path) -> None:
    before = (copy / FILE).read_bytes()
    shutil.rmtree(copy / "class_means")
    run, embedder, step = opened(copy)
    assert isinstance(by_means(run, embedder, step, pytest.fail).method, NearestMean)
    assert (copy / FILE).read_bytes() == before


def test_a_file_that_is_there_is_asked_without_an_image(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(class_means, "embed_samples", None)
    named = answering(*opened(copy), pytest.fail)
    assert not isinstance(named, str)


def test_means_of_other_weights_are_not_taken(copy: Path) -> None:
    run, embedder, step = opened(copy)
    before = file_hash(copy / FILE)
    with torch.no_grad():
        next(embedder.method.trunk.parameters()).mul_(2)
    assert kept(run, embedder.method.trunk, step) is None
    by_means(run, embedder, step, pytest.fail)
    assert kept(run, embedder.method.trunk, step) is not None
    assert file_hash(copy / FILE) != before


def test_a_damaged_file_is_named_with_the_fix(copy: Path) -> None:
    run, embedder, step = opened(copy)
    (copy / FILE).write_bytes((copy / FILE).read_bytes()[:-8])
    with pytest.raises(DataError, match=rf"{FILE} is damaged.*Delete it"):
        kept(run, embedder.method.trunk, step)
    names = ("ant", "bee")
    forged = NearestMean.empty(embedder.method.trunk, names)
    forged.labels = (1, 1)
    forged.means.centre = torch.zeros(3)
    class_means._keep(run, forged, step, pytest.fail)
    with pytest.raises(DataError, match=r"its tensors have shapes .*Delete it"):
        kept(run, embedder.method.trunk, step)


def test_a_run_that_cannot_be_written_to_is_asked_all_the_same(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise DiskError(f"cannot write {path}: Read-only file system")

    shutil.rmtree(copy / "class_means")
    monkeypatch.setattr(class_means, "refuse_links_out", refuse)
    heard: list[str] = []
    assert not isinstance(answering(*opened(copy), heard.append), str)
    assert heard[0].startswith("warning: the class means are not kept in the run: cannot write")
    assert not (copy / "class_means").exists()


def test_the_export_of_a_finished_run_is_written_again_with_its_means(copy: Path) -> None:
    first = file_hash(copy / "export" / "backbone.safetensors")
    assert export_again(Run(copy), copy / "again.safetensors").hash == first


def test_more_labels_than_the_end_of_a_run_reads_are_left_for_later(
    copy: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(copy / "class_means")
    monkeypatch.setattr(class_means, "AT_END", 19)
    run, embedder, step = opened(copy)
    heard: list[str] = []
    assert at_end(run, embedder, step, heard.append, open_index(shards)) is embedder.method
    assert "no classifier: 20 labelled images are more than the 19" in heard[0]
    assert not isinstance(answering(run, embedder, step, pytest.fail), str)


@pytest.fixture
def spoilt(tmp_path: Path) -> Callable[[int], tuple[Run, Embedder, int]]:
    """A run of its own shards, some of whose labelled images of class 1 can be read no more."""
    shards, run = tiny_shards(tmp_path / "shards", n=120), tmp_path / "run"
    overrides = ("method.name=simclr", *CASES["simclr"], "train.epochs=1")
    pretrain(tiny_recipe(shards, *overrides, "seeds={labels: shards, per_class: 3}"), run)
    shutil.rmtree(run / "class_means")

    def spoil(count: int) -> tuple[Run, Embedder, int]:
        index, recipe = open_index(shards), Run(run).recipe
        assert recipe.seeds is not None
        table = load(index, recipe.seeds, recipe.seed).table
        for sample in table.sample_ids[table.classes == 1][:count]:
            overwrite(index, int(sample))
        return opened(run)

    return spoil


def overwrite(index: Index, sample: int) -> None:
    """Put zeros in the place of an image, in a tar of the same size."""
    shard = int(np.searchsorted(index.bases, sample, "right")) - 1
    with Path(str(index.shards[shard])).open("r+b") as file:
        file.seek(int(index.offsets[sample]))
        file.write(bytes(int(index.sizes[sample])))


def test_a_labelled_image_that_cannot_be_read_is_left_out(
    spoilt: Callable[[int], tuple[Run, Embedder, int]],
) -> None:
    heard: list[str] = []
    method = by_means(*spoilt(1), heard.append).method
    assert isinstance(method, NearestMean)
    assert method.labels == (3, 2, 3, 3)
    assert heard == ["warning: 1 of 12 labelled samples are excluded"]


def test_a_class_that_has_no_image_left_is_named(
    spoilt: Callable[[int], tuple[Run, Embedder, int]],
) -> None:
    run, embedder, step = spoilt(3)
    why = answering(run, embedder, step, print)
    assert isinstance(why, str)
    assert "has no class means: the seeds have 1 classes without a sample" in why
    assert "'class 1'" in why


def test_images_that_are_not_those_of_the_run_are_not_asked(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(copy / "class_means")
    run, embedder, step = opened(copy)
    others = open_index(tiny_shards(tmp_path / "others", n=60))
    monkeypatch.setattr(class_means, "open_data_index", lambda *given, **options: others)
    with pytest.raises(RunDiffersError, match="was trained on other images"):
        by_means(run, embedder, step, print)
    monkeypatch.setattr(class_means, "is_remote", lambda shards: True)
    with pytest.raises(RecipeError, match=r"behind URLs.*deepclust evaluate"):
        by_means(run, embedder, step, print)


def test_one_of_two_ranks_makes_them_for_both(shards: Path, tmp_path: Path) -> None:
    seeds = "seeds={labels: shards, per_class: 5}"
    given = ("method.name=byol", *CASES["byol"], seeds, "train.ranks=2", "train.epochs=1")
    pretrain(tiny_recipe(shards, *given), tmp_path / "run")
    run, embedder, step = opened(tmp_path / "run")
    assert kept(run, embedder.method.trunk, step) is not None
    assert load_classifier(tmp_path / "run/export/backbone.safetensors").classes[0] == "class 0"
