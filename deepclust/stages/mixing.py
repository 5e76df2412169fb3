"""Mixup and cutmix of labelled images, in pairs of a global batch (`seeds.mix`).

Mixup: Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018. Cutmix: Yun et al.,
"CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features", ICCV 2019.
The keys and the box are those of timm's Mixup in its mode for single images.

The labelled images of a global batch are paired in their order: first and second, third and fourth.
So both of a pair are nearly always in one rank's part, and a part reads at most two images of
others. With an odd number of them the last takes the one before it, which has a partner already. A
pair is of the batch and not of a part, and weights are drawn by position, so ranks and restarts
make no difference. All crops of an image have the same partner, weight and box.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Float64, Int64
from scipy.special import betaincinv
from torch import Tensor

from deepclust.data.images.draws import uniform
from deepclust.data.to_device import send
from deepclust.recipe.sections import MixSection


@dataclass(frozen=True)
class Draws:
    """How each row is mixed: the weight of the row's image, or a box that the other one fills.

    Edges are top, bottom, left, right, as shares of the side.
    """

    mixed: Bool[np.ndarray, " b"]
    boxed: Bool[np.ndarray, " b"]
    weights: Float64[np.ndarray, " b"]
    edges: Float64[np.ndarray, "b 4"]

    def pixels(self, side: int) -> Int64[np.ndarray, "b 4"]:
        """Return the boxes in a crop of that side, whose edges are rounded down."""
        edges: Int64[np.ndarray, "b 4"] = np.floor(self.edges * side).astype(np.int64)
        return edges

    def shares(self, side: int) -> Float64[np.ndarray, " b"]:
        """Return the share of a row's own image in a crop: its weight, or what the box leaves."""
        top, bottom, left, right = self.pixels(side).T
        left_over = 1 - (bottom - top) * (right - left) / side**2
        shares: Float64[np.ndarray, " b"] = np.where(self.boxed, left_over, self.weights)
        return shares


def draw(config: MixSection, key: int, positions: Int64[np.ndarray, " b"]) -> Draws:
    """Return how the rows at these positions are mixed, if they are labelled and have a partner.

    The weight is drawn by the quantile of its Beta distribution. A box has its middle anywhere, and
    is cut at the edges of the image.
    """
    chance, switch, quantile, *middle = uniform(key, positions, 5).T
    boxed = switch < (config.switch if config.mixup else 1.0) * (config.cutmix > 0)
    alpha = np.where(boxed, config.cutmix, config.mixup)
    weights = betaincinv(alpha, alpha, quantile)
    half = np.sqrt(1 - weights) / 2
    ends = [place + sign * half for place in middle for sign in (-1, 1)]
    return Draws(chance < config.chance, boxed, weights, np.stack(ends, 1).clip(0, 1))


def partners(known: Bool[np.ndarray, " b"]) -> Int64[np.ndarray, " b"]:
    """Return the row that each labelled row of a global batch is mixed with, -1 for none."""
    rows = np.flatnonzero(known)
    other = np.full(len(known), -1)
    if len(rows) > 1:
        places = np.arange(len(rows)) ^ 1
        places[places == len(rows)] = len(rows) - 2  # the last of an odd number
        other[rows] = rows[places]
    return other


def mix_images(
    crop: Float[Tensor, "rows 3 s s"], partners: Int64[np.ndarray, " own"], draws: Draws
) -> Float[Tensor, "own 3 s s"]:
    """Return the own rows of a crop, mixed with their partners' where they have one."""
    own, rows = crop[: len(partners)].clone(), np.flatnonzero(partners >= 0)
    if not len(rows):
        return own
    shares = _kept(draws, rows, crop.shape[-1])
    at, others, kept = send([rows, partners[rows], shares], crop.device)
    mixed = own.index_select(0, at) * kept + crop.index_select(0, others) * (1 - kept)
    return own.index_copy_(0, at, mixed)


def mix_labels(
    labels: Int64[np.ndarray, " rows"],
    partners: Int64[np.ndarray, " own"],
    shares: Float64[np.ndarray, " own"],
    classes: int,
) -> Float[Tensor, "own classes"]:
    """Return the classes of the own rows, shared with their partners', and 0 where unlabelled."""
    soft = F.one_hot(torch.from_numpy(labels) + 1, classes + 1)[:, 1:].float()
    own, rows = soft[: len(partners)].clone(), np.flatnonzero(partners >= 0)
    share = torch.from_numpy(shares[rows]).float()[:, None]
    own[rows] = share * own[rows] + (1 - share) * soft[partners[rows]]
    return own


def certain(soft: Float[Tensor, "b classes"]) -> Int64[np.ndarray, " b"]:
    """Return the class of rows that have one alone, two images of it or one, and -1 for others."""
    share, labels = soft.max(1)
    classes: Int64[np.ndarray, " b"] = labels.where(share > 1 - 1e-6, -1).numpy()
    return classes


def _kept(
    draws: Draws, rows: Int64[np.ndarray, " mixed"], side: int
) -> Float32[np.ndarray, "mixed 1 s s"]:
    """Return the share of the own image in every pixel of some rows."""
    top, bottom, left, right = draws.pixels(side)[rows].T[:, :, None]
    line = np.arange(side)
    down, across = (line >= top) & (line < bottom), (line >= left) & (line < right)
    outside = ~(down[:, :, None] & across[:, None, :])
    weights = np.broadcast_to(draws.weights[rows][:, None, None], outside.shape)
    kept = np.where(draws.boxed[rows][:, None, None], outside, weights)
    return np.asarray(kept[:, None], np.float32)
