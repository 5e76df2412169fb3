"""kNN and the linear probe on many wide features, beside scikit-learn: seconds and peak memory.

    python tools/bench/evaluate_large.py --rows 200000 --dim 2048

Features are drawn around class centres into a memory-mapped float32 .npy. Every measurement is a
process of its own, ours and scikit-learn's in turn, and the numbers are printed as they come.
Memory is what a process has allocated itself at its peak (RssAnon), without the mapped file, less
what it had before the work. scikit-learn's kNN is brute force by cosine with our votes. Its
regression is StandardScaler and one fit of LogisticRegression with the C that ours has chosen. Ours
makes five fits, as it chooses C from four on a tenth of the rows held out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

POLL_S = 0.02
BLOCK = 8192  # rows that are drawn at a time


def main() -> None:
    """Draw the features, and measure each way in its own process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--test", type=int, default=2000)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--with", dest="with_", default="knn,linear")
    parser.add_argument("--child", nargs=3, metavar=("WAY", "FOLDER", "C"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.child[0], Path(args.child[1]), float(args.child[2]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder), args)
        for _ in range(args.repeats):
            for name in args.with_.split(","):
                strength = 1.0
                for peer in ("ours", "sklearn"):
                    result = child(f"{peer}_{name}", folder, strength)
                    strength = result.get("C", strength)
                    print(json.dumps({"way": f"{peer} {name}", **result}), flush=True)


def draw(folder: Path, args: argparse.Namespace) -> None:
    """Write train.npy, test.npy and their labels: noise around the centres of classes."""
    random = np.random.default_rng(0)
    centres = random.normal(size=(args.classes, args.dim)).astype(np.float32)
    for name, n in (("train", args.rows), ("test", args.test)):
        labels = random.integers(0, args.classes, n)
        rows = np.lib.format.open_memmap(
            folder / f"{name}.npy", mode="w+", dtype=np.float32, shape=(n, args.dim)
        )
        for start in range(0, n, BLOCK):
            part = labels[start : start + BLOCK]
            noise = random.standard_normal((len(part), args.dim), dtype=np.float32)
            rows[start : start + BLOCK] = centres[part] + 12 * noise
        rows.flush()
        np.save(folder / f"{name}-labels.npy", labels)


def child(way: str, folder: str, strength: float) -> dict[str, float]:
    """Return what a process of its own measures."""
    command = [sys.executable, __file__, "--child", way, folder, str(strength)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(way: str, folder: Path, strength: float) -> dict[str, float]:
    """Return the score of one way, its seconds and the peak of its memory, GB."""
    x, test = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("train", "test"))
    y, wanted = (np.load(folder / f"{name}-labels.npy") for name in ("train", "test"))
    work = WAYS[way]()  # imports, outside of the clock
    peak, stop, before = [0], threading.Event(), anonymous()
    watcher = threading.Thread(target=watch, args=(peak, stop))
    watcher.start()
    began = time.perf_counter()
    scores = work(x, y, test, wanted, strength)
    seconds = time.perf_counter() - began
    stop.set()
    watcher.join()
    return {**scores, "seconds": round(seconds, 1), "gb": round((peak[0] - before) / 1e9, 2)}


def watch(peak: list[int], stop: threading.Event) -> None:
    """Keep the most memory that this process has had."""
    while not stop.wait(POLL_S):
        peak[0] = max(peak[0], anonymous())


def anonymous() -> int:
    """Return the bytes that this process has allocated itself."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon: this needs Linux")


Work = Callable[..., dict[str, float]]


def ours(name: str) -> Callable[[], Work]:
    """Return what makes one of our evaluators."""

    def make() -> Work:
        from deepclust.evaluate import evaluate_features

        def work(x, y, test, wanted, strength):  # type: ignore[no-untyped-def]
            values = evaluate_features((x, y), (test, wanted), [name])[name]
            return {key: values[key] for key in ("top1", "C", "converged") if key in values}

        return work

    return make


def sklearn_knn() -> Work:
    """Return brute-force cosine neighbours with the votes of ours."""
    from sklearn.neighbors import KNeighborsClassifier

    def work(x, y, test, wanted, strength):  # type: ignore[no-untyped-def]
        model = KNeighborsClassifier(
            20, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
        )
        return {"top1": float(model.fit(x, y).score(test, wanted))}

    return work


def sklearn_linear() -> Work:
    """Return one fit of a logistic regression on standardised rows."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def work(x, y, test, wanted, strength):  # type: ignore[no-untyped-def]
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=500))
        return {"top1": float(model.fit(x, y).score(test, wanted))}

    return work


WAYS: dict[str, Callable[[], Work]] = {
    "ours_knn": ours("knn"),
    "sklearn_knn": sklearn_knn,
    "ours_linear": ours("linear"),
    "sklearn_linear": sklearn_linear,
}

if __name__ == "__main__":
    main()
