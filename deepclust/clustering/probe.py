"""Which backend of k-means works on a device, tried by a tiny search before an hour of extraction.

A wheel without kernels for this GPU, or with a missing library, imports well and fails at the first
use.
"""

from __future__ import annotations

import torch

from deepclust.clustering.search import SEARCHES
from deepclust.errors import ResourceError

CPU = torch.device("cpu")
_FAILURES = (RuntimeError, TypeError, AssertionError, ResourceError)


def probe_backend(
    backend: str, device: torch.device, named: bool = False
) -> tuple[str, torch.device, list[str]]:
    """Return the backend and device that work here, and notes of what did not.

    FAISS falls back on torch. A GPU falls back on the CPU, unless it was `named`: who asks for a
    device by name has it or an error. Raises `ResourceError` where nothing that may be used works.
    """
    notes: list[str] = []
    places = [(backend, device), ("torch", device), *([] if named else [("torch", CPU)])]
    for name, place in places:
        try:
            if _is_right(name, place):
                return name, place, notes + _about(name, place)
            notes.append(f"cluster.backend={name} on {place} finds wrong neighbours")
        except _FAILURES as error:
            first = str(error).split("\n")[0]
            notes.append(f"cluster.backend={name} does not work on {place}: {first}")
    raise ResourceError(
        "; ".join(dict.fromkeys(notes))
        + ("" if device.type == "cpu" else ". Use another GPU, or the device cpu")
    )


def _is_right(backend: str, device: torch.device) -> bool:
    points = torch.eye(3, device=device)
    search = SEARCHES[backend]
    return all(search(points, half)(points).tolist() == [0, 1, 2] for half in (False, True))


def _about(backend: str, device: torch.device) -> list[str]:
    """Return a note where the backend does not use the device."""
    if backend == "faiss" and device.type != "cpu":
        return [f"cluster.backend=faiss searches on the CPU, and copies every row from {device}"]
    return []
