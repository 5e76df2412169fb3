"""The device of a rank and of the cluster worker, tried before any work, and the worker's threads.

A device that a recipe names is that device or an error, never the CPU in its place. `auto` is a GPU
where torch sees one.
"""

from __future__ import annotations

import torch

from deepclust.errors import RecipeError, ResourceError
from deepclust.launch.role import Role, cores
from deepclust.launch.visible_gpus import number_of
from deepclust.recipe import Recipe

CPU = torch.device("cpu")


def training_device(recipe: Recipe, role: Role) -> torch.device:
    """Return the rank's device: its own GPU, which becomes torch's present one, or the CPU.

    Raises `ResourceError` when there is no such GPU, or when it does not work.
    """
    wanted, key = recipe.train.device, "train.device=cpu"
    place = role.rank if role.gpu is None else role.gpu
    if wanted == "cpu":
        return CPU
    number, gpus = number_of(place), torch.cuda.device_count()
    if wanted == "auto" and not gpus:
        return CPU
    if not torch.cuda.is_available():
        raise ResourceError(f"train.device={wanted}: {why_no_gpu()}. Mend that, or set {key}")
    if number >= gpus:
        raise ResourceError(
            f"{role.name} needs GPU {number} and this process sees {gpus}: lower train.ranks, or "
            f"set {key}"
        )
    device = working(torch.device("cuda", number), key)
    make_present(device)
    return device


def clustering_device(recipe: Recipe, role: Role) -> torch.device:
    """Return the device of the cluster worker, or of the rank that clusters alone.

    `cluster.device=cuda:N` is torch's GPU N. Otherwise it is the GPU that a scheduler has given to
    the process. Without a scheduler it is a GPU without a rank, else rank 0's. `cluster.gpus=0`
    lets a worker use the CPU. One that is named is tried here, and `auto` by `probe_backend`.
    """
    config, alone = recipe.clustering, role.is_cluster_worker
    wanted = torch.device("cuda" if config.device == "auto" else config.device)
    if alone and config.gpus == 0:
        if config.device.startswith("cuda"):
            raise RecipeError(f"cluster.gpus=0 and cluster.device={config.device} differ: drop one")
        return CPU
    if wanted.type == "cpu" or (config.device == "auto" and recipe.train.device == "cpu"):
        return CPU
    gpus = torch.cuda.device_count()
    if config.device == "auto" and not gpus:
        return CPU
    if not torch.cuda.is_available():
        raise ResourceError(
            f"cluster.device={config.device}: {why_no_gpu()}. Mend that, or set cluster.device=cpu"
        )
    device = torch.device("cuda", _clustering_number(recipe, role, wanted.index, gpus))
    return device if config.device == "auto" else working(device, "cluster.device=cpu")


def _clustering_number(recipe: Recipe, role: Role, named: int | None, gpus: int) -> int:
    if named is not None:
        number = named
    elif role.gpu is not None:
        number = number_of(role.gpu)
    else:
        number = number_of(recipe.train.ranks if recipe.train.ranks < gpus else 0)
    if number >= gpus:
        raise ResourceError(
            f"cluster.device={recipe.clustering.device}: torch sees {gpus} GPUs here, numbered "
            "from 0. Name one of them, or set cluster.device=cpu"
        )
    return number


def make_present(device: torch.device) -> None:
    """Let a GPU be the one that torch and Triton use where none is named."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def check_shared(recipe: Recipe, device: torch.device) -> None:
    """Raise `RecipeError` where ranks that cluster together are asked for another device."""
    wanted = recipe.clustering.device
    if wanted not in ("auto", device.type, str(device)):
        raise RecipeError(
            f"cluster.where=ranks clusters on the ranks' own devices ({device.type}), so "
            f"cluster.device={wanted} cannot be: leave it out, or set cluster.where=worker"
        )


def working(device: torch.device, other: str) -> torch.device:
    """Return the GPU after an operation on it, or raise `ResourceError`.

    `other` is the key that does without it. A driver that is too old and a wheel without kernels
    for the card are noticed at the first use only.
    """
    try:
        total = float(torch.arange(4.0, device=device).square().sum())
    except (RuntimeError, AssertionError) as error:
        raise ResourceError(f"{device} does not work: {_reason(error)}. Or set {other}") from error
    if total != 14.0:
        raise ResourceError(f"{device} computes wrong sums: use another GPU, or set {other}")
    return device


def why_no_gpu() -> str:
    """Return why torch has no GPU here, in part of a sentence."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        return _reason(error)
    return "torch sees no GPU"


def _reason(error: Exception) -> str:
    """Return an error of CUDA with what decides it: torch, its CUDA, and its kinds of cards."""
    first = str(error).split("\n")[0].split(". ")[0].rstrip(".")
    kinds = ", ".join(torch.cuda.get_arch_list())
    about = f"torch {torch.__version__} is built for CUDA {torch.version.cuda}"
    if "kernel image" in first and kinds:
        return f"{first} ({about} and {kinds}): install a torch that is built for this card"
    return f"{first} ({about})"


def threads_of(recipe: Recipe, role: Role) -> int:
    """Return the CPU threads of a process: `train.threads`, or more for a worker beside GPUs.

    Ranks on GPUs wait for a round, so the worker may use their CPUs too, as `role.threads` has it,
    or all of this machine's. Ranks on CPUs compute with the threads that the run has recorded, and
    so does their worker.
    """
    threads = recipe.train.threads or 1
    if not role.is_cluster_worker:
        return threads
    if role.threads is not None:
        return max(threads, min(role.threads, cores()))
    waiting = recipe.train.device != "cpu" and not recipe.clustering.overlap
    return cores() if waiting and torch.cuda.device_count() else threads
