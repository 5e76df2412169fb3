"""Which Ray: the standing cluster whose job we are, one that we are pointed to, or our own.

Our own is of this machine alone: everything it opens listens on loopback, behind Ray's token.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import ray
from ray._private import ray_constants
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

from cluster_jobs.ray.folders import INSIDE, TEMPORARY
from cluster_jobs.ray.spec import RaySpec, sizes
from deepclust.data.owned_folder import make_folder
from deepclust.errors import ResourceError
from deepclust.files import disk_errors
from deepclust.recipe import Recipe

STORE_BYTES = 100 * 2**20  # nothing of size goes through Ray's object store
NAMESPACE = "deepclust"
TOKEN = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
# Else Ray on Linux takes the machine's outer address even for itself, and listens on all of them.
# And it makes its workers nice (15): whatever else runs on the machine would come before a rank.
ALONE = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_worker_niceness": "0",
    # nobody looks at what Ray counts of its work, which costs a few percent of a small step
    "REPORTER_UPDATE_INTERVAL_MS": "30000",
    "RAY_event_stats": "0",
    "RAY_metrics_report_interval_ms": "60000",
    "RAY_task_events_report_interval_ms": "0",
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
    needed = max(sizes(recipe, spec)) * spec.cpus_of(recipe) + spec.worker_cpus
    with disk_errors(TEMPORARY):
        folder = make_folder(TEMPORARY, "dc-ray")
    try:
        with own_token(folder):
            ray.init(
                "local", namespace=NAMESPACE, log_to_driver=False, logging_level=logging.WARNING,
                num_cpus=max(needed, os.cpu_count() or 1), object_store_memory=STORE_BYTES,
                _temp_dir=str(folder / INSIDE), include_dashboard=False,
            )  # fmt: skip
            _end_helpers()
            yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def _end_helpers() -> None:
    """End what a Ray of one machine does not need: its autoscaler, and who reads logs for drivers.

    The latter looks at all files ten times a second, also where `log_to_driver` is off.
    """
    node = ray._private.worker._global_node
    for name in ("kill_log_monitor", "kill_monitor"):
        with contextlib.suppress(AttributeError, KeyError):  # another Ray may have none
            getattr(node, name)(check_alive=False)


@contextlib.contextmanager
def own_token(folder: Path) -> Iterator[None]:
    """Let what is started in the block require its own token, which this user alone can read.

    The user's environment may have RAY_AUTH_MODE=disabled for a standing cluster, and Ray's own
    file, ~/.ray/auth_token, may be readable by all.
    """
    file = folder / "token"
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
        out.write(secrets.token_hex(32))
    before = {name: os.environ.pop(name, None) for name in TOKEN}
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(file))
    _read_again()
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
        _read_again()


def _read_again() -> None:
    """Let this process see its variables, which Ray has read already."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
