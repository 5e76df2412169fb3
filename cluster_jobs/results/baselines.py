"""Baselines of an evaluation, kept beside it: they depend on the images, not on what was trained.

They lie in `evaluations/baselines/HASH.json`, by a hash of everything that they depend on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from deepclust.data.shards.index import Index
from deepclust.errors import DataError, DeepclustError
from deepclust.evaluate import Scores, evaluate
from deepclust.evaluate.baselines import (
    COMPARED,
    MOST_ROWS,
    OWN,
    RANDOM,
    compared,
    freeze_baselines,
    majority,
    rows_of,
    same_rows,
)
from deepclust.evaluate.frozen import FineTuning, Frozen, Images
from deepclust.files import read_record, write_json
from deepclust.methods.embed import Embedder

Emit = Callable[[str], None]


FINE_TUNING = FineTuning()


@dataclass(frozen=True)
class Beside:
    """What is measured beside the features of a network."""

    baselines: bool = True
    layers: bool = False
    finetuning: FineTuning = FINE_TUNING  # of the evaluators that fine-tune
    labels: str | None = None  # which, as data.labels; default: those of the run


JUDGES = ("knn", "linear", "multi_label")  # evaluators that depend on the number of training rows
TUNED = ("finetune", "finetune_1", "finetune_10")  # trained from random weights too
FIELDS = {"facts": dict, "scores": dict}


def baselines(
    frozen: Frozen,
    indexes: tuple[Index, Index],
    fresh: Callable[[], Embedder],
    names: list[str] | None,
    kept: tuple[Path, dict[str, Any]] | None,
    emit: Emit,
) -> Scores:
    """Return {"majority": {"top1": ...}, "rows": ..., "pixels": {"knn": {...}}, "random_weights"}.

    `names` are the evaluators whose scores they stand beside (default: all). `fresh` gives the
    network before training. `kept` is a folder, and the facts of the network that the scores depend
    on. Where baselines are measured on a part of the rows, "this_network" has the network's scores
    on these. A baseline that cannot be measured is left out, and `emit` is given the reason.
    """
    tuned = _tuned(frozen, indexes, fresh, names, kept, emit)
    answered: Scores = {} if names == ["multi_label"] else {"majority": dict(majority(frozen))}
    wanted = compared(COMPARED if names is None else names)
    if not wanted:
        return {**answered, **({RANDOM: tuned} if tuned else {})}
    store = _Store.of(kept, _facts(frozen, indexes))
    known = store.known
    missing = [name for name in wanted if any(name not in one for one in known.values())]
    if missing or not known:
        embedder = fresh()
        frozens = freeze_baselines(frozen, indexes, embedder.data, embedder)
        for name, one in frozens.items():
            measured = _measured(name, one, missing or wanted, emit)
            known[name] = {**known.get(name, {}), **measured}
        store.keep(emit)
    known[RANDOM] = {**known.get(RANDOM, {}), **tuned}
    wanted = [*wanted, *tuned]
    beside = {name: {n: one[n] for n in wanted if n in one} for name, one in known.items()}
    if (cut := same_rows(frozen)) is not None and (judges := [n for n in wanted if n in JUDGES]):
        beside[OWN] = _measured(OWN, cut, judges, emit)
    return {**answered, "rows": rows_of(frozen), **beside}


def _tuned(
    frozen: Frozen,
    indexes: tuple[Index, Index],
    fresh: Callable[[], Embedder],
    names: list[str] | None,
    kept: tuple[Path, dict[str, Any]] | None,
    emit: Emit,
) -> Scores:
    """Return the scores of a network with random weights that is fine-tuned on the same images."""
    wanted = [name for name in names or () if name in TUNED]
    if not wanted or frozen.images is None:
        return {}
    own = {"finetuning": asdict(frozen.finetuning)}
    store = _Store.of(kept, _facts(frozen, indexes) | own)
    known = store.known
    if missing := [name for name in wanted if name not in known]:
        embedder = fresh()
        images = Images(embedder.method.trunk, indexes, embedder.data)
        known |= _measured(RANDOM, replace(frozen, images=images), missing, emit)
        store.keep(emit)
    return {name: known[name] for name in wanted if name in known}


def _measured(name: str, frozen: Frozen, wanted: list[str], emit: Emit) -> Scores:
    try:
        return evaluate(frozen, wanted, lambda text: emit(f"baseline {name}: {text}"))
    except DeepclustError:  # all of them failed, and each said why
        return {}


def _facts(frozen: Frozen, indexes: tuple[Index, Index]) -> dict[str, Any]:
    """Return what pixels and labels of both splits are, as JSON has it."""
    hashed = hashlib.blake2b(digest_size=8)
    for split in (frozen.train, frozen.test):
        hashed.update(split.sample_ids.tobytes() + split.labels.tobytes())
    return {
        "data": [index.fingerprint for index in indexes],
        "labels": hashed.hexdigest(),
        "classes": frozen.classes,
        "dim": frozen.dim,
        "seed": frozen.seed,
        "most_rows": MOST_ROWS,
    }


@dataclass(frozen=True)
class _Store:
    """Baselines that were measured before, in a file named by the facts that they depend on."""

    facts: dict[str, Any]
    file: Path | None
    known: Scores

    @classmethod
    def of(cls, kept: tuple[Path, dict[str, Any]] | None, own: dict[str, Any]) -> _Store:
        """Open the file of these facts and those of the network; there may be none."""
        if kept is None:
            return cls(own, None, {})
        facts = kept[1] | own
        file = kept[0] / "baselines" / f"{_hash(facts)}.json"
        return cls(facts, file, _known(file, facts))

    def keep(self, emit: Emit) -> None:
        """Write what is known now, where there is a folder for it."""
        if self.file is not None:
            _keep(self.file, {"facts": self.facts, "scores": self.known}, emit)


def _hash(facts: dict[str, Any]) -> str:
    text = json.dumps(facts, sort_keys=True).encode()
    return hashlib.blake2b(text, digest_size=8).hexdigest()


def _known(file: Path, facts: dict[str, Any]) -> Scores:
    """Return the scores that are kept of these facts: none from a damaged file."""
    with contextlib.suppress(DataError, FileNotFoundError):
        record = read_record(file, FIELDS)
        if record["facts"] == facts:
            return dict(record["scores"])
    return {}


def _keep(file: Path, record: dict[str, Any], emit: Emit) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, record)
    except (DeepclustError, OSError) as error:
        emit(f"warning: the baselines are not kept: {error}")
