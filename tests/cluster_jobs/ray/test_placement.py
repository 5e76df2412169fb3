"""The resources of a worker group, what a cluster lacks of them, and the `ray` section."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster_jobs.executors.ray import EXECUTOR
from cluster_jobs.ray.actor import Place, _problem, own_gpu
from cluster_jobs.ray.placement import Shape, missing, shape_of
from cluster_jobs.ray.spec import RaySpec, ray_spec, sizes
from cluster_jobs.ray.transport import Actors, Handle
from deepclust import Recipe
from deepclust.errors import RecipeError
from deepclust.launch.role import roles_of
from deepclust.launch.visible_gpus import MASK
from deepclust.run.directory import Run
from deepclust.run.lock import hold
from tests.tiny import tiny_recipe

GPU_RANK, GPU_WORKER = {"CPU": 8.0, "GPU": 1.0}, {"CPU": 4.0, "GPU": 1.0}


def recipe(*overrides: str) -> Recipe:
    return tiny_recipe(Path("/shards"), "train.device=auto", *overrides)


def test_every_rank_and_the_cluster_worker_have_a_bundle_with_a_gpu() -> None:
    shape = shape_of(recipe("train.ranks=3"), RaySpec(cpus=8, worker_cpus=4), 3, with_gpus=True)
    assert shape.bundles == [GPU_RANK] * 3 + [GPU_WORKER]


@pytest.mark.parametrize("setting", ["cluster.gpus=0", "cluster.device=cpu"])
def test_the_cluster_worker_may_have_no_gpu(setting: str) -> None:
    shape = shape_of(recipe("train.ranks=2", setting), RaySpec(), 2, with_gpus=True)
    assert shape.worker == {"CPU": 1.0}


@pytest.mark.parametrize("setting", ["cluster.where=gang", "cluster.where=inline"])
def test_ranks_that_cluster_themselves_need_no_worker(setting: str) -> None:
    assert shape_of(recipe("train.ranks=2", setting), RaySpec(), 2, with_gpus=False).worker is None


def test_a_worker_whose_device_is_named_asks_for_it_beside_ranks_on_cpus() -> None:
    settings = ("train.ranks=2", "train.device=cpu", "cluster.device=cuda")
    shape = shape_of(recipe(*settings), RaySpec(), 2, with_gpus=True)
    assert shape.bundles == [{"CPU": 1.0}, {"CPU": 1.0}, {"CPU": 1.0, "GPU": 1.0}]


def test_a_rank_has_a_cpu_for_each_of_its_readers_unless_it_is_given() -> None:
    readers = recipe("data.workers=12")
    assert shape_of(readers, RaySpec(), 1, with_gpus=False).rank == {"CPU": 13.0}
    assert shape_of(readers, RaySpec(cpus=2), 1, with_gpus=False).rank == {"CPU": 2.0}


@pytest.mark.parametrize(
    ("mask", "gpus", "own", "problem"),
    [
        ("4,5", ("5",), 1, ""),
        ("GPU-aa,GPU-bb", ("GPU-aa",), 0, ""),
        ("0,1", ("5",), None, "does not see"),
        ("0,1", ("1", "0"), None, "GPUs 0, 1 at once: unset CUDA_VISIBLE_DEVICES in ray.env"),
        ("0,1", (), None, ""),
    ],
)
def test_an_actor_finds_the_gpu_that_ray_names_among_those_it_sees(
    monkeypatch: pytest.MonkeyPatch,
    mask: str,
    gpus: tuple[str, ...],
    own: int | None,
    problem: str,
) -> None:
    monkeypatch.setenv(MASK, mask)
    place, text = own_gpu(gpus)
    assert place == own
    assert problem in text
    assert bool(problem) == bool(text)


@pytest.mark.parametrize(
    ("worker_node", "settings", "threads"),
    [("a", (), 2 + 2 * 8), ("b", (), 2 + 8), ("a", ("cluster.overlap=true",), 2)],
)
def test_a_worker_beside_gpus_may_use_the_cpus_of_the_ranks_on_its_node(
    tmp_path: Path, worker_node: str, settings: tuple[str, ...], threads: int
) -> None:
    given = recipe("train.ranks=3", "cluster.gpus=0", *settings)
    given.save(tmp_path / "recipe.yaml")
    shape = shape_of(given, RaySpec(cpus=8, worker_cpus=2), 3, with_gpus=True)
    actors = Actors(Run(tmp_path), RaySpec(), shape, None)  # type: ignore[arg-type]
    nodes = ["a", "a", "b", worker_node]
    actors.handles = [
        Handle(role, None, Place(node, node, "::1", 1, ()))
        for role, node in zip(roles_of(given), nodes, strict=True)
    ]
    assert [actors._threads(handle) for handle in actors.handles] == [None, None, None, threads]


def test_nothing_is_missing_where_every_bundle_finds_a_node() -> None:
    shape = Shape(2, GPU_RANK, GPU_WORKER)
    assert missing(shape, [{"CPU": 16, "GPU": 2}, {"CPU": 4, "GPU": 1}]) == ""


def test_the_cluster_worker_has_its_gpu_where_its_own_resource_is() -> None:
    spec = RaySpec(cpus=8, worker_cpus=4, worker_resources={"first_node": 1.0})
    shape = shape_of(recipe("train.ranks=3"), spec, 3, with_gpus=True)
    assert shape.worker == {**GPU_WORKER, "first_node": 1.0}
    first, second = {"CPU": 16.0, "GPU": 2.0, "first_node": 1.0}, {"CPU": 16.0, "GPU": 2.0}
    assert missing(shape, [first, second]) == ""
    assert "needed" in missing(shape, [second, second])
    on_cpus = Shape(4, {"CPU": 4.0, "GPU": 1.0}, {"CPU": 1.0, "first_node": 1.0})
    first, second = {"CPU": 16.0, "GPU": 4.0, "first_node": 1.0}, {"CPU": 16.0, "GPU": 4.0}
    assert missing(on_cpus, [first, second]) == ""


def test_missing_resources_are_named_even_when_their_sum_would_suffice() -> None:
    shape = Shape(1, {"CPU": 4.0}, {"CPU": 1.0})
    assert missing(shape, [{"CPU": 3}, {"CPU": 3}]) == (
        "4 CPU more than the cluster has (3 CPU; 3 CPU) is needed for "
        "1 ranks (4 CPU each) and the cluster worker (1 CPU)"
    )
    assert "no node" in missing(shape, [])


def test_a_spare_gpu_is_missing_for_the_cluster_worker() -> None:
    assert missing(Shape(2, GPU_RANK, GPU_WORKER), [{"CPU": 64, "GPU": 2}]).startswith(
        "1 GPU, 4 CPU more than the cluster has (2 GPU, 64 CPU)"
    )


def test_numbers_of_ranks_divide_the_batch_and_the_most_come_first() -> None:
    elastic = recipe("train.batch=24", "ray.ranks={min: 2, max: 8}")
    assert sizes(elastic, ray_spec(elastic)) == [8, 6, 4, 3, 2]
    fixed = recipe("train.ranks=3")
    assert sizes(fixed, ray_spec(fixed)) == [3]


def test_no_number_of_ranks_that_divides_the_batch_is_refused() -> None:
    with pytest.raises(RecipeError, match="no number from 5 to 5 divides"):
        ray_spec(recipe("train.batch=24", "ray.ranks={min: 5, max: 5}"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ray.addres=x", "ray.addres: unknown key; did you mean 'address'"),
        ("ray.ranks={min: 3, max: 2}", "ray.ranks: min=3 is more than max=2"),
        ("ray.hang=0", "ray.hang"),
    ],
)
def test_a_wrong_key_of_the_ray_section_is_named(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        ray_spec(recipe(override))


def test_a_plan_says_where_and_what_and_writes_nothing(tmp_path: Path) -> None:
    plan = EXECUTOR.prepare(
        recipe("train.ranks=2", "ray.address=http://h:8265", "ray.cpus=4", "train.threads=null"),
        tmp_path / "run with; rm -rf",
    )
    text = str(plan)
    assert "a job of the Ray cluster at http://h:8265: 2 ranks of 4 CPU, the cluster worker" in text
    assert f"'{tmp_path}/run with; rm -rf'" in text  # quoted: the name stays a name
    assert plan.recipe.train.threads == 4  # of the cluster's machines
    assert not list(tmp_path.iterdir())


def test_a_node_that_does_not_see_the_run_or_sees_another_says_so(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    with hold(tmp_path) as token:
        assert _problem(tmp_path, token) == ""
        assert "is another folder there" in _problem(tmp_path, "another")
        assert "is missing" in _problem(tmp_path / "nowhere", token)
    assert not list((tmp_path / "logs").iterdir())
