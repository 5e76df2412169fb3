#!/usr/bin/env python3
"""Do VAEs of two views, side by side, have better clusters than either? Digits cut into halves.

    python tools/bench/vae_halves.py            three seeds on one core, a table, and JSON

The upper and the lower 32 pixels of scikit-learn's 1,797 digits stand for the features of two
networks. Each gets a VAE with 8 latents and beta 1, which takes 700 steps. Every score is the NMI
(geometric) of k-means with 10 clusters, the mean of ten starts.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits

from deepclust import Whitening, kmeans
from deepclust.clustering.statistics import nmi
from deepclust.clustering.vae import VaeOptions
from deepclust.clustering.vae_fit import fit_vae

STARTS = 10


def main() -> None:
    """Fit the VAEs of every seed, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--beta", type=float, default=1.0)
    parser.add_argument("--out", type=Path, default=Path("runs/vae-halves.json"))
    chosen = parser.parse_args()
    torch.set_num_threads(1)  # small networks: more threads wait for one another
    halves, pixels, classes = digits()
    table = {f"pixels, {name}": [score(rows, classes)] for name, rows in halves.items()}
    table["pixels, whole"] = [score(pixels, classes)]
    for seed in range(chosen.seeds):
        for name, value in of_seed(seed, chosen, halves, pixels, classes).items():
            table.setdefault(name, []).append(value)
    for name, values in table.items():
        each = " ".join(f"{value:.3f}" for value in values)
        print(f"{name:32}{statistics.fmean(values):8.3f}   {each}")
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(table, indent=1))


def of_seed(
    seed: int,
    chosen: argparse.Namespace,
    halves: dict[str, np.ndarray],
    pixels: np.ndarray,
    classes: np.ndarray,
) -> dict[str, float]:
    """Return the scores of one seed by name."""
    shape = {"epochs": chosen.epochs, "beta": chosen.beta, "seed": seed}
    latents = latents_of(halves, **shape)
    whole = fit_vae(pixels, VaeOptions(latent=16, **shape))[0].features(pixels)
    both = np.concatenate(latents, 1)
    scores = {f"VAE, {n}": score(rows, classes) for n, rows in zip(halves, latents, strict=True)}
    return {
        **scores,
        "VAE, whole": score(whole, classes),
        "both VAEs side by side": score(both, classes),
        "both, whitened": score(Whitening.fit(both, both.shape[1])(both), classes),
    }


def digits() -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Return the halves of the digits by name, the whole digits, and their classes."""
    images, classes = load_digits(return_X_y=True)
    pixels = images.astype(np.float32)
    return {"upper half": pixels[:, :32], "lower half": pixels[:, 32:]}, pixels, classes


def latents_of(halves: dict[str, np.ndarray], **shape: Any) -> list[np.ndarray]:
    """Return the features that a VAE of each half gives."""
    return [
        fit_vae(rows, VaeOptions(latent=8, **shape), number)[0].features(rows)
        for number, rows in enumerate(halves.values())
    ]


def score(rows: np.ndarray, classes: np.ndarray) -> float:
    """Return the mean NMI of ten starts."""
    starts = (kmeans(rows, 10, seed=seed, init="k-means++") for seed in range(STARTS))
    return statistics.fmean(nmi(one.assignments, classes) for one in starts)


if __name__ == "__main__":
    main()
