"""Ray and Slurm: needed by `--on ray` and `--on slurm` only, so the worst is yellow."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from cluster_jobs.doctor.finding import GREEN, YELLOW, Finding, attempt

PATIENCE_S = 20.0
RAY = "import ray; print(ray.__version__)"


def ray(_folder: Path) -> Finding:
    """Check that Ray can be imported; a cluster that the environment names is not reached."""
    tried = attempt(RAY, "pip install --upgrade 'deepclust[ray]'", worst=YELLOW)
    address = os.environ.get("RAY_ADDRESS")
    if tried.state == GREEN and address:
        return Finding(GREEN, f"{tried.seen}, RAY_ADDRESS={address}")
    return tried


def slurm(_folder: Path) -> Finding:
    """Check that Slurm's controller answers, where its commands are installed."""
    tool = shutil.which("sinfo")
    if tool is None:
        return Finding(GREEN, "not on this machine")
    fix = "ask the administrator of Slurm; munge and slurmctld must run"
    try:
        command = [tool, "--noheader", "--format=%P %a %D"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        return Finding(YELLOW, f"sinfo gave no answer within {PATIENCE_S:g} s", fix)
    if done.returncode != 0:
        return Finding(YELLOW, (done.stderr.strip().splitlines() or ["sinfo failed"])[-1], fix)
    return Finding(GREEN, f"{len(done.stdout.splitlines())} partitions")
