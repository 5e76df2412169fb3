"""The keys that may change when a run is resumed, because they change no result: one table.

Everything else is part of what the run computes. Whether changed places of data still hold the same
data is judged by their fingerprint, when they are opened.
"""

from __future__ import annotations

from deepclust.recipe.sections import BESIDE, PLACES

MAY_CHANGE = {
    "train.ranks": "the global batch stays the same",
    "train.hang": "when to give up",
    "train.timeout": "when to give up",
    "train.restarts": "when to give up",
    "train.log": "what is written",
    "train.checkpoint": "what is written",
    "train.evaluate": "what is measured",
    "train.evaluate_data": "what is measured",
    "cluster.raw": "where rows wait for their projection",
    "cluster.final": "what is made after the last step",
    "keep.features": "what stays on disk",
    "keep.checkpoints": "what stays on disk",
    "data.workers": "who reads",
    "data.stage": "from where shards are read",
    "data.scratch": "from where shards are read",
    "data.shards": "where they are; the fingerprint decides",
    "data.index": "where it is; the fingerprint decides",
    "data.read": "how shards are read; the order of the run's plans stays",
    "data.max_bad": "when to give up",
    "seeds.labels": "where they are; their digest decides",
}


def may_change(key: str, *, longer: bool) -> bool:
    """Return whether a key may change on resume; `train.epochs` may only become more."""
    top = key.partition(".")[0]
    # the section of a place, what happens beside a run, and the entries of a dictionary of shards
    known = key in MAY_CHANGE or top in (*PLACES, *BESIDE) or key.startswith("data.shards.")
    return known or (longer and key == "train.epochs")
