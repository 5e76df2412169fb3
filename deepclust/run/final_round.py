"""The final round: made after the last step, with the weights that are exported.

It is a round like any other, the next by number, and has `final.json` with the step of its weights.
Nothing trains on it. So a run that is made longer drops it, and makes another one at its new end.
"""

from __future__ import annotations

import shutil

from deepclust.files import read_record, write_json
from deepclust.run.directory import Run, numbered, prune

MARK = "final.json"
STAGES = ("assignments", "centroids", "features", "raw", "whitening")


def is_final(run: Run, number: int) -> bool:
    """Return whether a round is the one that nothing trains on."""
    return (run.round(number) / MARK).is_file()


def step_of(run: Run, number: int) -> int | None:
    """Return the step of the weights of a final round, or None for another round."""
    if not is_final(run, number):
        return None
    return int(read_record(run.round(number) / MARK, {"step": int})["step"])


def trained_number(run: Run, number: int) -> int:
    """Return the number by which seeds are pinned: a final round is as the one before it."""
    return number - is_final(run, number)


def begin(run: Run, number: int, step: int) -> None:
    """Mark a round as final, before anything is in it.

    What is there of a longer plan, or of other weights, is deleted.
    """
    if step_of(run, number) == step:
        return
    for folder in numbered(run.path / "rounds"):
        if int(folder.name) >= number:
            _delete(run, int(folder.name))
    run.round(number).mkdir(parents=True, exist_ok=True)
    run.fence()
    write_json(run.round(number) / MARK, {"step": step})


def drop(run: Run) -> None:
    """Delete the final round, if there is one: the run trains on."""
    for folder in numbered(run.path / "rounds"):
        if is_final(run, int(folder.name)):
            _delete(run, int(folder.name))


def _delete(run: Run, number: int) -> None:
    """Delete a round, so that no stage of it looks done while it goes, and its mark last."""
    run.fence()
    for stage in STAGES:
        prune([run.round(number) / stage], 0)
    shutil.rmtree(run.round(number), ignore_errors=True)
