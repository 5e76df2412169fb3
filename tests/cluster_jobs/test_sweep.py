"""Sweeps: which runs they are, what they are called, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster_jobs.slurm import script
from cluster_jobs.sweep import points, run_dir, run_dirs
from deepclust.errors import RecipeError
from tests.tiny import deepclust, tiny_recipe


def test_two_keys_give_all_combinations_in_order() -> None:
    assert points(["cluster.k=10,20", "train.lr=0.1, 1e-3"]) == [
        ["cluster.k=10", "train.lr=0.1"], ["cluster.k=10", "train.lr=1e-3"],
        ["cluster.k=20", "train.lr=0.1"], ["cluster.k=20", "train.lr=1e-3"],
    ]  # fmt: skip


def test_a_comma_inside_a_list_does_not_split_the_value() -> None:
    assert points(["a.b=[1,2],[3,4]"]) == [["a.b=[1,2]"], ["a.b=[3,4]"]]


def test_a_run_is_named_as_its_point_is_written() -> None:
    assert run_dir(Path("/runs"), ["cluster.k=10", "data.shards=/a/b"]) == Path(
        "/runs/cluster.k=10,data.shards=_a_b"
    )


@pytest.mark.parametrize("text", ["cluster.k", "=1,2", "cluster.k=1,,2", "cluster.k=1,1"])
def test_a_value_that_is_not_a_sweep_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="--sweep"):
        points([text])


def test_two_runs_of_a_sweep_may_not_have_one_name() -> None:
    with pytest.raises(RecipeError, match="the same name"):
        run_dirs(Path("/runs"), ["data.shards=/x/y,_x_y"])


def test_a_key_may_be_swept_once() -> None:
    with pytest.raises(RecipeError, match="has a key twice"):
        points(["a.b=1", "a.b=2"])


def test_a_sweep_on_this_machine_is_refused_and_writes_nothing(tmp_path: Path) -> None:
    tiny_recipe(tmp_path / "shards").save(tmp_path / "tiny.yaml")
    words = ["submit", tmp_path / "tiny.yaml", "--run", tmp_path / "runs", "--sweep"]
    for on in ("local", "ray"):
        done = deepclust(*words, "cluster.k=4,8", "--on", on, code=2)
        assert "a sweep needs a queue" in done.stderr
    assert "of the form" in deepclust(*words, "cluster.k", "--on", "slurm", code=2).stderr
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_of_a_sweep_shows_every_run(tmp_path: Path) -> None:
    tiny_recipe(tmp_path / "shards").save(tmp_path / "tiny.yaml")
    words = ["submit", tmp_path / "tiny.yaml", "--run", tmp_path / "runs", "--dry-run"]
    text = deepclust(*words, "--on", "slurm", "--sweep", "cluster.k=4,8").stdout
    assert f"# {tmp_path}/runs/cluster.k=4\n# {tmp_path}/runs/cluster.k=8\n" in text
    assert "#SBATCH --array=0-1%2" in text
    assert f"#SBATCH --output={tmp_path}/runs/slurm/%A_%a_0_log.out" in text


def test_runs_that_need_different_resources_cannot_share_an_array(tmp_path: Path) -> None:
    shapes = [tiny_recipe(tmp_path, f"slurm.nodes={n}", "train.ranks=2") for n in (1, 2)]
    plans = [script.prepare(r, tmp_path / str(n)) for n, r in enumerate(shapes)]
    with pytest.raises(RecipeError, match="1 needs other resources than 0"):
        script.prepare_sweep(plans, tmp_path)
