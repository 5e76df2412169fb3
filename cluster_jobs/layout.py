"""Which process of a Slurm job sits where: ranks and cluster worker on nodes, with CPUs and GPUs.

Nodes are alike, as Slurm's mostly are; what differs is the first, where the cluster worker has the
last GPU, or a place without one. All is derived from `slurm.*`, so that nobody counts. With
`slurm.gpus` nodes have what Slurm gives them, and Ray seats the processes when it knows.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster_jobs.spec import SlurmSpec, slurm_spec
from deepclust.errors import RecipeError
from deepclust.recipe import Recipe
from deepclust.seat import CLUSTER_WORKER


@dataclass(frozen=True)
class Place:
    """One process: its rank (-1: the cluster worker) and the number of its GPU on the node."""

    rank: int
    gpu: int | None


@dataclass(frozen=True)
class Layout:
    """The processes of every node, in the order of `srun`'s tasks; None: a task without work."""

    nodes: list[list[Place | None]]  # empty: as Ray seats them
    ranks: int
    rank_cpus: int
    worker_cpus: int
    cpus: int  # of a node
    gpus: int  # of a node, or of all

    @property
    def tasks(self) -> int:
        """Tasks of a node, the same on each."""
        return len(self.nodes[0])

    @property
    def worker(self) -> Place | None:
        """The cluster worker's place, if there is one."""
        return next((p for n in self.nodes for p in n if p and p.rank == CLUSTER_WORKER), None)

    def __str__(self) -> str:
        lines = []
        for number, node in enumerate(self.nodes):
            seated = [_told(place) for place in node if place is not None]
            lines.append(f"# node {number}: {', '.join(seated) or 'nothing'}")
        place = "a node" if self.nodes else "on all nodes"
        each = f"{self.cpus} CPU a node, {self.gpus} GPU {place}; {self.rank_cpus} CPU a rank"
        worker = f", {self.worker_cpus} the cluster worker" if self.worker else ""
        return "\n".join([f"# {self.ranks} ranks: {each}{worker}", *lines])


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
        return Layout([], ranks, cpus, spec.worker_cpus, spec.cpus_per_node or 1, spec.gpus)
    slots = spec.gpus_per_node if on_gpus else -(-(ranks + worker) // spec.nodes)
    nodes = _seat(spec.nodes, slots, ranks, worker, on_gpus, own_gpu)
    rank_cpus = _rank_cpus(recipe, spec, nodes)
    needed = max(_needs(node, rank_cpus, spec.worker_cpus) for node in nodes)
    cpus = spec.cpus_per_node or needed
    if needed > cpus:
        raise RecipeError(
            f"slurm.cpus_per_node={cpus} is too few: the processes of a node need {needed}. Raise "
            "it, or lower slurm.cpus_per_rank or slurm.worker_cpus"
        )
    return Layout(nodes, ranks, rank_cpus, spec.worker_cpus, cpus, spec.gpus_per_node)


def _ranks(recipe: Recipe, spec: SlurmSpec, on_gpus: bool) -> int:
    """As many as were asked for, else one for each GPU that the cluster worker does not have."""
    if spec.ranks is not None:
        return spec.ranks
    if not on_gpus:
        return recipe.train.ranks
    gpus = spec.gpus or spec.nodes * spec.gpus_per_node
    return gpus - (_has_worker(recipe, gpus) and _wants_gpu(recipe))


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


def _seat(
    nodes: int, slots: int, ranks: int, worker: bool, on_gpus: bool, own_gpu: bool
) -> list[list[Place | None]]:
    """Ranks in order, `slots` a node; the worker on the first, in a slot or beside them."""
    beside = worker and on_gpus and not own_gpu
    seated: list[list[Place | None]] = []
    following = 0
    for node in range(nodes):
        places: list[Place | None] = []
        for slot in range(slots):
            gpu = slot if on_gpus else None
            if node == 0 and slot == slots - 1 and worker and not beside:
                places.append(Place(CLUSTER_WORKER, gpu))
            elif following < ranks:
                places.append(Place(following, gpu))
                following += 1
            else:
                places.append(None)
        if beside:
            places.append(Place(CLUSTER_WORKER, None) if node == 0 else None)
        seated.append(places)
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
