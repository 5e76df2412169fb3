"""What a check finds, and how libraries are tried in a process of their own."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import dataclass

GREEN, YELLOW, RED = "green", "yellow", "red"
PATIENCE_S = 120.0


@dataclass(frozen=True)
class Finding:
    """A state, what was seen, and what mends it ("" where nothing has to)."""

    state: str
    seen: str
    fix: str = ""


def attempt(code: str, fix: str, *, worst: str = RED) -> Finding:
    """Run Python code in a new process: green with what it prints, else its last line of error."""
    command = [sys.executable, "-c", code]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=PATIENCE_S
        )
    except subprocess.TimeoutExpired:
        return Finding(worst, f"no answer within {PATIENCE_S:g} s", fix)
    if done.returncode == 0:
        return Finding(GREEN, done.stdout.strip())
    lines = done.stderr.strip().splitlines() or [_ending(done.returncode)]
    return Finding(worst, lines[-1][:300], fix)


def _ending(code: int) -> str:
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
