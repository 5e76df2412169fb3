"""An estimate as text: a table of stages, then memory, disk, network and what is assumed."""

from __future__ import annotations

from cluster_jobs.estimate import Estimate
from cluster_jobs.terminal import duration


def lines(made: Estimate) -> list[str]:
    """Return the lines of an estimate, at most 80 columns where no number is huge."""
    counts, sizes = made.counts, made.sizes
    work = f"{counts.samples:,} images, {counts.steps:,} steps"
    work += f", {counts.rounds:,} rounds" if counts.rounds else ""
    text = [f"{work}, on {made.ranks} rank{'s' if made.ranks > 1 else ''}", ""]
    text += [
        f"  {stage:<14}{duration(took):>14}{took / made.total:>8.1%}"
        for stage, took in made.seconds.items()
    ]
    held = f"   {made.gpu_hours:,.1f} GPU-hours" if made.gpus else ""
    text += [f"  {'in all':<14}{duration(made.total):>14}{held}", ""]
    text += [
        f"  memory of a rank   {_size(sizes.gpu)} on the device, {_size(sizes.host)} with readers",
        f"  disk               {_size(sizes.disk)} at the end, {_size(sizes.disk_peak)} at most",
    ]
    if sizes.step_traffic:
        text.append(f"  network            {_size(sizes.step_traffic)} a step from each rank")
    text += ["", *(f"assumed: {one}" for one in made.assumptions)]
    return [*text, *(f"warning: {one}" for one in made.warnings)]


def _size(count: float) -> str:
    """Return bytes with a unit, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError
