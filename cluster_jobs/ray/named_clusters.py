"""The Ray clusters that this user has named, which alone are given the user's token.

A run directory may come from somebody else, and its job.json or recipe may name any address. So
the addresses that the user has submitted to are kept in the user's own folder.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from deepclust.errors import ResourceError

MOST = 1000  # addresses, and letters of one


def remember(address: str) -> None:
    """Note an address that the user has given; a home that cannot be written keeps none."""
    with contextlib.suppress(OSError):
        known = [other for other in _known() if other != address][-MOST:]
        _file().parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(_file(), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with open(handle, "w", encoding="utf-8") as out:
            out.writelines(f"{one}\n" for one in [*known, address])


def require_named(address: object, run_dir: Path) -> None:
    """Raise `ResourceError` for an address that only a run directory has named."""
    if isinstance(address, str) and address in (*_known(), os.environ.get("RAY_ADDRESS")):
        return
    raise ResourceError(
        f"{run_dir} names a Ray cluster at {address!r:.100} to which you have not submitted. "
        "Asking it would send it your token. If you know it: deepclust resume RUN --on ray "
        "ray.address=ADDRESS, or set RAY_ADDRESS=ADDRESS for this command."
    )


def _known() -> list[str]:
    try:
        lines = _file().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    return [line for line in lines if len(line) < MOST]


def _file() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(state) / "deepclust" / "ray-clusters"
