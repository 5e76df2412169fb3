"""Search for the nearest centroid of a tile's rows: exact on a CPU, on a GPU, or by FAISS.

`auto` is torch everywhere. It was compared on two CPU cores (`tools/bench/clustering`, kmeans-cpu
and kmeans-grid). There it takes less time than FAISS from 1,000 clusters on, and about as long for
300. With few rows or few clusters FAISS is faster. On a GPU FAISS keeps rows and sums on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from jaxtyping import Float32
from torch import Tensor

from deepclust.clustering.fused import FusedNearest, power_of_two, works_on
from deepclust.clustering.nearest import Nearest, first_of_equals, packed_columns, packed_rows
from deepclust.errors import ResourceError

Search: TypeAlias = Callable[[Tensor], Tensor]  # rows float32 [m, d] -> centroid ids int64 [m]


def torch_search(centroids: Float32[Tensor, "k d"], half: bool = False) -> Search:
    """Return the exact search of this device: `nearest.py` on a CPU, `fused.py` on a GPU.

    A GPU without Triton, or one that Triton does not serve, gets the product of `gpu_search`.
    """
    if not centroids.is_cuda:
        return Nearest(centroids)
    if works_on(centroids.device):
        return FusedNearest(centroids)
    return gpu_search(centroids, half)


def gpu_search(centroids: Float32[Tensor, "k d"], half: bool) -> Search:
    """Return a search that ranks by |e|^2 / 2 - (x - o).e, e = c - o, o the mean centroid.

    The usual |c|^2 - 2 x.c loses its digits when the rows are far from the origin. `half` (rows are
    float16): the product is of scaled float16 with float32 sums, on the tensor cores. Near-ties
    within the rounding may fall either way. Equal centroids go to the lowest id.
    """
    wide = centroids.double()
    origin = wide.mean(0).float()
    offsets = wide - origin
    bias = offsets.square().sum(1) / 2
    first = first_of_equals(centroids)
    if half:
        scale = power_of_two((2 * bias.max()).sqrt())  # brings the centroids into float16's range
        packed = packed_columns(-offsets.T * scale, bias * scale**2, torch.float16)
        nowhere = torch.zeros_like(origin)

        def search_half(rows: Tensor) -> Tensor:
            scaled = (rows - origin) * scale.float()
            tile = packed_rows(scaled, nowhere, len(packed), packed.dtype)
            return first[torch.mm(tile, packed, out_dtype=torch.float32).argmin(1)]

        return search_half
    columns, constant = -offsets.float().T.contiguous(), bias.float()

    def search(rows: Tensor) -> Tensor:
        return first[torch.addmm(constant, rows - origin, columns).argmin(1)]

    return search


def faiss_search(centroids: Float32[Tensor, "k d"], half: bool = False) -> Search:
    """Return the search of FAISS's `IndexFlatL2` on the CPU, wherever the rows are.

    FAISS for GPUs ends the process, without an error, on a card that it has no kernels for.
    """
    try:
        import faiss
    except (ImportError, OSError) as error:  # a missing library of a wheel is an OSError
        raise ResourceError(f"backend=faiss needs faiss ({error}): use backend=torch") from error
    index: Any = faiss.IndexFlatL2(centroids.shape[1])
    index.add(centroids.cpu().contiguous().numpy())
    first = first_of_equals(centroids)

    def search(rows: Tensor) -> Tensor:
        _, nearest = index.search(rows.cpu().contiguous().numpy(), 1)
        return first[torch.from_numpy(nearest[:, 0]).to(rows.device)]

    return search


SEARCHES = {"auto": torch_search, "torch": torch_search, "faiss": faiss_search}
