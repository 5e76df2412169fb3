"""A run directory that was written before the redraw resumes, reports and exports.

`fixtures/run-of-10d50d1.tar.xz` holds 96 images in shards and a DeepCluster run of them, stopped at
step 7 of 16 by the code of commit 10d50d1: events and metrics with `incarnation`, momentum by the
number of a parameter.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest

from deepclust.run.directory import Run
from tests.tiny import assignments, deepclust
from tools.bench import fuzz_runs

ARCHIVE = Path(__file__).parent / "fixtures" / "run-of-10d50d1.tar.xz"
WRITTEN_IN = "/work/bits/fixture"  # the recipe of a run holds absolute paths


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[np.ndarray]]:
    """The old run after `resume`, and the assignments that it had before."""
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    recipe = folder / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(WRITTEN_IN, str(folder)))
    before = assignments(folder / "run")
    deepclust("resume", folder / "run")
    return folder / "run", before


def test_an_old_run_resumes_to_its_end(resumed: tuple[Path, list[np.ndarray]]) -> None:
    run, before = resumed
    after = assignments(run)
    assert len(before) == 2
    assert len(after) == 4 + 1  # and the final one, of which the old recipe says nothing
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=False))
    assert Run(run).events()[-1]["event"] == "finished"


def test_its_optimizers_go_on_from_their_momentum(
    resumed: tuple[Path, list[np.ndarray]],
) -> None:
    restored = [event for event in Run(resumed[0]).events() if event["event"] == "restored"]
    assert [event["step"] for event in restored] == [7]
    steps = [record["step"] for record in Run(resumed[0]).metrics("train")]
    assert steps == list(range(1, 17))


def test_it_reports_and_exports(resumed: tuple[Path, list[np.ndarray]], tmp_path: Path) -> None:
    run, _ = resumed
    deepclust("report", run, "--out", tmp_path / "report.html")
    deepclust("assignments", run, "--out", tmp_path / "clusters.csv")
    deepclust("export", run, "--out", tmp_path / "net.safetensors")
    assert "SUCCEEDED" in deepclust("status", run).stdout
    assert (tmp_path / "report.html").stat().st_size > 10_000


@pytest.mark.slow
def test_damaged_runs_are_right_or_clear_errors(tmp_path: Path) -> None:
    table, worst = fuzz_runs.fuzz(tmp_path, every=80, seed=0)
    assert not worst
    assert sum(sum(counts.values()) for counts in table.values()) > 10
