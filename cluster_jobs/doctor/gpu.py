"""The GPUs: a card that torch cannot use is red, no card is not."""

from __future__ import annotations

import glob
import shutil
import subprocess
from pathlib import Path

from cluster_jobs.doctor.finding import GREEN, RED, Finding, attempt

DEVICES = "/dev/nvidia[0-9]*"
PATIENCE_S = 30.0
CARDS = """
import warnings
warnings.simplefilter("error")
import torch
assert torch.version.cuda, "this torch was built without CUDA"
assert torch.cuda.is_available(), f"torch cannot use it: the driver may be older than CUDA " \\
    f"{torch.version.cuda}"
for number in range(torch.cuda.device_count()):
    assert float(torch.ones(8, device=f"cuda:{number}").sum()) == 8
names = {torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())}
print(torch.cuda.device_count(), "x", ", ".join(sorted(names)), "CUDA", torch.version.cuda)
"""
NCCL = """
import torch
assert torch.distributed.is_nccl_available(), "torch was built without NCCL"
print(".".join(map(str, torch.cuda.nccl.version())))
"""
NONE = Finding(GREEN, "no NVIDIA card here: runs use the CPU")


def present() -> bool:
    """Return whether the machine has a card, whether torch can use it or not."""
    return bool(glob.glob(DEVICES)) or _listed()


def _listed() -> bool:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    done = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=PATIENCE_S)
    return done.returncode == 0 and "GPU 0" in done.stdout


def driver(_folder: Path) -> Finding:
    """Check that torch can compute on every card."""
    if not present():
        return NONE
    fix = (
        "compare `nvidia-smi` with torch.version.cuda: update the driver, or install a torch of "
        "an older CUDA (pytorch.org). In a container, start it with --gpus all"
    )
    return attempt(CARDS, fix)


def nccl(_folder: Path) -> Finding:
    """Check that ranks on cards can talk to each other."""
    if not present():
        return Finding(GREEN, "not needed without a card: ranks use gloo")
    return attempt(NCCL, "install the torch of pytorch.org for Linux and CUDA", worst=RED)
