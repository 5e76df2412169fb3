"""Checks that run tests, the search at ImageNet's size, and the bench of a refresh."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from agreement import white_rows
from outcome import Outcome, Setting, judged

from cluster_jobs.estimate.devices import DEVICES
from deepclust import kmeans
from deepclust.clustering.array_points import ArrayPoints

ROOT = Path(__file__).resolve().parents[2]
ITERATIONS, MOST_S, PEAK = 20, 1.0, 0.25  # of k-means: its seconds, a pass's share of the peak


def gpu_tests(setting: Setting) -> Outcome:
    """Run the tests that need a GPU; a test that is skipped counts as a failure."""
    return pytest_of("-m", "gpu", "tests")


def long_waits(setting: Setting) -> Outcome:
    """Let ranks wait for a slow one longer than a collective may."""
    return pytest_of("tests/stages/test_long_stages.py", "tests/test_world.py")


def pytest_of(*words: str) -> Outcome:
    """Run tests, none of which may be skipped."""
    command = [sys.executable, "-m", "pytest", "-q", "-rs", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    last = (done.stdout.strip().splitlines() or ["no output"])[-1]
    passed = done.returncode == 0 and not re.search(r"\d+ skipped", last)
    return judged(passed, last, output=done.stdout[-4000:])


def kmeans_speed(setting: Setting, n: int = 1_281_167, k: int = 10_000) -> Outcome:
    """Time a pass at ImageNet's size against a plain loop of products, and 20 iterations."""
    rows = white_rows(n).half().to(setting.device)
    centroids = rows[:k].float()
    points = ArrayPoints(rows)
    points.check_finite()
    ours = seconds_of(lambda: points.assign_to(centroids, distances=False), setting.device)
    plain = seconds_of(lambda: plain_pass(rows, centroids), setting.device)
    rate = 2 * n * k * rows.shape[1] / ours / 1e12
    share = rate / peak_of(setting.device)
    whole = seconds_of(lambda: kmeans(rows, k, iterations=ITERATIONS), setting.device)
    text = (
        f"{ours:.3f} s a pass, {rate:.0f} TFLOP/s, {share:.0%} of the peak ({PEAK:.0%}), "
        f"{ours / plain:.2f} of a loop of products; {ITERATIONS} iterations {whole:.2f} s "
        f"({MOST_S})"
    )
    numbers = {"loop": plain, "tflops": rate, "share_of_peak": share, "iterations_s": whole}
    passed = ours <= plain and share >= PEAK and whole < MOST_S
    return judged(passed, text, seconds=ours, **numbers)


def peak_of(device: torch.device) -> float:
    """The published TFLOP/s of a card, or those of a large product of bfloat16 where none are."""
    name = torch.cuda.get_device_name(device).lower() if device.type == "cuda" else "cpu"
    published = [one.peak for one in DEVICES.values() if one.name in name.replace(" ", "")]
    if published:
        return published[0] / 1e12
    side = 8192 if device.type == "cuda" else 256
    square = torch.ones(side, side, dtype=torch.bfloat16, device=device)
    return 2 * side**3 / seconds_of(lambda: square @ square, device) / 1e12


def plain_pass(rows: torch.Tensor, centroids: torch.Tensor) -> None:
    """Scores in tiles and their largest, as a loop of torch has it."""
    bias, columns = centroids.square().sum(1) / -2, centroids.half().T.contiguous()
    for tile in rows.split(8192):
        (torch.mm(tile, columns).float() + bias).argmax(1)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """The shortest of three times, after one for what is made once."""
    times = []
    for _ in range(4):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times[1:])


def refresh(setting: Setting, n: int = 250_000) -> Outcome:
    """Run the bench of a whole refresh on the device, and print its stages."""
    file, device = setting.folder / "refresh.json", str(setting.device)
    command = [sys.executable, "tools/bench/refresh", "--n", str(n), "--device", device]
    done = subprocess.run(
        [*command, "--json", str(file)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    run = json.loads(file.read_text())["runs"][0] if file.exists() else {"error": done.stderr}
    if "error" in run:
        return judged(False, run["error"][-200:], output=done.stdout[-3000:])
    seconds = {stage["stage"]: round(stage["seconds"], 2) for stage in run["stages"]}
    text = ", ".join(f"{stage} {second}" for stage, second in seconds.items())
    return judged(run["device"] == device, f"seconds on {device}: {text}", seconds=seconds)
