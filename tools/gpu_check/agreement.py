"""Checks of numbers: the same on the GPU as on the CPU, or within a stated error.

Each runs on any device, so a machine without a GPU can test the checks themselves.
"""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import torch
from outcome import Outcome, Setting, judged
from torch import Tensor

from deepclust import kmeans
from deepclust.clustering import residence
from deepclust.clustering.array_points import ArrayPoints
from deepclust.clustering.moments import Moments
from deepclust.clustering.nearest import Nearest
from deepclust.clustering.search import SEARCHES
from deepclust.clustering.whiten import solve
from deepclust.data.images.colour import Colour
from deepclust.data.images.crops import CentreCrop, RandomResizedCrop
from deepclust.data.images.device_crops import crop, cut_of, pack
from deepclust.data.images.rotate import rotate
from deepclust.methods.parts.heads import CentroidHead
from deepclust.methods.simclr.method import nt_xent
from deepclust.models.sobel import Sobel
from deepclust.world import World

KS = (4, 20, 260, 1000, 3332, 10_000)


def white_rows(n: int, dim: int = 256, seed: int = 0) -> Tensor:
    """Unit rows of correlated numbers, with ties, duplicates and near-ties among them."""
    random = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, dim, generator=random) * torch.logspace(0, -1, dim)
    rows[n // 2 : n // 2 + n // 10] = rows[: n // 10]
    rows[-n // 10 :] = rows[: n // 10] * (1 + 1e-4)
    return torch.nn.functional.normalize(rows)


def search(setting: Setting, n: int = 100_000, ks: tuple[int, ...] = KS) -> Outcome:
    """Compare every label of a pass with the exact search of the CPU."""
    differ = {}
    for half in (True, False):
        rows = white_rows(n)
        rows = rows.half().float() if half else rows
        for k in (k for k in ks if k <= n):
            centroids = rows[:: n // k][:k].clone()
            centroids[1 % k] = centroids[0]  # equals go to the lowest id
            exact = Nearest(centroids)(rows)
            there = SEARCHES["auto"](centroids.to(setting.device), half)
            found = torch.cat([there(p.to(setting.device)).cpu() for p in rows.split(8192)])
            differ[f"k={k} fp{16 if half else 32}"] = int((found != exact).sum())
    worst = max(differ.values())
    text = f"at most {worst} of {n:,} labels differ from the exact ones"
    return judged(worst == 0, text, differ=differ)


def clusters(setting: Setting, n: int = 50_000, k: int = 200) -> Outcome:
    """Cluster twice the same, and label rows that lie here and there the same.

    They are on the device, on the host, in a file that is mapped, and a part of each.
    """
    rows = white_rows(n, 64).half().numpy()
    runs = [kmeans(rows, k, iterations=5, device=setting.device) for _ in range(2)]
    same = np.array_equal(runs[0].assignments, runs[1].assignments)
    same &= np.array_equal(runs[0].centroids, runs[1].centroids)
    centroids = torch.from_numpy(runs[0].centroids).to(setting.device)
    np.save(setting.folder / "rows.npy", rows)
    mapped = np.load(setting.folder / "rows.npy", mmap_mode="r")
    labels = [label(ArrayPoints(rows, device=setting.device), centroids)]
    with patch.dict(residence.MEMORY, {setting.device.type: lambda device: 0}):  # none fit there
        labels += [label(ArrayPoints(x, device=setting.device), centroids) for x in (rows, mapped)]
    agree = all(np.array_equal(labels[0], other) for other in labels)
    empty = int((np.bincount(runs[0].assignments, minlength=k) == 0).sum())
    text = f"twice the same bits: {same}; all places agree: {agree}; {empty} clusters are empty"
    return judged(bool(same) and agree and not empty, text)


def label(points: ArrayPoints, centroids: Tensor) -> np.ndarray:
    """The labels of all rows, then those of a third of them."""
    parts = (points, points.select(np.arange(0, points.n, 3)))
    return np.concatenate([p.assign_to(centroids).cluster_ids.cpu().numpy() for p in parts])


def whitening(setting: Setting, n: int = 20_000, wide: int = 512, dim: int = 64) -> Outcome:
    """Fit and apply on the device, and compare with float64 on the CPU."""
    rows = white_rows(n, wide)
    pivot = rows[:100].mean(0)
    there = Moments.zero(pivot.to(setting.device)).add(rows.to(setting.device))
    ours = solve(there, dim)
    covariance = torch.cov(rows.double().T, correction=0)
    exact = torch.linalg.eigh(covariance).eigenvectors[:, -dim:]
    basis, _ = torch.linalg.qr(torch.from_numpy(np.asarray(ours.matrix)).double())
    cosines = torch.linalg.svdvals(exact.T @ basis)
    angle = float(torch.arccos(cosines.min().clamp(max=1)))
    white = (rows - torch.from_numpy(np.asarray(ours.mean))).to(setting.device) @ torch.from_numpy(
        np.asarray(ours.matrix)
    ).to(setting.device)
    off = float((torch.cov(white.double().T, correction=0).cpu() - torch.eye(dim)).abs().max())
    text = f"subspace angle {angle:.1e} (1e-4), covariance off by {off:.1e} (1e-3)"
    return judged(angle < 1e-4 and off < 1e-3, text, angle=angle, covariance=off)


def gradients(setting: Setting) -> Outcome:
    """Compare gradients of float32 parts under autocast with those in float64."""
    errors = {"nt_xent": of_nt_xent(setting.device), "centroids": of_centroids(setting.device)}
    images = torch.randint(0, 256, (16, 3, 96, 96), generator=seeded()).float().div(255)
    with torch.autocast(setting.device.type, torch.bfloat16):
        edges = Sobel().to(setting.device)(images.to(setting.device)).float().cpu()
    errors["sobel"] = relative(edges, Sobel().double()(images.double()))
    limits = {"nt_xent": 1e-5, "centroids": 1e-5, "sobel": 1e-3}
    text = ", ".join(f"{name} {error:.1e} ({limits[name]:g})" for name, error in errors.items())
    return judged(all(errors[name] < limits[name] for name in errors), text, **errors)


def of_nt_xent(device: torch.device) -> float:
    """The relative error of NT-Xent's gradient."""
    pair = torch.randn(2, 64, 128, generator=seeded(), dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        a, b = torch.nn.functional.normalize(x, dim=2)
        return nt_xent(a, b, World(device=x.device), 0.1)

    return gradient_error(loss, pair, device)


def of_centroids(device: torch.device) -> float:
    """The relative error of the gradient through a centroid head."""
    head = CentroidHead.empty(128, 32, 50)
    for buffer in head.buffers():
        buffer.copy_(torch.randn(buffer.shape, generator=seeded()))
    target = torch.arange(64) % 50

    def loss(x: Tensor) -> Tensor:
        white = (x - head.mean.to(x)) @ head.matrix.to(x)
        logits = torch.nn.functional.normalize(white, dim=1) @ head.centroids.to(x).T / 0.1
        return torch.nn.functional.cross_entropy(logits, target.to(x.device))

    def ours(x: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(head.to(x.device)(x), target.to(x.device))

    rows = torch.randn(64, 128, generator=seeded(), dtype=torch.float64)
    return gradient_error(loss, rows, device, ours)


def gradient_error(loss: object, at: Tensor, device: torch.device, ours: object = None) -> float:
    """The relative error of a gradient in float32, its forward under autocast."""
    exact = at.clone().requires_grad_()
    loss(exact).backward()
    near = at.float().to(device).requires_grad_()
    with torch.autocast(device.type, torch.bfloat16):
        value = (ours or loss)(near)
    value.backward()
    return relative(near.grad.cpu(), exact.grad)


def relative(near: Tensor, exact: Tensor) -> float:
    """The length of the difference over the length of what is exact."""
    return float((near.double() - exact).norm() / exact.norm())


def seeded() -> torch.Generator:
    """A generator that starts at the same place each time."""
    return torch.Generator().manual_seed(7)


def views(setting: Setting, count: int = 200) -> Outcome:
    """Compare turned, coloured and cropped images with those of the CPU."""
    images = torch.randint(0, 256, (count, 3, 64, 64), dtype=torch.uint8, generator=seeded())
    turns = torch.arange(count) % 4
    turned = rotate(images.to(setting.device), turns.to(setting.device)).cpu()
    colour = Colour((0.4, 0.4, 0.4, 0.1), 0.8, 0.2, 0.5)
    draws = colour.draws(5, np.arange(count))
    here = colour(images, draws).int()
    there = colour(images.to(setting.device), draws).cpu().int()
    off = int((here - there).abs().max())
    same = torch.equal(turned, rotate(images, turns))
    pixels = of_crops(setting.device, count)
    text = f"turns equal: {same}; colours differ by {off} levels (1); {pixels} pixels of crops do"
    return judged(same and off <= 1 and not pixels, text, crops=pixels)


def of_crops(device: torch.device, count: int) -> int:
    """The pixels in which crops that the device makes differ from those of the CPU."""
    random = np.random.default_rng(7)
    images = [
        torch.from_numpy(random.integers(0, 256, (3, *random.integers(40, 400, 2)), np.uint8))
        for _ in range(count)
    ]
    differ = 0
    for view in (RandomResizedCrop(64), CentreCrop(64, 72)):
        draws = view.draws(7, np.arange(count))
        cuts = [cut_of(view, *x.shape[1:], draw) for x, draw in zip(images, draws, strict=True)]
        there = crop(pack(images, cuts, view.size).to(device)).cpu()
        here = torch.stack([view(x, draw) for x, draw in zip(images, draws, strict=True)])
        differ += int((there != here).sum())
    return differ
