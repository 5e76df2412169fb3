"""Which process of a Slurm job sits where: ranks and cluster worker on nodes, with CPUs and GPUs.

Nodes are alike, as Slurm's mostly are; what differs is the first, where the cluster worker has the
last GPU, or a place without one. All is derived from `slurm.*`, so that nobody counts. With
the launcher ray the roles are Ray's to give; what counts then is how many there are.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster_jobs.spec import SlurmSpec, slurm_spec
from deepclust.errors import RecipeError
from deepclust.launch.role import CLUSTER_WORKER
from deepclust.recipe import Recipe

FIRST_NODE = "first_node"  # the resource that its Ray has, and the cluster worker asks for


@dataclass(frozen=True)
class Place:
    """One process: its rank (-1: the cluster worker) and the number of its GPU on the node."""

    rank: int
    gpu: int | None


@dataclass(frozen=True)
class Layout:
    """The processes of every node, in the order of `srun`'s tasks; None: a task without work."""

    nodes: list[list[Place | None]]  # empty: nodes differ, and Ray roles all
    ranks: int
    rank_cpus: int
    worker_cpus: int
    cpus: int  # of a node
    gpus: int  # of a node, or of all
    by_ray: bool  # who sits where is its to say

    @property
    def tasks(self) -> int:
        """Tasks of a node, the same on each."""
        return len(self.nodes[0])

    @property
    def worker(self) -> Place | None:
        """The cluster worker's place, if there is one."""
        return next((p for n in self.nodes for p in n if p and p.rank == CLUSTER_WORKER), None)

    def __str__(self) -> str:
        lines: list[str] = []
        if self.by_ray:
            own = "" if self.worker and self.worker.gpu is None else ", with a GPU of its own"
            lines = [f"# the cluster worker is on the first node{own}"] if self.worker else []
            return "\n".join([self._head(), *lines])
        for number, node in enumerate(self.nodes):
            seated = [_told(place) for place in node if place is not None]
            lines.append(f"# node {number}: {', '.join(seated) or 'nothing'}")
        return "\n".join([self._head(), *lines])

    def _head(self) -> str:
        place = "a node" if self.nodes else "on all nodes"
        each = f"{self.cpus} CPU a node, {self.gpus} GPU {place}; {self.rank_cpus} CPU a rank"
        worker = f", {self.worker_cpus} the cluster worker" if self.worker else ""
        return f"# {self.ranks} ranks: {each}{worker}"


def layout(recipe: Recipe) -> Layout:
    """The layout for a recipe's `slurm` section. Raises `RecipeError` when it does not work out."""
    spec = slurm_spec(recipe)
    gpus = spec.gpus or spec.nodes * spec.gpus_per_node
    on_gpus = gpus > 0 and recipe.train.device != "cpu"
    if recipe.train.device.startswith("cuda") and not on_gpus:
        raise RecipeError("train.device=cuda needs GPUs: set slurm.gpus_per_node")
    ranks = _ranks(recipe, spec, on_gpus)
    worker = _has_worker(recipe, ranks)
    own_gpu = on_gpus and _wants_gpu(recipe)
    _check(recipe, ranks, worker and own_gpu, gpus if on_gpus else None)
    if spec.gpus:
        cpus = spec.cpus_per_rank or recipe.data.workers + 1
        return Layout([], ranks, cpus, spec.worker_cpus, spec.cpus_per_node or 1, spec.gpus, True)
    if on_gpus:
        nodes = _seat_on_gpus(spec, ranks, worker, own_gpu)
    else:
        nodes = _seat_on_cpus(spec.nodes, ranks, worker)
    rank_cpus = _rank_cpus(recipe, spec, nodes)
    needed = max(_needs(node, rank_cpus, spec.worker_cpus) for node in nodes)
    cpus = spec.cpus_per_node or needed
    if needed > cpus:
        raise RecipeError(
            f"slurm.cpus_per_node={cpus} is too few: the processes of a node need {needed}. Raise "
            "it, or lower slurm.cpus_per_rank or slurm.worker_cpus"
        )
    by_ray = spec.launcher == "ray"
    return Layout(nodes, ranks, rank_cpus, spec.worker_cpus, cpus, spec.gpus_per_node, by_ray)


def _ranks(recipe: Recipe, spec: SlurmSpec, on_gpus: bool) -> int:
    """As many as were asked for, else one for each GPU that the cluster worker does not have."""
    if spec.ranks is not None:
        return spec.ranks
    if not on_gpus:
        return recipe.train.ranks
    gpus = spec.gpus or spec.nodes * spec.gpus_per_node
    spare = _has_worker(recipe, gpus - 1) and _wants_gpu(recipe)  # one rank clusters by itself
    return gpus - spare if gpus > 1 else gpus


def _has_worker(recipe: Recipe, ranks: int) -> bool:
    """Whether so many ranks would have a cluster worker; whether they fit the batch comes later."""
    train = recipe.train.model_copy(update={"ranks": ranks})
    return not recipe.model_copy(update={"train": train}).clusters_inline


def _wants_gpu(recipe: Recipe) -> bool:
    cluster = recipe.cluster
    return cluster is not None and cluster.gpus > 0 and cluster.device != "cpu"


def _check(recipe: Recipe, ranks: int, spare: bool, gpus: int | None) -> None:
    parts = recipe.train.accumulate
    if gpus is not None and ranks + spare > gpus:
        raise RecipeError(
            f"slurm.ranks={ranks}{' and the cluster worker' if spare else ''} need more GPUs than "
            f"the job's {gpus} (slurm.nodes x slurm.gpus_per_node, or slurm.gpus): lower "
            "slurm.ranks, or set cluster.gpus=0, so that the cluster worker uses its CPUs"
        )
    if recipe.train.batch % (ranks * parts):
        worker = ", for the cluster worker has one" if spare else ""
        raise RecipeError(
            f"{gpus} GPUs leave {ranks} ranks{worker}, and train.batch={recipe.train.batch} is no "
            f"multiple of {ranks * parts}: set train.batch or slurm.ranks, or cluster.gpus=0 (then "
            "the cluster worker uses CPUs and every GPU trains)"
            if gpus is not None
            else f"train.batch={recipe.train.batch} is no multiple of {ranks} ranks x {parts} "
            "(train.accumulate): set slurm.ranks or train.batch"
        )


def _seat_on_gpus(
    spec: SlurmSpec, ranks: int, worker: bool, own_gpu: bool
) -> list[list[Place | None]]:
    """Ranks in order, one a GPU; the worker has the first node's last GPU, or none, beside them."""
    gpus, following = spec.gpus_per_node, 0
    seated: list[list[Place | None]] = []
    for node in range(spec.nodes):
        places: list[Place | None] = []
        for gpu in range(gpus):
            if node == 0 and gpu == gpus - 1 and worker and own_gpu:
                places.append(Place(CLUSTER_WORKER, gpu))
                continue
            places.append(Place(following, gpu) if following < ranks else None)
            following += 1
        if worker and not own_gpu:
            places.append(Place(CLUSTER_WORKER, None) if node == 0 else None)
        seated.append(places)
    return seated


def _seat_on_cpus(nodes: int, ranks: int, worker: bool) -> list[list[Place | None]]:
    """As evenly as they go, ranks in order, the worker last on the first node."""
    count, following = ranks + worker, 0
    seated: list[list[Place | None]] = []
    for node in range(nodes):
        size = count // nodes + (node < count % nodes)
        own = size - (worker and node == 0)
        places: list[Place | None] = [Place(following + n, None) for n in range(own)]
        following += own
        if worker and node == 0:
            places.append(Place(CLUSTER_WORKER, None))
        seated.append(places + [None] * (-(-count // nodes) - size))
    return seated


def _rank_cpus(recipe: Recipe, spec: SlurmSpec, nodes: list[list[Place | None]]) -> int:
    """As given, else an equal share of the node, else one and one for each reader."""
    if spec.cpus_per_rank:
        return spec.cpus_per_rank
    if spec.cpus_per_node is None:
        return recipe.data.workers + 1
    shares = [
        (spec.cpus_per_node - _needs(node, 0, spec.worker_cpus)) // max(1, _needs(node, 1, 0))
        for node in nodes
    ]
    return max(1, min(shares))


def _needs(node: list[Place | None], rank: int, worker: int) -> int:
    return sum(worker if p.rank == CLUSTER_WORKER else rank for p in node if p is not None)


def _told(place: Place) -> str:
    name = "the cluster worker" if place.rank == CLUSTER_WORKER else f"rank {place.rank}"
    return name if place.gpu is None else f"{name} on GPU {place.gpu}"
