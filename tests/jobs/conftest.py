"""The Slurm that the tests of this folder share: started by the first that wants it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.jobs.slurm_here import SlurmHere, why_not


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmHere]:
    """A real Slurm; commands that this process starts find it by SLURM_CONF."""
    if reason := why_not():
        pytest.skip(reason)
    here = SlurmHere()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("SLURM_CONF", "PATH"):
            patch.setenv(name, here.environment[name])
        yield here
    here.stop()
