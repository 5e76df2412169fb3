"""The way back when a round that a run needs is not whole.

Every stage has the hashes of its files. At the start of an attempt they are compared for the round
that is trained on and for later ones. A round with a damaged or missing file counts as not done:
it is set aside, and training goes back to the last whole checkpoint from before the round was made.
From there the same round is made again. Nothing is deleted, and a warning says what was lost.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from deepclust.errors import DataError
from deepclust.files import set_aside
from deepclust.recipe import Recipe
from deepclust.run import checkpoint, final_round
from deepclust.run.checkpoint import Checkpoint, State
from deepclust.run.directory import Run, is_done, manifest, numbered, verify
from deepclust.stages import cluster
from deepclust.stages.schedule import Timeline

Warn = Callable[[str], None]


def latest_whole(run: Run, recipe: Recipe, timeline: Timeline, warn: Warn) -> Checkpoint | None:
    """Return the checkpoint to go on from, whose rounds are whole, or None for the beginning.

    Raises `DataError` for a damaged round when no checkpoint from before it is left.
    """
    latest = checkpoint.load_latest(run, warn)
    if recipe.cluster is None:
        return latest
    state = latest.state if latest else State()
    _tell_of_earlier(run, state.round, warn)
    broken = find_broken(run, recipe, state.round)
    if broken is None:
        return latest
    number, why = broken
    final = final_round.is_final(run, number)  # nothing trained on it
    earlier = latest if final else _newest_before(run, timeline, number)
    if earlier is None and number > 0:
        return _go_on(run, state, number, why, latest, warn)
    _set_aside(run, number, earlier)
    step = earlier.state.step if earlier else 0
    warn(
        f"{why}. Round {number} is made again, from step {step} instead of {state.step}. What was "
        f"there is kept under {run.path} as rounds/damaged-* and checkpoints/unused-*"
    )
    return earlier


def _tell_of_earlier(run: Run, used: int, warn: Warn) -> None:
    """Warn of each round before the one in use whose assignments are not as they were written."""
    for number in (n for n in run.rounds() if n < used):
        try:
            verify(run.round(number) / "assignments", run.alive)
        except DataError as error:
            warn(f"{error}. Training does not need that round and goes on; tables of it do")


def find_broken(run: Run, recipe: Recipe, used: int) -> tuple[int, DataError] | None:
    """Return the first round, from the one in use on, that is not as it was written, and why.

    `used` is the round that is trained on, -1 for none.
    """
    there = {int(folder.name) for folder in numbered(run.path / "rounds")}
    for number in sorted(n for n in there | {used} if n >= max(used, 0)):
        try:
            if number == used:
                _check_complete(run.round(number), recipe)
            _verify_stages(run, number)
        except DataError as error:
            return number, error
    return None


def _check_complete(round_dir: Path, recipe: Recipe) -> None:
    """Raise `DataError` unless the round has all stages that training reads."""
    stages = ["assignments", "centroids"]
    for stage in stages:
        if not is_done(round_dir / stage):
            raise DataError(f"{round_dir / stage} is missing or not whole: it has no DONE")
    refresh = recipe.method.round
    imported = "from" in manifest(round_dir / "assignments")["inputs"]
    whitens = refresh is not None and refresh.whiten and not imported
    if whitens and not is_done(round_dir / "whitening"):
        raise DataError(f"{round_dir / 'whitening'} is missing or not whole: it has no DONE")


def _verify_stages(run: Run, number: int) -> None:
    """Compare the files of a round with their hashes; features only where they are still needed."""
    round_dir = run.round(number)
    stages = ["whitening", "centroids", "assignments"]
    if not is_done(round_dir / "assignments"):
        stages.append("features")
    for stage in stages:
        if is_done(round_dir / stage):
            verify(round_dir / stage, run.alive)


def _newest_before(run: Run, timeline: Timeline, number: int) -> Checkpoint | None:
    """Return the newest whole checkpoint from before a round was made."""
    for folder in reversed(run.checkpoints()):
        try:
            if timeline.precedes(checkpoint.read_state(folder), number):
                return Checkpoint(folder, *checkpoint.load(folder, alive=run.alive))
        except DataError:
            continue
    return None


def _go_on(
    run: Run, state: State, number: int, why: DataError, latest: Checkpoint | None, warn: Warn
) -> Checkpoint | None:
    """Go on with a round of which training can do without what is damaged, else raise."""
    try:
        if number == state.round:
            cluster.read_targets(run, number)
            warn(f"{why}. Training does not need it and goes on; tables of that round do")
            return latest
    except DataError:
        pass
    raise DataError(
        f"{why}. Round {number} is in use, and no whole checkpoint from before it is left to make "
        "it again. Copy the file back, or start a new run from the weights: "
        f"init.weights={run.path}"
    ) from why


def _set_aside(run: Run, number: int, kept: Checkpoint | None) -> None:
    """Rename the round, all after it, and the checkpoints that were trained on it."""
    run.fence()
    for folder in numbered(run.path / "rounds"):
        if int(folder.name) >= number:
            set_aside(folder, "damaged")
    for folder in numbered(run.path / "checkpoints"):
        if kept is None or int(folder.name) > int(kept.folder.name):
            set_aside(folder, "unused")
