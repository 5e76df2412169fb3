"""The processes of a Slurm job: ranks and cluster worker on nodes, with their CPUs and GPUs.

Nodes are alike, as Slurm's mostly are. What differs is the first, where the cluster worker has the
last GPU, or none. All numbers are derived from `slurm.*`. With the launcher `ray` it is Ray that
places the processes. The layout then gives their numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster_jobs.slurm.spec import SlurmSpec, slurm_spec
from deepclust.errors import RecipeError
from deepclust.launch.role import CLUSTER_WORKER
from deepclust.recipe import Recipe

FIRST_NODE = "first_node"  # the resource of its Ray that the cluster worker asks for


@dataclass(frozen=True)
class Slot:
    """A place for one process: its rank (-1: the cluster worker) and its GPU on the node."""

    rank: int
    gpu: int | None

    def __str__(self) -> str:
        name = "the cluster worker" if self.rank == CLUSTER_WORKER else f"rank {self.rank}"
        return name if self.gpu is None else f"{name} on GPU {self.gpu}"


Node = list[Slot | None]  # in the order of srun's tasks; None: a task without work


@dataclass(frozen=True)
class Layout:
    """The processes of every node."""

    nodes: list[Node]  # empty: nodes differ, and Ray places all processes
    ranks: int
    rank_cpus: int
    worker_cpus: int
    cpus: int  # of a node
    gpus: int  # of a node, or of all
    by_ray: bool  # whether Ray places the processes
    overlap: bool = False  # whether ranks train while the cluster worker works

    @property
    def tasks(self) -> int:
        """The number of tasks of a node, the same on each."""
        return len(self.nodes[0])

    @property
    def worker(self) -> Slot | None:
        """The cluster worker's slot, if there is one."""
        slots = [slot for node in self.nodes for slot in node if slot]
        return next((slot for slot in slots if slot.rank == CLUSTER_WORKER), None)

    @property
    def worker_threads(self) -> int:
        """The CPUs that the cluster worker may use.

        They are its own, and those of its node's ranks where these are on GPUs and wait for it.
        """
        first = self.nodes[0] if self.nodes else []
        beside = [one for one in first if one is not None and one.rank != CLUSTER_WORKER]
        waiting = [] if self.overlap else [one for one in beside if one.gpu is not None]
        return self.worker_cpus + len(waiting) * self.rank_cpus

    def __str__(self) -> str:
        return "\n".join([self._head(), *(self._by_ray() if self.by_ray else self._by_node())])

    def _head(self) -> str:
        where = "a node" if self.nodes else "on all nodes"
        each = f"{self.cpus} CPU a node, {self.gpus} GPU {where}; {self.rank_cpus} CPU a rank"
        worker = f", {self.worker_cpus} the cluster worker" if self.worker else ""
        return f"# {self.ranks} ranks: {each}{worker}"

    def _by_ray(self) -> list[str]:
        if self.worker is None:
            return []
        gpu = "" if self.worker.gpu is None else ", with its own GPU"
        return [f"# the cluster worker is on the first node{gpu}"]

    def _by_node(self) -> list[str]:
        texts = [", ".join(str(slot) for slot in node if slot) for node in self.nodes]
        return [f"# node {number}: {text or 'nothing'}" for number, text in enumerate(texts)]


def layout(recipe: Recipe) -> Layout:
    """Return the layout for a recipe's `slurm` section.

    Raises `RecipeError` when processes, GPUs, CPUs and batch do not fit each other.
    """
    spec = slurm_spec(recipe)
    gpus = spec.gpus or spec.nodes * spec.gpus_per_node
    on_gpus = gpus > 0 and recipe.train.device != "cpu"
    if recipe.train.device.startswith("cuda") and not on_gpus:
        raise RecipeError("train.device=cuda needs GPUs: set slurm.gpus_per_node")
    ranks = _rank_count(recipe, spec, on_gpus)
    worker = _has_worker(recipe, ranks)
    own_gpu = on_gpus and _worker_wants_gpu(recipe)
    _check_fit(recipe, ranks, worker and own_gpu, gpus if on_gpus else None)
    if spec.gpus:
        cpus = spec.cpus_per_rank or recipe.data.readers() + 1
        return Layout([], ranks, cpus, spec.worker_cpus, spec.cpus_per_node or 1, spec.gpus, True)
    if on_gpus:
        nodes = _place_on_gpus(spec, ranks, worker, own_gpu)
    else:
        nodes = _place_on_cpus(spec.nodes, ranks, worker)
    rank_cpus = _rank_cpus(recipe, spec, nodes)
    cpus = _node_cpus(spec, nodes, rank_cpus)
    by_ray = spec.launcher == "ray"
    overlap = recipe.cluster is not None and recipe.cluster.overlap
    sizes = (rank_cpus, spec.worker_cpus, cpus, spec.gpus_per_node)
    return Layout(nodes, ranks, *sizes, by_ray, overlap)


def _rank_count(recipe: Recipe, spec: SlurmSpec, on_gpus: bool) -> int:
    """Return the ranks asked for, or one for each GPU that the cluster worker does not have."""
    if spec.ranks is not None:
        return spec.ranks
    if not on_gpus:
        return recipe.train.ranks
    gpus = spec.gpus or spec.nodes * spec.gpus_per_node
    # one rank alone clusters by itself, without a worker
    worker_gpu = _has_worker(recipe, gpus - 1) and _worker_wants_gpu(recipe)
    return gpus - worker_gpu if gpus > 1 else gpus


def _has_worker(recipe: Recipe, ranks: int) -> bool:
    """Return whether that many ranks have a cluster worker, without a check of the batch."""
    train = recipe.train.model_copy(update={"ranks": ranks})
    return not recipe.model_copy(update={"train": train}).clusters_inline


def _worker_wants_gpu(recipe: Recipe) -> bool:
    cluster = recipe.cluster
    return cluster is not None and cluster.gpus > 0 and cluster.device != "cpu"


def _check_fit(recipe: Recipe, ranks: int, worker_gpu: bool, gpus: int | None) -> None:
    """Raise `RecipeError` when ranks do not fit the GPUs, or do not divide the batch."""
    batch, parts = recipe.train.batch, recipe.train.accumulate
    if gpus is not None and ranks + worker_gpu > gpus:
        raise RecipeError(
            f"slurm.ranks={ranks}{' and the cluster worker' if worker_gpu else ''} need more GPUs "
            f"than the job's {gpus} (slurm.nodes x slurm.gpus_per_node, or slurm.gpus): lower "
            "slurm.ranks, or set cluster.gpus=0, so that the cluster worker uses its CPUs"
        )
    if batch % (ranks * parts) == 0:
        return
    misfit = f"train.batch={batch} is not a multiple of"
    if gpus is None:
        raise RecipeError(
            f"{misfit} {ranks} ranks x {parts} (train.accumulate): set slurm.ranks or train.batch"
        )
    worker = " beside the cluster worker" if worker_gpu else ""
    raise RecipeError(
        f"{gpus} GPUs leave {ranks} ranks{worker}, and {misfit} {ranks * parts}: set train.batch "
        "or slurm.ranks, or cluster.gpus=0 (then the cluster worker uses CPUs and every GPU trains)"
    )


def _place_on_gpus(spec: SlurmSpec, ranks: int, worker: bool, own_gpu: bool) -> list[Node]:
    """Return one rank for each GPU, in order, and the worker last on the first node.

    The worker has the first node's last GPU, or none.
    """
    following, nodes = 0, []
    for number in range(spec.nodes):
        node: Node = []
        for gpu in range(spec.gpus_per_node):
            if number == 0 and gpu == spec.gpus_per_node - 1 and worker and own_gpu:
                node.append(Slot(CLUSTER_WORKER, gpu))
                continue
            node.append(Slot(following, gpu) if following < ranks else None)
            following += 1
        if worker and not own_gpu:
            node.append(Slot(CLUSTER_WORKER, None) if number == 0 else None)
        nodes.append(node)
    return nodes


def _place_on_cpus(count: int, ranks: int, worker: bool) -> list[Node]:
    """Return the processes spread evenly over nodes, in order, the worker last on the first."""
    processes = ranks + worker
    most = -(-processes // count)
    following, nodes = 0, []
    for number in range(count):
        size = processes // count + (number < processes % count)
        own = size - (worker and number == 0)
        node: Node = [Slot(following + n, None) for n in range(own)]
        following += own
        if worker and number == 0:
            node.append(Slot(CLUSTER_WORKER, None))
        nodes.append(node + [None] * (most - size))
    return nodes


def _rank_cpus(recipe: Recipe, spec: SlurmSpec, nodes: list[Node]) -> int:
    """Return the CPUs of a rank: as given, or its share of the node, or one and the readers'."""
    if spec.cpus_per_rank:
        return spec.cpus_per_rank
    if spec.cpus_per_node is None:
        return recipe.data.readers() + 1
    shares = [
        (spec.cpus_per_node - _needed_cpus(node, 0, spec.worker_cpus))
        // max(1, _needed_cpus(node, 1, 0))
        for node in nodes
    ]
    return max(1, min(shares))


def _node_cpus(spec: SlurmSpec, nodes: list[Node], rank_cpus: int) -> int:
    """Return the CPUs of a node, or raise `RecipeError` when they are too few."""
    needed = max(_needed_cpus(node, rank_cpus, spec.worker_cpus) for node in nodes)
    cpus = spec.cpus_per_node or needed
    if needed > cpus:
        raise RecipeError(
            f"slurm.cpus_per_node={cpus} is too few: the processes of a node need {needed}. Raise "
            "it, or lower slurm.cpus_per_rank or slurm.worker_cpus"
        )
    return cpus


def _needed_cpus(node: Node, rank_cpus: int, worker_cpus: int) -> int:
    slots = [slot for slot in node if slot is not None]
    return sum(worker_cpus if slot.rank == CLUSTER_WORKER else rank_cpus for slot in slots)
