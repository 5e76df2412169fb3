"""The checks of `tools/gpu_check` that run something whole, on the CPU or the pretended device."""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.forks import in_fork
from tests.gpu_check import FOLDER, modules
from tests.killing import family, role
from tests.pretended_device import pretended
from tests.tiny import tiny_recipe


@pytest.fixture(scope="module")
def tool() -> Iterator[Any]:
    with modules() as found:
        yield found


def on_cpu(tool: Any, folder: Path) -> Any:
    return tool["Setting"](torch.device("cpu"), folder)


def two_ranks_on_the_cpu(folder: Path) -> tuple[str, str, dict[str, Any]]:
    with modules() as tool:
        outcome = tool["two_ranks"].two_ranks(on_cpu(tool, folder), ("resnet18",))
    return outcome.verdict, outcome.text, outcome.numbers


@pytest.mark.slow
def test_two_ranks_on_the_cpu_pass_what_two_gpus_are_asked(tmp_path: Path) -> None:
    verdict, text, numbers = in_fork(two_ranks_on_the_cpu, tmp_path)
    assert verdict == "pass", text
    assert numbers["labels of runs differ"] == 0
    assert 0 < numbers["seconds from a kill to the end"] < 60


@pytest.mark.slow
def test_a_small_run_is_stopped_and_resumed_and_has_the_neighbours_of_the_cpu(
    tool: Any, tmp_path: Path
) -> None:
    outcome = tool["small_run"].small_run(on_cpu(tool, tmp_path))
    assert outcome.verdict == "pass", outcome
    assert outcome.numbers["same"]
    assert len(set(outcome.numbers["accuracy"])) == 1


def small_on_the_card(folder: Path) -> tuple[bool, list[str]]:
    with modules() as tool:
        check = tool["small_run"]
        recipe = check.recipe_on("cuda", check.digits(folder / "digits", slice(0, 300)), 1)
        with pretended():
            _, same, notes = check.straight_and_stopped(recipe, folder)
    return same, notes


@pytest.mark.slow
def test_a_small_run_on_a_card_is_stopped_and_resumed_too(tmp_path: Path) -> None:
    assert in_fork(small_on_the_card, tmp_path) == (True, [])


def memory_on_the_card(folder: Path, shards: Path) -> tuple[str, dict[str, Any]]:
    recipe = tiny_recipe(shards, "train.device=cuda", "train.epochs=1")
    with modules() as tool:
        check, setting = tool["peaks"], tool["Setting"](torch.device("cuda", 0), folder)
        printed = check.estimated(recipe, 300)
        with pretended():
            peaks = check.measured(setting, recipe)
            kept = check.kept_by_kmeans(setting.device, 2000)
        outcome = check.compared(peaks, printed, kept)
    return outcome.verdict, outcome.numbers


@pytest.mark.slow
def test_the_tensors_of_each_stage_take_what_the_estimate_prints_at_most(
    shards: Path, tmp_path: Path
) -> None:
    verdict, numbers = in_fork(memory_on_the_card, tmp_path, shards)
    assert verdict == "pass", numbers
    assert list(numbers["peaks"]) == ["extraction", "clustering", "training"]
    assert all(0.2 * numbers["printed"][name] < peak for name, peak in numbers["peaks"].items())


def script(path: Path, words: list[str]) -> tuple[Any, str]:
    """Be a script of tools/bench; its exit code, and what it says of errors."""
    sys.argv, sys.path[0] = [str(path), *words], str(path if path.is_dir() else path.parent)
    with contextlib.redirect_stderr(io.StringIO()) as said, pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    return ended.value.code, said.getvalue()


UUIDS = [f"GPU-{letter * 4}" for letter in "abcd"]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_rank_that_takes_another_card_than_its_mask_says_is_named(tool: Any, count: int) -> None:
    cards, uuids = tool["cards"], UUIDS[:count]

    def honest(mask: str, rank: int) -> str:
        entry = mask.split(",")[rank]
        return (entry if entry in uuids else uuids[int(entry)]).removeprefix("GPU-")

    assert cards.wrong_cards("local", honest, uuids) == []
    wrong = cards.wrong_cards("local", lambda mask, rank: "aaaa", uuids)
    assert len(wrong) == {1: 0, 2: 3, 4: 4}[count]


def test_the_scripts_of_a_card_fail_for_want_of_one_and_not_earlier(tool: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("is about a machine without a GPU")
    said = tool["cards"].local("0", 0)
    assert "torch sees no GPU" in said or "CUDA" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("guilty", "words"),
    [((), "does not list"), (("rank 0",), ""), (("rank 0", "cluster worker"), "has a context")],
)
def test_a_cluster_worker_on_a_card_is_noticed(
    tool: Any, tmp_path: Path, guilty: tuple[str, ...], words: str
) -> None:
    def pids() -> set[int]:
        return {pid for pid in family(os.getpid()) if role(pid, 0) in guilty}

    said = tool["cards"].worker_on_a_card(on_cpu(tool, tmp_path), pids)
    assert len(said) == bool(words)
    assert words in "".join(said)


@pytest.mark.parametrize(
    "words",
    [["nccl.py"], ["clustering", "gpu"], ["refresh", "--device", "cuda"], ["decode_paths.py"]],
)
def test_a_bench_of_gpus_says_that_there_are_none_and_ends_with_4(words: list[str]) -> None:
    if torch.cuda.device_count() > 1:
        pytest.skip("is about a machine without GPUs")
    code, said = in_fork(script, FOLDER.parent / "bench" / words[0], words[1:])
    assert code == 4, said
    assert "GPU" in said


@pytest.mark.slow
def test_the_bench_of_an_all_reduce_runs_on_two_ranks_of_the_cpu() -> None:
    command = [sys.executable, str(FOLDER.parent / "bench" / "nccl.py"), "--device", "cpu"]
    done = subprocess.run(
        [*command, "--numbers", "1000"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"1,000 numbers +[\d.]+ ms +[\d.]+ GB/s", done.stdout)
