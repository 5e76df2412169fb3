"""One life of the gang: place it, see it up, watch it, and say how it ended.

The controller is the only one who watches. It asks every member for news; a member that dies is
told by Ray at once, one that hangs by its silence, and then the whole gang ends: a process group
cannot lose a member. Nothing is lost by that but the steps since the last checkpoint, and the next
life begins from what is on disk.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayError
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster_jobs.gang.member import ClusterWorker, News, Place, Trainer
from cluster_jobs.gang.placement import Shape
from cluster_jobs.spec import RaySpec
from deepclust.errors import DeepclustError, RequeueWanted, ResourceError
from deepclust.rundir import Run
from deepclust.seat import CLUSTER_WORKER, Seat

RETRY_S = 0.2
NEWS_S = 0.5  # how long a member with nothing to tell keeps a question
STOP_S = 120.0  # from the wish to stop to the next step that all agree on
LOSS_S = 30.0  # until Ray calls a node dead whose machine says nothing any more
AFTERMATH_S = 2.0  # for the others to say why they end, when one has
GRACE = 1.5  # a hang stops the others too; who does not even answer is named first
MORE_THREADS = 3  # of an actor: two questions and the wish to stop
UNMASKED = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
ALONE = "worker process has died"  # how Ray tells the death of a process whose node lives
UNEXPECTED = 1  # exit code of an error that is none of ours
# what another try may mend: a process group that broke, a reader that died; not bad data or NaN
MAY_PASS = (UNEXPECTED, ResourceError.exit_code)
Cause = Literal["death", "node", "preemption", "hang", "start", "error"]


@dataclass(frozen=True)
class Ending:
    """How a life of the gang ended."""

    kind: Literal["finished", "stopped", "failed", "fault"]
    who: str = ""
    cause: Cause = "death"  # of a fault
    text: str = ""
    error: DeepclustError | None = None  # of a failure, which no restart would mend


@dataclass
class _Seated:
    """A member, what it was asked, and what is known of it."""

    name: str
    rank: int
    actor: Any
    place: Place | None = None
    question: Any = None  # its next news
    have: int = 0  # records of it that were taken in
    result: dict[str, Any] | None = None
    death: str = ""
    unreachable: bool = False
    answered: float = field(default_factory=time.monotonic)
    idle_s: float | None = None

    @property
    def over(self) -> bool:
        return self.result is not None or bool(self.death)


class Gang:
    """The ranks and the cluster worker of one incarnation, on a placement group."""

    def __init__(self, run: Run, spec: RaySpec, shape: Shape, group: PlacementGroup) -> None:
        """Create the actors; they come up while `watch` begins."""
        self.run, self.spec, self.shape, self.group = run, spec, shape, group
        seats = list(range(shape.ranks)) + ([CLUSTER_WORKER] if shape.worker else [])
        self.members = [self._seat(bundle, rank) for bundle, rank in enumerate(seats)]
        self.trainers = [m for m in self.members if m.rank != CLUSTER_WORKER]
        self.asked_to_stop: float | None = None  # when
        self.begun = time.monotonic()

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

    def _seat(self, bundle: int, rank: int) -> _Seated:
        kind, name = (Trainer, f"rank {rank}") if rank >= 0 else (ClusterWorker, "cluster worker")
        wants = self.shape.bundles[bundle]
        actor = (
            ray.remote(kind)
            .options(
                name=f"deepclust {self.run.path.name} {self.run.token} {name}",
                num_cpus=wants["CPU"], num_gpus=wants.get("GPU", 0),
                max_restarts=0, max_concurrency=MORE_THREADS,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self.group, bundle),
                # masks per actor trouble NCCL on NVSwitch machines; ranks set their device instead
                runtime_env={"env_vars": {**UNMASKED, **self.spec.env}},
            )
            .remote(str(self.run.path))
        )  # fmt: skip
        return _Seated(name, rank, actor)

    def _begin(self, take: Callable[[dict[str, Any]], None]) -> Ending | None:
        """See that all are up, on devices of their own, with the run in sight; then start them."""
        try:
            asked: list[Any] = [m.actor.look.remote(self.run.token) for m in self.members]
            places: list[Place] = ray.get(asked, timeout=self.spec.start)
            for member, place in zip(self.members, places, strict=True):
                member.place = place
            self._check_places()
            take({"event": "placed", "members": self._places()})
            meeting: str = ray.get(self.trainers[0].actor.meeting.remote(), timeout=self.spec.start)
        except GetTimeoutError:
            silent = [m.name for m, a in zip(self.members, asked, strict=True) if not _ready(a)]
            text = f"{', '.join(silent)} did not come up within ray.start={self.spec.start:g} s"
            return Ending("fault", silent[0] if silent else "", "start", text)
        except RayActorError as error:
            return Ending("fault", self._dead_name(error), "death", _first_line(error))
        for member in self.members:
            gpu = member.place.gpus[0] if member.place and member.place.gpus else None
            seat = Seat(member.rank, self.shape.ranks, meeting, gpu=gpu)
            member.actor.begin.remote(seat, self.run.token, self.run.incarnation)
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
        for member in self.members:
            for gpu in member.place.gpus if member.place else ():
                other = taken.setdefault(
                    (member.place.node if member.place else "", gpu), member.name
                )
                if other != member.name:
                    raise ResourceError(
                        f"{other} and {member.name} were given one device, GPU {gpu}"
                    )

    def _ask(self, member: _Seated) -> None:
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

    def _hear(self, member: _Seated, take: Callable[[dict[str, Any]], None]) -> None:
        try:
            news: News = ray.get(member.question)
        except ActorUnavailableError:  # perhaps only the network; time will tell
            member.unreachable = True
            time.sleep(RETRY_S)
            return self._ask(member)
        except RayError as error:
            member.death = _first_line(error)
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
        if self.asked_to_stop is None or time.monotonic() - self.asked_to_stop < STOP_S:
            return None
        return Ending("stopped", text=f"it did not stop within {STOP_S:.0f} s and was killed")

    def _ended(self, take: Callable[[dict[str, Any]], None]) -> Ending | None:
        """How it ended, if it has."""
        results = [m.result for m in self.trainers]
        if all(result == {} for result in results):
            return Ending("finished")
        if all(r is not None and r.get("kind") == RequeueWanted.__name__ for r in results):
            return Ending("stopped", text=str(results[0] and results[0]["failed"]))
        if any(m.death or _bad(m.result) for m in self.members) or self._worker_left():
            self._aftermath(take)
            return self._why()
        return self._hang()

    def _worker_left(self) -> bool:
        """Nobody tells the cluster worker to leave before the trainers do."""
        return any(m.rank == CLUSTER_WORKER and m.result == {} for m in self.members)

    def _aftermath(self, take: Callable[[dict[str, Any]], None]) -> None:
        """Hear the others out: who dies with its node is called dead later than who notices it."""
        began = time.monotonic()
        while not (any(m.death for m in self.members) or all(m.over for m in self.trainers)):
            lost = any(m.unreachable and not m.death for m in self.members)
            if time.monotonic() - began > (LOSS_S if lost else AFTERMATH_S):
                return
            self._listen(take)

    def _why(self) -> Ending:
        """The death, or the reason that was told first; not that of those who only followed."""
        told = [m for m in self.members if _bad(m.result)]
        own = [m for m in told if m.result and m.result["exit_code"] not in MAY_PASS]
        if own:
            return Ending("failed", own[0].name, error=_error_of(own[0].result or {}))
        for member in sorted(self.members, key=lambda m: not m.death):
            if member.death or member.unreachable:
                return self._lost(member)
        if self._worker_left():
            return Ending("fault", "cluster worker", "error", "it left before the trainers")
        told.sort(key=lambda m: (m.result or {}).get("kind") == "FollowedError")
        first = told[0]
        return Ending("fault", first.name, "error", str((first.result or {})["failed"]))

    def _lost(self, member: _Seated) -> Ending:
        """A dead member: it alone, or its node, or its node taken away on purpose."""
        node = member.place.node if member.place and ALONE not in member.death else ""
        facts = next((n for n in _nodes_soon(node) if n["NodeID"] == node), None)
        if facts is None or facts["Alive"]:
            return Ending("fault", member.name, "death", member.death or "it cannot be reached")
        why = f"{facts.get('DeathReason', '')} {facts.get('DeathReasonMessage', '')}".strip()
        cause: Cause = "preemption" if "PREEMPT" in why.upper() else "node"
        host = member.place.host if member.place else "?"
        return Ending("fault", member.name, cause, f"node {node[:8]} on {host} is gone ({why})")

    def _hang(self) -> Ending | None:
        """Who does not answer; else a rank that answers and gets nowhere."""
        now, limit = time.monotonic(), self.spec.hang
        for member in self.members:
            silence = now - member.answered
            if not member.over and silence > limit:
                return Ending("fault", member.name, "hang", f"no answer for {silence:.0f} s")
        for member in (m for m in self.trainers if not m.over):
            if member.idle_s is None:
                if now - self.begun > self.spec.start:
                    text = f"it did not begin within ray.start={self.spec.start:g} s"
                    return Ending("fault", member.name, "start", text)
            elif (idle := member.idle_s + now - member.answered) > GRACE * limit:
                text = f"no step for {idle:.0f} s; ray.hang={limit:g}"
                return Ending("fault", member.name, "hang", text)
        return None

    def _dead_name(self, error: RayActorError) -> str:
        dead = [m.name for m in self.members if m.actor._ray_actor_id.hex() in str(error)]
        return dead[0] if dead else "a member"


def _ready(ref: Any) -> bool:
    return bool(ray.wait([ref], timeout=0)[0])


def _bad(result: dict[str, Any] | None) -> bool:
    """Whether it ended with an error, and not because it was asked to stop."""
    return bool(result) and (result or {})["kind"] != RequeueWanted.__name__


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    dead = [line for line in lines if "dead because" in line or "died" in line]
    return (dead or lines or [type(error).__name__])[-1][:300]


def _nodes_soon(node: str) -> list[dict[str, Any]]:
    """The cluster's nodes; a dead process is told a moment before its dead node is."""
    deadline = time.monotonic() + AFTERMATH_S
    while node and time.monotonic() < deadline:
        nodes: list[dict[str, Any]] = ray.nodes()
        if any(n["NodeID"] == node and not n["Alive"] for n in nodes):
            return nodes
        time.sleep(0.1)
    return ray.nodes()  # type: ignore[no-any-return]


def _error_of(result: dict[str, Any]) -> DeepclustError:
    kinds = {kind.exit_code: kind for kind in DeepclustError.__subclasses__()}
    return kinds[result["exit_code"]](result["failed"])
