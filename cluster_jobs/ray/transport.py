"""The Ray transport: the processes of a worker group as actors on a placement group.

Every actor is asked for news, and has always one question. Ray reports an actor that dies at once,
and says whether its node has died too.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayError
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster_jobs.ray.actor import ClusterWorker, News, Place, Trainer
from cluster_jobs.ray.placement import Shape
from cluster_jobs.ray.spec import RaySpec
from deepclust.errors import ResourceError
from deepclust.launch.endings import Cause, Ending, Record
from deepclust.launch.policy import AFTERMATH_S
from deepclust.launch.role import CLUSTER_WORKER, Role
from deepclust.launch.supervisor import AttemptEnded
from deepclust.launch.warm import PATIENCE_S
from deepclust.run.directory import Run

RETRY_S = 0.2
END_S = 10.0  # for processes to be killed; an actor that does not answer by then is lost
NEWS_S = 2.0  # how long an actor with nothing to report keeps a question: ranks report each second
MORE_THREADS = 3  # of an actor: two questions and the request to stop
PROCESS_ALONE = "worker process has died"  # Ray's words where the node lives on
UNMASKED = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}


@dataclass
class Handle:
    """An actor, its place, and the question that it has."""

    role: Role
    actor: Any
    place: Place | None = None
    pid: int = 0  # of the process that it keeps
    question: Any = None
    have: int = 0  # records that it has reported
    is_over: bool = False


class Actors:
    """The transport of a group on a placement group of the shape."""

    def __init__(self, run: Run, spec: RaySpec, shape: Shape, group: PlacementGroup) -> None:
        self.run, self.spec, self.shape, self.group = run, spec, shape, group
        self.handles: list[Handle] = []
        self.is_whole = True  # every actor can begin again

    def start(self, roles: list[Role]) -> list[Record]:
        """See that all actors are up and see the run, and give each its role.

        They are created for the first attempt and stay for the next ones.
        """
        stay = [handle.actor for handle in self.handles]
        actors = stay or [self._create(bundle, role) for bundle, role in enumerate(roles)]
        self.handles = [Handle(role, one) for role, one in zip(roles, actors, strict=True)]
        asked = [handle.actor.place.remote(self.run.token) for handle in self.handles]
        try:
            for handle, place in zip(
                self.handles, ray.get(asked, timeout=self.spec.start), strict=True
            ):
                handle.place = place
            self._check_places()
            asked = self._begin()
            for handle, pid in zip(
                self.handles, ray.get(asked, timeout=self._patience), strict=True
            ):
                handle.pid = pid
        except GetTimeoutError as error:
            late = [s.role.name for s, a in zip(self.handles, asked, strict=True) if not _ready(a)]
            text = f"{', '.join(late)} did not come up within ray.start={self.spec.start:g} s"
            raise AttemptEnded(Ending("fault", late[0] if late else "", "start", text)) from error
        except RayActorError as error:
            who = self._name_of(error)
            raise AttemptEnded(Ending("fault", who, "death", first_line(error))) from error
        for handle in self.handles:
            self._ask(handle)
        return self._places()

    @property
    def _patience(self) -> float:
        """Seconds until a process is there: its warm process may still import torch."""
        return self.spec.start + PATIENCE_S

    def _begin(self) -> list[Any]:
        """Ask every actor for the process of its role."""
        first = self.handles[0].actor.rendezvous.remote()
        rendezvous: str = ray.get(first, timeout=self.spec.start)
        asked = []
        for handle in self.handles:
            gpu, threads = handle.place.gpu if handle.place else None, self._threads(handle)
            role = replace(handle.role, rendezvous=rendezvous, gpu=gpu, threads=threads)
            asked.append(handle.actor.begin.remote(role, self.run.token, self.run.attempt))
        return asked

    def poll(self, timeout: float) -> list[tuple[int, Record]]:
        """Return the news of the actors that have answered within the time."""
        asked = {handle.question: handle for handle in self.handles if not handle.is_over}
        if not asked:
            time.sleep(timeout)
            return []
        ready, _ = ray.wait(list(asked), num_returns=1, timeout=timeout)
        if ready:  # and whatever else is there by now
            ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=0)
        handles = [asked[question] for question in ready]
        return [(handle.role.rank, record) for handle in handles for record in self._answer(handle)]

    def stop(self) -> None:
        """Ask the trainers to stop at their next step."""
        for handle in self.handles:
            if handle.role.rank != CLUSTER_WORKER:
                handle.actor.stop.remote()

    def kill(self) -> None:
        """Have every actor kill the process of its role."""
        asked = [handle.actor.end.remote() for handle in self.handles]
        deadline = time.monotonic() + END_S
        for answer in asked:
            try:
                ray.get(answer, timeout=max(0.0, deadline - time.monotonic()))
            except (RayError, GetTimeoutError):
                self.is_whole = False

    def release(self) -> None:
        """Kill the actors and give the devices back."""
        for handle in self.handles:
            ray.kill(handle.actor, no_restart=True)
        remove_placement_group(self.group)

    def _create(self, bundle: int, role: Role) -> Any:
        kind = ClusterWorker if role.rank == CLUSTER_WORKER else Trainer
        wants, mark = self.shape.bundles[bundle], self.run.token[:4]  # a name is taken only once
        options = {
            "name": f"{self.run.path.name}: {role.name} (attempt {self.run.attempt}, {mark})",
            "num_cpus": wants["CPU"], "num_gpus": wants.get("GPU", 0),
            "max_restarts": 0, "max_concurrency": MORE_THREADS,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self.group, bundle),
            # masks per actor trouble NCCL on NVSwitch machines; ranks set their device instead
            "runtime_env": {"env_vars": {**UNMASKED, **self.spec.env}},
        }  # fmt: skip
        return ray.remote(kind).options(**options).remote(str(self.run.path))

    def _threads(self, handle: Handle) -> int | None:
        """Return the CPUs that the cluster worker may use: its own, and those of waiting ranks."""
        if not handle.role.is_cluster_worker or handle.place is None:
            return None
        own, ranks = int(self.shape.bundles[-1]["CPU"]), self.handles[:-1]
        if "GPU" not in self.shape.rank or self.run.recipe.clustering.overlap:
            return own
        beside = sum(r.place is not None and r.place.node == handle.place.node for r in ranks)
        return own + beside * int(self.shape.rank["CPU"])

    def _places(self) -> list[Record]:
        return [
            {"who": handle.role.name, "host": place.host, "node": place.node[:8], "pid": handle.pid,
             "gpus": [int(gpu) if gpu.isdecimal() else gpu for gpu in place.gpus]}
            for handle in self.handles if (place := handle.place)
        ]  # fmt: skip

    def _check_places(self) -> None:
        """Raise `ResourceError`: a node that does not see the run, a device that two have."""
        owners: dict[tuple[str, str], str] = {}
        for handle in self.handles:
            place, name = handle.place, handle.role.name
            if place is None:
                continue
            if place.problem:
                raise ResourceError(
                    f"node {place.host} ({place.ip}), where the {name} is: {place.problem}."
                )
            for gpu in place.gpus:
                other = owners.setdefault((place.node, gpu), name)
                if other != name:
                    raise ResourceError(f"{other} and {name} were given one device, GPU {gpu}")

    def _ask(self, handle: Handle) -> None:
        handle.question = handle.actor.news.remote(handle.have, NEWS_S)

    def _answer(self, handle: Handle) -> list[Record]:
        """Return the records of an answer, and ask again unless it was the last."""
        try:
            news: News = ray.get(handle.question)
        except ActorUnavailableError:  # perhaps only the network, for a while
            time.sleep(RETRY_S)
            self._ask(handle)
            return [{"unreachable": True}]
        except RayError as error:
            handle.is_over = True
            return [death(first_line(error), handle.place)]
        handle.have += len(news.records)
        handle.is_over = news.is_over
        if not handle.is_over:
            self._ask(handle)
        return news.records

    def _name_of(self, error: RayActorError) -> str:
        dead = [s.role.name for s in self.handles if s.actor._ray_actor_id.hex() in str(error)]
        return dead[0] if dead else "a process"


def death(text: str, place: Place | None) -> Record:
    """Return the record of a dead actor: it alone, its node, or its node taken away on purpose."""
    node = place.node if place and PROCESS_ALONE not in text else ""
    facts = next((n for n in _nodes_soon(node) if n["NodeID"] == node), None)
    if facts is None or facts["Alive"] or place is None:
        return {"death": text}
    reason = f"{facts.get('DeathReason', '')} {facts.get('DeathReasonMessage', '')}".strip()
    cause: Cause = "preemption" if "PREEMPT" in reason.upper() else "node"
    return {"death": f"node {node[:8]} on {place.host} is gone ({reason})", "cause": cause}


def _nodes_soon(node: str) -> list[dict[str, Any]]:
    """Return the cluster's nodes.

    Ray reports a dead process a moment before its dead node.
    """
    deadline = time.monotonic() + AFTERMATH_S
    nodes: list[dict[str, Any]] = []
    while node and time.monotonic() < deadline:
        nodes = list(ray.nodes())
        if any(n["NodeID"] == node and not n["Alive"] for n in nodes):
            break
        time.sleep(0.1)
    return nodes


def first_line(error: Exception) -> str:
    """Return the line of a long message of Ray that says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    dead = [line for line in lines if "dead because" in line or "died" in line]
    return (dead or lines or [type(error).__name__])[-1][:300]


def _ready(ref: Any) -> bool:
    return bool(ray.wait([ref], timeout=0)[0])
