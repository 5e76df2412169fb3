"""One life of the gang: place it, see it up, watch it, and say how it ended.

The controller is the only one who watches. It asks every member for news; a member that dies is
told by Ray at once, one that hangs by its silence, and then the whole gang ends: a process group
cannot lose a member. Nothing is lost by that but the steps since the last checkpoint, and the next
life begins from what is on disk.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayError
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster_jobs.ray.actor import ClusterWorker, News, Place, Trainer
from cluster_jobs.ray.faults import (
    Ending,
    Seated,
    all_stopped,
    first_line,
    hang,
    is_bad,
    why,
    worker_left,
)
from cluster_jobs.ray.placement import Shape
from cluster_jobs.ray.spec import RaySpec
from deepclust.errors import ResourceError
from deepclust.launch.policy import AFTERMATH_S
from deepclust.launch.role import CLUSTER_WORKER, Role
from deepclust.run.directory import Run

RETRY_S = 0.2
NEWS_S = 0.5  # how long a member with nothing to tell keeps a question
LOSS_S = 30.0  # until Ray calls a node dead whose machine says nothing any more
MORE_THREADS = 3  # of an actor: two questions and the wish to stop
UNMASKED = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}


class WorkerGroup:
    """The ranks and the cluster worker of one attempt, on a placement group."""

    def __init__(self, run: Run, spec: RaySpec, shape: Shape, group: PlacementGroup) -> None:
        """Create the actors; they come up while `watch` begins."""
        self.run, self.spec, self.shape, self.group = run, spec, shape, group
        roles = list(range(shape.ranks)) + ([CLUSTER_WORKER] if shape.worker else [])
        self.members = [self._seat(bundle, rank) for bundle, rank in enumerate(roles)]
        self.trainers = [m for m in self.members if m.rank != CLUSTER_WORKER]
        self.asked_to_stop: float | None = None  # when

    def close(self) -> None:
        """Kill what still runs and give the devices back; every stage is atomic."""
        for member in self.members:
            ray.kill(member.actor, no_restart=True)
        remove_placement_group(self.group)

    def watch(self, take: Callable[[dict[str, Any]], None], stopping: Callable[[], bool]) -> Ending:
        """Until the trainers are through, a member is lost, or all have stopped as asked.

        `take` is given every event and progress that a member tells.
        """
        ending = self._begin(take)
        while ending is None:
            self._listen(take)
            if self.asked_to_stop is None and stopping():
                self._ask_to_stop()
            ending = self._ended(take) or self._overdue()
        return ending

    def _seat(self, bundle: int, rank: int) -> Seated:
        kind, name = (Trainer, f"rank {rank}") if rank >= 0 else (ClusterWorker, "cluster worker")
        wants, mark = self.shape.bundles[bundle], self.run.token[:4]  # a name is taken only once
        actor = (
            ray.remote(kind)
            .options(
                name=f"{self.run.path.name}: {name} (life {self.run.attempt}, {mark})",
                num_cpus=wants["CPU"], num_gpus=wants.get("GPU", 0),
                max_restarts=0, max_concurrency=MORE_THREADS,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self.group, bundle),
                # masks per actor trouble NCCL on NVSwitch machines; ranks set their device instead
                runtime_env={"env_vars": {**UNMASKED, **self.spec.env}},
            )
            .remote(str(self.run.path))
        )  # fmt: skip
        return Seated(name, rank, actor)

    def _begin(self, take: Callable[[dict[str, Any]], None]) -> Ending | None:
        """See that all are up, on devices of their own, with the run in sight; then start them."""
        try:
            asked: list[Any] = [m.actor.look.remote(self.run.token) for m in self.members]
            places: list[Place] = ray.get(asked, timeout=self.spec.start)
            for member, place in zip(self.members, places, strict=True):
                member.place = place
            self._check_places()
            take({"event": "placed", "members": self._places()})
            rendezvous: str = ray.get(
                self.trainers[0].actor.rendezvous.remote(), timeout=self.spec.start
            )
        except GetTimeoutError:
            silent = [m.name for m, a in zip(self.members, asked, strict=True) if not _ready(a)]
            text = f"{', '.join(silent)} did not come up within ray.start={self.spec.start:g} s"
            return Ending("fault", silent[0] if silent else "", "start", text)
        except RayActorError as error:
            return Ending("fault", self._dead_name(error), "death", first_line(error))
        for member in self.members:
            gpu = member.place.gpus[0] if member.place and member.place.gpus else None
            role = Role(member.rank, self.shape.ranks, rendezvous, gpu=gpu)
            member.actor.begin.remote(role, self.run.token, self.run.attempt)
            member.answered = time.monotonic()
            self._ask(member)
        return None

    def _places(self) -> list[dict[str, Any]]:
        """Who has come up where, for an event."""
        return [
            {"who": m.name, "host": m.place.host, "node": m.place.node[:8], "pid": m.place.pid,
             "gpus": list(m.place.gpus)}
            for m in self.members
            if m.place is not None
        ]  # fmt: skip

    def _check_places(self) -> None:
        """Raise `ResourceError`: a node that does not see the run, a device that two have."""
        for member in self.members:
            if member.place and member.place.problem:
                raise ResourceError(
                    f"node {member.place.host} ({member.place.ip}), where the {member.name} is: "
                    f"{member.place.problem}. Every node must see the run directory, on a shared "
                    "file system, under the same path."
                )
        taken: dict[tuple[str, int], str] = {}
        for name, place in ((m.name, m.place) for m in self.members if m.place):
            for gpu in place.gpus:
                other = taken.setdefault((place.node, gpu), name)
                if other != name:
                    raise ResourceError(f"{other} and {name} were given one device, GPU {gpu}")

    def _ask(self, member: Seated) -> None:
        member.question = member.actor.news.remote(member.have, NEWS_S)

    def _listen(self, take: Callable[[dict[str, Any]], None]) -> None:
        """Take in what comes within half a second."""
        asked = {m.question: m for m in self.members if not m.over}
        if not asked:
            return
        ready, _ = ray.wait(list(asked), num_returns=1, timeout=NEWS_S)
        if ready:  # and whatever else is there by now
            ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=0)
        for question in ready:
            self._hear(asked[question], take)

    def _hear(self, member: Seated, take: Callable[[dict[str, Any]], None]) -> None:
        try:
            news: News = ray.get(member.question)
        except ActorUnavailableError:  # perhaps only the network; time will tell
            member.unreachable = True
            time.sleep(RETRY_S)
            return self._ask(member)
        except RayError as error:
            member.death = first_line(error)
            return
        member.answered, member.idle_s, member.unreachable = time.monotonic(), news.idle_s, False
        for record in news.records:
            member.have += 1
            take(record)
        member.result = news.result
        self._ask(member)

    def _ask_to_stop(self) -> None:
        self.asked_to_stop = time.monotonic()
        for member in self.trainers:
            member.actor.stop.remote()

    def _overdue(self) -> Ending | None:
        """Who was asked to stop and does not is not waited for: the last commit counts."""
        if self.asked_to_stop is None or time.monotonic() - self.asked_to_stop < self.spec.stop:
            return None
        return Ending("stopped", text=f"it did not stop within {self.spec.stop:g} s and was killed")

    def _ended(self, take: Callable[[dict[str, Any]], None]) -> Ending | None:
        """How it ended, if it has."""
        results = [m.result for m in self.trainers]
        if all(result == {} for result in results):
            return Ending("finished")
        if all_stopped(self.trainers):
            return Ending("stopped", text=str((results[0] or {})["failed"]))
        if any(m.death or is_bad(m.result) for m in self.members) or worker_left(self.members):
            self._aftermath(take)
            return why(self.members)
        return hang(self.members, self.spec.hang)

    def _aftermath(self, take: Callable[[dict[str, Any]], None]) -> None:
        """Hear the others out: who dies with its node is called dead later than who notices it."""
        began = time.monotonic()
        while not (any(m.death for m in self.members) or all(m.over for m in self.trainers)):
            lost = any(m.unreachable and not m.death for m in self.members)
            if time.monotonic() - began > (LOSS_S if lost else AFTERMATH_S):
                return
            self._listen(take)

    def _dead_name(self, error: RayActorError) -> str:
        dead = [m.name for m in self.members if m.actor._ray_actor_id.hex() in str(error)]
        return dead[0] if dead else "a member"


def _ready(ref: Any) -> bool:
    return bool(ray.wait([ref], timeout=0)[0])
