"""Text for a terminal, which obeys escapes: keys, events and logs may come from anybody."""

from __future__ import annotations


def visible(text: str) -> str:
    """Return a text whose control characters are written as Python does; lines and tabs stay."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t " else ascii(c)[1:-1] for c in text)
