"""Verbs for one stage of a run, or for features from elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cluster_jobs.cli import going_on
from cluster_jobs.cli.common import Json, RunDir, examples, log, print_out

PANEL = "One stage"
verbs = typer.Typer()


@verbs.command(rich_help_panel=PANEL, epilog=examples("extract runs/a"))
def extract(run_dir: RunDir) -> None:
    """Do one stage of a run: extract the features of the round that is due."""
    _run_stage(run_dir, "extract")


Clusters = Annotated[
    str | None,
    typer.Option("--k", metavar="K[,K...]", help="The number of clusters; several are compared."),
]
Whiten = Annotated[int | None, typer.Option(help="PCA-whiten the rows to this many dimensions.")]
Iterations = Annotated[int, typer.Option(help="The number of updates of the centroids.")]
Seed = Annotated[int, typer.Option(help="The seed of the initial centroids.")]
Init = Annotated[str, typer.Option(help="The initial centroids: random, k-means++ or two-level.")]
Spherical = Annotated[
    bool, typer.Option("--spherical", help="Compare unit rows by their inner product.")
]
Empty = Annotated[str, typer.Option(help="How an empty cluster is refilled: split or relocate.")]
MinSize = Annotated[int, typer.Option(help="The smallest number of rows of a cluster.")]
Backend = Annotated[str, typer.Option(help="auto, torch or faiss.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Ids = Annotated[Path | None, typer.Option(help="The names of the rows: a text file or Parquet.")]
NewFolder = Annotated[Path | None, typer.Option(help="The new folder for the result.")]
Source = Annotated[
    Path,
    typer.Argument(
        metavar="RUN|FEATURES", help="A run, a file of features, or a folder of embed or vae."
    ),
]


@verbs.command(
    rich_help_panel=PANEL,
    epilog=examples(
        "cluster runs/a",
        "cluster features.npy --k 1000 --whiten 256 --out clusters",
        "cluster runs/a --k 50,100,200,500",
    ),
)
def cluster(
    source: Source,
    k: Clusters = None,
    out: NewFolder = None,
    whiten: Whiten = None,
    iterations: Iterations = 20,
    seed: Seed = 0,
    init: Init = "random",
    spherical: Spherical = False,
    empty: Empty = "split",
    min_size: MinSize = 1,
    backend: Backend = "auto",
    device: Device = "auto",
    ids: Ids = None,
    as_json: Json = False,
) -> None:
    """Cluster any features by k-means, or do the clustering stage of a run.

    The options are for features from elsewhere. A run has them in its recipe. With several numbers
    after --k, the features are clustered with each and the results are compared.
    """
    log(f"clustering {source}")
    from cluster_jobs.results import choose_k, cluster_file, vae_files

    source = vae_files.file_in(source)
    ks = choose_k.parse_ks(k)
    options = cluster_file.Options(
        ks[0] if ks else None,
        whiten,
        iterations,
        seed,
        init,
        spherical,
        empty,
        min_size,
        backend,
        device,
        ids,
    )
    if len(ks) > 1:
        compared = choose_k.compare(source, out, ks, options)
        if as_json:
            typer.echo(json.dumps(compared))
            return
        print_out(choose_k.summary(compared))
        choose_k.advise()
        return
    if not cluster_file.is_features(source):
        cluster_file.refuse_options(source, options, out)
        _run_stage(source, "cluster")
        return
    statistics = cluster_file.cluster_features(source, out, options)
    if as_json:
        typer.echo(json.dumps(statistics))
        return
    print_out(cluster_file.summary(statistics))
    log(f"wrote {out}")


@verbs.command(
    rich_help_panel=PANEL,
    epilog=examples(
        "vae resnet.npy vit.npy --out latents",
        "vae features_of_a features_of_b --out latents",
        "cluster latents --k 1000 --whiten 64 --out clusters",
        "vae runs/a/rounds/0003/features/rows.npy --latent 16 --out latents",
    ),
)
def vae(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="FEATURES|RUN ...",
            help="Rows (n x d) of the same images, one source a network: a .npy file, a folder of "
            "embed, or a run (its last round).",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="The folder for the result.")],
    latent: Annotated[int, typer.Option(help="The latents of each VAE.")] = 32,
    hidden: Annotated[int, typer.Option(help="The units of its hidden layers; 0: linear.")] = 128,
    beta: Annotated[float, typer.Option(help="The weight of the divergence from N(0, 1).")] = 1.0,
    epochs: Annotated[
        int, typer.Option(help="The passes over the rows; 0: 3000 steps, but 10 passes at least.")
    ] = 0,
    batch: Annotated[int, typer.Option(help="The rows of a step.")] = 256,
    lr: Annotated[float, typer.Option(help="Adam's rate.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="The seed of weights, order and noise.")] = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Turn features of one or several networks into latent means of VAEs, to cluster those.

    Given again, the command goes on where it was stopped.
    """
    log(f"reading {' '.join(map(str, sources))[:200]}")
    from cluster_jobs.results import vae_files
    from deepclust.clustering.vae import VaeOptions

    options = VaeOptions(latent, hidden, beta, epochs, batch, lr, seed)
    with going_on.resumed_by(going_on.typed_again):
        manifest = vae_files.build_vaes(sources, out, options, device)
    if as_json:
        typer.echo(json.dumps(manifest))
        return
    print_out(vae_files.summary(manifest, out))
    log(f"wrote {out / vae_files.FEATURES}")


@verbs.command(rich_help_panel=PANEL, epilog=examples("train runs/a"))
def train(run_dir: RunDir) -> None:
    """Do one stage of a run: train until the next round is due."""
    _run_stage(run_dir, "train")


def _run_stage(run_dir: Path, stage: str) -> None:
    log(f"{stage} of {run_dir}")
    from cluster_jobs import runs
    from cluster_jobs.display import Display

    with going_on.resumed_by(going_on.typed_again), Display() as display:
        runs.run_stage(run_dir, stage, display)
    log(f"{stage} is done: {run_dir}")
