"""The controller of a run on Ray: one life of the gang after the other, until the run is finished.

    python -m cluster_jobs.ray.controller RUN       # what `deepclust submit --on ray` starts

It holds the run's lock, writes the events, and decides: begin again from the last commit when a
member, a node or a preemption was the cause, with a budget for each; with fewer ranks when there
is no room for more, and with more again at the next round; give up when three lives in a row
brought nothing. It computes nothing and keeps nothing: whatever it knows stands in the run.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster_jobs import job_file
from cluster_jobs.ray.connection import connected
from cluster_jobs.ray.faults import Ending
from cluster_jobs.ray.placement import Shape, alive, has_gpus, has_room, reserve, shape_of
from cluster_jobs.ray.spec import RaySpec, ray_spec, sizes
from cluster_jobs.ray.transport import WorkerGroup
from deepclust.errors import DeepclustError, RequeueWanted, ResourceError
from deepclust.launch.policy import FRUITLESS
from deepclust.launch.start import collected_signals, is_finished
from deepclust.run import directory
from deepclust.run.directory import Run
from deepclust.run.lock import hold, renew

log = logging.getLogger("cluster_jobs")


@dataclass
class Controller:
    """What is known of the lives so far; the rest stands in the run."""

    run: Run
    spec: RaySpec
    signals: list[int]
    failures: int = 0
    preemptions: int = 0
    fruitless: int = 0
    wants_more: bool = False  # the gang is asked to stop only to come back larger

    def control(self) -> None:
        """Live until the run is finished. Raises what ended it otherwise."""
        while True:
            before = job_file.progress(self.run)
            ending = self._live()
            if ending.kind == "finished":
                return self._event("finished", epochs=self.run.recipe.train.epochs)
            if ending.kind == "failed":
                assert ending.error is not None
                raise ending.error
            if ending.kind == "stopped":
                if not self.wants_more or self._asked():
                    raise RequeueWanted(ending.text)
                self.wants_more = False
                continue
            self._forgive(ending, job_file.progress(self.run) != before)

    def _live(self) -> Ending:
        """One life of the gang, from a reservation to its end."""
        recipe, gpus = self.run.recipe, has_gpus(alive())
        shapes = [shape_of(recipe, self.spec, n, gpus) for n in sizes(recipe, self.spec)]
        found = reserve(shapes, self.spec, self._wait, self._asked)
        if found is None:
            return Ending("stopped", text="cancelled before it was placed")
        shape, group = found
        self._begin(shape)
        gang = WorkerGroup(self.run, self.spec, shape, group)
        try:
            return gang.watch(self._taking(shape, shapes), lambda: self.wants_more or self._asked())
        finally:
            gang.close()

    def _begin(self, shape: Shape) -> None:
        """Fence off what is left of the last gang, clean up after it, and say that we begin."""
        token = renew(self.run.path, self.run.token)
        self.run = replace(self.run, token=token, attempt=_lives(self.run) + 1)
        directory.sweep(self.run.path)
        recipe = self.run.recipe
        if recipe.train.ranks != shape.ranks:
            resized = recipe.replace(f"train.ranks={shape.ranks}")
            resized.save(self.run.path / "recipe.yaml")
        self._event("started", pid=os.getpid(), ranks=shape.ranks)

    def _taking(self, shape: Shape, shapes: list[Shape]) -> Callable[[dict[str, Any]], None]:
        """What is done with a member's news: events are written, and a new round may bring more."""
        larger = [other for other in shapes if other.ranks > shape.ranks]

        def take(record: dict[str, Any]) -> None:
            if "event" not in record:
                return
            fields = {key: value for key, value in record.items() if key != "event"}
            self._event(record["event"], **fields)
            if record["event"] == "clustered" and any(has_room(shape, o) for o in larger):
                self._event("growing", text="nodes are back: a larger gang takes over")
                self.wants_more = True

        return take

    def _forgive(self, ending: Ending, fruitful: bool) -> None:
        """Count a fault, and raise `ResourceError` when there have been too many."""
        self._event("fault", who=ending.who, cause=ending.cause, text=ending.text)
        if self._asked():
            raise RequeueWanted(f"cancelled while {ending.who} was lost")
        self.wants_more = False
        self.fruitless = 0 if fruitful else self.fruitless + 1
        preempted = ending.cause == "preemption"
        self.preemptions += preempted
        self.failures += not preempted
        last = f"The last: {ending.who}, {ending.cause}: {ending.text}"
        if self.fruitless >= FRUITLESS:
            raise ResourceError(f"{FRUITLESS} lives of the gang in a row brought nothing. {last}")
        for name in ("failures", "preemptions"):
            limit = getattr(self.spec, f"max_{name}")
            if getattr(self, name) > limit:
                raise ResourceError(f"more than ray.max_{name}={limit} {name}. {last}")

    def _asked(self) -> bool:
        """Whether a signal or a file asks us to stop."""
        return job_file.stopping(self.run.path, self.signals)

    def _wait(self, reason: str) -> None:
        self._event("waiting", text=reason)

    def _event(self, name: str, **fields: Any) -> None:
        self.run.event(name, **fields)
        log.info("%s %s", name, fields)


def control(
    path: Path, asked: list[int] | None = None, changed: dict[str, Any] | None = None
) -> None:
    """Bring the run to its end. Raises the errors of `deepclust.errors`.

    `asked` are the signals of a caller who collects them already, `changed` what is different in
    its `ray` section where the caller has started that Ray.
    """
    found = directory.open_run(path)
    spec = ray_spec(found.recipe).model_copy(update=changed or {})
    with hold(path) as token:
        controller = Controller(Run(path, token, _lives(found)), spec, [])
        if is_finished(controller.run):
            return
        try:
            # after Ray has come, which has a way of its own to take TERM
            with connected(spec, found.recipe), collected_signals(asked) as controller.signals:
                controller.control()
        except BaseException as error:
            told = str(error) or "interrupted"
            controller.run.event("stopped", kind=type(error).__name__, text=told)
            job_file.forget_cancel(path)
            raise


def _lives(run: Run) -> int:
    return sum(event["event"] == "started" for event in run.events())


def main() -> int:
    """Control the run that is named, and end with the exit code of what ended it."""
    path = Path(sys.argv[1])
    job_file.log_to(path)
    try:
        control(path)
    except DeepclustError as error:
        log.error("%s: %s", type(error).__name__, error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
