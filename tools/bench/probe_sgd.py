"""The probes by SGD and by L-BFGS beside scikit-learn's, on Fashion-MNIST's 60,000 training images.

    python tools/bench/probe_sgd.py [--fashion FOLDER] [--dim 128]

Features are pixels on their first principal directions. scikit-learn's peer is StandardScaler and
LogisticRegression with C = 1. It ends with 1 where SGD and the peer differ by more than 0.3 points.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from deepclust.data.pack.idx import read_idx
from deepclust.evaluate.frozen import freeze
from deepclust.evaluate.linear import MAX_ITERATIONS, TOLERANCE, linear
from deepclust.evaluate.sgd import linear_sgd

MOST = 0.003  # share of the test images


def main() -> int:
    """Measure the three, print one line each, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fashion", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--dim", type=int, default=128)
    args = parser.parse_args()
    (x, y), (tx, ty) = (split(args.fashion / name) for name in ("train", "t10k"))
    pca = PCA(args.dim, svd_solver="covariance_eigh", random_state=0).fit(x)
    x, tx = (pca.transform(rows).astype(np.float32) for rows in (x, tx))
    frozen, scores = freeze((x, y), (tx, ty)), {}
    for name, probe in (("linear_sgd", linear_sgd), ("linear", linear)):
        began = time.perf_counter()
        told = dict(probe(frozen))
        scores[name] = float(told["top1"])
        print(json.dumps({"way": name, "seconds": time.perf_counter() - began, **told}), flush=True)
    began = time.perf_counter()
    model = LogisticRegression(tol=TOLERANCE, max_iter=MAX_ITERATIONS)
    peer = make_pipeline(StandardScaler(), model).fit(x, y).score(tx, ty)
    print(json.dumps({"way": "scikit-learn", "seconds": time.perf_counter() - began, "top1": peer}))
    return int(abs(scores["linear_sgd"] - peer) > MOST)


def split(prefix: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return pixels float32 [n, 784] and labels of one of the set's files."""
    files = read_idx(prefix)
    assert files.labels is not None
    return files.images.reshape(len(files.images), -1).astype(np.float32), files.labels


if __name__ == "__main__":
    sys.exit(main())
