#!/usr/bin/env python3
"""Continue from weights of every kind: the keys that are used, and the first loss against random.

    python tools/bench/start_weights.py --shards DIR [--work DIR] [--steps 20] [--out FILE]

Two short runs of SimCLR make the weights, a ResNet-18 and a ViT of timm. They are written as files
of torchvision and timm, in DINO's layout, and in the export formats that hold weights. From each a
new run of another seed goes on for --steps steps, and so does one from random weights, on the same
batches. A loss is the mean over those steps, at a learning rate that is too low to train.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools/bench/clustering")]

import report  # noqa: E402

from deepclust import Recipe, pretrain  # noqa: E402
from deepclust.export.backbone import export_backbone  # noqa: E402
from deepclust.models import Backbone, build_backbone  # noqa: E402
from deepclust.run.directory import Run, exists  # noqa: E402
from deepclust.stages.warm_start import load_weights  # noqa: E402

NETWORKS = {"resnet18": 64, "timm/vit_tiny_patch16_224": 64}
META = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
BATCH = 64
SETTINGS = [f"train.batch={BATCH}", "train.threads=1", "data.workers=1", "train.log=1"]
LOWEST = "train.lr=1e-9"


def main() -> None:
    """Make the weights, go on from each, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("/tmp/bench-start-weights"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("/tmp/bench-start-weights.json"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    rows = [row for name in NETWORKS for row in of_network(name, options)]
    print(report.markdown(rows))
    options.out.write_text(json.dumps({"load": os.getloadavg(), "rows": rows}, indent=1) + "\n")


def recipe(name: str, options: argparse.Namespace, *words: str) -> Recipe:
    """Return SimCLR's recipe for a network."""
    size = NETWORKS[name]
    own = [f"backbone.name={name}", f"data.size={size}", f"data.resize={size}"]
    shards = f"data.shards={options.shards}"
    return Recipe.load("simclr-small-photos", shards, *own, *SETTINGS, *words)


def of_network(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each source of weights, and that of random ones."""
    first = options.work / f"trained-{Path(name).name}"
    if not exists(first):
        pretrain(recipe(name, options, "train.epochs=1", "train.lr=0.1", "train.warmup=0.2"), first)
    trained = build_backbone(name, image_size=NETWORKS[name])
    load_weights(trained, str(first))
    random = mean_loss(name, options, "random", [])
    rows = [{"network": name, "weights": "random", "tensors": "", "first loss": f"{random:.3f}"}]
    for kind, write in SOURCES.items():
        source = write(trained.eval(), options.work / f"{Path(name).name}-{kind}")
        if source is not None:
            rows.append(row(name, options, kind, source))
    return rows


def row(name: str, options: argparse.Namespace, kind: str, source: Path) -> dict[str, Any]:
    """Go on from one source."""
    backbone = build_backbone(name, image_size=NETWORKS[name], seed=1)
    said = load_weights(backbone, str(source))
    loss = mean_loss(name, options, kind, [f"init.weights={source}"])
    return {
        "network": name, "weights": kind, "tensors": len(backbone.net.state_dict()),
        "said": said.replace(str(options.work), "."), "first loss": f"{loss:.3f}",
    }  # fmt: skip


def mean_loss(name: str, options: argparse.Namespace, kind: str, words: list[str]) -> float:
    """Return the mean loss of the first steps of a run."""
    folder = options.work / f"next-{Path(name).name}-{kind}"
    if not exists(folder):
        asked = recipe(name, options, "seed=1", "train.epochs=1", LOWEST, *words)

        def stop(record: dict[str, Any]) -> None:
            if record.get("step", 0) >= options.steps:
                raise KeyboardInterrupt

        try:
            pretrain(asked, folder, show=stop)
        except BaseException as ended:
            if not isinstance(ended, KeyboardInterrupt):
                raise
    losses = [line["loss"] for line in Run(folder).metrics("train")][: options.steps]
    return sum(losses) / len(losses)


def _torchvision(trained: Backbone, place: Path) -> Path | None:
    """A file of torchvision's whole network, with its classifier."""
    if trained.name != "resnet18":
        return None
    net = torchvision.models.resnet18()
    net.load_state_dict(trained.export_state(), strict=False)
    torch.save(net.state_dict(), place.with_suffix(".pth"))
    return place.with_suffix(".pth")


def _timm(trained: Backbone, place: Path) -> Path | None:
    """A checkpoint of timm's whole network, as its trainer writes it."""
    if not trained.name.startswith("timm/"):
        return None
    import timm

    net = timm.create_model(trained.name.removeprefix("timm/"), img_size=NETWORKS[trained.name])
    net.load_state_dict(trained.export_state(), strict=False)
    state = {"arch": trained.name, "epoch": 1, "state_dict": net.state_dict()}
    torch.save(state, place.with_suffix(".pth.tar"))
    return place.with_suffix(".pth.tar")


def _dino(trained: Backbone, place: Path) -> Path:
    state = {f"backbone.{key}": value for key, value in trained.export_state().items()}
    wrong = {f"module.{key}": torch.zeros_like(value) for key, value in state.items()}
    head = {"head.mlp.0.weight": torch.ones(2, 2)}
    torch.save({"student": wrong, "teacher": state | head, "epoch": 1}, place.with_suffix(".pth"))
    return place.with_suffix(".pth")


def _export(form: str, suffix: str) -> Callable[[Backbone, Path], Path | None]:
    def write(trained: Backbone, place: Path) -> Path | None:
        file = place.with_suffix(suffix)
        if form == "torchvision" and trained.name.startswith("timm/"):
            return None
        if not file.exists():
            export_backbone(trained, file, form, meta=META)
        return file / "model.safetensors" if form == "hf" else file

    return write


SOURCES: dict[str, Callable[[Backbone, Path], Path | None]] = {
    "torchvision's file": _torchvision,
    "timm's checkpoint": _timm,
    "DINO's layout": _dino,
    "export torchvision": _export("torchvision", ".pth"),
    "export safetensors": _export("safetensors", ".safetensors"),
    "export timm": _export("timm", ".safetensors"),
    "export hf": _export("hf", ".hf"),
}


if __name__ == "__main__":
    main()
