"""One thing is broken at a time, for real where that can be: the right line is not green."""

from __future__ import annotations

import json
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster_jobs import doctor
from cluster_jobs.cli import begin
from cluster_jobs.doctor import places
from deepclust.errors import ResourceError
from tests.tiny import deepclust

Break = Callable[[Path, pytest.MonkeyPatch], None]
FINDS = dict(doctor.CHECKS)


def module(name: str, text: str) -> Break:
    """A package of that name comes first, and does `text`."""

    def do(folder: Path, patch: pytest.MonkeyPatch) -> None:
        (folder / f"{name}.py").write_text(text)
        patch.setenv("PYTHONPATH", str(folder))

    return do


def program(name: str, text: str) -> Break:
    """A program of that name comes first."""

    def do(folder: Path, patch: pytest.MonkeyPatch) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
        patch.setenv("PATH", str(folder), prepend=":")

    return do


def old_numpy(folder: Path, patch: pytest.MonkeyPatch) -> None:
    (folder / "numpy-1.0.dist-info").mkdir()
    (folder / "numpy-1.0.dist-info" / "METADATA").write_text("Name: numpy\nVersion: 1.0\n")
    patch.syspath_prepend(str(folder))


def few_files(_: Path, patch: pytest.MonkeyPatch) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    patch.setattr(resource, "getrlimit", lambda _: (128, limits[1]))


def other_clock(_: Path, patch: pytest.MonkeyPatch) -> None:
    honest = time.time
    patch.setattr(places.time, "time", lambda: honest() - 60)


def no_temporary(_: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tempfile, "tempdir", "/proc")


BROKEN: list[tuple[str, Break, str, str]] = [
    ("packages", old_numpy, doctor.RED, "numpy 1.0"),
    ("torch", module("torch", "raise ImportError('libcudart is missing')"), doctor.RED,
     "ImportError: libcudart is missing"),
    ("faiss", module("faiss", "import os; os.abort()"), doctor.RED, "ended by SIGABRT"),
    ("decoders", module("PIL", "raise ImportError('libjpeg is missing')"), doctor.RED, "libjpeg"),
    ("gpu", program("nvidia-smi", "echo GPU 0: a card"), doctor.RED, "torch"),
    ("open files", few_files, doctor.RED, "128"),
    ("clock", other_clock, doctor.RED, "+60.0 s"),
    ("temporary files", no_temporary, doctor.RED, "/proc"),
    ("ray", module("ray", "raise ImportError('grpc is missing')"), "yellow", "grpc"),
    ("slurm", program("sinfo", "echo no controller >&2; exit 1"), "yellow", "no controller"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "spoil", "state", "seen"), BROKEN, ids=[b[0] for b in BROKEN])
def test_what_is_broken_is_seen_and_has_a_fix(
    name: str, spoil: Break, state: str, seen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(tmp_path, monkeypatch)
    finding = FINDS[name](tmp_path)
    assert finding.state == state
    assert seen in finding.seen
    assert finding.fix


def test_a_folder_that_cannot_be_written_is_red() -> None:
    finding = FINDS["folder"](Path("/proc/runs"))
    assert finding.state == doctor.RED
    assert finding.fix in doctor.line("folder", finding)


def test_a_check_that_fails_itself_is_red_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(_: Path) -> doctor.Finding:
        raise KeyError("MemAvailable")

    checks = (("memory", broken), ("free space", FINDS["free space"]))
    monkeypatch.setattr(doctor, "CHECKS", checks)
    (memory, space) = [finding for _, finding in doctor.examine(tmp_path)]
    assert memory.state == doctor.RED
    assert "MemAvailable" in memory.seen
    assert space.state != doctor.RED


@pytest.mark.slow
def test_a_machine_that_passes_these_tests_is_healthy(tmp_path: Path) -> None:
    report = json.loads(deepclust("doctor", "--runs", tmp_path / "runs", "--json").stdout)
    assert report["ok"], report
    assert [one["name"] for one in report["checks"]] == list(FINDS)


def test_something_red_ends_with_exit_code_4_and_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "CHECKS", (("folder", FINDS["folder"]),))
    with pytest.raises(ResourceError, match="red: folder") as caught:
        begin.doctor(Path("/proc/runs"))
    assert caught.value.exit_code == 4
