"""What a check says, and the check itself: a number, a name, what it asks, and one function."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

Verdict = Literal["pass", "fail", "not built", "not here"]  # not here: it needs more GPUs


@dataclass(frozen=True)
class Setting:
    """Where a check runs: the device, and a folder for what it writes."""

    device: torch.device
    folder: Path


@dataclass(frozen=True)
class Outcome:
    """Whether a check passed, what it saw in words, and its numbers."""

    verdict: Verdict
    text: str
    numbers: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Check:
    """One check; without a function it is not built."""

    number: int
    name: str
    asks: str
    function: Callable[[Setting], Outcome] | None = None

    def run(self, setting: Setting) -> Outcome:
        """Return the outcome; an error of the check is a failure with its last line."""
        if self.function is None:
            return Outcome("not built", "nothing of the product does this yet")
        began = time.monotonic()
        try:
            outcome = self.function(setting)
        except Exception as error:
            first = (str(error).splitlines() or [""])[0][:200]
            trace = traceback.format_exc()
            outcome = Outcome("fail", f"{type(error).__name__}: {first}", {"traceback": trace})
        seconds = round(time.monotonic() - began, 1)
        return Outcome(outcome.verdict, outcome.text, outcome.numbers, seconds)


def judged(passed: bool, text: str, **numbers: Any) -> Outcome:
    """Return a pass or a failure."""
    return Outcome("pass" if passed else "fail", text, numbers)
