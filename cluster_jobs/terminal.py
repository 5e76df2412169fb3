"""Text for a terminal, which obeys escapes: keys, events and logs may come from anybody."""

from __future__ import annotations

import shlex
from typing import Any

from deepclust.errors import argument


def visible(text: str) -> str:
    """Return a text whose control characters are written as Python does; lines and tabs stay."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t " else ascii(c)[1:-1] for c in text)


def duration(seconds: float) -> str:
    """Return a time as people say it: 0.4 s, 12 s, 5 min 3 s, 2 h 10 min, 3 d 4 h."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours // 24} d {hours % 24} h" if hours >= 48 else f"{hours} h {minutes} min"


def recorded_command(words: Any) -> str | None:
    """Return the command that a run's env.json records, to be typed again; None where it is none.

    Anybody may have written it, so secrets are taken out once more.
    """
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words[1:]):
        return None
    return shlex.join(["deepclust", *map(argument, words[1:])]) if words[1:] else None
