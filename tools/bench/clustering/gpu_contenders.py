"""The contenders on a GPU. Each says when its rows are there, so that the copy is timed apart.

`passes` is how often a contender multiplies all rows by all centroids: iterations + 1 with a last
assignment, as DeepCluster makes it, or iterations without. Peers that need the rows on the host
(FAISS) or whose copy cannot be separated have it in their time: that is how they are used.
float32 is true float32 where the library lets us say so; flash-kmeans and cuVS take TF32 forms.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import processes
import torch

TILE = 8192
Arrived = Callable[[], None]
Result = tuple[object, int]  # centroids, passes


def to_gpu(rows: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """Rows on the GPU, copied block by block."""
    out = torch.empty(rows.shape, dtype=dtype, device="cuda")
    for at in range(0, len(rows), 2**18):
        out[at : at + 2**18] = torch.from_numpy(np.array(rows[at : at + 2**18]))
    return out


def ours(rows, start, iterations: int, dtype, arrived: Arrived) -> Result:
    """Our k-means by its public door."""
    from deepclust import kmeans

    x = to_gpu(rows, dtype)
    arrived()
    found = kmeans(x, len(start), iterations=iterations, init=start)
    return found.centroids, len(found.history) + 1


def faiss(rows, start, iterations: int, dtype, arrived: Arrived) -> Result:
    """`faiss.Kmeans(gpu=True)` over all rows, then its search."""
    import faiss

    if faiss.get_num_gpus() == 0:
        raise RuntimeError("this FAISS sees no GPU")
    x = np.ascontiguousarray(rows, np.float32)
    arrived()
    options = {"max_points_per_centroid": 10_000_000, "early_stop_threshold": -1.0}
    found = faiss.Kmeans(x.shape[1], len(start), niter=iterations, gpu=True, **options)
    found.train(x, init_centroids=start)
    found.assign(x)
    return found.centroids, iterations + 1


def flash(rows, start, iterations: int, dtype, arrived: Arrived) -> Result:
    """flash-kmeans: Triton kernels; centroids in the rows' dtype."""
    from flash_kmeans import batch_kmeans_Euclid

    x = to_gpu(rows, dtype)[None]
    first = torch.from_numpy(start).to(x)[None]
    arrived()
    _, centroids, done = batch_kmeans_Euclid(
        x, len(start), max_iters=iterations, tol=0.0, init_centroids=first
    )
    return centroids[0], done


def fast_pytorch(rows, start, iterations: int, dtype, arrived: Arrived) -> Result:
    """fast-pytorch-kmeans: builds a k x n mask."""
    from fast_pytorch_kmeans import KMeans

    x, first = to_gpu(rows, dtype), torch.from_numpy(start).to("cuda", dtype)
    arrived()
    found = KMeans(len(start), max_iter=iterations, tol=-1.0)
    found.fit_predict(x, centroids=first)
    return found.centroids, iterations


def cuml(rows, start, iterations: int, dtype, arrived: Arrived) -> Result:
    """KMeans of cuML, which wraps RAFT's and cuVS's."""
    from cuml.cluster import KMeans

    x = to_gpu(rows, dtype)
    arrived()
    options = {"n_init": 1, "tol": 0.0, "output_type": "numpy"}
    found = KMeans(n_clusters=len(start), init=start, max_iter=iterations, **options).fit(x)
    return found.cluster_centers_, iterations + 1


def cuvs(rows, start, iterations: int, dtype, arrived: Arrived) -> Result:
    """Plain k-means of cuVS."""
    from cuvs.cluster.kmeans import KMeansParams, fit

    x, first = to_gpu(rows, dtype), torch.from_numpy(start).to("cuda", dtype)
    arrived()
    options = {"init_method": "Array", "max_iter": iterations, "tol": 0.0}
    found = fit(KMeansParams(n_clusters=len(start), **options), x, centroids=first)
    return torch.as_tensor(found[0], device="cuda"), iterations + 1


def torch_loop(rows, start, iterations: int, dtype, arrived: Arrived) -> Result:
    """Ten lines of torch: tiles of a product, argmin, index_add in float32."""
    x, centroids = to_gpu(rows, dtype), torch.from_numpy(start).cuda()
    arrived()
    labels = torch.empty(len(x), dtype=torch.int64, device="cuda")
    for step in range(iterations + 1):
        squares, columns = centroids.square().sum(1), centroids.T.to(dtype)
        for at in range(0, len(x), TILE):
            labels[at : at + TILE] = (squares - 2 * (x[at : at + TILE] @ columns)).argmin(1)
        if step == iterations:
            break
        sums = torch.zeros_like(centroids).index_add_(0, labels, x.float())
        counts = torch.bincount(labels, minlength=len(centroids))[:, None]
        centroids = torch.where(counts > 0, sums / counts, centroids)
    return centroids, iterations + 1


GPU = {
    "ours-fp16": (ours, torch.float16), "ours-fp32": (ours, torch.float32),
    "faiss-gpu": (faiss, torch.float32),
    "flash-fp16": (flash, torch.float16), "flash-fp32": (flash, torch.float32),
    "fast-pytorch": (fast_pytorch, torch.float32), "cuml": (cuml, torch.float32),
    "cuvs": (cuvs, torch.float32), "torch-loop": (torch_loop, torch.float32),
}  # fmt: skip


def measure(job: dict) -> dict:
    """One contender in this process: a run of one iteration that isn't counted, then the run."""
    torch.set_float32_matmul_precision("highest")
    run, dtype = GPU[job["name"]]
    rows = np.load(job["rows"], mmap_mode="r")
    start = np.asarray(rows[np.load(job["ids"])], np.float32)
    run(rows, start, 1, dtype, lambda: None)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    times: list[float] = []

    def lap() -> None:
        torch.cuda.synchronize()
        times.append(time.perf_counter())

    lap()
    centroids, passes = run(rows, start, job["iterations"], dtype, lap)
    lap()
    if isinstance(centroids, torch.Tensor):
        centroids = centroids.float().cpu().numpy()
    np.save(job["centroids"], np.asarray(centroids, np.float32))
    return {
        "transfer": times[1] - times[0], "seconds": times[2] - times[1], "passes": passes,
        "torch_peak_GB": torch.cuda.max_memory_allocated() / 1e9,
        "half": dtype == torch.float16, "environment": processes.environment(),
    }  # fmt: skip
