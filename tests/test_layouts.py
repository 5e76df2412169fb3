"""What people have, from `pretrain` to `assignments`: folders, lists, tables, archives, shards."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster_jobs.results.assignments import export_assignments
from deepclust import Recipe, open_index, pretrain
from deepclust.data.pack.pack import pack
from deepclust.launch.start import resume
from tests.images import draw, encode
from tests.tiny import TREE, final_weights

N = 72
IMAGES = {f"c{i % 3}/{i:03d}.png": encode(draw(i, 16, 16, i % 3)) for i in range(N)}
SHORT = ("train.batch=24", "train.epochs=1", "cluster.k=4", "cluster.dim=4")


def write(folder: Path) -> Path:
    for name, data in IMAGES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def in_folder(place: Path) -> str:
    return str(write(place / "photos"))


def packed(place: Path) -> str:
    pack(write(place / "photos"), place / "shards")
    return str(place / "shards")


def in_list(place: Path) -> str:
    write(place / "photos")
    lines = [f"photos/{name} {name[:2]}\n" for name in IMAGES]
    (place / "list.txt").write_text("".join(lines))
    return str(place / "list.txt")


def in_parquet(place: Path) -> str:
    rows = {
        "image": [{"bytes": data, "path": name} for name, data in IMAGES.items()],
        "label": [name[:2] for name in IMAGES],
    }
    pq.write_table(pa.table(rows), place / "train.parquet")
    pack(place / "train.parquet", place / "shards")
    return str(place / "shards")


def in_zip(place: Path) -> str:
    with zipfile.ZipFile(place / "photos.zip", "w") as archive:
        for name, data in IMAGES.items():
            archive.writestr(name, data)
    pack(place / "photos.zip", place / "shards")
    return str(place / "shards")


def nested(place: Path) -> str:
    halves = (("a", 0), ("b", 1))
    for name, half in halves:
        chosen = [file for i, file in enumerate(IMAGES) if i % 2 == half]
        for file in chosen:
            (place / f"of-{name}" / file).parent.mkdir(parents=True, exist_ok=True)
            (place / f"of-{name}" / file).write_bytes(IMAGES[file])
        pack(place / f"of-{name}", place / "shards" / name)  # shards of one name in two folders
    return str(place / "shards")


def weighted(place: Path) -> str:
    folder = nested(place)
    return f"{{{folder}/a: 2, {folder}/b: 1}}"


def run(place: Path, made: Callable[[Path], str], *overrides: str) -> tuple[Any, pa.Table]:
    """The final weights and assignments of a short run."""
    tree = {**TREE, "data": {**TREE["data"], "shards": "x"}}
    recipe = Recipe.parse(tree).replace(f"data.shards={made(place)}", *SHORT, *overrides)
    pretrain(recipe, place / "run")
    export_assignments(place / "run", place / "clusters.parquet")
    return final_weights(place / "run"), pq.read_table(place / "clusters.parquet")


@pytest.mark.slow
@pytest.mark.parametrize("made", [in_list, in_parquet, in_zip, nested, weighted])
def test_every_layout_is_clustered_with_its_keys_and_labels(tmp_path: Path, made) -> None:
    _, table = run(tmp_path, made)
    keys = [key.removeprefix("photos/") for key in table["key"].to_pylist()]
    assert sorted(keys) == sorted(name.removesuffix(".png") for name in IMAGES)
    assert min(table["cluster"].to_pylist()) >= 0
    index = open_index(Recipe.load(tmp_path / "run/recipe.yaml").data.shards)
    names = index.class_names or ["c0", "c1", "c2"]  # which two packed folders number alike
    assert [names[i] for i in index.labels] == [key[:2] for key in keys]  # type: ignore[union-attr]


@pytest.mark.slow
def test_a_folder_and_its_packed_shards_give_the_same_bits_and_each_goes_on_as_the_other(
    tmp_path: Path,
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    weights, table = run(tmp_path / "a", in_folder)
    others, other = run(tmp_path / "b", packed)
    assert weights.keys() == others.keys()
    assert all((weights[name] == others[name]).all() for name in weights)
    assert table["path"][0].as_py().startswith(str(tmp_path / "a/photos"))
    assert other["path"][0].as_py().startswith(str(tmp_path / "b/photos"))  # pack has kept them
    assert table.drop_columns("path").equals(other.drop_columns("path"))
    shutil.rmtree(tmp_path / "a/photos")
    resume(tmp_path / "a/run", f"data.shards={tmp_path}/b/shards", "train.epochs=2")
    resume(tmp_path / "b/run", f"data.shards={tmp_path}/b/photos", "train.epochs=2")
    weights, others = final_weights(tmp_path / "a/run"), final_weights(tmp_path / "b/run")
    assert all((weights[name] == others[name]).all() for name in weights)
