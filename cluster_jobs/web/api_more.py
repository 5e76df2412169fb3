"""The API beyond the files of a run: members of a cluster, map, exports, estimate, comparison."""

from __future__ import annotations

import json
import os
import tempfile
import threading
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from starlette.responses import FileResponse, HTMLResponse, Response

from cluster_jobs.estimate import estimate
from cluster_jobs.estimate.devices import device_of
from cluster_jobs.report import write_comparison
from cluster_jobs.report.map import map_of
from cluster_jobs.web import members
from cluster_jobs.web.answers import Answer, NotThereError
from cluster_jobs.web.api import Head, RoundNumber, known_recipe, runs_of, views_of
from deepclust.errors import RecipeError
from deepclust.recipe import Recipe
from deepclust.run.directory import Run
from deepclust.stages.data_index import open_data_index
from deepclust.trained.trained_run import choose_round

router = APIRouter(prefix="/api")
EXPORTS = ("export", "evaluations")  # folders of a run whose files are handed out
Keys = Annotated[list[str], Query(max_length=200, description="such as train.epochs=3")]
_one_map = threading.Lock()  # a map takes seconds on all cores


@router.get("/runs/{name}/clusters/{cluster}/borderline")
def get_borderline(
    request: Request, name: str, cluster: int, round_: RoundNumber = None, head: Head = 0
) -> Response:
    """Return the images of a cluster for which another is nearly as near, at most 500."""
    run = runs_of(request).run(name)
    with views_of(request).open(run, round_, head) as view:
        return Answer(members.borderline(run, view, cluster))


@router.get("/runs/{name}/clusters/{cluster}/duplicates")
def get_duplicates(
    request: Request,
    name: str,
    cluster: int,
    round_: RoundNumber = None,
    head: Head = 0,
    similarity: Annotated[float, Query(gt=0, le=1, description="cosine")] = 0.98,
) -> Response:
    """Return groups of images of a cluster that are nearly alike."""
    run = runs_of(request).run(name)
    with views_of(request).open(run, round_, head) as view:
        return Answer(members.duplicates(run, view, cluster, similarity))


@router.get("/runs/{name}/clusters/{cluster}/lineage")
def get_lineage(
    request: Request,
    name: str,
    cluster: int,
    round_: RoundNumber = None,
    head: Head = 0,
    rounds: Annotated[int, Query(ge=1, le=100)] = 10,
) -> Response:
    """Return where a cluster's images were in the rounds before."""
    run = runs_of(request).run(name)
    with views_of(request).open(run, round_, head) as view:
        view.members(cluster)  # an error where there is no such cluster
        number = view.round
    return Answer({"lineage": members.lineage(run, number, head, cluster, rounds)})


@router.get("/runs/{name}/images/{sample}/neighbours")
def get_neighbours(
    request: Request,
    name: str,
    sample: int,
    within: Literal["cluster", "all"] = "cluster",
    limit: Annotated[int, Query(ge=1, le=100)] = 12,
) -> Response:
    """Return the images that are nearest to one by the features of the last round."""
    run = runs_of(request).run(name)
    with views_of(request).open(run, None, 0) as view:
        return Answer(members.neighbours(run, view, sample, within, limit))


@router.get("/runs/{name}/map")
def get_map(request: Request, name: str) -> Response:
    """Return at most 1,000 images of the last round with their places in two dimensions."""
    return Answer(mapped(request, runs_of(request).run(name)))


def mapped(request: Request, run: Run) -> dict[str, Any]:
    """Return how the map was made, and of each image its id, x, y and cluster; kept by round."""
    key, known = (run.path, choose_round(run, None)), request.app.state.maps
    with _one_map:
        if key not in known:
            made = map_of(run)
            if made is None:
                raise NotThereError(f"{run.path.name} keeps no features of its last round")
            way, ids, places, clusters = made
            rows = zip(ids.tolist(), places.tolist(), clusters.tolist(), strict=True)
            points = [[one, round(x, 3), round(y, 3), own] for one, (x, y), own in rows]
            while len(known) >= 4:
                known.pop(next(iter(known)))
            known[key] = {"way": way, "points": points}
        found: dict[str, Any] = known[key]
    return found


@router.get("/runs/{name}/exports")
def list_exports(request: Request, name: str) -> Response:
    """List the files of a run that can be downloaded: exported weights and evaluations."""
    return Answer({"files": list(exports(runs_of(request).run(name)))})


def exports(run: Run) -> dict[str, Path]:
    """Return the files in the export folders of a run, by folder and name."""
    folders = [run.path / name for name in EXPORTS if (run.path / name).is_dir()]
    found = [Path(one) for folder in folders for one in os.scandir(folder) if one.is_file()]
    return {f"{file.parent.name}/{file.name}": file for file in sorted(found)}


@router.get("/runs/{name}/exports/{folder}/{file}", response_class=FileResponse)
def get_export(request: Request, name: str, folder: str, file: str) -> Response:
    """Return a file that `list_exports` lists."""
    found = exports(runs_of(request).run(name)).get(f"{folder}/{file}")
    if found is None:
        raise NotThereError(f"{name} has no such export: see /api/runs/{name}/exports")
    return FileResponse(found, filename=f"{name}-{found.name}")


@router.get("/recipes/{recipe}")
def get_recipe(recipe: str, overrides: Keys = []) -> Response:  # noqa: B006
    """Return the resolved recipe, and the JSON schema of its keys."""
    chosen = Recipe.load(known_recipe(recipe), "data.shards=SHARDS", *overrides)
    schema = type(chosen).model_json_schema()
    return Answer({"recipe": chosen.show(), "schema": json.loads(json.dumps(schema, default=str))})


@router.get("/estimate")
def get_estimate(
    recipe: str,
    device: Annotated[str, Query(description="a GPU by name, such as h100")],
    overrides: Keys = [],  # noqa: B006
    samples: Annotated[int | None, Query(ge=1, le=2**40, description="or data.shards")] = None,
) -> Response:
    """Return what a run would take: seconds by stage, GPU-hours, memory, disk, network."""
    return Answer(estimated(recipe, device, overrides, samples).as_dict())


def estimated(recipe: str, device: str, overrides: list[str], samples: int | None) -> Any:
    """Return the estimate of a shipped recipe on a named device."""
    where = [] if samples is None else ["data.shards=not-read"]
    chosen = Recipe.load(known_recipe(recipe), *where, *overrides)
    source = samples if samples is not None else open_data_index(chosen.data)
    return estimate(chosen, source, device_of(device))


@router.get("/compare", response_class=HTMLResponse)
def compare(
    request: Request, run: Annotated[list[str], Query(min_length=2, max_length=20)]
) -> Response:
    """Return the page that compares runs by name."""
    return HTMLResponse(compared(request, run))


def compared(request: Request, names: list[str]) -> str:
    """Return the page that compares runs, which loads nothing."""
    if len(set(names)) < 2:
        raise RecipeError("choose two runs or more to compare")
    paths = [runs_of(request).run(name).path for name in names]
    with tempfile.TemporaryDirectory(prefix="deepclust-") as folder:
        return write_comparison(paths, Path(folder) / "compare.html").read_text("utf-8")


@router.get("/{rest:path}", include_in_schema=False)
def nothing(rest: str) -> Response:
    """Say that there is no such address."""
    raise NotThereError(f"there is no /api/{rest[:100]}: see /openapi.json")
