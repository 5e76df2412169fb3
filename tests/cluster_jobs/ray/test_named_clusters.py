"""No address that only a run directory names is given the user's token."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from ray._raylet import AuthenticationMode, get_authentication_mode

from cluster_jobs import job_file
from cluster_jobs.executors import executor
from cluster_jobs.ray import connection, named_clusters
from deepclust.errors import DeepclustError
from deepclust.launch.start import prepare_run
from tests.tiny import tiny_recipe

EVIL = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return tmp_path / "state"


@pytest.mark.parametrize("address", [EVIL, "https://u:p@h", 7, None, ["x"]])
def test_a_foreign_run_reaches_no_cluster(tmp_path: Path, address: object) -> None:
    run = tmp_path / "run"
    prepare_run(tiny_recipe(Path("/shards"), f"ray.address={EVIL}"), run)
    job_file.record(run, on="ray", address=address, submission="x")
    ray = executor("ray")
    for ask in (ray.cancel, ray.is_pending, lambda run: ray.resume(run, [])):
        with pytest.raises(DeepclustError, match=r"have not submitted|is damaged"):
            ask(run)


def test_a_cluster_that_the_user_has_named_is_asked(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named_clusters.remember(EVIL)
    named_clusters.remember("other:6379")
    named_clusters.require_named(EVIL, tmp_path)
    assert next(home.rglob("ray-clusters")).stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv("RAY_ADDRESS", "third:6379")
    named_clusters.require_named("third:6379", tmp_path)


def test_a_ray_of_our_own_has_its_own_token_whatever_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "mine")
    with connection.own_token(tmp_path):
        assert os.environ["RAY_AUTH_MODE"] == "token"
        assert "RAY_AUTH_TOKEN" not in os.environ
        file = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
        assert len(file.read_text()) == 64
        assert file.stat().st_mode & 0o777 == 0o600
        assert get_authentication_mode() == AuthenticationMode.TOKEN
    assert (os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"]) == ("disabled", "mine")
    assert "RAY_AUTH_TOKEN_PATH" not in os.environ
