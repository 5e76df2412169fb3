"""An estimate as text: a table of stages, then memory, disk, network and what is assumed."""

from __future__ import annotations

from cluster_jobs.estimate import Estimate
from cluster_jobs.estimate.stages import Stage
from cluster_jobs.terminal import duration

HEADS = ("time", "share", "device", "host", "disk", "network")


def lines(made: Estimate) -> list[str]:
    """Return the lines of an estimate, at most 80 columns where no number is huge."""
    counts, sizes = made.counts, made.sizes
    work = f"{counts.samples:,} images, {counts.steps:,} steps"
    work += f", {counts.rounds:,} rounds" if counts.rounds else ""
    text = [f"{work}, on {made.ranks} rank{'s' if made.ranks > 1 else ''}", ""]
    text.append(f"  {'':<12}" + "".join(f"{head:>{_wide(head)}}" for head in HEADS))
    text += [_row(stage, made.total) for stage in made.stages]
    held = f"   {made.gpu_hours:,.1f} GPU-hours" if made.gpus else ""
    text += [f"  {'in all':<12}{duration(made.total):>{_wide('time')}}{held}", ""]
    text += [
        f"  memory of a rank   {_size(sizes.gpu)} on the device, {_size(sizes.host)} with readers",
        f"  memory in all      {_size(sizes.memory)} of all processes, beside GPUs",
        f"  disk               {_size(sizes.disk)} at the end, {_size(sizes.disk_peak)} at most",
    ]
    if sizes.step_traffic:
        text.append(f"  network            {_size(sizes.step_traffic)} a step from each rank")
    text += ["", "  device, host: of a rank, at the stage's peak. disk: written. network: in all"]
    text += ["", *(f"assumed: {one}" for one in made.assumptions)]
    return [*text, *(f"warning: {one}" for one in made.warnings)]


def _row(stage: Stage, total: float) -> str:
    """Return a stage's line of the table, with a dash for nothing."""
    numbers = (stage.device, stage.host, stage.disk, stage.network)
    cells = [duration(stage.seconds), f"{stage.seconds / total:.1%}"]
    cells += [_size(number) if number else "-" for number in numbers]
    pairs = zip(HEADS, cells, strict=True)
    return f"  {stage.name:<12}" + "".join(f"{cell:>{_wide(head)}}" for head, cell in pairs)


def _wide(head: str) -> int:
    return {"time": 14, "share": 8}.get(head, 10)


def _size(count: float) -> str:
    """Return bytes with a unit, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if round(count) < 1000 or unit == "PB":  # 999.6 has three digits as 1 of the next unit
            return f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError
