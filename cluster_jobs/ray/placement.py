"""The place of a worker group: a bundle for each rank and one for the cluster worker.

Ray's placement group reserves all of them or none. The cluster's nodes are compared with the
bundles first, so that the user learns what a cluster that is too small lacks.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from cluster_jobs.ray.spec import RaySpec
from deepclust.errors import ResourceError
from deepclust.recipe import Recipe

Resources: TypeAlias = dict[str, float]

POLL_S = 0.5
OFFER_S = 10.0  # for a group that the nodes' totals could hold; others may be using them


@dataclass(frozen=True)
class Shape:
    """What a worker group asks for: a bundle for every rank, then one for the cluster worker."""

    ranks: int
    rank: Resources
    worker: Resources | None

    @property
    def bundles(self) -> list[Resources]:
        """The bundles, in the order of the roles."""
        return [self.rank] * self.ranks + ([self.worker] if self.worker else [])

    def __str__(self) -> str:
        worker = f" and the cluster worker ({_in_words(self.worker)})" if self.worker else ""
        return f"{self.ranks} ranks ({_in_words(self.rank)} each){worker}"


def shape_of(recipe: Recipe, spec: RaySpec, ranks: int, with_gpus: bool) -> Shape:
    """Return the shape of a group of so many ranks; `with_gpus`: the cluster has GPUs."""
    device = recipe.train.device
    on_gpus = with_gpus if device == "auto" else device != "cpu"
    rank = {"CPU": float(spec.cpus_of(recipe)), **({"GPU": 1.0} if on_gpus else {})}
    sized = recipe.replace(f"train.ranks={ranks}")
    if sized.clusters_inline:
        return Shape(ranks, rank, None)
    wanted = sized.clustering.device
    own_gpu = sized.clustering.gpus > 0 and (on_gpus if wanted == "auto" else wanted != "cpu")
    worker = {"CPU": float(spec.worker_cpus), **({"GPU": 1.0} if own_gpu else {})}
    worker |= spec.worker_resources
    return Shape(ranks, rank, worker)


def has_gpus(nodes: list[Resources]) -> bool:
    """Return whether any node has a GPU."""
    return any(node.get("GPU", 0) > 0 for node in nodes)


def alive() -> list[Resources]:
    """Return the resources of every living node."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def missing(shape: Shape, nodes: list[Resources]) -> str:
    """Return what the cluster lacks for the shape, in words, or empty when it could hold it.

    First fit, the most particular bundles first, then the largest: exact for the few kinds of
    bundle that a group has, unless nodes differ wildly. Then the placement group, not this, has the
    last word.
    """
    free = [dict(node) for node in nodes]
    lacking: Counter[str] = Counter()
    for bundle in sorted(shape.bundles, key=_particular):
        home = next((n for n in free if all(n.get(k, 0) >= v for k, v in bundle.items())), None)
        if home is None:
            lacking.update({name: int(amount) for name, amount in bundle.items()})
            continue
        for name, amount in bundle.items():
            home[name] -= amount
    if not lacking:
        return ""
    there = "; ".join(_in_words(node) for node in nodes) or "no node"
    return f"{_in_words(lacking)} more than the cluster has ({there}) is needed for {shape}"


def _particular(bundle: Resources) -> tuple[float, ...]:
    """Return the key that sorts the most particular first."""
    return -len(bundle.keys() - {"CPU", "GPU"}), -bundle.get("GPU", 0), -bundle["CPU"]


def has_room(now: Shape, wanted: Shape) -> bool:
    """Return whether a group of the shape `now` could have the shape `wanted` instead."""
    free = Counter(ray.available_resources())
    more = Counter(_total(wanted))
    more.subtract(_total(now))
    return all(free[name] >= amount for name, amount in more.items()) and not missing(
        wanted, alive()
    )


def _total(shape: Shape) -> Counter[str]:
    total: Counter[str] = Counter()
    for bundle in shape.bundles:
        total.update({name: int(amount) for name, amount in bundle.items()})
    return total


def _in_words(resources: Resources | Counter[str] | None) -> str:
    known = ((name, (resources or {}).get(name, 0)) for name in ("GPU", "CPU"))
    return ", ".join(f"{amount:g} {name}" for name, amount in known if amount) or "nothing"


def reserve(
    shapes: list[Shape],
    spec: RaySpec,
    emit: Callable[[str], None],
    stopping: Callable[[], bool],
) -> tuple[Shape, PlacementGroup] | None:
    """Reserve the first of the shapes (most ranks first) that fits, or None when asked to stop.

    `emit` is called with why we wait, once for each reason. Fewer ranks than wanted are good
    enough after `spec.settle` seconds. Raises `ResourceError`, naming what is missing, when the
    cluster is still too small for the smallest shape after `spec.wait` seconds.
    """
    began, last = time.monotonic(), ""
    while not stopping():
        patient = time.monotonic() - began < spec.settle
        for shape in shapes[:1] if patient else shapes:
            lack = missing(shape, alive())
            if not lack and (group := _offer(shape, spec, stopping)):
                return shape, group
            reason = lack or f"the cluster is busy: waiting for {shape}"
            if reason != last:
                emit(reason)
                last = reason
        lack = missing(shapes[-1], alive())
        if lack and time.monotonic() - began >= spec.wait + spec.settle * (len(shapes) > 1):
            raise ResourceError(
                f"{lack}. Add nodes, or ask for less: train.ranks, ray.ranks={{min: ..., max: "
                "...}, ray.cpus, cluster.gpus=0, train.device=cpu"
            )
        time.sleep(POLL_S)
    return None


def _offer(shape: Shape, spec: RaySpec, stopping: Callable[[], bool]) -> PlacementGroup | None:
    """Return a placement group of that shape, if there is room for it now."""
    group: PlacementGroup = placement_group(shape.bundles, strategy=spec.strategy)
    deadline = time.monotonic() + OFFER_S
    while time.monotonic() < deadline and not stopping():
        if group.wait(POLL_S):
            return group
    remove_placement_group(group)
    return None
