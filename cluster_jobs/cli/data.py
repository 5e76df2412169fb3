"""Verbs that pack and index images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cluster_jobs.cli.common import begun, examples, log
from deepclust.errors import redact

PANEL = "Data"
verbs = typer.Typer()


@verbs.command(
    rich_help_panel=PANEL,
    epilog=examples(
        "pack photos shards --workers 8",
        "pack photos.zip more/ shards --classes last",
        "pack labels.csv shards --range 0:4095",
        "pack idx:fashion/train shards",
    ),
)
def pack(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Folders of images; lists (.txt, .csv) or .parquet of them; a .zip or .tar.gz; "
            "idx:DIR/train; torchvision:NAME:SPLIT@DIR."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The folder for the shards.")],
    workers: Annotated[
        int, typer.Option(help="The threads; the bytes are the same for any number.")
    ] = 1,
    seed: Annotated[int, typer.Option(help="The seed of the shuffle.")] = 0,
    resize_short: Annotated[
        int | None, typer.Option(help="The short side of every image, in pixels.")
    ] = None,
    shard_size: Annotated[int | None, typer.Option(help="The samples of a shard.")] = None,
    classes: Annotated[
        str,
        typer.Option(help="none, first, last or full folder, or a file with a class name a line."),
    ] = "",
    range_: Annotated[
        str,
        typer.Option("--range", help="Black and white of more than 8 bits: auto, full, LOW:HIGH."),
    ] = "auto",
) -> None:
    """Write images as shuffled tar shards, index them, and say what was left out."""
    shape = {"resize_short": resize_short, "shard_size": shard_size}
    rules = {"classes": classes, "range": range_}
    log(f"packing into {out}")
    from deepclust.data.pack.pack import pack as pack_images

    index = pack_images(sources, out, emit=log, workers=workers, seed=seed, **shape, **rules)
    log(f"{len(index)} samples in {len(index.shards)} shards: {out}")


@verbs.command(
    rich_help_panel=PANEL,
    epilog=examples(
        "index shards",
        "index 's3://bucket/train-{000..146}.tar' --index i",
        "index 'shards/**/*.tar' --image input.jpg --labels json.class",
        "index photos --labels last",
    ),
)
def index(
    shards: Annotated[
        list[str],
        typer.Argument(help="Folders of tar shards or images, lists, patterns with *, or URLs."),
    ],
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Read headers and labels again; compare with every row."),
    ] = False,
    bodies: Annotated[
        bool,
        typer.Option("--bodies", help="Hash all bytes too, so that --verify compares images."),
    ] = False,
    at: Annotated[
        Path | None, typer.Option("--index", help="The folder of the index; default: the shards'.")
    ] = None,
    image: Annotated[str, typer.Option(help="As data.image: auto, or input.jpg.")] = "auto",
    labels: Annotated[
        str, typer.Option(help="As data.labels: auto, none, folder, cls, json.KEY; last, FILE.")
    ] = "auto",
) -> None:
    """Index WebDataset shards of any origin, or image files, and say what is left out."""
    rules: dict[str, Any] = {"verify": verify, "bodies": bodies, "image": image, "labels": labels}
    begun(f"indexing {redact(' '.join(shards))[:200]}")
    from deepclust.data.shards import summary
    from deepclust.data.shards.index import build_index

    built = build_index(shards[0] if len(shards) == 1 else shards, at, **rules)
    for note in built.notes():
        log(f"note: {note}")
    labelled = summary.describe_labels(built.manifest)
    log(f"{len(built)} samples in {len(built.shards)} shards, {labelled}, {built.fingerprint}")
    if verify:
        log(summary.describe_check(built.manifest))
