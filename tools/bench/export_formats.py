#!/usr/bin/env python3
"""Each export format, loaded by its own library in a fresh process: difference, size, seconds.

    python tools/bench/export_formats.py [--networks resnet18 resnet50] [--out FILE]

The lines that `export` prints are what the fresh process executes. The difference is the largest of
any feature of eight images, beside the spread (standard deviation) of the features. The network has
weights of its initialisation and statistics of one batch. Files are below 2 GB, on a local disk.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools/bench/clustering")]

import report  # noqa: E402

from deepclust.export.backbone import FORMATS, export_backbone  # noqa: E402
from deepclust.models import Backbone, build_backbone  # noqa: E402
from tests.export.test_elsewhere import loaded  # noqa: E402

META = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "resize": 256}
SUFFIX = {"torchvision": ".pth", "safetensors": ".safetensors", "timm": ".safetensors"}
LIBRARY = {
    "torchvision": "torchvision", "safetensors": "deepclust", "timm": "timm",
    "hf": "transformers", "onnx": "onnxruntime", "torch-export": "torch",
}  # fmt: skip


def main() -> None:
    """Export, load and compare every network in every format that holds it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--networks", nargs="+", default=["resnet18", "resnet50", "timm/vit_small_patch16_224"]
    )
    parser.add_argument("--size", type=int, default=224, help="pixels of the images")
    parser.add_argument("--out", type=Path, default=Path("/tmp/bench-export-formats.json"))
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        print(json.dumps(load(options.load)))
        return
    rows = [row for name in options.networks for row in of_network(name, options.size)]
    print(report.markdown(rows))
    options.out.write_text(json.dumps({"load": os.getloadavg(), "rows": rows}, indent=1) + "\n")


def of_network(name: str, size: int) -> list[dict[str, Any]]:
    """Return a row for each format."""
    backbone = build_backbone(name, image_size=size, seed=0)
    images = torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        backbone.train()(images)
        features = backbone.eval()(images)
    return [of_format(backbone, images, features, form) for form in FORMATS]


def of_format(
    backbone: Backbone, images: torch.Tensor, features: torch.Tensor, form: str
) -> dict[str, Any]:
    """Return what one format gives, or why it cannot hold the network."""
    row: dict[str, Any] = {"network": backbone.name, "format": form}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        began = time.perf_counter()
        try:
            made = export_backbone(backbone, place / f"net{SUFFIX.get(form, '')}", form, meta=META)
        except Exception as error:
            return row | {"library": str(error).splitlines()[0]}
        row["written, s"] = f"{time.perf_counter() - began:.2f}"
        size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
        np.save(place / "images.npy", images.numpy())
        (place / "usage.txt").write_text(made.usage)
        words = [sys.executable, __file__, "--load", folder]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.strip().splitlines()[-1])
        theirs = np.load(place / "features.npy")
    version = importlib.metadata.version(LIBRARY[form])
    return row | {
        "library": f"{LIBRARY[form]} {version}", "size, MB": f"{size / 1e6:.1f}",
        "loaded, s": f"{found['seconds']:.2f}",
        "greatest difference": f"{np.abs(theirs - features.numpy()).max():.1e}",
        "spread of features": f"{float(features.std()):.2g}",
    }  # fmt: skip


def load(folder: Path) -> dict[str, float]:
    """Execute the lines of a usage, and write the features of the images."""
    images = torch.from_numpy(np.load(folder / "images.npy"))
    began = time.perf_counter()
    net = loaded((folder / "usage.txt").read_text())
    if hasattr(net, "fc"):  # torchvision's classifier, which no export has
        net.fc = torch.nn.Identity()
    seconds = time.perf_counter() - began
    with torch.no_grad():
        np.save(folder / "features.npy", net(images).numpy())
    return {"seconds": seconds}


if __name__ == "__main__":
    main()
