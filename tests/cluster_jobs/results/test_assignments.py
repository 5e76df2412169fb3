"""Which image is in which cluster: every sample, its own key, and why some have no cluster."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch

from cluster_jobs.results.assignments import SCHEMA, export_assignments
from cluster_jobs.results.evaluate import load_embedder
from cluster_jobs.results.tables import safe_cells
from deepclust import open_index, pretrain
from deepclust.data.read.loader import Bad, Loaded, Loader, Request
from deepclust.errors import RecipeError, RunDiffersError
from deepclust.evaluate.frozen import embed_labelled
from deepclust.files import write_json
from deepclust.run.directory import open_run
from tests.cluster_jobs.synthetic import EXCLUDED, make_run, make_simclr, reseal
from tests.images import make_shards
from tests.tiny import tiny_recipe, tiny_shards

N = 100  # shards of 34, 34, 32


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", make_shards(tmp_path / "shards", n=N, shards=3), rounds=2)


def rows(run: Path, out: Path, round: int | None = None) -> list[dict]:
    return pyarrow.parquet.read_table(export_assignments(run, out, round)).to_pylist()


def test_every_sample_has_one_row_with_its_key_shard_and_cluster(run: Path, tmp_path: Path) -> None:
    table = rows(run, tmp_path / "a.parquet")
    stage = run / "rounds" / "0001" / "assignments"
    assert [row["sample_id"] for row in table] == list(range(N))
    assert [row["key"] for row in table] == [f"{i:07d}" for i in range(N)]
    assert [row["shard"] for row in table] == [f"shard-{i // 34:06d}.tar" for i in range(N)]
    assert [row["cluster"] for row in table] == np.load(stage / "assignments.npy")[0].tolist()
    assert {row["head"] for row in table} == {0}
    distances = np.load(stage / "distances.npy")[0]
    assert table[50]["distance"] == distances[50]


def test_an_excluded_sample_has_no_cluster_but_a_reason(run: Path, tmp_path: Path) -> None:
    table = rows(run, tmp_path / "a.parquet")
    reasons = {row["sample_id"]: row["reason"] for row in table if row["cluster"] == -1}
    assert reasons == EXCLUDED
    assert {row["sample_id"] for row in table if row["distance"] is None} == set(EXCLUDED)
    assert all(row["reason"] is None for row in table if row["cluster"] >= 0)


def test_csv_holds_the_same_as_parquet(run: Path, tmp_path: Path) -> None:
    parquet = pyarrow.parquet.read_table(export_assignments(run, tmp_path / "a.parquet"))
    csv = pyarrow.csv.read_csv(
        export_assignments(run, tmp_path / "a.csv"),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=SCHEMA, strings_can_be_null=True, quoted_strings_can_be_null=False
        ),
    )
    assert parquet.schema.equals(SCHEMA)
    assert csv.equals(parquet)


def test_an_older_round_can_be_exported(run: Path, tmp_path: Path) -> None:
    first = [row["cluster"] for row in rows(run, tmp_path / "a.parquet", round=0)]
    stage = run / "rounds" / "0000" / "assignments"
    assert first == np.load(stage / "assignments.npy")[0].tolist()
    assert first != [row["cluster"] for row in rows(run, tmp_path / "b.parquet")]


def test_the_reasons_outlive_the_features(run: Path, tmp_path: Path) -> None:
    shutil.rmtree(run / "rounds" / "0000" / "features")
    table = rows(run, tmp_path / "a.parquet", round=0)
    assert {row["reason"] for row in table if row["cluster"] == -1} >= set(EXCLUDED.values())


def test_several_heads_are_listed_one_after_the_other_in_each_shard(
    run: Path, tmp_path: Path
) -> None:
    stage = run / "rounds" / "0001" / "assignments"
    for name in ("assignments", "distances"):
        one = np.load(stage / f"{name}.npy")
        np.save(stage / f"{name}.npy", np.concatenate([one, one[:, ::-1]]))
    reseal(stage)
    table = rows(run, tmp_path / "a.parquet")
    assert len(table) == 2 * N
    assert [row["head"] for row in table[:68]] == [0] * 34 + [1] * 34
    second = [row["cluster"] for row in table if row["head"] == 1]
    assert second == [row["cluster"] for row in table if row["head"] == 0][::-1]


def test_exporting_twice_gives_the_same_bytes(run: Path, tmp_path: Path) -> None:
    first, second = (export_assignments(run, tmp_path / f"{i}.csv") for i in range(2))
    assert first.read_bytes() == second.read_bytes()


def test_a_round_that_is_not_there_is_answered_with_those_that_are(run: Path) -> None:
    with pytest.raises(RecipeError, match="no round 7; there are 2: 0 to 1"):
        export_assignments(run, run / "a.csv", round=7)


def test_the_error_for_a_run_without_a_round_names_the_command_that_makes_one(
    tmp_path: Path,
) -> None:
    run = make_run(tmp_path / "new", make_shards(tmp_path / "shards"), rounds=0)
    with pytest.raises(RecipeError, match=r"no finished round yet.*deepclust resume"):
        export_assignments(run, run / "a.csv")


def test_a_run_without_clusters_has_no_table(tmp_path: Path) -> None:
    run = make_simclr(tmp_path / "simclr", make_shards(tmp_path / "shards"))
    with pytest.raises(RecipeError, match=r"method simclr, which has no clusters"):
        export_assignments(run, run / "a.csv")


def test_an_unknown_suffix_is_answered_with_the_known_ones(run: Path) -> None:
    with pytest.raises(RecipeError, match=r"a\.xlsx: name it \*\.parquet or \*\.csv"):
        export_assignments(run, run / "a.xlsx")


def test_other_shards_in_the_place_of_the_old_ones_are_refused(run: Path, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "shards")
    make_shards(tmp_path / "shards", n=N, shards=3, classes=2)
    with pytest.raises(RunDiffersError, match="ids no longer name the same images"):
        export_assignments(run, run / "a.csv")
    assert not (run / "a.csv").exists()


@pytest.mark.parametrize(
    "text", ["=1+1", "+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1", " =1", "\uff1d1"]
)
def test_no_spreadsheet_runs_a_cell_and_no_terminal_obeys_it(text: str) -> None:
    (cell,) = safe_cells(pa.record_batch({"key": [text]}))["key"].to_pylist()
    assert cell[0] in "'\\"
    assert cell.isprintable()


def test_other_cells_stay_as_they_are_in_a_csv() -> None:
    texts = ["a-b", "0001", "x=1", "ümlaut", None, ""]
    assert safe_cells(pa.record_batch({"key": texts}))["key"].to_pylist() == texts
    hostile = pa.record_batch({"key": ["\x1b]0;owned\x07", "a\nb"], "n": [-1, 2]})
    assert safe_cells(hostile).to_pydict() == {
        "key": ["\\x1b]0;owned\\x07", "a\\nb"],
        "n": [-1, 2],
    }


@pytest.fixture(scope="module")
def answering(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a method without rounds, whose network answers with a cluster."""
    folder = tmp_path_factory.mktemp("answering")
    given = tiny_recipe(
        tiny_shards(folder / "shards", n=90), "method.name=dac", "method.clusters=5",
        "cluster=null", "train.epochs=1",
    )  # fmt: skip
    pretrain(given, folder / "run")
    return folder / "run"


def test_a_method_without_rounds_answers_for_every_image(answering: Path, tmp_path: Path) -> None:
    said: list[str] = []
    table = export_assignments(answering, tmp_path / "a.parquet", emit=said.append)
    assert pyarrow.parquet.read_schema(table).equals(SCHEMA)
    written = pyarrow.parquet.read_table(table).to_pydict()
    assert written["sample_id"] == list(range(90))
    assert {*written["distance"], *written["reason"]} == {None}
    run = open_run(answering)
    embedder, index = load_embedder(run), open_index(run.recipe.data.shards)
    features = embed_labelled(embedder, index, run.recipe.data).features
    logits = embedder.method.classify(torch.from_numpy(features))
    assert written["cluster"] == logits.argmax(1).tolist()
    assert not said


def test_an_image_that_cannot_be_read_has_no_answer_but_a_reason(
    answering: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Loader.stream

    def broken(self: Loader, requests: Iterator[Request]) -> Iterator[Loaded]:
        for loaded in stream(self, requests):
            yield replace(loaded, bad=[Bad(7, "not an image")])

    monkeypatch.setattr(Loader, "stream", broken)
    table = rows(answering, tmp_path / "a.parquet")
    assert [row["sample_id"] for row in table if row["cluster"] == -1] == [7]
    assert table[7]["reason"] == "not an image"


def test_a_run_without_rounds_has_no_round_to_choose(answering: Path) -> None:
    with pytest.raises(RecipeError, match="no rounds: its network answers"):
        export_assignments(answering, answering / "a.csv", round=0)


def test_other_shards_in_the_place_of_those_trained_on_are_refused(
    answering: Path, tmp_path: Path
) -> None:
    write_json(tmp_path / "data.json", {"n": 90, "fingerprint": "another"})
    for name in ("recipe.yaml", "checkpoints", "events.jsonl"):
        (tmp_path / name).symlink_to(answering / name)
    with pytest.raises(RunDiffersError, match="was trained on another"):
        export_assignments(tmp_path, tmp_path / "a.csv")
