"""What this user has named before: addresses and places that a run directory alone may not choose.

A run directory may come from somebody else, and it names clusters and servers. So those that the
user has named are kept in the user's own folder, one a line.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

MOST = 1000  # lines of a kind, and letters of one


def remember(kind: str, name: str) -> None:
    """Note a name that the user has given; a home that cannot be written keeps none."""
    with contextlib.suppress(OSError):
        lines = [other for other in known(kind) if other != name][-MOST:]
        _file(kind).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(_file(kind), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with open(handle, "w", encoding="utf-8") as out:
            out.writelines(f"{one}\n" for one in [*lines, name])


def known(kind: str) -> list[str]:
    """Return the names of a kind that the user has given, the last one last."""
    try:
        lines = _file(kind).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    return [line for line in lines if len(line) < MOST]


def _file(kind: str) -> Path:
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(state) / "deepclust" / kind
