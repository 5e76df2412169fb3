"""Labelled seeds: a few samples whose class is known, read from the shards or from a table.

A table (Parquet or CSV) has the columns `key` and `class`, any text, and, where keys repeat across
shards, `shard` (a file name). It is joined to the index's keys a stretch of shards at a time.
Classes are numbered by their sorted names, numerically if all are decimals, so neither the order of
rows nor who reads them changes a number. What cannot be used is counted in `notes`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from jaxtyping import Bool, Int32, Int64

from deepclust.data.shards.index import Index
from deepclust.data.shards.keys import read_keys
from deepclust.data.shards.left_out import shown
from deepclust.errors import DataError
from deepclust.recipe.sections import SHARDS, SeedsSection
from deepclust.world import generator

STRETCH = 2**22  # keys looked up at a time
SHOWN = 5  # keys or names that a message lists


@dataclass(frozen=True)
class SeedTable:
    """Samples of known class, by ascending sample id."""

    sample_ids: Int64[np.ndarray, " m"]
    classes: Int32[np.ndarray, " m"]  # positions in `names`
    names: list[str]

    def __len__(self) -> int:
        """Return the number of labelled samples."""
        return len(self.sample_ids)

    @property
    def counts(self) -> Int64[np.ndarray, " classes"]:
        """Labelled samples of each class."""
        return np.bincount(self.classes, minlength=len(self.names)).astype(np.int64)

    @cached_property
    def digest(self) -> str:
        """What tells one table from another, whatever file it came from."""
        state = hashlib.blake2b(json.dumps(self.names).encode(), digest_size=16)
        state.update(self.sample_ids.astype("<i8").tobytes())
        state.update(self.classes.astype("<i4").tobytes())
        return state.hexdigest()

    def where(self, wanted: Bool[np.ndarray, " m"]) -> SeedTable:
        """Return some of its samples; the classes keep their numbers."""
        return SeedTable(self.sample_ids[wanted], self.classes[wanted], self.names)

    def without(self, samples: Int64[np.ndarray, " s"]) -> SeedTable:
        """Return all of its samples but these."""
        places = np.searchsorted(self.sample_ids, samples)
        found = places < len(self)
        found[found] = self.sample_ids[places[found]] == samples[found]
        stays = np.ones(len(self), bool)
        stays[places[found]] = False
        return self.where(stays)


@dataclass(frozen=True)
class Seeds:
    """The labels that are used, those that judge, and what the user should know of both."""

    table: SeedTable
    held_out: SeedTable | None  # of the classes of `table`; len(names) stands for any other class
    notes: list[str]

    def in_round(self, excluded: Int64[np.ndarray, " e"]) -> tuple[SeedTable, list[str]]:
        """Return the labelled samples that have a feature row this round.

        Raises `DataError` naming a class that has none left.
        """
        notes: list[str] = []
        left = _usable(self.table, excluded, notes)
        return left, notes


def load(index: Index, config: SeedsSection, seed: int) -> Seeds:
    """Read the labels of a recipe's `seeds` section and set aside those that are held out.

    Held out are the labels of `config.held_out`, or what `per_class` leaves, or, with a table, the
    shards' other labels. Raises `DataError` for a table that cannot be read or joined, and for
    conflicting rows. It also does for a class without a sample, and for held-out seeds.
    """
    notes: list[str] = []
    everything = _read(index, config.labels, "seeds.labels", notes)
    usable = _usable(everything, np.array(list(index.excluded), np.int64), notes)
    chosen = _draw(usable, config.per_class, seed)
    _note_few(usable, config.per_class, notes)
    table, rest = usable.where(chosen), usable.where(~chosen)
    return Seeds(table, _held_out(index, config, table, rest, notes), notes)


def ordered(names: Iterable[str]) -> list[str]:
    """Distinct class names in their order: numeric if all are decimals, else alphabetical."""
    distinct = sorted(set(names))
    if all(name.isascii() and name.isdecimal() for name in distinct):
        return sorted(distinct, key=int)
    return distinct


def _read(index: Index, source: str, option: str, notes: list[str]) -> SeedTable:
    """Read all labels of "shards" or of a table.

    `option` is the recipe's key, for messages.
    """
    if source == SHARDS:
        return _from_shards(index, option)
    path = Path(source)
    return _joined(index, _read_table(path, option), path, notes)


def _from_shards(index: Index, option: str) -> SeedTable:
    if index.labels is None:
        raise DataError(
            f"{option}=shards, but the shards have no labels: add a KEY.cls to the samples, name "
            "the field that has them (data.labels=cls, json.KEY or folder), or give a table "
            "(Parquet or CSV) with the columns key and class."
        )
    labels = np.asarray(index.labels)
    ids = np.flatnonzero(labels >= 0)
    # np.unique sorts all of them, which takes 48 bytes a sample
    encoded, given = pa.array(labels[ids]).dictionary_encode(), index.class_names
    values = encoded.dictionary.to_pylist()
    names = [str(i) if given is None else str(given[i]) for i in values]
    return _numbered(ids, encoded.indices.to_numpy(), names)


def _numbered(ids: Int64[np.ndarray, " m"], codes: np.ndarray, names: list[str]) -> SeedTable:
    """Return the table of samples of class `names[code]`, numbered as all tables are."""
    final = ordered(names)
    number = {name: i for i, name in enumerate(final)}
    classes = np.array([number[name] for name in names], np.int32)[codes]
    if (ids[1:] < ids[:-1]).any():
        order = np.argsort(ids, kind="stable")
        ids, classes = ids[order], classes[order]
    return SeedTable(ids.astype(np.int64, copy=False), classes, final)


def _read_table(path: Path, option: str) -> pa.Table:
    """Read the columns key, class and perhaps shard of a Parquet or CSV file, as text."""
    if not path.is_file():
        raise DataError(f'{option}: {path} is not a file; give "shards", or a Parquet or CSV table')
    try:
        table = _read_parquet(path) if path.suffix == ".parquet" else _read_csv(path)
        names = ["key", "class", *(["shard"] if "shard" in table.column_names else [])]
        if missing := set(names) - set(table.column_names):
            listed = ", ".join(sorted(missing))
            raise DataError(f"{path} has no column {listed}: it needs key and class")
        if doubled := [name for name in names if table.column_names.count(name) > 1]:
            raise DataError(f"{path} has more than one column {doubled[0]}: keep the right one")
        table = table.select(names)
        table = table.cast(pa.schema([(name, pa.string()) for name in names]))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(f"{option}: {path} cannot be read as a table: {error}") from error
    for name in names:
        blank = pc.fill_null(pc.equal(table[name], ""), True).to_numpy()
        if blank.any():
            raise DataError(f"{path}, row {int(blank.argmax())} (from 0) has no {name}")
    if len(table) == 0:
        raise DataError(f"{path} has no rows")
    return table


def _read_parquet(path: Path) -> pa.Table:
    with pq.ParquetFile(path) as file:  # read_table would take columns from the folders' names
        return file.read()


def _read_csv(path: Path) -> pa.Table:
    texts = {name: pa.string() for name in ("key", "class", "shard")}
    options = pa.csv.ConvertOptions(column_types=texts, strings_can_be_null=False)
    return pa.csv.read_csv(path, convert_options=options)


def _joined(index: Index, table: pa.Table, path: Path, notes: list[str]) -> SeedTable:
    """Return a table's classes by sample id.

    Keys that no shard has are counted.
    """
    key = table["key"]
    if by_shard := "shard" in table.column_names:
        key = _in_shard(table["shard"], key)
    keys, key_of = _codes(key)
    names, class_of = _codes(table["class"])
    _check_spelling(names.to_pylist(), path)
    classes = _one_class_each(keys, key_of, names, class_of, path)
    ids = _sample_ids(index, keys, by_shard, path)
    known = ids >= 0
    _note_unknown(keys, known, path, notes, index, by_shard)
    joined = _numbered(ids[known], classes[known], names.to_pylist())
    _check_classes(joined, f"{path} names")
    return joined


def _check_spelling(names: list[str], path: Path) -> None:
    """Raise `DataError` for two classes whose names differ in spaces at their ends alone."""
    first: dict[str, str] = {}
    for name in names:
        other = first.setdefault(name.strip(), name)
        if other != name:
            raise DataError(f"{path} has the classes {other!r} and {name!r}: write both alike")


def _in_shard(shards: Any, keys: Any) -> Any:
    """Return keys that are unique over all shards: no shard's name has a slash."""
    return pc.binary_join_element_wise(shards, keys, "/")


def _codes(column: pa.ChunkedArray) -> tuple[pa.Array, Int64[np.ndarray, " rows"]]:
    """Return the distinct values of a column, and each row's position among them."""
    encoded = column.combine_chunks().dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):  # older pyarrow keeps the chunks
        encoded = encoded.combine_chunks()
    return encoded.dictionary, encoded.indices.to_numpy().astype(np.int64)


def _one_class_each(
    keys: pa.Array,
    key_of: Int64[np.ndarray, " rows"],
    names: pa.Array,
    class_of: Int64[np.ndarray, " rows"],
    path: Path,
) -> Int64[np.ndarray, " keys"]:
    """Return the class of every key.

    Raises `DataError` if a key has two classes.
    """
    pairs = np.unique(key_of * len(names) + class_of)
    key, classes = np.divmod(pairs, len(names))
    twice = np.flatnonzero(key[1:] == key[:-1])
    if len(twice):
        at = int(twice[0])
        one, other = (names[int(classes[i])].as_py() for i in (at, at + 1))
        raise DataError(
            f"{path} gives key {keys[int(key[at])].as_py()!r} two classes, {one!r} and {other!r}"
            f" ({len(twice)} such keys). Leave one row for each key."
        )
    return classes


def _sample_ids(
    index: Index, keys: pa.Array, by_shard: bool, path: Path
) -> Int64[np.ndarray, " keys"]:
    """Return each key's sample id, -1 for unknown; raise `DataError` for a key of two samples."""
    pairs = [np.zeros((2, 0), np.int64)]
    for base, stretch in _stretches(index, len(keys), by_shard):
        places = pc.index_in(stretch, value_set=keys)
        hits = np.flatnonzero(pc.is_valid(places).to_numpy(zero_copy_only=False))
        pairs.append(np.stack([places.take(pa.array(hits)).to_numpy(), base + hits]))
    rows, ids = np.concatenate(pairs, axis=1)
    order = np.argsort(rows, kind="stable")
    twice = np.flatnonzero(rows[order][1:] == rows[order][:-1])
    if len(twice):
        one, other = (index.where(int(i)) for i in ids[order[twice[0] : twice[0] + 2]])
        raise DataError(
            f"{path}: more than one sample has the key {keys[int(rows[order[twice[0]]])].as_py()!r}"
            f" ({one}; {other}). Add a column `shard` with the shards' file names."
        )
    sample_ids = np.full(len(keys), -1, np.int64)
    sample_ids[rows] = ids
    return sample_ids


def _stretches(index: Index, keys: int, by_shard: bool) -> Iterator[tuple[int, pa.Array]]:
    """Yield first sample id and keys of stretches of shards, about the length of the table."""
    wanted, held, base = min(STRETCH, max(keys, STRETCH // 4)), [], 0
    keys_of = read_keys(index.folder, range(len(index.shards)))
    for number, (shard, own) in enumerate(zip(index.names, keys_of, strict=True)):
        held.append(_in_shard(pa.scalar(shard), own) if by_shard else own)
        end = int(index.bases[number + 1])
        if end - base >= wanted or end == len(index):
            chunks = [chunk for column in held for chunk in column.chunks]
            yield base, pa.concat_arrays(chunks)
            held, base = [], end


def _note_unknown(
    keys: pa.Array,
    known: Bool[np.ndarray, " keys"],
    path: Path,
    notes: list[str],
    index: Index,
    by_shard: bool,
) -> None:
    """Note the keys that no shard has; raise DataError, with a real key, if no shard has any."""
    if known.all():
        return
    first = [keys[int(i)].as_py() for i in np.flatnonzero(~known)[:SHOWN]]
    text = f"{path}: {int((~known).sum())} of {len(known)} keys are not in data.shards: {first}"
    if not known.any():
        shard, example, folder = index.names[0], shown(index.keys[0]), index.folder
        column = f" The column shard must hold file names such as {shard}." if by_shard else ""
        raise DataError(
            f"{text}. A key is the name of a sample's files in the tar, with its folders and up to "
            f"the first dot of the name: that of the first sample is {example!r} (all of them are "
            f"in {folder}/keys.parquet).{column}"
        )
    notes.append(text)


def _usable(table: SeedTable, excluded: Int64[np.ndarray, " e"], notes: list[str]) -> SeedTable:
    """Return the table without samples that are excluded.

    They are counted.
    """
    left = table.without(excluded)
    if len(left) < len(table):
        notes.append(f"{len(table) - len(left)} of {len(table)} labelled samples are excluded")
    _check_classes(left, "the seeds have")
    return left


def _check_classes(table: SeedTable, whose: str) -> None:
    """Raise `DataError` naming the classes that have no sample."""
    bare = np.flatnonzero(table.counts == 0)
    if len(bare):
        listed = ", ".join(repr(table.names[i]) for i in bare[:SHOWN])
        more = ", ..." if len(bare) > SHOWN else ""
        raise DataError(
            f"{whose} {len(bare)} classes without a sample that can be used: {listed}{more}. "
            "Label others of their samples, or leave the classes out."
        )


def _draw(table: SeedTable, per_class: int | None, seed: int) -> Bool[np.ndarray, " m"]:
    """Draw which labels are used: `per_class` of each class (all, if it has fewer)."""
    if per_class is None:
        return np.ones(len(table), bool)
    chosen = np.zeros(len(table), bool)
    order = np.argsort(table.classes, kind="stable")
    groups = np.split(order, np.cumsum(table.counts)[:-1])
    for name, own in zip(table.names, groups, strict=True):
        count = min(per_class, len(own))
        chosen[generator(seed, "seeds", name).choice(own, count, replace=False)] = True
    return chosen


def _note_few(table: SeedTable, per_class: int | None, notes: list[str]) -> None:
    """Note the classes that have fewer labels than are asked for: all of theirs are used."""
    few = [] if per_class is None else np.flatnonzero(table.counts < per_class).tolist()
    if few:
        listed = ", ".join(f"{table.names[i]!r} has {table.counts[i]}" for i in few[:SHOWN])
        more = ", ..." if len(few) > SHOWN else ""
        notes.append(
            f"seeds.per_class={per_class}: {len(few)} of {len(table.names)} classes have fewer "
            f"labels, and all of theirs are used ({listed}{more})"
        )


def _held_out(
    index: Index, config: SeedsSection, table: SeedTable, rest: SeedTable, notes: list[str]
) -> SeedTable | None:
    """Return the labels to judge by, as classes of the seeds, or None if there are none."""
    if config.held_out is not None:
        judges = _read(index, config.held_out, "seeds.held_out", notes)
        if config.held_out != SHARDS:
            _check_apart(index, table, judges)
    elif len(rest) or index.labels is None or config.labels == SHARDS:
        judges = rest
    else:
        judges = _from_shards(index, "seeds.held_out")
    judges = _renamed(judges.without(table.sample_ids), table.names)
    if len(judges) and not (judges.classes < len(table.names)).any():
        text = "no held-out label has a class of the seeds"
        if config.held_out is not None:
            raise DataError(f"seeds.held_out: {text} ({table.names[:SHOWN]}): check the names")
        notes.append(f"{text}, so they are not used for evaluation")
        return None
    return judges if len(judges) else None


def _check_apart(index: Index, table: SeedTable, judges: SeedTable) -> None:
    both = np.intersect1d(table.sample_ids, judges.sample_ids)
    if len(both):
        raise DataError(
            f"seeds.held_out: {len(both)} of its samples are seeds, the first of them "
            f"{index.where(int(both[0]))}. Labels for evaluation must not be seeds: leave them out."
        )


def _renamed(judges: SeedTable, names: list[str]) -> SeedTable:
    """Return held-out labels in the classes of the seeds; `len(names)` for any other class."""
    number = {name: i for i, name in enumerate(names)}
    final = np.array([number.get(name, len(names)) for name in judges.names], np.int32)
    return SeedTable(judges.sample_ids, final[judges.classes], [*names, "other"])
