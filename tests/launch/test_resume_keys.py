"""What may change when a run is resumed, and what the messages say."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from deepclust import Recipe, pretrain
from deepclust.errors import DataError, DeepclustError, RecipeError, RunDiffersError
from deepclust.launch import start
from deepclust.launch.start import changed, resolved, resume
from deepclust.recipe.may_change import MAY_CHANGE
from deepclust.run.directory import Run
from tests.images import make_shards
from tests.tiny import tiny_recipe, tiny_shards

OTHER = {  # another value of every key that may change
    "train.ranks": "3", "train.hang": "7", "train.timeout": "8", "train.restarts": "0",
    "train.log": "7", "train.checkpoint": "5 steps", "keep.features": "0", "keep.checkpoints": "1",
    "data.workers": "1", "data.stage": "/s", "data.scratch": "/t", "data.shards": "/u",
    "data.index": "/v", "data.read": "block", "data.max_bad": "0.5", "cluster.final": "true",
    "cluster.raw": "memory",
    "train.evaluate": "1 epoch", "train.evaluate_data": "/w",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run beside its shards."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = tiny_recipe(tiny_shards(folder / "shards", n=96), "train.schedule=cosine")
    pretrain(recipe, folder / "run")
    return folder


@pytest.fixture
def place(finished: Path, tmp_path: Path) -> Path:
    """A copy of both, whose recipe names the shards there."""
    shutil.copytree(finished, tmp_path / "p")
    file = tmp_path / "p" / "run" / "recipe.yaml"
    file.write_text(file.read_text().replace(str(finished), str(tmp_path / "p")))
    return tmp_path / "p"


def test_every_key_of_the_table_may_change_and_others_may_not(finished: Path) -> None:
    run = Run(finished / "run")
    assert {*OTHER, "seeds.labels"} == set(MAY_CHANGE)
    for key, value in OTHER.items():
        needs = ["train.evaluate=2 epochs"] if key == "train.evaluate_data" else []
        assert changed(run, *needs, f"{key}={value}") != run.recipe, key
    for change in ("cluster.k=9", "train.lr=1", "seed=1", "train.epochs=1", "data.size=8"):
        with pytest.raises(RunDiffersError, match=change.partition("=")[0]):
            changed(run, change)


def test_moved_shards_are_taken_by_their_fingerprint(place: Path) -> None:
    (place / "shards").rename(place / "moved")
    with pytest.raises(DataError, match=r"cannot be opened: .* data\.shards=NEW_PLACE") as caught:
        resume(place / "run", "train.epochs=3")
    assert "changed" not in str(caught.value)
    resume(place / "run", "train.epochs=3", f"data.shards={place / 'moved'}")
    assert Run(place / "run").recipe.data.shards == str(place / "moved")


def test_other_shards_are_refused_and_not_stored(place: Path) -> None:
    make_shards(place / "others", n=95, shards=3, classes=4, size=16)
    before = (place / "run" / "recipe.yaml").read_text()
    with pytest.raises(RunDiffersError, match=r"data\.shards: these are not the data"):
        resume(place / "run", f"data.shards={place / 'others'}")
    assert (place / "run" / "recipe.yaml").read_text() == before


def test_a_damaged_record_of_the_data_is_made_again_when_it_is_deleted(place: Path) -> None:
    file = place / "run" / "data.json"
    whole = file.read_text()
    for damaged in (whole[:40], whole.replace('"n": 96', '"n": 69')):
        file.write_text(damaged)
        with pytest.raises(DeepclustError, match=r"data\.json is damaged.*[Dd]elete"):
            resume(place / "run", "train.epochs=3")
    file.unlink()
    resume(place / "run")
    assert file.read_text() == whole


def test_paths_become_absolute_whatever_they_are_called(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    recipe = resolved(tiny_recipe(Path("shards")))
    assert recipe.data.shards == str(place / "shards")
    stage = changed(Run(place / "run"), "data.stage=stage", "data.scratch=a:b").data
    assert (stage.stage, stage.scratch) == (str(place / "stage"), str(place / "a:b"))
    seeded = Recipe.load("small-photos", "data.shards=shards", "seeds.labels=shards")
    assert resolved(seeded).seeds.labels == "shards"
    assert resolved(seeded.replace("seeds.held_out=t.csv")).seeds.held_out == str(place / "t.csv")
    url = resolved(tiny_recipe(place, "data.shards=s3://bucket/x", "init.weights=w"))
    assert (url.data.shards, url.init.weights) == ("s3://bucket/x", str(place / "w"))


def test_weights_of_sources_stay_where_they_decide_what_is_drawn(tmp_path: Path) -> None:
    weighted = tiny_recipe(tmp_path, "data.shards={a: 2, b: 1}")
    for name, overrides in (("online", ["method.name=simclr", "cluster=null"]), ("clusters", [])):
        start.prepare_run(weighted.replace(*overrides), tmp_path / name)
    online, clusters = Run(tmp_path / "online"), Run(tmp_path / "clusters")
    assert list(online.recipe.data.shards) == [os.path.abspath(name) for name in "ab"]
    assert changed(online, "data.shards={c: 2, d: 1}").data.weights == (2, 1)
    assert changed(clusters, "data.shards={c: 1, d: 3}").data.weights == (1, 3)
    for other in ("{c: 1, d: 3}", "[c, d]", "c"):
        with pytest.raises(RunDiffersError, match="weights"):
            changed(online, f"data.shards={other}")


def test_a_longer_cosine_says_how_the_rate_jumps(place: Path) -> None:
    shown: list[str] = []
    resume(place / "run", "train.epochs=3", show=lambda record: shown.append(str(record)))
    assert any("at epoch 2 the learning rate goes from 0 to 0.0125" in text for text in shown)


def test_fewer_checkpoints_are_deleted_before_anything_is_written(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(run_dir: Path) -> None:
        raise OSError("full")

    assert len(Run(place / "run").checkpoints()) == 3
    monkeypatch.setattr(start, "hold", full)
    with pytest.raises(OSError, match="full"):
        resume(place / "run", "keep.checkpoints=1")
    assert len(Run(place / "run").checkpoints()) == 1


@pytest.mark.parametrize("how", ["gone", "flip"])
def test_a_finished_run_has_its_weights_written_again(place: Path, how: str) -> None:
    file = place / "run" / "export" / "backbone.safetensors"
    data = file.read_bytes()
    file.unlink() if how == "gone" else file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    shown: list[str] = []
    resume(place / "run", show=lambda record: shown.append(str(record)))
    assert file.read_bytes() == data
    assert any("written again" in text for text in shown)


@pytest.mark.parametrize("change", ["train.batch=1", "train.accumulate=24"])
def test_a_batch_of_one_is_refused_before_any_work(place: Path, change: str) -> None:
    with pytest.raises(RecipeError, match=r"train\.batch: .* batch norms"):
        pretrain(tiny_recipe(place / "shards", change), place / "new")
    assert not (place / "new" / "rounds").exists()


@pytest.mark.parametrize("method", ["byol", "moco-v2", "moco-v3"])
def test_a_method_that_norms_each_crop_alone_needs_two_images(place: Path, method: str) -> None:
    given = [f"method.name={method}", "cluster=null", "train.ranks=2"]
    with pytest.raises(RecipeError, match=rf"train\.batch: {method} norms .* set 4 or more"):
        tiny_recipe(place, *given, "train.batch=2")
    assert tiny_recipe(place, *given, "train.batch=4").train.batch == 4


def test_simclr_with_a_batch_of_one_is_refused(place: Path) -> None:
    with pytest.raises(RecipeError, match=r"train\.batch: simclr compares"):
        tiny_recipe(place, "method.name=simclr", "cluster=null", "train.batch=1")


@pytest.mark.parametrize("what", ["run", "checkpoint", "export"])
def test_weights_of_another_backbone_are_named_in_one_line(place: Path, what: str) -> None:
    sources = {
        "run": place / "run",
        "checkpoint": Run(place / "run").checkpoints()[-1],
        "export": place / "run" / "export" / "backbone.safetensors",
    }
    recipe = tiny_recipe(
        place / "shards", "backbone.name=resnet18_small", f"init.weights={sources[what]}"
    )
    with pytest.raises(RecipeError, match=r"it holds conv4; set backbone\.name=conv4") as caught:
        pretrain(recipe, place / "new")
    assert "\n" not in str(caught.value)


def test_a_run_in_an_odd_place_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing" / "deeper")
    os.mkfifo(tmp_path / "pipe")
    recipe = tiny_recipe(tmp_path)
    for name in ("file", "dangling", "pipe", "x" * 300, "file/below"):
        with pytest.raises(OSError, match="cannot") as caught:
            pretrain(recipe, tmp_path / name)
        assert caught.value.exit_code == 5  # type: ignore[attr-defined]
