"""The controller of a run on Ray: one attempt after the other, until the run is finished.

    python -m cluster_jobs.ray.controller RUN       # what `deepclust submit --on ray` starts

It holds the run's lock and supervises. Every attempt gets the most ranks that there is room for,
within `ray.ranks`. A smaller group stops at the next round when nodes have come back. It computes
nothing and keeps nothing: what it knows is in the run.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster_jobs import job_file
from cluster_jobs.ray.connection import connected
from cluster_jobs.ray.placement import Shape, alive, has_gpus, has_room, reserve, shape_of
from cluster_jobs.ray.spec import RaySpec, ray_spec, sizes
from cluster_jobs.ray.transport import Actors
from deepclust.errors import DeepclustError
from deepclust.launch.endings import Ending, Record
from deepclust.launch.policy import Policy
from deepclust.launch.role import roles_of
from deepclust.launch.signals import collected_signals
from deepclust.launch.start import is_finished
from deepclust.launch.supervisor import Supervisor
from deepclust.run import directory
from deepclust.run.directory import Run
from deepclust.run.lock import hold

log = logging.getLogger("cluster_jobs")


class Controller:
    """The attempts of a run on Ray, each as large as there is room for."""

    def __init__(self, run: Run, spec: RaySpec) -> None:
        self.spec = spec
        self.signals: list[int] = []
        self.larger: list[Shape] = []  # than the group of this attempt
        self.actors: Actors | None = None
        self.wants_more = False  # the group is asked to stop only to come back larger
        self.supervisor = Supervisor(run, policy_of(run, spec), self.asked, self.grow)

    def asked(self) -> bool:
        """Return whether a signal or a file asks the run to stop."""
        return job_file.stopping(self.supervisor.run.path, self.signals)

    def attempt(self) -> Ending:
        """Make one attempt, from a reservation to its end."""
        supervisor, actors = self.supervisor, self._placed()
        if actors is None:
            return Ending("stopped", text="cancelled before it was placed")
        self.wants_more = False
        supervisor.begin(actors.shape.ranks)
        actors.run = supervisor.run
        roles = roles_of(supervisor.run.recipe)
        ending = supervisor.watch(actors, roles, lambda: self.wants_more or self.asked())
        if ending.kind == "stopped" and self.wants_more and not self.asked():
            return replace(ending, kind="resized")
        return ending

    def _placed(self) -> Actors | None:
        """Return the actors of the last attempt if they stay, or new ones; None when cancelled."""
        if self.actors is not None and self.actors.is_whole and not self.has_room():
            return self.actors
        self.release()
        recipe, gpus = self.supervisor.run.recipe, has_gpus(alive())
        shapes = [shape_of(recipe, self.spec, n, gpus) for n in sizes(recipe, self.spec)]
        reserved = reserve(shapes, self.spec, self.wait, self.asked)
        if reserved is None:
            return None
        shape, group = reserved
        self.larger = [other for other in shapes if other.ranks > shape.ranks]
        self.actors = Actors(self.supervisor.run, self.spec, shape, group)
        return self.actors

    def release(self) -> None:
        """Give back what the last attempt had."""
        if self.actors is not None:
            self.actors.release()
        self.actors = None

    def wait(self, reason: str) -> None:
        """Write why the run waits for room."""
        self.supervisor.event("waiting", text=reason)

    def grow(self, record: Record) -> None:
        """Let the group grow at a new round, if there is room."""
        if record.get("event") == "clustered" and self.has_room():
            self.wants_more = True
            self.supervisor.event("growing", text="nodes have returned: restarting with more ranks")

    def has_room(self) -> bool:
        """Return whether a larger group would fit now."""
        now = self.actors
        return now is not None and any(has_room(now.shape, other) for other in self.larger)


def policy_of(run: Run, spec: RaySpec) -> Policy:
    """Return the policy of a run on Ray: the keys of `ray` before those of `train`."""
    common = Policy.of(run.recipe)
    return replace(
        common, hang=spec.hang or common.hang, stop=spec.stop, start=spec.start,
        failures=spec.max_failures, preemptions=spec.max_preemptions,
        hang_key="ray.hang" if spec.hang else common.hang_key, failures_key="ray.max_failures",
    )  # fmt: skip


def control(
    run_dir: Path, asked: list[int] | None = None, changed: dict[str, Any] | None = None
) -> None:
    """Bring the run to its end, or raise the errors of `deepclust.errors`.

    `asked` are the signals of a caller who collects them already. `changed` is what is different in
    its `ray` section where the caller has started that Ray.
    """
    recipe = directory.open_run(run_dir).recipe
    spec = ray_spec(recipe).model_copy(update=changed or {})
    with hold(run_dir) as token:
        controller = Controller(Run(run_dir, token), spec)
        supervisor = controller.supervisor
        if is_finished(supervisor.run):
            return
        try:
            # signals after Ray has come up, which sets a handler for TERM
            with (
                supervisor.recorded(),
                connected(spec, recipe),
                collected_signals(asked) as controller.signals,
            ):
                try:
                    supervisor.control(controller.attempt)
                finally:
                    controller.release()
        except BaseException:
            job_file.forget_cancel(run_dir)
            raise


def main() -> int:
    """Control the run that is named, and end with the exit code of what ended it."""
    run_dir = Path(sys.argv[1])
    job_file.log_to(run_dir)
    try:
        control(run_dir)
    except DeepclustError as error:
        log.error("%s: %s", type(error).__name__, error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
