"""Anyone's features, clustered by the command: what is written, and what is refused and why."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow.parquet
import pytest

from cluster_jobs.results import cluster_file
from cluster_jobs.results.cluster_file import Options, cluster_features
from cluster_jobs.results.npy_file import open_rows
from deepclust.clustering.search import SEARCHES
from deepclust.clustering.statistics import ari
from deepclust.clustering.whiten import Whitening
from deepclust.errors import DataError, DiskError, NumericalError, RecipeError
from deepclust.recipe.sections import ClusterSection
from tests.pretended_device import pretended
from tests.tiny import deepclust

N, D, K = 600, 12, 20
WRITTEN = ["assignments.npy", "assignments.parquet", "centroids.npy", "statistics.json"]


def draw(n: int = N, dim: int = D) -> np.ndarray:
    draws = np.random.default_rng(0)
    centres = 3 * draws.standard_normal((40, dim))
    return (centres[draws.integers(0, 40, n)] + draws.standard_normal((n, dim))).astype(np.float32)


def save(folder: Path, array: np.ndarray) -> Path:
    np.save(folder / "features.npy", array)
    return folder / "features.npy"


def distances(rows: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    wide = rows.astype(np.float64)[:, None] - centroids.astype(np.float64)
    return (wide**2).sum(2)


def table(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = pyarrow.parquet.read_table(out / "assignments.parquet").to_pydict()
    return found


def test_the_command_writes_centroids_assignments_and_statistics(tmp_path: Path) -> None:
    rows, out = draw(), tmp_path / "out"
    done = deepclust("cluster", save(tmp_path, rows), "--k", K, "--out", out, "--json")
    statistics = json.loads(done.stdout)
    assert sorted(os.listdir(out)) == WRITTEN
    assert statistics == json.loads((out / "statistics.json").read_text())
    centroids, labels = np.load(out / "centroids.npy"), np.load(out / "assignments.npy")
    assert (centroids.shape, centroids.dtype, labels.dtype) == ((K, D), np.float32, np.int32)
    nearest = distances(rows, centroids)
    assert np.array_equal(labels, nearest.argmin(1))
    assert table(out)["row"] == list(range(N))
    assert table(out)["cluster"] == labels.tolist()
    assert np.allclose(table(out)["distance"], nearest.min(1), rtol=1e-4)
    assert statistics["inertia"] == pytest.approx(nearest.min(1).sum(), rel=1e-5)
    assert statistics["sizes"]["min"] > 0
    assert statistics["input"] == {
        "path": str(tmp_path / "features.npy"), "shape": [N, D], "dtype": "float32",
    }  # fmt: skip
    assert statistics["arguments"]["k"] == K


def test_without_json_a_table_is_shown(tmp_path: Path) -> None:
    source = save(tmp_path, draw().astype(np.float16))
    done = deepclust("cluster", source, "--k", K, "--out", tmp_path / "new" / "out")
    assert "largest cluster" in done.stdout
    assert "clustering 600 rows of 12 into 20 clusters" in done.stderr


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_whitened_rows_are_those_of_whitening(tmp_path: Path, dtype: str) -> None:
    rows = draw().astype(dtype)
    cluster_features(save(tmp_path, rows), tmp_path / "out", Options(K, whiten=5))
    assert sorted(os.listdir(tmp_path / "out")) == [*WRITTEN, "whitening.safetensors"]
    whitened = Whitening.load(tmp_path / "out" / "whitening.safetensors")(rows)
    nearest = distances(whitened, np.load(tmp_path / "out" / "centroids.npy"))
    own = nearest[np.arange(N), np.load(tmp_path / "out" / "assignments.npy")]
    assert np.allclose(own, nearest.min(1), atol=2e-3)
    assert np.linalg.norm(whitened, axis=1) == pytest.approx(np.ones(N), abs=1e-5)


def test_options_reach_the_engine(tmp_path: Path) -> None:
    source = save(tmp_path, draw())
    chosen = Options(
        K, iterations=3, seed=7, init="k-means++", spherical=True, empty="relocate", min_size=4
    )
    found = cluster_features(source, tmp_path / "out", chosen)
    assert found["iterations"] == len(found["history"]) == 3
    assert found["sizes"]["min"] >= 4
    norms = np.linalg.norm(np.load(tmp_path / "out" / "centroids.npy"), axis=1)
    assert norms == pytest.approx(np.ones(K), abs=1e-5)


@pytest.mark.parametrize("init", get_args(ClusterSection.model_fields["init"].annotation))
def test_every_start_that_a_recipe_knows_works_here_too(tmp_path: Path, init: str) -> None:
    out = tmp_path / "out"
    cluster_features(save(tmp_path, draw()), out, Options(k=K, init=init))
    assert len(np.unique(np.load(out / "assignments.npy"))) == K


def test_a_backend_that_does_not_work_here_is_replaced_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(*_: object) -> None:
        raise RuntimeError("no kernel image")

    monkeypatch.setitem(SEARCHES, "faiss", missing)
    cluster_features(save(tmp_path, draw()), tmp_path / "out", Options(k=K, backend="faiss"))
    assert "cluster.backend=faiss does not work on cpu: no kernel image" in capsys.readouterr().err


def test_the_device_that_was_tried_becomes_the_present_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(cluster_file, "make_present", lambda device: seen.append(str(device)))
    cluster_features(save(tmp_path, draw()), tmp_path / "out", Options(K, device="cpu"))
    assert seen == ["cpu"]


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_rows_are_whitened_on_the_device_that_clusters_them(tmp_path: Path, kind: Any) -> None:
    source = save(tmp_path, draw().astype(kind) + (1e8 if kind == np.float64 else 0))
    cluster_features(source, tmp_path / "host", Options(K, whiten=6, device="cpu"))
    with pretended() as log:
        cluster_features(source, tmp_path / "card", Options(K, whiten=6, device="cuda"))
    products = {name for name, _ in log.types}
    assert {"mm", "_linalg_eigh"} <= products
    ours, theirs = (Whitening.load(tmp_path / name / "whitening.safetensors")
                    for name in ("card", "host"))  # fmt: skip
    assert np.allclose(ours.matrix, theirs.matrix, atol=1e-4)
    labels = [np.load(tmp_path / name / "assignments.npy") for name in ("card", "host")]
    assert ari(*labels) > 0.95  # eigenvectors of two routines differ in their last digits


def test_the_seed_decides_the_result(tmp_path: Path) -> None:
    source = save(tmp_path, draw())
    for name, seed in {"a": 0, "b": 0, "c": 1}.items():
        cluster_features(source, tmp_path / name, Options(K, seed=seed))
    a, b, c = ((tmp_path / name / "assignments.npy").read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("suffix", [".txt", ".parquet"])
def test_rows_can_have_names(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_file, "GROUP", 250)
    names = [f"image {i}, the best" for i in range(N)]
    ids = tmp_path / f"names{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"key": names}), ids)
    else:
        ids.write_text("\n".join(names) + "\n")
    cluster_features(save(tmp_path, draw()), tmp_path / "out", Options(K, ids=ids))
    assert table(tmp_path / "out")["id"] == names
    assert pyarrow.parquet.ParquetFile(tmp_path / "out/assignments.parquet").num_row_groups == 3
    ids.write_text("one\ntwo\n") if suffix == ".txt" else ids.write_text("no parquet")
    with pytest.raises(DataError, match=r"2 names for 600 rows|cannot read names"):
        cluster_features(save(tmp_path, draw()), tmp_path / "other", Options(K, ids=ids))


def test_rows_stay_on_disk_in_a_read_only_map(tmp_path: Path) -> None:
    rows = open_rows(save(tmp_path, draw()))
    assert isinstance(rows, np.memmap)
    assert rows.mode == "r"  # copy-on-write would be refused for a file larger than the memory


class Trap:
    """Unpickling this would write a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("unpickled",)


BROKEN = {
    "an object array": (np.array([[Trap()]], object), "never loaded"),
    "integers": (np.ones((9, 3), np.int64), "dtype int64"),
    "one dimension": (np.ones(9, np.float32), "shape (9,)"),
    "no rows": (np.ones((0, 3), np.float32), "shape (0, 3)"),
    "foreign byte order": (np.ones((9, 3), ">f4"), "native byte order"),
    "too few rows": (np.ones((3, 3), np.float32), "--k to at most 3"),
    "too few distinct rows": (np.ones((9, 3), np.float32), "--k to at most 1"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_clustered_is_named(tmp_path: Path, name: str) -> None:
    array, words = BROKEN[name]
    source = save(tmp_path, array)
    with pytest.raises(DataError) as caught:
        cluster_features(source, tmp_path / "out", Options(5))
    assert words in str(caught.value)
    assert str(source) in str(caught.value)
    assert os.listdir(tmp_path) == ["features.npy"]


@pytest.mark.parametrize("whiten", [None, 4])
def test_a_row_that_is_not_finite_is_named(tmp_path: Path, whiten: int | None) -> None:
    rows = draw()
    rows[123, 4] = np.nan
    with pytest.raises(NumericalError, match=r"features\.npy: 1 of 600 .* row 123"):
        cluster_features(save(tmp_path, rows), tmp_path / "out", Options(K, whiten))
    assert os.listdir(tmp_path) == ["features.npy"]


def test_a_file_that_is_not_an_array_or_is_truncated_is_named(tmp_path: Path) -> None:
    source = save(tmp_path, draw())
    source.write_bytes(source.read_bytes()[:-100])
    np.savez(tmp_path / "features.npz", draw())
    messages = {
        "features.npy": "cut short",
        "features.npz": "not a .npy",
        "no.npy": "does not exist",
    }
    for name, words in messages.items():
        with pytest.raises(DataError, match=words):
            cluster_features(tmp_path / name, tmp_path / "out", Options(5))


def test_usage_is_explained(tmp_path: Path) -> None:
    source = save(tmp_path, draw())
    with pytest.raises(RecipeError, match="--k 1000 --out"):
        cluster_features(source, None, Options(5))
    with pytest.raises(RecipeError, match=r"--init best: .*k-means\+\+"):
        cluster_features(source, tmp_path / "out", Options(5, init="best"))


def test_the_command_distinguishes_a_run_from_a_file(tmp_path: Path) -> None:
    assert "in its recipe" in deepclust("cluster", tmp_path, "--k", 5, code=2).stderr
    missing = deepclust("cluster", tmp_path / "no.npy", "--k", 5, "--out", "x", code=3)
    assert "does not exist" in missing.stderr


@pytest.mark.parametrize("k", ["5", "5,8"])
def test_a_folder_of_embed_or_vae_stands_for_its_features(k: str, tmp_path: Path) -> None:
    source = save(tmp_path, draw())  # where both write them
    words = ("cluster", tmp_path, "--k", k, "--out", tmp_path / "out", "--json")
    assert str(source) in deepclust(*words).stdout
    source.rename(tmp_path / "features.parquet")
    assert "embed again with --format npy" in deepclust(*words, code=3).stderr


def test_an_output_folder_that_is_not_empty_is_not_overwritten(tmp_path: Path) -> None:
    source = save(tmp_path, draw())
    (tmp_path / "out").mkdir()
    cluster_features(source, tmp_path / "out", Options(K, iterations=1))
    with pytest.raises(RecipeError, match="exists and is not empty"):
        cluster_features(source, tmp_path / "out", Options(K))


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    source = save(tmp_path, draw())
    with pytest.raises(DiskError, match="Choose a folder"):
        cluster_features(source, source / "out", Options(K))


def test_a_full_disk_leaves_nothing_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cluster_file, "_write_table", full)
    with pytest.raises(DiskError, match="Free some space"):
        cluster_features(save(tmp_path, draw()), tmp_path / "out", Options(K))
    assert os.listdir(tmp_path) == ["features.npy"]


def test_float64_rows_far_from_the_origin_are_clustered_as_near_ones(tmp_path: Path) -> None:
    rows = draw().astype(np.float64)
    for init in ("k-means++", "two-level"):
        results = []
        for name, offset in (("near", 0.0), ("far", 1e8)):
            (tmp_path / init / name).mkdir(parents=True)
            out = tmp_path / init / name / "out"
            options = Options(k=K, init=init)
            statistics = cluster_features(save(out.parent, rows + offset), out, options)
            centroids = np.load(out / "centroids.npy") - offset
            assert statistics["inertia"] == pytest.approx(
                distances(rows, centroids).min(1).sum(), rel=1e-4
            )
            results.append(np.load(out / "assignments.npy"))
        assert (results[0] == results[1]).mean() > 0.99


def test_errors_about_a_file_name_what_can_be_done_to_a_file(tmp_path: Path) -> None:
    rows = draw()
    rows[3] = np.nan
    with pytest.raises(NumericalError, match=r"row 3\. Take them out of the file"):
        cluster_features(save(tmp_path, rows), tmp_path / "out", Options(k=K))
    with pytest.raises(DataError, match=r"only 2.*more than one dimension"):
        cluster_features(save(tmp_path, draw()), tmp_path / "out", Options(k=K, whiten=1))
