"""Which GPU a process takes, by the mask, the scheduler and the recipe; no GPU is needed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from deepclust import Recipe
from deepclust.errors import RecipeError, ResourceError
from deepclust.launch import devices, start, visible_gpus, worker
from deepclust.launch.devices import (
    check_shared,
    clustering_device,
    threads_of,
    training_device,
    working,
)
from deepclust.launch.in_process import borrowed_process
from deepclust.launch.role import CLUSTER_WORKER, Role, cores
from deepclust.launch.visible_gpus import MASK, gpus_here, number_of, place_of, visible
from deepclust.run.directory import Run, create
from deepclust.run.reporting import DirectReport
from tests.tiny import tiny_recipe

WORKER = Role(CLUSTER_WORKER, 2)


def recipe(*overrides: str) -> Recipe:
    return tiny_recipe(Path("/shards"), "train.device=auto", "train.ranks=2", *overrides)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Eight GPUs that torch sees, and that work."""
    monkeypatch.delenv(MASK, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(devices, "working", lambda device, other: device)
    return monkeypatch


@pytest.mark.parametrize(
    ("mask", "gpu", "place"),
    [
        (None, "5", 5),
        ("4,5", "5", 1),
        ("4, 5", "5", 1),
        ("GPU-aa,GPU-bb", "GPU-bb", 1),
        ("MIG-GPU-aa/1/0,MIG-bb", "MIG-bb", 1),
        ("0,-1,1", "0", 0),
    ],
)
def test_torchs_number_is_the_place_in_the_mask(
    monkeypatch: pytest.MonkeyPatch, mask: str | None, gpu: str, place: int
) -> None:
    monkeypatch.delenv(MASK, raising=False)
    if mask is not None:
        monkeypatch.setenv(MASK, mask)
    assert place_of(gpu) == place


@pytest.mark.parametrize(
    ("mask", "gpu"), [("0,1", "4"), ("3", "0"), ("", "0"), ("0,-1,1", "1"), (None, "GPU-a")]
)
def test_a_gpu_that_the_mask_hides_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, mask: str | None, gpu: str
) -> None:
    monkeypatch.delenv(MASK, raising=False)
    if mask is not None:
        monkeypatch.setenv(MASK, mask)
    with pytest.raises(ResourceError, match=f"gives GPU {gpu}, which this process does not see"):
        place_of(gpu)


def test_a_process_with_one_visible_gpu_takes_it_and_one_with_two_the_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(MASK, "7")  # --gpus-per-task=1: the layout's place is 3, torch's number 0
    assert (visible(), number_of(3)) == (["7"], 0)
    monkeypatch.setenv(MASK, "6,7")
    assert number_of(1) == 1
    monkeypatch.setenv(MASK, "NoDevFiles")
    assert visible() == []


def test_a_mig_instance_is_the_only_one_that_its_process_sees(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(MASK, "MIG-aa,MIG-bb")
    assert number_of(1) == 0
    assert visible() == ["MIG-bb"]


def test_a_rank_takes_the_gpu_of_its_scheduler_or_that_of_its_number(
    gpus: pytest.MonkeyPatch,
) -> None:
    assert training_device(recipe(), Role(1, 2)) == torch.device("cuda", 1)
    assert training_device(recipe(), Role(1, 2, gpu=5)) == torch.device("cuda", 5)
    assert training_device(recipe("train.device=cpu"), Role(1, 2, gpu=5)).type == "cpu"
    gpus.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ResourceError, match=r"rank 1 needs GPU 1 and this process sees 1"):
        training_device(recipe(), Role(1, 2))


@pytest.mark.parametrize(
    ("settings", "role", "device"),
    [
        ((), WORKER, "cuda:2"),  # one without a rank
        (("train.ranks=8",), WORKER, "cuda:0"),
        ((), Role(CLUSTER_WORKER, 2, gpu=5), "cuda:5"),
        (("cluster.device=cuda",), Role(CLUSTER_WORKER, 2, gpu=5), "cuda:5"),
        (("cluster.device=cuda",), WORKER, "cuda:2"),
        (("cluster.device=cuda:3",), Role(CLUSTER_WORKER, 2, gpu=5), "cuda:3"),
        (("cluster.gpus=0",), WORKER, "cpu"),
        (("cluster.gpus=0", "train.ranks=8"), Role(CLUSTER_WORKER, 8, gpu=None), "cpu"),
        (("cluster.device=cpu",), WORKER, "cpu"),
        (("train.device=cpu",), WORKER, "cpu"),
        (("train.device=cpu", "cluster.device=cuda"), WORKER, "cuda:2"),
        # a rank that clusters by itself stays on what its scheduler gave it
        (("train.ranks=1",), Role(0, 1, gpu=5), "cuda:5"),
        (("train.ranks=1", "cluster.gpus=0"), Role(0, 1, gpu=5), "cuda:5"),
    ],
)
def test_the_device_of_the_clustering_is_the_documented_one(
    gpus: pytest.MonkeyPatch, settings: tuple[str, ...], role: Role, device: str
) -> None:
    assert str(clustering_device(recipe(*settings), role)) == device


@pytest.mark.parametrize(
    ("settings", "gpus", "where"),
    [
        ((), 2, "ranks"),
        (("train.device=cuda", "cluster.device=cuda"), 2, "ranks"),
        ((), 0, "auto"),
        ((), 3, "auto"),  # one is left for the worker
        (("train.ranks=1",), 1, "auto"),
        (("train.device=cpu",), 2, "auto"),
        (("cluster.gpus=0",), 2, "auto"),
        (("cluster.device=cpu",), 2, "auto"),
        (("cluster.overlap=true",), 2, "auto"),
        (("cluster.where=worker",), 2, "worker"),
    ],
)
def test_ranks_of_a_new_run_cluster_together_where_no_gpu_is_left_for_a_worker(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    settings: tuple[str, ...],
    gpus: int,
    where: str,
) -> None:
    monkeypatch.setattr(start, "gpus_here", lambda: gpus)
    monkeypatch.setattr(start, "_start", lambda path, show: Run(path))
    run = start.pretrain(recipe(*settings), tmp_path / "new")
    assert run.recipe.clustering.where == where
    create(tmp_path / "old", start.resolved(recipe(*settings)))
    before = Run(tmp_path / "old").recipe
    assert start.resume(tmp_path / "old").recipe == before


def test_without_a_driver_no_gpu_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(visible_gpus, "DRIVERS", ("/no/such/file",))
    assert gpus_here() == 0
    monkeypatch.setattr(visible_gpus, "DRIVERS", ("/dev/null",))
    assert gpus_here() == 8


def test_contradictions_and_numbers_that_are_not_there_are_refused(
    gpus: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(RecipeError, match="drop one"):
        clustering_device(recipe("cluster.gpus=0", "cluster.device=cuda"), WORKER)
    with pytest.raises(ResourceError, match="sees 8 GPUs here, numbered from 0"):
        clustering_device(recipe("cluster.device=cuda:8"), WORKER)
    check_shared(recipe("cluster.device=cuda"), torch.device("cuda", 1))
    for wanted in ("cpu", "cuda:0"):
        with pytest.raises(RecipeError, match=f"cluster.device={wanted} cannot be"):
            check_shared(recipe(f"cluster.device={wanted}"), torch.device("cuda", 1))


def test_the_card_of_the_cluster_worker_becomes_torchs_present_one(
    gpus: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[object] = []
    gpus.setattr(torch.cuda, "set_device", lambda device: seen.append(str(device)))
    gpus.setattr(worker, "open_data", lambda *_, **__: (None, "offset"))
    tried = SimpleNamespace(device=torch.device("cuda", 2))
    gpus.setattr(worker.cluster, "make_context", lambda *_: tried)
    gpus.setattr(worker.cluster, "serve", lambda *_: seen.append("serves"))
    create(tmp_path / "run", recipe())
    run = Run(tmp_path / "run")
    with borrowed_process():
        worker.work(run, WORKER, DirectReport(run, lambda record: None), lambda: False)
    assert seen == ["cuda:2", "serves"]


def test_a_cluster_worker_whose_gpu_is_full_says_how_to_go_on(
    gpus: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def serve(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    gpus.setattr(worker, "open_data", lambda *_, **__: (None, "offset"))
    gpus.setattr(worker.cluster, "make_context", lambda *_: SimpleNamespace(device=devices.CPU))
    gpus.setattr(worker.cluster, "serve", serve)
    create(tmp_path / "run", recipe())
    run = Run(tmp_path / "run")
    with borrowed_process(), pytest.raises(ResourceError) as told:
        worker.work(run, WORKER, DirectReport(run, lambda record: None), lambda: False)
    assert "2.00 GiB.): end what else uses it" in str(told.value)
    assert "cluster.device=cpu" in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("key", ["train", "cluster"])
def test_a_device_that_is_named_and_missing_is_an_error_and_never_the_cpu(
    monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)  # by NVML, with an old driver
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def too_old() -> None:
        raise RuntimeError(
            "The NVIDIA driver on your system is too old (found version 11040). Please update"
        )

    monkeypatch.setattr(torch.cuda, "init", too_old)
    choose = training_device if key == "train" else clustering_device
    with pytest.raises(ResourceError) as told:
        choose(recipe(f"{key}.device=cuda"), WORKER)
    assert "too old (found version 11040) (torch" in str(told.value)
    assert f"set {key}.device=cpu" in str(told.value)
    assert "\n" not in str(told.value)


def test_a_card_without_kernels_is_named_with_those_that_torch_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_kernel(*args: object, **more: object) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution\nmore lines")

    monkeypatch.setattr(torch, "arange", no_kernel)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80"])
    with pytest.raises(ResourceError, match=r"sm_75, sm_80\): install a torch .* set a\.b=c$"):
        working(torch.device("cuda", 0), "a.b=c")


def test_a_worker_beside_gpus_uses_the_cpus_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert threads_of(recipe("train.threads=3"), Role(0, 2)) == 3
    assert threads_of(recipe("train.threads=3"), WORKER) == cores()
    overlap = recipe("train.threads=3", "cluster.overlap=true")
    assert threads_of(overlap, WORKER) == 3
    cpu = recipe("train.threads=3", "train.device=cpu")
    assert threads_of(cpu, WORKER) == 3  # as the run has recorded
    given = Role(CLUSTER_WORKER, 2, threads=cores())
    assert threads_of(recipe("train.threads=1"), given) == cores()
