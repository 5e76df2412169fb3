"""Text for a terminal, which obeys escapes: keys, events and logs may come from anybody."""

from __future__ import annotations


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
