"""The check of memory: each stage within its estimate, and a round gives back what it took."""

from __future__ import annotations

import torch
from agreement import white_rows
from outcome import Outcome, Setting, judged

from cluster_jobs.estimate.counts import count
from cluster_jobs.estimate.network import measure
from cluster_jobs.estimate.sizes import sizes
from cluster_jobs.estimate.stages import stages
from deepclust import Recipe, kmeans
from deepclust.launch.start import prepare_run, run_stage
from deepclust.stages.cluster import release
from tests.tiny import tiny_recipe, tiny_shards

STAGES = {"extraction": "extract", "clustering": "cluster", "training": "train"}  # and commands
SETTINGS = ("backbone.name=resnet50", "data.size=128", "data.resize=146", "train.batch=128",
            "data.extract_batch=256", "cluster.k=100", "cluster.dim=256",
            "train.epochs=1")  # fmt: skip
SAMPLES = 2000
MOST_KEPT = 0.2e9  # bytes that torch may still hold after a round


def memory(setting: Setting) -> Outcome:
    """Compare each stage's peak with what the estimate prints, and ask what a k-means keeps."""
    shards = tiny_shards(setting.folder / "shards", SAMPLES)
    recipe = tiny_recipe(shards, f"train.device={setting.device.type}", *SETTINGS)
    printed = estimated(recipe, SAMPLES)  # before the stages, as users have it
    peaks = measured(setting, recipe)
    return compared(peaks, printed, kept_by_kmeans(setting.device))


def compared(peaks: dict[str, int], printed: dict[str, float], kept: int) -> Outcome:
    """Whether each peak is at most what was printed, and little is kept."""
    over = [name for name, peak in peaks.items() if peak > printed[name]]
    parts = [f"{name} {peaks[name] / 1e9:.2f} of {printed[name] / 1e9:.2f} GB" for name in peaks]
    text = f"{', '.join(parts)}; {kept / 1e9:.2f} GB kept after a round (0.2)"
    return judged(not over and kept <= MOST_KEPT, text, peaks=peaks, printed=printed, kept=kept)


def estimated(recipe: Recipe, samples: int) -> dict[str, float]:
    """The bytes of each stage on a rank's device, as `deepclust estimate` prints them."""
    network, counts = measure(recipe), count(recipe, samples)
    made = stages(recipe, counts, sizes(recipe, network, counts), dict.fromkeys(STAGES, 0.0), 0.0)
    return {stage.name: stage.device for stage in made}


def measured(setting: Setting, recipe: Recipe) -> dict[str, int]:
    """The most bytes of tensors in each stage, done alone; what was there before is not counted."""
    prepare_run(recipe, setting.folder / "run")
    peaks = {}
    for name, stage in STAGES.items():
        torch.cuda.reset_peak_memory_stats(setting.device)
        before = torch.cuda.memory_allocated(setting.device)
        run_stage(setting.folder / "run", stage)
        peaks[name] = torch.cuda.max_memory_allocated(setting.device) - before
    return peaks


def kept_by_kmeans(device: torch.device, rows: int = 200_000) -> int:
    """The bytes that torch still holds when a clustering is over."""
    before = torch.cuda.memory_reserved(device)
    kmeans(white_rows(rows, 128).half().numpy(), 500, iterations=3, device=device)
    release(device)
    return torch.cuda.memory_reserved(device) - before
