"""A round that is not as it was written is made again, or the run ends with the file's name."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest

from deepclust import pretrain
from deepclust.errors import DataError, RequeueWanted
from deepclust.launch.start import resume
from deepclust.run.directory import Run
from deepclust.stages import extract, raw_chunk, whole
from tests.tiny import assert_same_run, stop_at, tiny_recipe

RECIPE = ("train.epochs=2", "train.checkpoint=4 steps", "keep.checkpoints=9")


@pytest.fixture(scope="module")
def straight(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight") / "run"
    pretrain(tiny_recipe(shards, *RECIPE), folder)
    return folder


@pytest.fixture(scope="module")
def stopped(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped in round 1, after a checkpoint of it."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(RequeueWanted):
        pretrain(tiny_recipe(shards, *RECIPE), folder, stop_at(15))
    return folder


def damaged_copy(run: Path, folder: Path, file: str, how: str) -> Path:
    """A copy of a run with a flipped bit in a file, or without it."""
    shutil.copytree(run, folder)
    data = (folder / file).read_bytes()
    (folder / file).unlink()
    if how == "flip":
        (folder / file).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    return folder


@pytest.mark.parametrize(
    ("file", "how"),
    [
        ("assignments/assignments.npy", "flip"),
        ("assignments/manifest.json", "flip"),
        ("centroids/centroids.npy", "gone"),
        ("whitening/DONE", "gone"),
    ],
)
def test_a_damaged_round_in_use_is_made_again_from_the_checkpoint_before_it(
    straight: Path, stopped: Path, tmp_path: Path, file: str, how: str
) -> None:
    run = damaged_copy(stopped, tmp_path / "run", f"rounds/0001/{file}", how)
    shown: list[str] = []
    resume(run, show=lambda record: shown.append(str(record.get("text"))))
    assert any("Round 1 is made again, from step 12 instead of 16" in text for text in shown)
    assert any("made again" in str(event.get("text")) for event in Run(run).events())
    assert_same_run(run, straight)
    assert (run / "rounds" / "damaged-0001").is_dir()


def test_the_first_round_is_made_again_from_the_beginning(
    straight: Path, stopped: Path, tmp_path: Path
) -> None:
    run = damaged_copy(stopped, tmp_path / "run", "rounds/0000/assignments/assignments.npy", "flip")
    for folder in Run(run).checkpoints()[3:]:  # those of round 1
        shutil.rmtree(folder)
    shutil.rmtree(run / "rounds" / "0001")
    resume(run)
    assert_same_run(run, straight)


def test_without_a_checkpoint_before_the_round_the_file_is_named(
    stopped: Path, tmp_path: Path
) -> None:
    file = "rounds/0001/assignments/assignments.npy"
    run = damaged_copy(stopped, tmp_path / "run", file, "flip")
    for folder in Run(run).checkpoints()[:-1]:
        shutil.rmtree(folder)
    with pytest.raises(DataError, match=r"assignments\.npy has changed.*init\.weights="):
        resume(run)


def test_training_goes_on_without_a_file_that_it_does_not_read(
    straight: Path, stopped: Path, tmp_path: Path
) -> None:
    file = "rounds/0001/assignments/distances.npy"
    run = damaged_copy(stopped, tmp_path / "run", file, "flip")
    for folder in Run(run).checkpoints()[:-1]:
        shutil.rmtree(folder)
    shown: list[str] = []
    resume(run, show=lambda record: shown.append(str(record.get("text"))))
    assert any("distances.npy has changed" in text for text in shown)
    assert_same_run(run, straight)


def test_a_damaged_round_before_the_one_in_use_is_told(stopped: Path, tmp_path: Path) -> None:
    run = damaged_copy(stopped, tmp_path / "run", "rounds/0000/assignments/assignments.npy", "flip")
    shown: list[str] = []
    whole._tell_of_earlier(Run(run), 1, shown.append)
    assert len(shown) == 1
    assert "assignments.npy has changed since it was written. Training does not need" in shown[0]


@pytest.mark.parametrize("file", ["unit-00001.safetensors", "pivot.npy"])
def test_a_damaged_chunk_of_an_extraction_is_extracted_again(
    straight: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    monkeypatch.setattr(extract, "SMALLEST_CHUNK", 64)
    recipe = tiny_recipe(shards, *RECIPE)
    pretrain(recipe, tmp_path / "straight")

    def stop(record: dict[str, object]) -> None:
        if record.get("event") == "unit" and record.get("unit") == 1:
            raise RequeueWanted("here")

    with contextlib.suppress(RequeueWanted):
        pretrain(recipe, tmp_path / "first", stop)
    run = damaged_copy(tmp_path / "first", tmp_path / "run", f"rounds/0000/raw/{file}", "flip")
    shown: list[str] = []
    resume(run, show=lambda record: shown.append(str(record.get("text"))))
    assert any(file in text and "made again" in text for text in shown)
    assert_same_run(run, tmp_path / "straight")


def test_a_chunk_without_a_hash_is_one_of_an_older_version(tmp_path: Path) -> None:
    import torch

    from deepclust.files import write_tensors

    write_tensors(tmp_path / "unit-00000.safetensors", {"rows": torch.zeros(3)}, {"excluded": "{}"})
    raw_chunk.check(tmp_path / "unit-00000.safetensors")
