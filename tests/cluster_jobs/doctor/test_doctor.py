"""One thing is broken at a time, for real where that can be: the right line is not green."""

from __future__ import annotations

import json
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster_jobs import doctor
from cluster_jobs.cli import begin
from cluster_jobs.doctor import places
from deepclust.errors import ResourceError
from tests.forks import in_fork
from tests.tiny import deepclust

STOPPED_SLURM = """
ClusterName=stopped
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=9
MessageTimeout=2
NodeName=localhost CPUs=1
PartitionName=all Nodes=localhost
"""
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


def other_clock(_: Path, patch: pytest.MonkeyPatch) -> None:
    honest = time.time
    patch.setattr(places.time, "time", lambda: honest() - 60)


def stopped_slurm(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """The commands of Slurm are here, and the controller that they are told of is not."""
    if shutil.which("sinfo") is None:
        program("sinfo", "echo Unable to contact slurm controller >&2; exit 1")(folder, patch)
        return
    (folder / "slurm.conf").write_text(STOPPED_SLURM)
    patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))


def no_tmpdir(folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("TMPDIR", str(folder / "gone"))
    patch.setattr(tempfile, "tempdir", None)  # as in a new process


def never_compiled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "pycache_prefix", str(folder / "none"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)


BROKEN: list[tuple[str, Break, str, str]] = [
    ("packages", old_numpy, doctor.RED, "numpy 1.0"),
    ("torch", module("torch", "raise ImportError('libcudart is missing')"), doctor.RED,
     "ImportError: libcudart is missing"),
    ("compiled", never_compiled, "yellow", "PYTHONDONTWRITEBYTECODE is set"),
    ("faiss", module("faiss", "import os; os.abort()"), doctor.RED, "ended by SIGABRT"),
    ("decoders", module("PIL", "raise ImportError('libjpeg is missing')"), doctor.RED, "libjpeg"),
    ("gpu", program("nvidia-smi", "echo GPU 0: a card"), doctor.RED, "torch"),
    ("clock", other_clock, doctor.RED, "+60.0 s"),
    ("temporary files", no_tmpdir, "yellow", "gone cannot be used"),
    ("ray", module("ray", "raise ImportError('grpc is missing')"), "yellow", "grpc"),
    ("slurm", stopped_slurm, "yellow", "Unable to contact slurm controller"),
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


def under_limit(number: int, limit: int, name: str, folder: Path) -> tuple[str, str, str]:
    """What a check finds in this process, below a real limit of the kernel."""
    before = resource.getrlimit(number)
    resource.setrlimit(number, (limit, before[1]))
    tempfile.tempdir = None
    finding = FINDS[name](folder)
    resource.setrlimit(number, before)
    return finding.state, finding.seen, finding.fix


@pytest.mark.parametrize(
    ("number", "limit", "name", "seen"),
    [
        (resource.RLIMIT_NOFILE, 128, "open files", "128 of at most"),
        (resource.RLIMIT_FSIZE, 0, "temporary files", "No usable temporary directory"),
        (resource.RLIMIT_FSIZE, 0, "folder", "File too large"),
    ],
)
def test_a_limit_that_is_too_low_is_red(
    number: int, limit: int, name: str, seen: str, tmp_path: Path
) -> None:
    state, found, fix = in_fork(under_limit, number, limit, name, tmp_path)
    assert state == doctor.RED
    assert seen in found
    assert fix


def on_small_disk(name: str, place: str) -> tuple[str, str]:
    """What a check finds in a new process, which sees 1 MB of memory as a disk at the place."""
    code = (
        "from pathlib import Path; from cluster_jobs import doctor\n"
        f"found = dict(doctor.CHECKS)[{name!r}](Path({place!r}))\n"
        "print(found.state, found.seen)"
    )
    python = shlex.join([sys.executable, "-c", code])
    mount = f"mount -t tmpfs -o size=1m none {place} && exec {python}"
    words = ["unshare", "--mount", "sh", "-c", mount]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    state, _, seen = done.stdout.strip().partition(" ")
    return state, seen


@pytest.mark.mount
@pytest.mark.parametrize(
    ("name", "place", "seen"),
    [
        ("shared memory", "/dev/shm", "0.00 GiB are free in /dev/shm"),
        ("free space", "DISK", "0.0 GiB are free"),
    ],
)
def test_a_small_disk_is_red(name: str, place: str, seen: str, tmp_path: Path) -> None:
    if subprocess.run(["unshare", "--mount", "true"], check=False).returncode:
        pytest.skip("this process may not mount")
    assert on_small_disk(name, str(tmp_path) if place == "DISK" else place) == (doctor.RED, seen)


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
