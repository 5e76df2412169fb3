"""Which Ray: the standing cluster whose job we are, one that we are pointed to, or our own.

Our own is of this machine alone: everything it opens listens on loopback, behind Ray's token.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator

import ray
from ray._private import ray_constants

from cluster_jobs.ray.folders import make_folder
from cluster_jobs.ray.spec import RaySpec, sizes
from deepclust.errors import ResourceError
from deepclust.recipe import Recipe

STORE_BYTES = 100 * 2**20  # nothing of size goes through Ray's object store
NAMESPACE = "deepclust"
# Else Ray on Linux takes the machine's outer address even for itself, and listens on all of them.
# And it makes its workers nice (15): whatever else runs on the machine would come before a rank.
ALONE = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_worker_niceness": "0",
    "REPORTER_UPDATE_INTERVAL_MS": "30000",  # of the dashboard; looking costs a few percent
}


@contextlib.contextmanager
def connected(spec: RaySpec, recipe: Recipe) -> Iterator[None]:
    """Connect while the block lasts, or raise `ResourceError` when there is no such cluster."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = os.environ.get("RAY_ADDRESS") or spec.address
    with _private(spec, recipe) if address is None else _standing(address):
        yield


@contextlib.contextmanager
def _standing(address: str) -> Iterator[None]:
    if address.startswith("http"):  # the dashboard's; on the cluster itself, Ray finds its way
        address = "auto"
    try:
        ray.init(address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ResourceError(
            f"no Ray cluster answers at {address}: {error}. Start one (`ray start --head`), "
            "correct ray.address, or leave it out to use this machine alone."
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _private(spec: RaySpec, recipe: Recipe) -> Iterator[None]:
    """Start a Ray of this machine alone, where processes may outnumber the cores."""
    os.environ.update(ALONE)
    ray_constants.ENABLE_RAY_CLUSTER = False  # the same, for this process, which has read it
    needed = max(sizes(recipe, spec)) * spec.cpus + spec.worker_cpus
    folder = make_folder("dc-ray")
    try:
        ray.init(
            "local", namespace=NAMESPACE, log_to_driver=False, logging_level=logging.WARNING,
            num_cpus=max(needed, os.cpu_count() or 1), object_store_memory=STORE_BYTES,
            _temp_dir=str(folder),
        )  # fmt: skip
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
