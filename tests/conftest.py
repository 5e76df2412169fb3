"""What all tests share: one thread (repeatable, and kind to each other), and no skipping in CI.

With DEEPCLUST_TEST_INSTALL=1 everything that tests need can be installed, so a skipped test is a
hole that nobody sees: it fails. Only those marked `gpu` or `mount` may be, and
`root` where that is missing.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest
import torch

from deepclust import pretrain
from deepclust.launch import warm
from tests.forks import Shared
from tests.tiny import tiny_recipe, tiny_shards

NOT_FOR_ALL = ("gpu", "mount")  # what no package gives: a device, the right to mount
if os.geteuid():
    NOT_FOR_ALL += ("root",)
NO_SKIPPING = os.environ.get("DEEPCLUST_TEST_INSTALL") == "1"

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def state_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep what tests name out of what the user has named (`cluster_jobs/known.py`)."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture(autouse=True)
def ranks_are_forks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the ranks of runs that a test starts in this process be forks."""
    if request.node.get_closest_marker("new_interpreters") is None:
        monkeypatch.setattr(warm, "Warm", Shared)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small labelled shards, for many runs; nobody writes there."""
    return tiny_shards(tmp_path_factory.mktemp("shards") / "small")


@pytest.fixture(scope="session")
def many_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four times as many images, so that a kill strikes while something goes on."""
    return tiny_shards(tmp_path_factory.mktemp("shards") / "many", n=1200)


@pytest.fixture(scope="session")
def final_run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a final round, of pinned and of free clusters; nobody writes there."""
    run = tmp_path_factory.mktemp("runs") / "final"
    seeds = "seeds={labels: shards, per_class: 5, force: true, release_after: 1}"
    pretrain(tiny_recipe(shards, "cluster.final=true", "cluster.min_size=12", seeds), run)
    return run


@pytest.fixture(scope="session")
def judged(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished runs with labels that train nothing, by method; nobody writes there."""
    from tests.methods.cases import CASES  # imports every method

    folder, seeds = tmp_path_factory.mktemp("judged"), "seeds={labels: shards, per_class: 5}"
    for name in ("simclr", "swav", "sela"):
        final = ("cluster.final=true",) if name == "sela" else ()
        overrides = (f"method.name={name}", *CASES[name], *final, "train.epochs=1", seeds)
        pretrain(tiny_recipe(shards, *overrides), folder / name)
    return {name: folder / name for name in ("simclr", "swav", "sela")}


@pytest.fixture(scope="session")
def resnet(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a network that torchvision and timm have; nobody writes there."""
    small = ("backbone.name=resnet18", "data.size=32", "data.resize=32", "train.epochs=1")
    run = tmp_path_factory.mktemp("runs") / "resnet"
    pretrain(tiny_recipe(shards, *small, "cluster.final=true"), run)
    return run


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport]:
    report = yield
    if not any(item.get_closest_marker(name) for name in NOT_FOR_ALL):
        _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport]:
    report = yield
    _refuse_skip(report)
    return report


def _refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """A skip becomes a failure with its reason; an expected failure (xfail) stays what it is."""
    if NO_SKIPPING and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"DEEPCLUST_TEST_INSTALL=1 allows no skipped test: {reason}"
