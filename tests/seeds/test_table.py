"""Labels joined by key: every row found, or counted, or a clear error; order never matters."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deepclust.data.shards.index import Index, open_index
from deepclust.errors import DataError
from deepclust.recipe.sections import SeedsSection
from deepclust.seeds.table import Seeds, SeedTable, load, ordered
from tests.images import draw, encode, make_shards, write_tar

N, CLASSES = 60, 3


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """Sample i has key 000000i, class i % 3, in four shards."""
    folder = tmp_path_factory.mktemp("seeds") / "shards"
    return open_index(make_shards(folder, n=N, shards=4, classes=CLASSES, size=8))


def table(path: Path, rows: Iterable[tuple[str, ...]]) -> Path:
    """A table (key, class[, shard]) as its suffix says."""
    rows = list(rows)
    names = ["key", "class", "shard"][: len(rows[0])]
    columns = {name: [row[i] for row in rows] for i, name in enumerate(names)}
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    else:
        path.write_text("\n".join([",".join(names), *(",".join(row) for row in rows)]))
    return path


def seeds(index: Index, labels: Path | str, **options: object) -> Seeds:
    return load(index, SeedsSection(labels=str(labels), **options), seed=0)


def key(i: int) -> str:
    return f"{i:07d}"


def test_labels_of_the_shards_are_seeds_by_name(index: Index) -> None:
    found = seeds(index, "shards").table
    assert found.names == ["class 0", "class 1", "class 2"]
    np.testing.assert_array_equal(found.sample_ids, np.arange(N))
    np.testing.assert_array_equal(found.classes, np.arange(N) % CLASSES)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_table_is_joined_by_key_in_any_order(index: Index, tmp_path: Path, suffix: str) -> None:
    rows = [(key(i), "äpfel" if i % 2 else "日本") for i in (59, 3, 17, 22)]
    one = seeds(index, table(tmp_path / f"a{suffix}", rows)).table
    other = seeds(index, table(tmp_path / f"b{suffix}", rows[::-1])).table
    assert one.sample_ids.tolist() == [3, 17, 22, 59]
    assert [one.names[c] for c in one.classes] == ["äpfel", "äpfel", "日本", "äpfel"]
    assert one.digest == other.digest
    np.testing.assert_array_equal(one.classes, other.classes)


def test_the_join_equals_that_of_a_dictionary(index: Index, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    chosen = random.choice(90, 40, replace=False)  # a third of them unknown
    rows = {key(i): f"c{random.integers(5)}" for i in chosen}
    found = seeds(index, table(tmp_path / "t.csv", rows.items()))
    expected = {i: rows[name] for i, name in enumerate(index.keys) if name in rows}
    names = [found.table.names[c] for c in found.table.classes]
    assert dict(zip(found.table.sample_ids.tolist(), names, strict=True)) == expected
    unknown = (chosen >= N).sum()
    assert f"{unknown} of 40 keys are not in data.shards" in found.notes[0]


def test_classes_are_in_the_order_of_numbers_or_of_letters() -> None:
    assert ordered(["10", "9", "2", "9"]) == ["2", "9", "10"]
    assert ordered(["10", "9", "b"]) == ["10", "9", "b"]


def test_keys_that_only_look_like_numbers_stay_text(index: Index, tmp_path: Path) -> None:
    found = seeds(index, table(tmp_path / "t.csv", [(key(1), "007"), (key(2), "NA")])).table
    assert found.names == ["007", "NA"]


def test_rows_that_agree_are_one_and_rows_that_conflict_are_named(
    index: Index, tmp_path: Path
) -> None:
    same = [(key(1), "a"), (key(2), "b"), (key(1), "a")]
    assert seeds(index, table(tmp_path / "same.csv", same)).table.sample_ids.tolist() == [1, 2]
    with pytest.raises(DataError, match=r"key '0000001' two classes, 'a' and 'b' \(1 such"):
        seeds(index, table(tmp_path / "conflict.csv", [*same, (key(1), "b")]))


def test_a_table_of_unknown_keys_is_an_error_that_shows_some(index: Index, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"2 of 2 keys .*\['x', 'y'\].*first sample is '0000000'"):
        seeds(index, table(tmp_path / "t.csv", [("x", "a"), ("y", "b")]))


def test_a_class_whose_samples_are_all_unknown_is_named(index: Index, tmp_path: Path) -> None:
    rows = [(key(1), "a"), ("x", "lost")]
    with pytest.raises(DataError, match=r"1 classes without a sample .*: 'lost'"):
        seeds(index, table(tmp_path / "t.csv", rows))


def test_a_key_in_two_shards_needs_the_shard(tmp_path: Path) -> None:
    image = encode(draw(0, 8, 8))
    for name in ("a", "b"):
        write_tar(tmp_path / "s" / f"{name}.tar", [("x.png", image), (f"{name}.png", image)])
    twins = open_index(tmp_path / "s")
    with pytest.raises(DataError, match=r"key 'x' .*a\.tar.*b\.tar.*column `shard`"):
        seeds(twins, table(tmp_path / "t.csv", [("x", "1")]))
    rows = [("x", "2", "b.tar"), ("x", "1", "a.tar"), ("b", "1", "b.tar")]
    found = seeds(twins, table(tmp_path / "u.csv", rows)).table
    assert found.sample_ids.tolist() == [0, 2, 3]
    assert found.classes.tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("key,label\n1,2", "no column class"),
        ("key,class\n0000001,", r"row 0 \(from 0\) has no class"),
        ("key,class\n", "no rows"),
        ("key,class\n1,2,3", "cannot be read as a table"),
        ("key,class,class\n1,2,3", r"t\.csv has more than one column class"),
    ],
)
def test_a_broken_table_is_named(index: Index, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        seeds(index, tmp_path / "t.csv")


def test_a_doubled_column_of_a_parquet_table_is_named(index: Index, tmp_path: Path) -> None:
    columns = [pa.array([text]) for text in (key(1), "a", "b")]
    pq.write_table(pa.table(columns, names=["key", "class", "class"]), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"t\.parquet has more than one column class"):
        seeds(index, tmp_path / "t.parquet")


def test_shards_that_are_all_unknown_are_answered_with_one(index: Index, tmp_path: Path) -> None:
    rows = [(key(1), "a", "shard-0"), (key(2), "b", "shard-0")]
    with pytest.raises(DataError, match=r"shard must hold file names such as shard-000000\.tar"):
        seeds(index, table(tmp_path / "t.csv", rows))


def test_missing_tables_and_labels_are_errors(tmp_path: Path) -> None:
    bare = open_index(make_shards(tmp_path / "s", n=8, shards=2, size=8, labels=False))
    with pytest.raises(DataError, match="the shards have no labels"):
        seeds(bare, "shards")
    with pytest.raises(DataError, match="is not a file"):
        seeds(bare, tmp_path / "nothing.parquet")


def test_so_many_of_each_class_are_drawn_and_the_rest_is_held_out(index: Index) -> None:
    found = seeds(index, "shards", per_class=4)
    assert found.table.counts.tolist() == [4, 4, 4]
    assert found.held_out is not None
    both = np.concatenate([found.table.sample_ids, found.held_out.sample_ids])
    np.testing.assert_array_equal(np.sort(both), np.arange(N))
    again = seeds(index, "shards", per_class=4)
    assert again.table.digest == found.table.digest
    other = load(index, SeedsSection(labels="shards", per_class=4), seed=1)
    assert other.table.digest != found.table.digest


def test_a_class_with_few_labels_gives_all_of_them(index: Index, tmp_path: Path) -> None:
    rows = [(key(i), "a" if i else "b") for i in range(10)]
    assert seeds(index, table(tmp_path / "t.csv", rows), per_class=3).table.counts.tolist() == [
        3,
        1,
    ]


def test_the_draw_of_a_class_does_not_depend_on_the_others(index: Index, tmp_path: Path) -> None:
    rows = [(key(i), f"c{i % 4}") for i in range(N)]
    whole = seeds(index, table(tmp_path / "a.csv", rows), per_class=3).table
    some = seeds(index, table(tmp_path / "b.csv", [r for r in rows if r[1] > "c1"]), per_class=3)
    np.testing.assert_array_equal(whole.sample_ids[whole.classes >= 2], some.table.sample_ids)


def test_the_shards_other_labels_judge_a_table(index: Index, tmp_path: Path) -> None:
    rows = [(key(0), "class 0"), (key(1), "class 1"), (key(4), "class 1")]
    found = seeds(index, table(tmp_path / "t.csv", rows))
    assert found.held_out is not None
    assert len(found.held_out) == N - 3
    assert found.held_out.names == ["class 0", "class 1", "other"]
    np.testing.assert_array_equal(
        found.held_out.classes, found.held_out.sample_ids % 3
    )  # 2 is other


def test_other_names_in_the_shards_judge_nothing(index: Index, tmp_path: Path) -> None:
    found = seeds(index, table(tmp_path / "t.csv", [(key(0), "cat")]))
    assert found.held_out is None
    assert "are not used for evaluation" in found.notes[0]
    with pytest.raises(DataError, match=r"seeds.held_out: no held-out label"):
        seeds(index, tmp_path / "t.csv", held_out="shards")


def test_held_out_labels_must_not_be_seeds(index: Index, tmp_path: Path) -> None:
    used = table(tmp_path / "used.csv", [(key(0), "a"), (key(1), "b")])
    judge = table(tmp_path / "judge.csv", [(key(1), "b"), (key(2), "a")])
    with pytest.raises(DataError, match=r"1 of its samples are seeds.*key '0000001'"):
        seeds(index, used, held_out=str(judge))


def test_excluded_samples_are_counted_and_a_class_left_bare_is_an_error(index: Index) -> None:
    found = seeds(index, "shards", per_class=2)
    own = found.table.sample_ids[found.table.classes == 1]
    left, notes = found.in_round(own[:1])
    assert left.counts.tolist() == [2, 1, 2]
    assert notes == ["1 of 6 labelled samples are excluded"]
    with pytest.raises(DataError, match="'class 1'"):
        found.in_round(own)


def test_stretches_of_shards_change_nothing(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = table(tmp_path / "t.csv", [(key(i), f"c{i % 7}") for i in range(0, N, 2)])
    whole = seeds(index, path).table.digest
    monkeypatch.setattr("deepclust.seeds.table.STRETCH", 20)
    assert seeds(index, path).table.digest == whole


def test_a_class_with_fewer_labels_than_asked_for_gives_all_and_is_noted(
    index: Index, tmp_path: Path
) -> None:
    assert index.labels is not None
    few = SeedsSection(labels="shards", per_class=len(index))
    seeds = load(index, few, 0)
    assert len(seeds.table) == (np.asarray(index.labels) >= 0).sum()
    assert any("classes have fewer labels, and all of theirs are used" in n for n in seeds.notes)


def test_classes_that_differ_in_spaces_alone_are_a_conflict(index: Index, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text(f"key,class\n{index.keys[0]},cat\n{index.keys[1]},cat \n")
    with pytest.raises(DataError, match="'cat' and 'cat ': write both alike"):
        load(index, SeedsSection(labels=str(table)), 0)


@pytest.mark.parametrize("seed", range(5))
def test_samples_are_left_out_in_any_order_and_unknown_ones_change_nothing(seed: int) -> None:
    draws = np.random.default_rng(seed)
    ids = np.unique(draws.integers(0, 50, 30))
    whole = SeedTable(ids, np.arange(len(ids), dtype=np.int32) % CLASSES, ["a", "b", "c"])
    gone = draws.integers(-5, 60, [0, 1, 40][seed % 3])
    left = whole.without(gone)
    stays = ~np.isin(ids, gone)
    np.testing.assert_array_equal(left.sample_ids, ids[stays])
    np.testing.assert_array_equal(left.classes, whole.classes[stays])
    assert len(left.without(left.sample_ids)) == 0
