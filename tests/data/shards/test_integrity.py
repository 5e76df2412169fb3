"""Damaged tars and index folders: right, or an error that says what is damaged; nothing else."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deepclust.data.shards.index import build_index, open_index
from deepclust.data.shards.manifest import seal
from deepclust.data.shards.summary import describe_check
from deepclust.errors import DataError
from tests.data.shards.servers import web
from tests.images import make_shards


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    path = Path(__file__).parents[3] / "tools" / "bench" / "fuzz_tars.py"
    spec = importlib.util.spec_from_file_location("fuzz_tars", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz_tars"] = module
    spec.loader.exec_module(module)
    return module


def test_two_hundred_damaged_tars_are_right_or_a_clear_error(
    fuzz: ModuleType, tmp_path: Path
) -> None:
    result = fuzz.fuzz_tars(200, 1, tmp_path)
    assert result["bad"] == []
    assert sum(result["counts"].values()) == 200


@pytest.mark.parametrize("old", [False, True])
def test_a_damaged_index_is_never_wrong_where_it_is_verified(
    fuzz: ModuleType, tmp_path: Path, old: bool
) -> None:
    result = fuzz.fuzz_index(tmp_path, 0, old=old)
    bad = [one for one in result["bad"] if not old or one["door"] == "verify" or one["text"]]
    assert bad == []


def test_an_index_that_lost_its_manifest_is_written_again(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "s", n=4, shards=1, size=8)
    before = open_index(folder)
    (before.folder / "manifest.json").unlink()
    assert open_index(folder).fingerprint == before.fingerprint


def test_damage_names_the_command_that_mends_it_even_elsewhere(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "s", n=4, shards=1, size=8)
    place = open_index(folder, tmp_path / "i").folder
    (place / "keys.parquet").write_bytes(b"junk")
    with pytest.raises(DataError, match=rf"is damaged: keys.*index SHARDS --index {place}`"):
        open_index(folder, place)
    assert len(build_index(folder, place)) == 4


def swap_two_pixels(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    at = data.index(b"IDAT") + 8
    data[at] ^= 1
    shard.write_bytes(data)


def test_other_bytes_of_an_image_are_found_where_they_were_hashed(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "s", n=4, shards=2, size=8)
    build_index(folder)
    assert "were not compared" in describe_check(build_index(folder, verify=True).manifest)
    build_index(folder, bodies=True)
    assert "all bytes" in describe_check(build_index(folder, verify=True).manifest)
    swap_two_pixels(folder / "shard-000001.tar")
    with pytest.raises(DataError, match=r"shard-000001\.tar has the same members, but other bytes"):
        build_index(folder, verify=True)


def forge(place: Path, **changes: object) -> None:
    """Change an index's manifest and seal it again, as who means harm does."""
    manifest = json.loads((place / "manifest.json").read_bytes())
    manifest |= changes
    manifest.pop("columns")
    manifest["seal"] = seal(manifest)
    (place / "manifest.json").write_text(json.dumps(manifest))


def huge_offsets(place: Path) -> None:
    np.save(place / "offsets.npy", np.full(8, 2**63, np.uint64))
    forge(place)


def other_dtype(place: Path) -> None:
    np.save(place / "sizes.npy", np.zeros(8, np.float64))
    forge(place)


def pickled(place: Path) -> None:
    np.save(place / "labels.npy", np.array([print] * 8, object), allow_pickle=True)
    forge(place)


def other_keys(place: Path) -> None:
    pq.write_table(pa.table({"key": ["x"] * 3}), place / "keys.parquet")
    forge(place)


def many_samples(place: Path) -> None:
    shards = json.loads((place / "manifest.json").read_bytes())["shards"]
    forge(place, shards=[{**one, "samples": 2**60} for one in shards])


def negative_sample(place: Path) -> None:
    forge(place, excluded={"-1": "x"})


def excluded_elsewhere(place: Path) -> None:
    forge(place, excluded={"3": "x"})


def shards_as_text(place: Path) -> None:
    forge(place, shards="abc")


def fields_as_list(place: Path) -> None:
    forge(place, fields=["a"])


def deep_json(place: Path) -> None:
    (place / "manifest.json").write_text("[" * 100_000)


FORGERIES = [
    *(huge_offsets, other_dtype, pickled, other_keys, many_samples, negative_sample),
    *(excluded_elsewhere, shards_as_text, fields_as_list, deep_json),
]


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_index_is_refused_here_and_not_copied_from_a_server(
    tmp_path: Path, forgery: object
) -> None:
    folder = make_shards(tmp_path / "s", n=8, shards=2, size=8)
    right = open_index(folder)
    keys = list(right.keys)
    forgery(right.folder)  # type: ignore[operator]
    with pytest.raises(DataError, match="damaged"):
        open_index(folder)
    with web(folder) as server:
        index = open_index(server.url + "/shard-{000000..000001}.tar", tmp_path / "i")
    assert list(index.keys) == keys
    assert index.fingerprint == right.fingerprint


def test_a_column_behind_a_url_that_is_longer_than_it_can_be_is_not_copied(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "s", n=8, shards=2, size=8)
    with open(open_index(folder).folder / "offsets.npy", "ab") as file:
        file.truncate(1 << 24)
    with web(folder) as server:
        assert len(open_index(server.url + "/shard-{000000..000001}.tar", tmp_path / "i")) == 8
        assert server.sent["offsets.npy"] < 1000
