"""Features in, latent means out, by the command: what is written, continued, and refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster_jobs.results import vae_files
from cluster_jobs.results.embed import EmbedOptions, embed
from cluster_jobs.results.vae_files import build_vaes
from deepclust.clustering.vae import Vae, VaeOptions
from deepclust.clustering.vae_fit import Fit
from deepclust.errors import DataError, NumericalError, RecipeError, RunDiffersError
from deepclust.files import file_hash
from tests.cluster_jobs.synthetic import make_run, make_simclr, reseal
from tests.images import make_shards
from tests.tiny import deepclust

QUICK = VaeOptions(latent=2, hidden=8, epochs=4, batch=50, lr=0.01)
WHOLE = ["features.npy", "job.json", "manifest.json", "vae-0.safetensors", "vae-1.safetensors"]


def draw(n: int = 300, width: int = 6, seed: int = 0) -> np.ndarray:
    draws = np.random.default_rng(seed)
    inside = draws.normal(size=(n, 2)) @ draws.normal(size=(2, width))
    return (inside + 0.3 * draws.normal(size=(n, width))).astype(np.float32)


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    np.save(tmp_path / "a.npy", draw())
    np.save(tmp_path / "b.npy", draw(width=9, seed=1).astype(np.float16))
    return [tmp_path / "a.npy", tmp_path / "b.npy"]


def written(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in out.glob("*") if file.suffix != ".json"}


def test_the_command_writes_latent_means_that_the_next_one_clusters(
    pair: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "latents"
    done = deepclust(
        "vae", *pair, "--out", out, "--latent", 2, "--epochs", 30, "--batch", 50, "--json"
    )
    manifest = json.loads(done.stdout)
    assert manifest == json.loads((out / "manifest.json").read_text())
    assert sorted(set(os.listdir(out)) - {".lock"}) == WHOLE
    features = np.load(out / "features.npy")
    assert (features.shape, features.dtype) == ((300, 4), np.float32)
    assert [one["shape"] for one in manifest["inputs"]] == [[300, 6], [300, 9]]
    assert manifest["files"] == {name: file_hash(out / name) for name in manifest["files"]}
    for number, source in enumerate(pair):
        vae = Vae.load(out / f"vae-{number}.safetensors")
        ours = features[:, 2 * number : 2 * number + 2]
        np.testing.assert_allclose(vae.features(np.load(source)), ours, atol=1e-5)
    words = ("cluster", out, "--whiten", 3, "--out", tmp_path / "clusters", "--json", "--k")
    statistics = json.loads(deepclust(*words, 5).stdout)
    assert statistics["input"]["path"] == str(out / "features.npy")


def stop_in(number: int, epoch: int) -> type:
    class Stopping(vae_files._Watch):
        def __call__(self, fit: Fit) -> bool:
            if (self.number, fit.epoch) == (number, epoch):
                raise KeyboardInterrupt
            return True

    return Stopping


@pytest.mark.parametrize(("number", "epoch"), [(0, 2), (1, 1), (1, 4)])
def test_a_command_that_was_stopped_and_given_again_writes_the_same_bits(
    number: int, epoch: int, pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_vaes(pair, tmp_path / "straight", QUICK)
    with monkeypatch.context() as patched:
        patched.setattr(vae_files, "_Watch", stop_in(number, epoch))
        with pytest.raises(KeyboardInterrupt):
            build_vaes(pair, tmp_path / "stopped", QUICK)
    assert not (tmp_path / "stopped" / "features.npy").exists()
    build_vaes(pair, tmp_path / "stopped", QUICK)
    assert written(tmp_path / "stopped") == written(tmp_path / "straight")


def test_a_finished_folder_is_left_as_it_is_also_when_its_files_have_moved(
    pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build_vaes(pair, tmp_path / "out", QUICK)
    monkeypatch.setattr(vae_files, "fit_vae", lambda *_, **__: pytest.fail("trained again"))
    moved = [shutil.copy(file, tmp_path / f"moved-{file.name}") for file in pair]
    assert build_vaes(list(map(Path, moved)), tmp_path / "out", QUICK) == first


def test_a_folder_of_another_job_is_refused(pair: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    build_vaes(pair, out, QUICK)
    with pytest.raises(RunDiffersError, match="begun with --latent 2, not 3"):
        build_vaes(pair, out, VaeOptions(latent=3, hidden=8, epochs=4, batch=50, lr=0.01))
    with pytest.raises(RunDiffersError, match="other features, or in another order"):
        build_vaes(pair[::-1], out, QUICK)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(RecipeError, match="exists and is not empty"):
        build_vaes(pair, tmp_path / "other", QUICK)


def test_a_run_stands_for_the_features_of_its_last_round(tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "shards", n=120)
    run = make_run(tmp_path / "run", shards, rounds=2)
    rows = run / "rounds" / "0001" / "features" / "rows.npy"
    np.save(rows, draw(n=120))
    reseal(rows.parent)
    found = build_vaes([run], tmp_path / "out", QUICK)
    assert [one["path"] for one in found["inputs"]] == [str(rows.resolve())]
    with pytest.raises(DataError, match="no features of a round"):
        build_vaes([make_simclr(tmp_path / "simclr", shards)], tmp_path / "no", QUICK)


def test_a_folder_that_embed_wrote_stands_for_its_features(
    final_run: Path, shards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "features"
    embed(final_run, str(shards), out, EmbedOptions(), emit=print)
    found = build_vaes([out], tmp_path / "latents", QUICK)
    assert [one["path"] for one in found["inputs"]] == [str((out / "features.npy").resolve())]
    (out / "features.npy").rename(out / "features.parquet")
    with pytest.raises(DataError, match="embed again with --format npy"):
        build_vaes([out], tmp_path / "no", QUICK)


BROKEN: dict[str, tuple[Any, type[Exception], str]] = {
    "other rows": (draw(n=299), DataError, r"b\.npy has 299 rows, and .*a\.npy has 300"),
    "whole numbers": (np.ones((300, 4), np.int64), DataError, "dtype int64"),
    "no columns": (np.ones((300, 0), np.float32), DataError, r"shape \(300, 0\)"),
    "a vector": (np.ones(300, np.float32), DataError, r"shape \(300,\)"),
    "equal rows": (np.ones((300, 4), np.float32), NumericalError, r"b\.npy: all 300 rows"),
    "not finite": (np.full((300, 4), np.nan), NumericalError, r"b\.npy: 300 of 300 rows .* row 0"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_used_is_named(name: str, pair: list[Path], tmp_path: Path) -> None:
    array, error, words = BROKEN[name]
    np.save(pair[1], array)
    with pytest.raises(error, match=words):
        build_vaes(pair, tmp_path / "out", QUICK)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_fewer_rows_than_a_batch_are_refused_with_the_batch_that_works(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", draw(n=20))
    with pytest.raises(DataError, match="--batch to at most 20"):
        build_vaes([tmp_path / "a.npy"], tmp_path / "out", VaeOptions())
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="does not exist"):
        build_vaes([tmp_path / "no.npy"], tmp_path / "out", QUICK)
