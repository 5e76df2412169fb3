"""A warm process forks what it is asked for, and all of it ends with who has started it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepclust.launch import local
from deepclust.launch.local import WorkerProcess
from deepclust.launch.role import Role
from deepclust.launch.warm import LONGEST, Fork, Warm, warmed
from deepclust.run.directory import Run
from tests.forks import in_fork
from tests.killing import wait_until_gone
from tools.bench.forked import WarmFork

HERE = "tests.launch.test_warm"


def tell(words: list[str], files: list[int]) -> int:
    """Print what a fork has; the code is its last word."""
    variable, name = os.environ.get("DEEPCLUST_TOLD"), Path("/proc/self/comm").read_text().strip()
    print(words[:-1], variable, os.getcwd(), os.getpgid(0) == os.getpid(), name)
    for file in files:
        os.write(file, b"given")
    return int(words[-1])


def sleep(words: list[str], files: list[int]) -> None:
    """Live until somebody ends it."""
    time.sleep(600)


def threads_and_cuda(words: list[str], files: list[int]) -> None:
    """What a rank finds: one thread of Python, no GPU in use, torch imported."""
    import threading

    import torch

    print(threading.active_count(), torch.cuda.is_initialized())


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    one = Warm(HERE, options=())
    yield one
    one.close()


def start(
    warm: Warm, function: str, words: list[str], out: Path, *files: int, name: str = ""
) -> Fork:
    with out.open("wb") as told:
        return warm.fork(f"{HERE}:{function}", words, [told.fileno(), told.fileno(), *files], name)


def test_a_fork_has_our_words_variables_folder_files_and_name(
    warm: Warm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPCLUST_TOLD", "yes")
    monkeypatch.chdir(tmp_path)
    reading, writing = os.pipe()
    process = start(warm, "tell", ["a b", "7"], tmp_path / "out", writing, name="rank 3")
    os.close(writing)
    assert process.wait(60) == process.poll() == 7
    assert (tmp_path / "out").read_text().split("\n")[0] == f"['a b'] yes {tmp_path} True rank 3"
    assert os.read(reading, 100) == b"given"
    assert os.read(reading, 100) == b""  # nobody else holds the other end
    os.close(reading)


def test_variables_of_one_fork_are_not_those_of_the_next(
    warm: Warm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPCLUST_TOLD", "yes")
    assert start(warm, "tell", ["0"], tmp_path / "a").wait(60) == 0
    monkeypatch.delenv("DEEPCLUST_TOLD")
    assert start(warm, "tell", ["0"], tmp_path / "b").wait(60) == 0
    assert " yes " in (tmp_path / "a").read_text()
    assert " None " in (tmp_path / "b").read_text()


def test_a_rank_begins_with_one_thread_and_without_a_gpu_in_use(tmp_path: Path) -> None:
    with warmed() as rank:
        assert rank is not None
        process = start(rank, "threads_and_cuda", [], tmp_path / "out")
        assert process.wait(120) == 0, (tmp_path / "out").read_text()
    assert (tmp_path / "out").read_text() == "1 False\n"


def test_an_error_is_in_the_output_and_the_code_is_1(warm: Warm, tmp_path: Path) -> None:
    assert start(warm, "no_such", [], tmp_path / "out").wait(60) == 1
    assert "no attribute 'no_such'" in (tmp_path / "out").read_text()
    assert start(warm, "tell", ["no number"], tmp_path / "out").wait(60) == 1


def test_signals_and_their_codes_are_those_of_a_process(warm: Warm, tmp_path: Path) -> None:
    process = start(warm, "sleep", [], tmp_path / "out")
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == -signal.SIGTERM
    process.send_signal(signal.SIGTERM)  # nobody is there


def test_what_it_has_started_ends_with_it(tmp_path: Path) -> None:
    one = Warm(HERE, options=())
    process = start(one, "sleep", [], tmp_path / "out")
    os.kill(one._process.pid, signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    wait_until_gone([process.pid])
    with pytest.raises(OSError):
        start(one, "tell", ["0"], tmp_path / "out")
    one.close()


def test_a_warm_process_that_answers_too_late_starts_nothing_any_more(tmp_path: Path) -> None:
    one = Warm(HERE, options=())
    os.kill(one._process.pid, signal.SIGSTOP)
    one._socket.settimeout(0.1)
    for _ in range(2):
        with pytest.raises(OSError):
            start(one, "tell", ["0"], tmp_path / "out")
    assert one._process.poll() == -signal.SIGKILL


def test_variables_without_bound_are_refused_and_the_next_fork_works(
    warm: Warm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPCLUST_TOLD", "x" * LONGEST)
    with pytest.raises(OSError, match="too many"):
        start(warm, "tell", ["0"], tmp_path / "out")
    monkeypatch.delenv("DEEPCLUST_TOLD")
    assert start(warm, "tell", ["0"], tmp_path / "out").wait(60) == 0


def leave(out: Path) -> list[int]:
    """Start a warm process and a fork, and end without a word."""
    one = WarmFork()
    return [one.server.pid, start(one, "sleep", [], out).pid]


def test_it_ends_with_who_has_started_it(tmp_path: Path) -> None:
    wait_until_gone(in_fork(leave, tmp_path / "out"))


@pytest.mark.new_interpreters
def test_where_it_has_gone_a_rank_is_a_new_interpreter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "RANK", "tests.launch.long_stage")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    (tmp_path / "logs").mkdir()
    one = Warm(HERE, options=())
    one.close()
    process = WorkerProcess(Run(tmp_path, attempt=0), Role(0, 1), one)
    assert process.process.wait(60) == 0
    process.kill()
