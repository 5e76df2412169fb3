"""Run one function of this folder in a process of its own, and say what machine it ran on.

OpenMP runtimes of torch, FAISS and scikit-learn get in each other's way in one process, so every
contender has its own. `python processes.py MODULE FUNCTION JSON` is that process: it prints the
function's dictionary as the last line, or {"error": ...}.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).parent
PACKAGES = (
    "deepclust", "torch", "numpy", "scipy", "scikit-learn", "faiss-cpu", "faiss-gpu", "triton",
    "fast-pytorch-kmeans", "flash-kmeans", "cuml-cu12", "cuml-cu13", "cuvs-cu12", "cuvs-cu13",
)  # fmt: skip
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_tile")
LIBRARIES = ("OMP_", "OPENBLAS_", "MKL_", "KMP_", "ATEN_", "ONEDNN_", "NVIDIA_TF32")
BUSY = """
import os
parent = os.getppid()
while os.getppid() == parent:
    sum(range(1_000_000))
"""


def call(
    module: str, function: str, job: dict, options: argparse.Namespace, limit: float = 3600
) -> dict:
    """`module.function(job)` in a new process; an error or timeout is a result too."""
    environment = surroundings(options.threads, options.openblas)
    command = [sys.executable, __file__, module, function, json.dumps(job)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not finished after {limit:.0f} s"}
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        return {"error": f"exit code {done.returncode}: {last[0]}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def surroundings(threads: int | None, openblas: str) -> dict[str, str]:
    """Environment of a contender. OpenBLAS gets the widest kernels that the CPU has.

    What it detects itself depends on its version (the one inside FAISS took a new CPU for a
    Barcelona of 2007 and was five times slower), and some machines set OPENBLAS_CORETYPE.
    """
    found = dict(os.environ)
    if threads:
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        found.update(dict.fromkeys(names, str(threads)))
    if openblas == "auto" and "avx512f" in cpu()["flags"].split():
        openblas = "SkylakeX"
    if openblas not in ("auto", "as-is"):
        found.pop("OPENBLAS_L2_SIZE", None)
        found["OPENBLAS_CORETYPE"] = openblas
    return found


def cpu() -> dict[str, str]:
    """The first processor of /proc/cpuinfo."""
    first = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    words = dict(line.split(":", 1) for line in first if ":" in line)
    return {"flags": "", **{key.strip(): value.strip() for key, value in words.items()}}


def main() -> None:
    """The process: call, and print what came."""
    module, function, job = sys.argv[1:]
    try:
        found = getattr(importlib.import_module(module), function)(json.loads(job))
    except (Exception, SystemExit) as error:
        found = {"error": f"{type(error).__name__}: {error}".split("\n")[0][:300]}
    print(json.dumps(found))


@contextlib.contextmanager
def busy(wanted: bool) -> Iterator[None]:
    """While inside, one other process keeps a core busy, if wanted."""
    other = subprocess.Popen([sys.executable, "-c", BUSY]) if wanted else None
    try:
        yield
    finally:
        if other is not None:
            other.kill()
            other.wait()


def environment() -> dict:
    """Versions, and the BLAS and OpenMP libraries with their threads, as loaded here."""
    from threadpoolctl import threadpool_info

    pools = [
        {key: pool.get(key) for key in ("internal_api", "version", "num_threads", "architecture")}
        for pool in threadpool_info()
    ]
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    variables = {key: os.environ[key] for key in sorted(os.environ) if key.startswith(LIBRARIES)}
    found = {"python": platform.python_version(), "versions": versions, "threadpools": pools}
    found["variables"] = variables
    torch = sys.modules.get("torch")
    if torch is not None:
        found["torch_threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            found["gpu"] = torch.cuda.get_device_name()
    return found


def machine() -> dict:
    """CPU, its flags that matter here, memory, load before we start, and our commit."""
    commit = subprocess.run(
        ["git", "-C", str(HERE), "describe", "--always", "--dirty"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": cpu().get("model name"),
        "cpus": os.cpu_count(),
        "flags": [flag for flag in FLAGS if flag in cpu()["flags"].split()],
        "memory_GB": round(pages / 1e9, 1),
        "load_before": os.getloadavg(),
        "kernel": platform.release(),
        "commit": commit.stdout.strip(),
    }


if __name__ == "__main__":
    main()
