"""Python, the packages that deepclust declares, and the libraries that do its work."""

from __future__ import annotations

import os
import sys
from importlib import metadata
from importlib.util import cache_from_source, find_spec
from pathlib import Path

from packaging.requirements import Requirement

from cluster_jobs.doctor.finding import GREEN, RED, YELLOW, Finding, attempt
from cluster_jobs.doctor.places import existing

OLDEST = (3, 11)
INSTALL = "pip install --upgrade --force-reinstall"
TORCH = """
import torch
rows = torch.rand(64, 8)
assert torch.isfinite(torch.linalg.eigh(rows.T @ rows).eigenvalues).all()
assert torch.distributed.is_gloo_available(), "torch was built without gloo"
print(torch.__version__, "with gloo")
"""
FAISS = """
import faiss, numpy as np
rows = np.eye(8, dtype=np.float32)
index = faiss.IndexFlatL2(8)
index.add(rows)
assert (index.search(rows, 1)[1][:, 0] == range(8)).all(), "a search found wrong rows"
print(faiss.__version__)
"""
DECODERS = """
import io
import numpy as np
from PIL import Image
from deepclust.data.images.decode import decode
image = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8)[:, None], (1, 64))).convert("RGB")
for kind in ("JPEG", "PNG", "WEBP"):
    file = io.BytesIO()
    image.save(file, kind, quality=95)
    seen = decode(file.getvalue()).permute(1, 2, 0).numpy()
    assert abs(seen.astype(int) - np.asarray(image)).max() < 8, f"{kind} has wrong pixels"
import torch
native = hasattr(torch.ops.image, "decode_jpegs_cuda") or hasattr(torch.ops.image, "decode_image")
print("JPEG, PNG, WebP", "by torchvision" if native else "by Pillow alone, three times slower")
"""


def python(_folder: Path) -> Finding:
    """Check that Python is new enough."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < OLDEST:
        return Finding(RED, version, f"install Python {OLDEST[0]}.{OLDEST[1]} or later")
    return Finding(GREEN, f"{version}, {sys.executable}")


def packages(_folder: Path) -> Finding:
    """Check that every package is there, in a version that deepclust works with."""
    bad = []
    declared = [Requirement(text) for text in metadata.requires("deepclust") or ()]
    needed = [r for r in declared if r.marker is None or r.marker.evaluate({"extra": ""})]
    for one in needed:
        try:
            version = metadata.version(one.name)
        except metadata.PackageNotFoundError:
            bad.append((one, "missing"))
            continue
        if not one.specifier.contains(version, prereleases=True):
            bad.append((one, version))
    if bad:
        wanted = " ".join(f"'{one.name}{one.specifier}'" for one, _ in bad)
        seen = ", ".join(f"{one.name} {version}" for one, version in bad)
        return Finding(RED, seen, f"pip install --upgrade {wanted}")
    return Finding(
        GREEN, f"deepclust {metadata.version('deepclust')} has all {len(needed)} packages"
    )


def torch(_folder: Path) -> Finding:
    """Check that torch computes, and that its processes can talk to each other."""
    return attempt(TORCH, f"{INSTALL} torch torchvision")


def compiled(_folder: Path) -> Finding:
    """Check that Python keeps its compiled modules: else every command compiles torch again."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return Finding(YELLOW, "torch is missing", f"{INSTALL} torch torchvision")
    place, again = Path(cache_from_source(spec.origin)), "every command compiles torch again"
    if place.exists():
        return Finding(GREEN, "torch is compiled")
    if not os.access(existing(place), os.W_OK):
        fix = "set PYTHONPYCACHEPREFIX to a folder that you can write"
        return Finding(YELLOW, f"{again}: {existing(place)} is read-only", fix)
    if sys.dont_write_bytecode:
        fix = f"{sys.executable} -m compileall -q -j 0 {Path(spec.origin).parents[1]}"
        return Finding(YELLOW, f"{again}: PYTHONDONTWRITEBYTECODE is set", fix)
    return Finding(GREEN, "Python compiles modules when it first needs them")


def faiss(_folder: Path) -> Finding:
    """Check that FAISS searches."""
    return attempt(FAISS, f"{INSTALL} faiss-gpu, or cluster.backend=torch")


def decoders(_folder: Path) -> Finding:
    """Check that images of the usual kinds are decoded to the right pixels."""
    return attempt(DECODERS, f"{INSTALL} torchvision pillow")
