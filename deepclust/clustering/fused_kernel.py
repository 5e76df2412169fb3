"""Triton kernels of the exact search on a GPU: what `fused.py` cannot say in torch.

`guess_nearest` multiplies rows by centroids in float16 with float32 sums, and keeps of every row
the best score, its centroid and the second-best score. The n x k scores stay in registers.
`decide_candidates` goes over the rows whose second-best is within the error bound. It makes their
scores again, and compares the centroids that can be nearest by float32 differences.

The idea of the first is that of flash attention and of flash-kmeans (arXiv 2603.09229). The bounds
and the second kernel are ours. This module imports Triton, so only `fused.py` may import it, and
only when it makes a search. The block sizes were chosen on paper: no GPU has measured them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# rows and centroids of a block, numbers of a row in one product, warps and stages
GUESS = {"ROWS": 128, "COLS": 64, "PART": 64, "num_warps": 8, "num_stages": 3}
DECIDE = {"ROWS": 16, "COLS": 32, "PART": 32, "num_warps": 4, "num_stages": 2}
PIECE = 8  # numbers of a row that one step of a difference takes


def guess_nearest(rows: Tensor, facts: Tensor, columns: Tensor, bias: Tensor) -> Tensor:
    """Return best score, second-best score and, as bits of an int32, the best centroid: [3, m].

    `rows` float16 [m, p] and `columns` float16 [k, p] are contiguous, p a multiple of 16. `facts`
    float32 [2, m]: the factor of a row's products, and its margin. `bias` float32 [k] is taken off.
    """
    out = torch.empty(3, len(rows), dtype=torch.float32, device=rows.device)
    sizes = (len(rows), len(columns), rows.shape[1])
    # else Triton launches on torch's present card, wherever the rows are
    with torch.cuda.device_of(rows):  # type: ignore[no-untyped-call]
        _guess[(triton.cdiv(len(rows), GUESS["ROWS"]),)](
            rows, facts, columns, bias, out, *sizes, **_blocks(GUESS, rows.shape[1])
        )
    return out


def decide_candidates(
    packed: tuple[Tensor, Tensor, Tensor, Tensor],
    exact: tuple[Tensor, Tensor],
    listed: tuple[Tensor, Tensor],
    out: Tensor,
) -> None:
    """Write nearest centroid and rival of the listed rows to `out`, int32 [2, m].

    `packed` are the arguments of `guess_nearest`, with the lowest score of a candidate as the
    second of the facts. `exact`: rows [m, d] and centroids [k, d] in float32. `listed`: numbers of
    rows int32 [m], and how many of these count, int32 [1], which stays on the device. A rival is a
    second centroid whose distance is too near to tell. -1: none, -2: several, or no number.
    """
    rows, columns = packed[0], packed[2]
    sizes = (len(rows), len(columns), rows.shape[1], exact[0].shape[1])
    with torch.cuda.device_of(rows):  # type: ignore[no-untyped-call]
        _decide[(triton.cdiv(len(rows), DECIDE["ROWS"]),)](
            *packed, *exact, *listed, out, *sizes, PIECE=PIECE, **_blocks(DECIDE, rows.shape[1])
        )


def _blocks(table: dict[str, int], width: int) -> dict[str, int]:
    """Return the block sizes of a kernel for rows of `width` numbers: no wider than the rows."""
    part = table["PART"]
    while width % part:
        part //= 2
    return table | {"PART": part}


@triton.jit
def _scores(x, facts, c, bias, row, own, column, m, k, width, PART: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the scores of a block of rows by a block of centroids; -inf beyond the last one."""
    rows_here, columns_here = own, column < k
    part = tl.arange(0, PART)
    x_at = x + row.to(tl.int64)[:, None] * width + part[None, :]
    c_at = c + column.to(tl.int64)[None, :] * width + part[:, None]
    products = tl.zeros((row.shape[0], column.shape[0]), tl.float32)
    for start in range(0, width, PART):
        left = tl.load(x_at + start, mask=rows_here[:, None], other=0.0)
        right = tl.load(c_at + start, mask=columns_here[None, :], other=0.0)
        products = tl.dot(left, right, products)
    factor = tl.load(facts + row, mask=rows_here, other=0.0)
    offset = tl.load(bias + column, mask=columns_here, other=float("inf"))
    return products * factor[:, None] - offset[None, :]


@triton.jit
def _guess(  # type: ignore[no-untyped-def]
    x, facts, c, bias, out, m, k, width,
    ROWS: tl.constexpr, COLS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    own = row < m
    lane = tl.arange(0, COLS)
    # every lane keeps its own best two, so that the lanes meet once, after the loop
    best = tl.full((ROWS, COLS), float("-inf"), tl.float32)
    second = tl.full((ROWS, COLS), float("-inf"), tl.float32)
    block = tl.zeros((ROWS, COLS), tl.int32)
    for start in range(0, k, COLS):
        score = _scores(x, facts, c, bias, row, own, start + lane, m, k, width, PART)
        second = tl.maximum(second, tl.minimum(best, score))
        block = tl.where(score > best, start, block)
        best = tl.maximum(best, score)
    ids = block + lane[None, :]
    top = tl.max(best, 1)
    nearest = tl.min(tl.where(best == top[:, None], ids, k), 1)
    rest = tl.where(ids == nearest[:, None], second, best)
    tl.store(out + row, top, mask=own)
    tl.store(out + m + row, tl.max(rest, 1), mask=own)
    tl.store(out + 2 * m + row, nearest.to(tl.float32, bitcast=True), mask=own)


@triton.jit
def _differences(x, c, row, own, column, k, dim, PIECE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return |x - c|^2 by differences, in float32."""
    piece = tl.arange(0, PIECE)
    x_at = x + row.to(tl.int64) * dim
    c_at = c + column.to(tl.int64) * dim
    total = tl.zeros((row.shape[0], column.shape[0]), tl.float32)
    for start in range(0, dim, PIECE):
        inside = start + piece < dim
        left = tl.load(
            x_at[:, None] + start + piece[None, :], mask=own[:, None] & inside[None, :], other=0.0
        )
        right = tl.load(
            c_at[:, None] + start + piece[None, :],
            mask=(column < k)[:, None] & inside[None, :], other=0.0,
        )  # fmt: skip
        apart = right[None, :, :] - left[:, None, :]
        total += tl.sum(apart * apart, 2)
    return total


@triton.jit
def _keep_three(apart, column, near, near_id, far, far_id, last):  # type: ignore[no-untyped-def]
    """Sort new distances into the lanes' threes; the third needs no id."""
    is_near, is_far = apart < near, apart < far
    last = tl.where(is_far, far, tl.minimum(last, apart))
    far = tl.where(is_near, near, tl.minimum(far, apart))
    far_id = tl.where(is_near, near_id, tl.where(is_far, column[None, :], far_id))
    near_id = tl.where(is_near, column[None, :], near_id)
    return tl.minimum(near, apart), near_id, far, far_id, last


@triton.jit
def _next_best(near, near_id, far, far_id, last, none):  # type: ignore[no-untyped-def]
    """Take the least distance, ties to the lowest id, out of the lanes' sorted threes."""
    least = tl.min(near, 1)
    chosen = tl.min(tl.where(near == least[:, None], near_id, none), 1)
    taken = near_id == chosen[:, None]
    near = tl.where(taken, far, near)
    near_id = tl.where(taken, far_id, near_id)
    far = tl.where(taken, last, far)
    last = tl.where(taken, float("inf"), last)
    return least, chosen, near, near_id, far, last


@triton.jit
def _decide(  # type: ignore[no-untyped-def]
    x, facts, c, bias, rows, centroids, listed, count, out, m, k, width, dim,
    PIECE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    how_many = tl.load(count)
    if tl.program_id(0) * ROWS < how_many:
        own = place < how_many
        row = tl.load(listed + place, mask=own, other=0)
        lane = tl.arange(0, COLS)
        floor = tl.load(facts + m + row, mask=own, other=float("inf"))
        near = tl.full((ROWS, COLS), float("inf"), tl.float32)
        far, last = near, near
        near_id = tl.broadcast_to(k + lane[None, :], (ROWS, COLS))
        far_id = near_id
        for start in range(0, k, COLS):
            column = start + lane
            score = _scores(x, facts, c, bias, row, own, column, m, k, width, PART)
            # "not below" keeps NaN; a bias of infinity marks what never counts
            able = tl.load(bias + column, mask=column < k, other=float("inf")) < float("inf")
            candidate = own[:, None] & able[None, :] & ((score < floor[:, None]) == 0)
            if tl.max(tl.max(candidate.to(tl.int32), 1), 0) > 0:
                apart = _differences(rows, centroids, row, own, column, k, dim, PIECE)
                apart = tl.where(candidate, apart, float("inf"))
                near, near_id, far, far_id, last = _keep_three(
                    apart, column, near, near_id, far, far_id, last
                )
        d1, first, near, near_id, far, last = _next_best(near, near_id, far, far_id, last, 2 * k)
        d2, second, near, near_id, far, last = _next_best(near, near_id, far, far_id, last, 2 * k)
        d3 = tl.min(near, 1)
        # both distances round, here and on the CPU: 4 (d + 4) u, and what falls below the normals
        reach = d1 * (1 + 4.04 * (dim + 4) * 5.9604645e-08) + dim * 2.350988e-38
        rival = tl.where(d3 <= reach, -2, tl.where(d2 <= reach, second, -1))
        rival = tl.where(d1 < float("inf"), rival, -2)
        tl.store(out + row, tl.where(d1 < float("inf"), first, 0), mask=own)
        tl.store(out + m + row, rival, mask=own)
