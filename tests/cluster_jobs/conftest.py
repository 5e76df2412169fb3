"""The Slurm that the tests of this folder share: started by the first that wants it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster_jobs.slurm.slurm_here import SlurmHere, running, why_not


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmHere]:
    """A real Slurm of two nodes."""
    if reason := why_not():
        pytest.skip(reason)
    with running() as here:
        yield here
