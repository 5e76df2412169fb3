"""The Ray clusters that this user has named, which alone are given the user's token.

A run directory may come from somebody else, and its job.json or recipe may name any address. So
the addresses that the user has submitted to are kept (`known.py`).
"""

from __future__ import annotations

import os
from pathlib import Path

from cluster_jobs import known
from deepclust.errors import ResourceError

KIND = "ray-clusters"


def remember(address: str) -> None:
    """Note an address that the user has given."""
    known.remember(KIND, address)


def require_named(address: object, run_dir: Path) -> None:
    """Raise `ResourceError` for an address that only a run directory has named."""
    if isinstance(address, str) and address in (*known.known(KIND), os.environ.get("RAY_ADDRESS")):
        return
    raise ResourceError(
        f"{run_dir} names a Ray cluster at {address!r:.100} to which you have not submitted. "
        "Asking it would send it your token. If you know it: deepclust resume RUN --on ray "
        "ray.address=ADDRESS, or set RAY_ADDRESS=ADDRESS for this command."
    )
