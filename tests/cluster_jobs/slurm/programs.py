"""Programs of Slurm that say what a test wants, for what needs no Slurm."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def programs(folder: Path, monkeypatch: pytest.MonkeyPatch, **bodies: str) -> None:
    """Programs of these names on PATH, before all others."""
    for name, body in bodies.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
