"""Back to the files: folders of images, JSON for viewers, duplicates and outliers."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from pyarrow.csv import read_csv
from pyarrow.parquet import read_table
from typer.testing import CliRunner

from cluster_jobs.cli import app
from cluster_jobs.results.assignments import export_assignments
from cluster_jobs.results.duplicates import deviations_of, near_duplicates, write_duplicates
from cluster_jobs.results.folders import safe_name, write_folders
from cluster_jobs.results.viewers import write_json_of
from deepclust import open_index
from deepclust.data.pack.pack import pack
from deepclust.errors import RecipeError
from tests.cluster_jobs.synthetic import EXCLUDED, make_run
from tests.images import make_image_folder, make_shards

N = 40


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return make_image_folder(tmp_path / "photos", n=N)


@pytest.fixture
def run(tmp_path: Path, photos: Path) -> Path:
    """A run on shards that are packed from a folder of photos."""
    pack(photos, tmp_path / "shards")
    return make_run(tmp_path / "run", tmp_path / "shards", rounds=1)


def clusters(run: Path) -> list[int]:
    return np.load(run / "rounds" / "0000" / "assignments" / "assignments.npy")[0].tolist()


def test_the_table_of_packed_photos_has_their_paths(
    run: Path, photos: Path, tmp_path: Path
) -> None:
    table = read_table(export_assignments(run, tmp_path / "a.parquet")).to_pydict()
    assert set(map(Path, table["path"])) == set(photos.rglob("*.png"))
    stems = [Path(path).relative_to(photos).with_suffix("").as_posix() for path in table["path"]]
    assert stems == table["key"]


def test_paths_that_were_lost_or_never_known_are_null_or_absent(run: Path, tmp_path: Path) -> None:
    (tmp_path / "shards" / "paths.parquet").unlink()
    assert "path" not in read_table(export_assignments(run, tmp_path / "a.parquet")).column_names


def test_images_in_shards_are_written_as_files_a_folder_for_each_cluster(
    run: Path, photos: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    assert write_folders(run, tmp_path / "out", emit=said.append) == N - len(EXCLUDED)
    keys = open_index(tmp_path / "shards").keys
    for sample, cluster in enumerate(clusters(run)):
        if cluster >= 0:
            written = tmp_path / "out" / f"{cluster:04d}" / f"{keys[sample].split('/')[-1]}.png"
            assert written.read_bytes() == (photos / f"{keys[sample]}.png").read_bytes()
    assert "2 images have no cluster" in said[-1]


@pytest.mark.parametrize("how", ["link", "copy", None])
def test_image_files_are_linked_or_copied(how: str | None, photos: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", photos, rounds=1)
    write_folders(run, tmp_path / "out", how, emit=print)
    files = list((tmp_path / "out").rglob("*.png"))
    assert len(files) == N - len(EXCLUDED)
    assert all(file.is_symlink() == (how != "copy") for file in files)
    assert all(file.resolve().read_bytes()[:4] == b"\x89PNG" for file in files)


def test_links_to_images_in_shards_and_full_folders_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="leave --link out"):
        write_folders(run, tmp_path / "out", "link", emit=print)
    with pytest.raises(RecipeError, match="exists already"):
        write_folders(run, tmp_path / "shards", emit=print)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["..", "../x", "/etc/x", ".hidden", "a\nb", "", "x" * 400, "a/b"])
def test_a_hostile_name_leads_nowhere_else(name: str) -> None:
    safe = safe_name(name)
    assert safe not in ("", ".", "..")
    assert "/" not in safe
    assert "\n" not in safe
    assert len(safe) < 130


def test_seeded_clusters_have_the_names_of_their_classes(final_run: Path, tmp_path: Path) -> None:
    write_folders(final_run, tmp_path / "out", emit=print)
    names = {folder.name for folder in (tmp_path / "out").iterdir()}
    assert {f"class {i}" for i in range(4)} <= names
    assert "0004" in names
    assert len(list((tmp_path / "out").rglob("*.png"))) == 300


def test_fiftyone_reads_samples_and_label_studio_tasks(
    run: Path, photos: Path, tmp_path: Path
) -> None:
    write_json_of(run, tmp_path / "f.json", "fiftyone", emit=print)
    write_json_of(run, tmp_path / "l.json", "label-studio", emit=print)
    samples = json.loads((tmp_path / "f.json").read_text())["samples"]
    tasks = json.loads((tmp_path / "l.json").read_text())
    assert len(samples) == len(tasks) == N - len(EXCLUDED)
    known = {i: c for i, c in enumerate(clusters(run)) if c >= 0}
    assert {s["sample_id"]: int(s["cluster"]["label"]) for s in samples} == known
    assert all(Path(sample["filepath"]).is_file() for sample in samples)
    choice = tasks[0]["predictions"][0]["result"][0]
    assert choice["value"] == {"choices": [samples[0]["cluster"]["label"]]}
    assert tasks[0]["data"]["image"] == f"/data/local-files/?d={samples[0]['filepath'][1:]}"


def test_viewers_need_files(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", make_shards(tmp_path / "shards"), rounds=1)
    with pytest.raises(RecipeError, match="--folders OUT"):
        write_json_of(run, tmp_path / "f.json", "fiftyone", emit=print)
    with pytest.raises(RecipeError, match="fiftyone or label-studio"):
        write_json_of(run, tmp_path / "f.json", "coco", emit=print)


def test_the_command_takes_a_table_folders_or_json(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "c.fiftyone.json"
    call = partial(CliRunner().invoke, app)
    done = call(
        ["assignments", str(run), "--out", str(out), "--folders", str(tmp_path / "clusters")]
    )
    assert done.exit_code == 0
    assert json.loads(out.read_text())["samples"]
    assert len(list((tmp_path / "clusters").rglob("*.png"))) == N - len(EXCLUDED)
    for words in ([], ["--out", str(tmp_path / "a.csv"), "--copy"], ["--format", "fiftyone"]):
        assert isinstance(call(["assignments", str(run), *words]).exception, RecipeError)


def test_near_duplicates_are_found_within_clusters_across_tiles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cluster_jobs.results.duplicates.TILE", 7)
    random = np.random.default_rng(0)
    rows = random.normal(size=(90, 16)).astype(np.float16)
    clusters = random.integers(-1, 3, 90).astype(np.int32)
    rows[50], rows[80], rows[81] = rows[3], rows[50], -rows[4]
    clusters[[3, 50, 80]] = 2
    same = near_duplicates(rows, clusters, 0.9)
    assert same.of[[3, 50, 80]].tolist() == [-1, 3, 3]
    assert same.groups[[3, 50, 80]].tolist() == [3, 3, 3]
    unit = rows.astype(np.float32) / np.linalg.norm(rows.astype(np.float32), axis=1, keepdims=True)
    alike = (unit @ unit.T >= 0.9) & (clusters[:, None] == clusters) & (clusters >= 0)
    assert ((same.of >= 0) == np.tril(alike, -1).any(1)).all()
    apart = near_duplicates(rows, np.where(np.arange(90) == 80, 1, clusters), 0.9)
    assert apart.of[80] == -1


def test_outliers_are_far_for_their_cluster_and_small_clusters_have_none() -> None:
    distances = np.r_[np.linspace(1, 2, 50), 9.0, np.linspace(10, 11, 49), 5.0, 1.0, np.nan]
    clusters = np.r_[np.zeros(51), np.ones(49), [2, 2, 0]].astype(np.int32)
    assert np.flatnonzero(deviations_of(distances, clusters) > 4).tolist() == [50]


def test_the_table_of_duplicates_has_a_row_for_each(
    final_run: Path, run: Path, tmp_path: Path
) -> None:
    counts = write_duplicates(final_run, tmp_path / "d.csv", 0.999, emit=print)
    table = read_csv(tmp_path / "d.csv").to_pydict()
    assert counts["duplicates"] == table["kind"].count("duplicate")
    assert counts["outliers"] == table["kind"].count("outlier")
    assert all(
        of < sample for of, sample in zip(table["of"], table["sample_id"], strict=True) if of
    )
    with pytest.raises(RecipeError, match="--similarity"):
        write_duplicates(final_run, tmp_path / "d.csv", 1.5, emit=print)
    with pytest.raises(RecipeError, match="no features"):
        write_duplicates(run, tmp_path / "d.csv", emit=print)
