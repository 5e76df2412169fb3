"""What goes wrong, as a user meets it: the exit code, a message with the fix, nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from deepclust.run.directory import Run
from tests.images import draw, encode, make_shards, write_tar
from tests.killing import MOMENTS, start
from tests.tiny import assignments, deepclust, tiny_recipe, tiny_shards

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 400 kB; mounting one takes root, which CI has."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        assert os.environ.get("DEEPCLUST_TEST_INSTALL") != "1", "CI must be able to mount a tmpfs"
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def recipe(shards: Path, folder: Path, *overrides: str) -> Path:
    tiny_recipe(shards, "train.epochs=1", *overrides).save(folder / "recipe.yaml")
    return folder / "recipe.yaml"


def fails(shards: Path, folder: Path, code: int, *overrides: str) -> str:
    """The message of a run that must end with this exit code."""
    done = deepclust(
        "pretrain", recipe(shards, folder, *overrides), "--run", folder / "run", code=code
    )
    assert "Traceback" not in done.stderr
    assert "error: " in done.stderr
    return done.stderr.split("error: ", 1)[1]


def break_images(folder: Path, count: int) -> Path:
    """Shards whose first images are no images."""
    members = []
    for i in range(300):
        data = b"not an image" if i < count else encode(draw(i, 16, 16, i % 4))
        members += [(f"{i:04d}.cls", str(i % 4).encode()), (f"{i:04d}.png", data)]
    write_tar(folder / "shard-000000.tar", members)
    return folder


def test_a_corrupt_image_is_left_out_with_a_reason(tmp_path: Path) -> None:
    broken = break_images(tmp_path / "shards", 2)
    deepclust("pretrain", recipe(broken, tmp_path), "--run", tmp_path / "run")
    labels = assignments(tmp_path / "run")[0][0]
    assert (labels[:2] == -1).all()
    assert (labels[2:] >= 0).all()
    deepclust("assignments", tmp_path / "run", "--out", tmp_path / "a.parquet")
    table = pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert len(table) == 300
    assert table[1]["cluster"] == -1
    assert "0001" in table[1]["reason"]


def test_too_many_corrupt_images_fail_the_run_with_their_names(tmp_path: Path) -> None:
    text = fails(break_images(tmp_path / "shards", 20), tmp_path, 3)
    assert "20 of 300" in text
    assert "key '0003'" in text
    assert "data.max_bad" in text


def test_a_decompression_bomb_is_refused_before_decoding(shards: Path, tmp_path: Path) -> None:
    text = fails(shards, tmp_path, 3, "data.max_pixels=100")
    assert "16 x 16" in text or "256 pixels" in text


@pytest.mark.parametrize("how", ["truncated", "interleaved", "empty", "duplicate"])
def test_a_broken_tar_is_named(tmp_path: Path, how: str) -> None:
    folder = make_shards(tmp_path / "shards", n=40, shards=1, size=16)
    shard = folder / "shard-000000.tar"
    png = encode(draw(0, 16, 16))
    if how == "truncated":
        shard.write_bytes(shard.read_bytes()[:9000])
    elif how == "interleaved":
        write_tar(shard, [("a.png", png), ("b.png", png), ("a.cls", b"1"), ("b.cls", b"2")])
    elif how == "duplicate":
        write_tar(shard, [("a.png", png), ("b.png", png), ("a.png", png)])
    else:
        shard.write_bytes(b"")
    assert "shard-000000.tar" in fails(folder, tmp_path, 3)


def test_k_above_the_distinct_images_is_an_error_with_both_numbers(tmp_path: Path) -> None:
    members = [(f"{i:04d}.png", encode(draw(i % 5, 16, 16))) for i in range(300)]
    write_tar(tmp_path / "shards" / "shard-0.tar", members)
    text = fails(tmp_path / "shards", tmp_path, 3)
    assert "8 clusters need 8 distinct feature rows, but 300 rows have only 5" in text
    assert "cluster.k" in text


def test_fewer_images_than_a_batch_is_an_error(shards: Path, tmp_path: Path) -> None:
    assert "lower train.batch" in fails(shards, tmp_path, 3, "train.batch=500")


def test_a_nan_loss_stops_before_a_checkpoint_and_names_the_steps(
    shards: Path, tmp_path: Path
) -> None:
    text = fails(shards, tmp_path, 6, "train.lr=1e30", "train.checkpoint=1 step")
    assert "not finite in steps" in text
    ids = json.loads((tmp_path / "run" / "nan-batch.json").read_text())["ids"]
    assert len(ids[0]) == 24
    for folder in Run(tmp_path / "run").checkpoints():
        assert int(folder.name) < 12


def test_a_collapsed_clustering_is_an_error(shards: Path, tmp_path: Path) -> None:
    text = fails(shards, tmp_path, 6, "cluster.max_share=0.1")
    assert "collapsed" in text
    assert Run(tmp_path / "run").rounds() == []


def test_constant_images_are_a_collapse_of_the_features(tmp_path: Path) -> None:
    members = [(f"{i:04d}.png", encode(draw(1, 16, 16))) for i in range(300)]
    write_tar(tmp_path / "shards" / "shard-0.tar", members)
    assert "constant" in fails(tmp_path / "shards", tmp_path, 6)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk_loses_nothing_that_was_finished(
    shards: Path, tmp_path: Path, small_disk: Path, ranks: int
) -> None:
    done = deepclust(
        "pretrain", recipe(shards, tmp_path, f"train.ranks={ranks}"),
        "--run", small_disk / "run", code=5,
    )  # fmt: skip
    assert "Free some space" in done.stderr
    subprocess.run(["mount", "-o", "remount,size=100m", str(small_disk)], check=True)
    deepclust("resume", small_disk / "run")


def test_a_folder_that_may_not_be_written_is_a_disk_error(shards: Path, tmp_path: Path) -> None:
    done = deepclust("pretrain", recipe(shards, tmp_path), "--run", "/sys/run", code=5)
    assert "may write to" in done.stderr


def test_a_second_controller_is_refused_with_the_first_ones_name(
    shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start("pretrain", recipe(shards, tmp_path, "train.epochs=50"), "--run", run)
    while not MOMENTS["mid-epoch"](run):
        time.sleep(0.05)
    assert f"process {process.pid}" in deepclust("resume", run, code=7).stderr
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75


def test_changed_shards_are_refused_on_resume(shards: Path, tmp_path: Path) -> None:
    mine = tmp_path / "shards"
    shutil.copytree(shards, mine)
    deepclust("pretrain", recipe(mine, tmp_path), "--run", tmp_path / "run")
    (mine / "shard-000000.tar").rename(mine / "renamed-000000.tar")
    done = deepclust("resume", tmp_path / "run", "train.epochs=2", code=8)
    assert "000000.tar" in done.stderr
    assert Run(tmp_path / "run").rounds() == [0]


def test_shards_indexed_again_with_other_images_are_refused_on_resume(
    shards: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "shards"
    shutil.copytree(shards, mine)
    deepclust("pretrain", recipe(mine, tmp_path), "--run", tmp_path / "run")
    shutil.rmtree(mine)
    tiny_shards(mine, n=240)
    done = deepclust("resume", tmp_path / "run", "train.epochs=2", code=8)
    assert "300 before, 240 now" in done.stderr


def test_an_unreadable_checkpoint_is_reported_and_the_one_before_it_used(
    shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    deepclust("pretrain", recipe(shards, tmp_path, "train.checkpoint=4 steps"), "--run", run)
    newest = Run(run).checkpoints()[-1]
    (newest / "model.safetensors").write_bytes(b"torn")
    done = deepclust("resume", run, "train.epochs=2")
    assert "using the previous one" in done.stderr
    restored = [e for e in Run(run).events() if e["event"] == "restored"]
    assert restored[-1]["step"] == 8


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["pretrain", "nothing", "--run", "x"], 2, "no recipe 'nothing'"),
        (
            ["pretrain", "small-photos", "--run", "x", "cluster.kay=3"],
            2,
            "cluster.kay: unknown key",
        ),
        (["pretrain", "small-photos", "--run", "x", "data.shards=/none"], 3, "/none"),
        (["resume", "nowhere"], 2, "nowhere is not a run"),
        (["submit", "small-photos", "--run", "x", "--on", "moon"], 2, "choose from local"),
        (["pretrain", "small-photos"], 2, "--run"),
    ],
)
def test_wrong_usage_has_a_code_and_a_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert says in deepclust(*arguments, code=code).stderr


def test_ctrl_c_keeps_what_was_finished(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start("pretrain", recipe(shards, tmp_path, "train.epochs=50"), "--run", run)
    while not MOMENTS["mid-epoch"](run):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    steps = [int(folder.name) for folder in Run(run).checkpoints()]
    assert steps[-1] == Run(run).metrics("train")[-1]["step"]
    assert np.diff(steps).min() > 0
