"""The API under /api: what the verbs of the command line do, as JSON.

Routes are plain functions, which run in threads. Streams wait without one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, File, Query, Request, UploadFile
from pydantic import BaseModel, ConfigDict, Field
from starlette.background import BackgroundTask
from starlette.responses import FileResponse, Response, StreamingResponse

from cluster_jobs import runs as verbs
from cluster_jobs.results.assignments import export_assignments
from cluster_jobs.web.answers import Answer
from cluster_jobs.web.clusters import Views
from cluster_jobs.web.folder import Runs
from cluster_jobs.web.live import event_text, last_offset, lines_from, stream
from cluster_jobs.web.upload import Networks
from deepclust.errors import RecipeError
from deepclust.recipe.named import nearest
from deepclust.recipe.recipe import shipped
from deepclust.run.directory import Run
from deepclust.run.round_files import read_statistics

router = APIRouter(prefix="/api")
Offset = Annotated[int, Query(ge=0, le=2**53)]
Limit = Annotated[int, Query(ge=1, le=500)]
RoundNumber = Annotated[int | None, Query(alias="round", ge=0, le=2**31)]
Head = Annotated[int, Query(ge=0, le=2**16)]
RunSort = Literal["name", "state", "epoch", "loss", "nmi_labels", "images_per_s"]
Log = Literal["controller", "rank", "cluster-worker"]
Rank = Annotated[int, Query(ge=0, le=10**6)]
Lines = Annotated[int, Query(ge=1, le=10_000, description="the last ones")]


class Submission(BaseModel):
    """A run to submit: the name of a shipped recipe, or a recipe's own text."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(description="of the run, in the folder that is served")
    recipe: str = Field("", description="the name of a shipped recipe")
    text: str = Field("", description="a recipe as YAML, in place of a name")
    on: str = Field("local", pattern="^(local|ray|slurm)$")
    overrides: list[str] = Field(default=[], max_length=200)
    dry_run: bool = False


class Resumption(BaseModel):
    """How a run is continued."""

    model_config = ConfigDict(extra="forbid")
    on: str = Field("local", pattern="^(local|ray|slurm)$")
    overrides: list[str] = Field(default=[], max_length=200)


def runs_of(request: Request) -> Runs:
    """Return the runs that the server shows."""
    runs: Runs = request.app.state.runs
    return runs


def views_of(request: Request) -> Views:
    """Return the clusterings that the server keeps."""
    views: Views = request.app.state.views
    return views


@router.get("/runs")
def list_runs(
    request: Request,
    state: str = "",
    text: str = "",
    sort: RunSort = "name",
    descending: bool = False,
    offset: Offset = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Response:
    """List the runs, by state and by a text in their name, sorted."""
    total, page = runs_of(request).page(state, text, offset, limit, sort, descending)
    return Answer({"total": total, "runs": [one.as_dict() for one in page]})


@router.get("/runs/{name}")
def get_run(request: Request, name: str) -> Response:
    """Return the status of a run."""
    runs = runs_of(request)
    return Answer(runs.status(runs.run(name)).as_dict())


@router.get("/runs/{name}/recipe")
def get_recipe(request: Request, name: str) -> Response:
    """Return the recipe of a run as YAML, without its secrets."""
    return Response(runs_of(request).run(name).recipe.show(), media_type="application/yaml")


@router.get("/runs/{name}/metrics")
def get_metrics(
    request: Request,
    name: str,
    kind: str = "train",
    first: Offset = 0,
    last: Annotated[int | None, Query(ge=0, le=2**53)] = None,
    points: Annotated[int, Query(ge=1, le=10_000)] = 1000,
) -> Response:
    """Return the metrics of steps `first` to `last`, of them at most so many, evenly spaced."""
    records = runs_of(request).run(name).metrics(kind)
    chosen = [r for r in records if first <= r["step"] and (last is None or r["step"] <= last)]
    return Answer({"total": len(chosen), "metrics": thinned(chosen, points)})


def thinned(records: Sequence[Any], most: int) -> list[Any]:
    """Return at most so many records, evenly spaced, with the first and the last."""
    if len(records) <= most:
        return list(records)
    places = np.linspace(len(records) - 1, 0, most).round().astype(int)[::-1]
    return [records[place] for place in places]


@router.get("/runs/{name}/events")
def get_events(
    request: Request, name: str, offset: Offset = 0, limit: Annotated[int, Query(ge=1)] = 1000
) -> Response:
    """Return the events of a run, oldest first."""
    events = runs_of(request).run(name).events()
    return Answer({"total": len(events), "events": events[offset:][:limit]})


@router.get("/runs/{name}/events/stream", response_class=StreamingResponse)
def stream_events(request: Request, name: str) -> Response:
    """Stream the events of a run, each a JSON object, until the run has ended."""
    run = runs_of(request).run(name)
    return _streamed(request, run, run.path / "events.jsonl", None)


@router.get("/runs/{name}/logs")
def get_logs(
    request: Request,
    name: str,
    log: Log = "rank",
    rank: Rank = 0,
    lines: Lines = 200,
) -> Response:
    """Return the last lines of a log as plain text."""
    file = log_of(runs_of(request).run(name), log, rank)
    text, _ = lines_from(file, last_offset(file, lines))
    return Response("".join(f"{line}\n" for _, line in text), media_type="text/plain")


@router.get("/runs/{name}/logs/stream", response_class=StreamingResponse)
def stream_logs(
    request: Request,
    name: str,
    log: Log = "rank",
    rank: Rank = 0,
    lines: Lines = 200,
) -> Response:
    """Stream the last lines of a log and those that follow, until the run has ended."""
    run = runs_of(request).run(name)
    return _streamed(request, run, log_of(run, log, rank), lines)


def log_of(run: Run, log: Log, rank: int) -> Path:
    """Return the file of a log."""
    names = {"controller": "controller.log", "cluster-worker": "cluster-worker.out"}
    return run.path / "logs" / names.get(log, f"rank-{rank:05d}.log")


def _streamed(request: Request, run: Run, file: Path, lines: int | None) -> Response:
    runs, seen = runs_of(request), request.headers.get("last-event-id", "")
    first = 0 if lines is None else last_offset(file, lines)
    offset = int(seen) if seen.isascii() and seen.isdecimal() and len(seen) < 17 else first

    def is_over() -> bool:
        return runs.is_over(run)

    headers = {"X-Accel-Buffering": "no"}
    is_log = lines is not None
    body = stream(file, offset, is_over) if is_log else stream(file, offset, is_over, event_text)
    return StreamingResponse(body, media_type="text/event-stream", headers=headers)


@router.get("/runs/{name}/rounds")
def get_rounds(request: Request, name: str) -> Response:
    """Return the statistics of every finished round."""
    run = runs_of(request).run(name)
    rounds = [{**read_statistics(run, one), "round": one} for one in run.rounds()]
    return Answer({"rounds": rounds})


@router.get("/runs/{name}/clusters")
def get_clusters(
    request: Request,
    name: str,
    round_: RoundNumber = None,
    head: Head = 0,
    sort: str = "size",
    descending: bool = True,
    text: Annotated[str, Query(max_length=500, description="in the name of its class")] = "",
    least: Annotated[int, Query(ge=0, le=2**53, description="images")] = 0,
    offset: Offset = 0,
    limit: Limit = 50,
) -> Response:
    """Return a page of the clusters of a round (default: the last), sorted and filtered."""
    with views_of(request).open(runs_of(request).run(name), round_, head) as view:
        return Answer(view.page(sort, descending, offset, limit, text, least))


@router.get("/runs/{name}/clusters/{cluster}/images")
def get_images(
    request: Request,
    name: str,
    cluster: int,
    round_: RoundNumber = None,
    head: Head = 0,
    order: str = "near",
    offset: Offset = 0,
    limit: Limit = 50,
) -> Response:
    """Return a page of a cluster's images: near its centre first, or far from it."""
    with views_of(request).open(runs_of(request).run(name), round_, head) as view:
        return Answer({**view.cluster(cluster), **view.images(cluster, order, offset, limit)})


@router.get("/runs/{name}/images/{sample}")
def get_image(request: Request, name: str, sample: int) -> Response:
    """Return the key, cluster and class of an image."""
    with views_of(request).open(runs_of(request).run(name), None, 0) as view:
        return Answer(view.image(sample))


@router.get("/runs/{name}/images/{sample}/picture")
def get_picture(
    request: Request,
    name: str,
    sample: int,
    side: Annotated[int, Query(ge=16, le=1024)] = 256,
) -> Response:
    """Return an image as JPEG, its longer side at most `side` pixels."""
    with views_of(request).open(runs_of(request).run(name), None, 0) as view:
        picture = view.picture(sample, side)
    headers = {"Cache-Control": "private, max-age=600"}
    return Response(picture, media_type="image/jpeg", headers=headers)


@router.get("/runs/{name}/search")
def search(
    request: Request, name: str, key: Annotated[str, Query(min_length=1, max_length=500)]
) -> Response:
    """Return the images with a text in their key, at most 200."""
    with views_of(request).open(runs_of(request).run(name), None, 0) as view:
        return Answer({"images": view.search(key)})


@router.post("/runs/{name}/predict")
def predict(request: Request, name: str, image: Annotated[UploadFile, File()]) -> Response:
    """Return the cluster of an image, and the images of the run that are nearest to it."""
    return Answer(predicted(request, name, image.file.read()))


def predicted(request: Request, name: str, data: bytes) -> dict[str, Any]:
    """Return the answer of a run's network to an image."""
    networks: Networks = request.app.state.networks
    return networks.predict(runs_of(request).run(name), data)


@router.get("/runs/{name}/assignments.{suffix}", response_class=FileResponse)
def get_assignments(
    request: Request, name: str, suffix: Literal["csv", "parquet"], round_: RoundNumber = None
) -> Response:
    """Return which image is in which cluster, as one table."""
    run = runs_of(request).run(name)
    folder = tempfile.TemporaryDirectory(prefix="deepclust-")
    file = Path(folder.name) / f"assignments.{suffix}"
    try:
        if run.recipe.cluster is None:
            raise RecipeError(f"{name} has no rounds: deepclust assignments asks its network")
        export_assignments(run.path, file, round_)
    except BaseException:
        folder.cleanup()
        raise
    done = BackgroundTask(folder.cleanup)
    return FileResponse(file, filename=f"{run.path.name}.{suffix}", background=done)


@router.get("/recipes")
def list_recipes() -> Response:
    """List the recipes that are shipped."""
    return Answer({"recipes": shipped()})


@router.post("/runs")
def submit(request: Request, submission: Submission) -> Response:
    """Submit a run by a recipe, and return its plan."""
    return Answer({"name": submission.name, "plan": submitted(request, submission)}, 201)


def known_recipe(name: str) -> str:
    """Return the name of a shipped recipe, or raise `RecipeError`: never a path."""
    if name not in shipped():
        raise RecipeError(f"no recipe {name[:100]!r}{nearest(name, shipped())}")
    return name


def submitted(request: Request, wanted: Submission) -> str:
    """Submit a run, or only plan it, and return its plan."""
    run_dir = runs_of(request).new(wanted.name)
    if bool(wanted.recipe) == bool(wanted.text):
        raise RecipeError("give the name of a recipe, or a recipe's text")
    if wanted.recipe:
        known_recipe(wanted.recipe)
    with tempfile.TemporaryDirectory(prefix="deepclust-") as folder:
        source = wanted.recipe
        if wanted.text:
            source = str(Path(folder) / "recipe.yaml")
            Path(source).write_text(wanted.text, "utf-8", errors="replace")
        made = verbs.submit(source, run_dir, wanted.on, wanted.overrides, wanted.dry_run)
        return str(made)


@router.post("/runs/{name}/cancel")
def cancel(request: Request, name: str) -> Response:
    """Stop a run at its next step."""
    return Answer({"text": cancelled(request, name)})


def cancelled(request: Request, name: str) -> str:
    """Stop a run, and return what became of it."""
    return " ".join(verbs.cancel(runs_of(request).run(name).path))


@router.post("/runs/{name}/resume")
def resume(request: Request, name: str, how: Resumption | None = None) -> Response:
    """Continue a run in the background."""
    how = how or Resumption()
    verbs.resume(runs_of(request).run(name).path, how.overrides, how.on)
    return Answer({"text": f"{name} is resumed"})
