"""The pages of runs for a browser: HTML that the server writes, readable without a script."""

from __future__ import annotations

import math
from importlib.resources import files
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Depends, File, Query, Request, UploadFile
from starlette.responses import HTMLResponse, RedirectResponse, Response

from cluster_jobs import job_file
from cluster_jobs import runs as verbs
from cluster_jobs.estimate.devices import DEVICES
from cluster_jobs.estimate.show import lines
from cluster_jobs.report.map import has_map
from cluster_jobs.status import Status
from cluster_jobs.web import api, api_more
from cluster_jobs.web.answers import NotThereError
from cluster_jobs.web.api import Offset, RunSort, runs_of
from cluster_jobs.web.folder import SORTS
from cluster_jobs.web.form import overrides_of, sections_of
from cluster_jobs.web.html import (
    EACH,
    LIVE,
    Part,
    cell,
    curve,
    field,
    form,
    images_of,
    next_links,
    page,
    refresh_of,
    run_path,
)
from cluster_jobs.web.live import last_offset, lines_from
from cluster_jobs.web.reports import Reports
from deepclust.recipe import shipped
from deepclust.run.directory import Run

router = APIRouter(include_in_schema=False)
STATES = ["", "PENDING", "RUNNING", "RECOVERING", "SUCCEEDED", "STOPPED", "FAILED", "DIED"]
OF_REPORT = (  # it holds its style and script, both ours, and every value in it is escaped
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; frame-ancestors 'none'; form-action 'none'"
)
WHERE = ("local", "ray", "slurm")
OF_A_RUN = (  # fields of a status, as its page names them
    ("phase", "Phase"), ("round", "Round"), ("epoch", "Epoch"), ("epochs", "of epochs"),
    ("step", "Step"), ("loss", "Loss"), ("images_per_s", "Images a second"),
    ("clusters", "Clusters with images"), ("k", "k"), ("reassigned", "Share reassigned"),
    ("nmi_labels", "NMI to labels"), ("collapse", "Collapse"), ("owner", "Controller"),
    ("reason", "What to know"), ("exit_code", "Exit code"),
)  # fmt: skip
LOG_LINES = 15


async def sent_form(request: Request) -> dict[str, str]:
    """Return the texts of a form."""
    sent = await request.form(max_files=0, max_fields=1000)
    return {key: value for key, value in sent.items() if isinstance(value, str)}


@router.get("/")
def list_runs(
    request: Request,
    state: str = "",
    text: str = "",
    sort: RunSort = "name",
    offset: Offset = 0,
) -> Response:
    """Show the runs."""
    total, chosen = runs_of(request).page(state, text, offset, EACH, sort, sort != "name")
    rows = [
        [cell(one.name, check="run"), cell(one.name, run_path(one.name)),
         cell(one.state, state=True), cell(one.phase), cell(_share(one)), cell(one.loss),
         cell(one.nmi_labels), cell(one.reason)]
        for one in chosen
    ]  # fmt: skip
    fields = [
        field("A part of the name", "text", value=text),
        field("State", "state", options=STATES, value=state),
        field("Sort by", "sort", options=SORTS, value=sort),
    ]
    columns = ["Compare", "Run", "State", "Phase", "Epoch", "Loss", "NMI to labels", "What to know"]
    return page(
        "Runs", columns=columns, rows=rows, forms=[form("/", "Show", fields)],
        choose={"action": "/compare", "button": "Compare the chosen runs"},
        after=next_links("/", offset, total, state=state, text=text, sort=sort),
        note="" if rows else "There are no such runs in this folder.",
        refresh=refresh_of(*(one.state for one in chosen)),
    )  # fmt: skip


def _share(status: Status) -> str:
    epoch = 0.0 if status.epoch is None else status.epoch
    return f"{epoch:.3g} of {status.epochs}"


@router.get("/runs/{name}")
def show_run(request: Request, name: str) -> Response:
    """Show the status of a run, its curves, its newest log lines, and where the rest is."""
    run = runs_of(request).run(name)
    status = runs_of(request).status(run)
    known = [(title, getattr(status, key)) for key, title in OF_A_RUN]
    rows = [[cell(title), cell(value)] for title, value in known if value not in (None, "")]
    done = min(1.0, (status.epoch or 0.0) / max(1, status.epochs))
    done = 1.0 if status.state == "SUCCEEDED" else done
    return page(
        name, crumbs=[cell("Runs", "/")], columns=["Fact", "Value"], rows=rows,
        links=_links(run, name),
        curves=_curves(run), text=_log(run), text_title="The newest lines of the log",
        forms=[] if request.app.state.read_only else _forms(run_path(name), status.state),
        progress={"state": status.state, "value": done, "text": f"{done:.0%} of the epochs"},
        refresh=refresh_of(status.state), stream=f"/api{run_path(name)}/events/stream",
    )  # fmt: skip


def _links(run: Run, name: str) -> list[Part]:
    here = run_path(name)
    return [
        cell("Clusters", f"{here}/clusters"),
        cell("Search by key", f"{here}/search"),
        *(cell("Map", f"{here}/map") for _ in range(has_map(run))),
        cell("Report", f"{here}/report"),
        cell("Log", f"/api{here}/logs"),
        cell("Recipe", f"/api{here}/recipe"),
        cell("Assignments as CSV", f"/api{here}/assignments.csv"),
        cell("Assignments as Parquet", f"/api{here}/assignments.parquet"),
        *(cell(file, f"/api{here}/exports/{quote(file)}") for file in api_more.exports(run)),
    ]


def _curves(run: Run) -> list[Part]:
    """Return the curves of a run: by epoch from its metrics, by round from its events."""
    trained = run.metrics("train")
    rounds = [event for event in run.events() if event["event"] == "clustered"]
    made = [
        curve("Loss", "epoch", _pairs(trained, "epoch", "loss")),
        curve("Images a second", "epoch", _pairs(trained, "epoch", "images_per_s")),
        curve("NMI to labels", "round", _pairs(rounds, "round", "nmi_labels")),
        curve("Share reassigned", "round", _pairs(rounds, "round", "reassigned")),
    ]
    return [one for one in made if one is not None]


def _pairs(records: list[dict[str, Any]], x: str, y: str) -> list[tuple[float, float]]:
    known = [(record.get(x), record.get(y)) for record in records]
    return [
        (float(a), float(b))
        for a, b in known
        if isinstance(a, int | float) and isinstance(b, int | float) and math.isfinite(b)
    ]


def _log(run: Run) -> str:
    """Return the newest lines of the log of rank 0."""
    file = api.log_of(run, "rank", 0)
    if not file.exists():
        return ""
    return "\n".join(line for _, line in lines_from(file, last_offset(file, LOG_LINES))[0])


def _forms(here: str, state: str) -> list[Part]:
    """Return what can be done with a run: cancel or resume it, and ask it about an image."""
    image = field("An image, for its cluster", "image", "file", required=True)
    ask = form(f"{here}/predict", "Ask", [image], "post") | {"enctype": "multipart/form-data"}
    verb = "cancel" if state in LIVE else "resume" if state != "SUCCEEDED" else None
    return [ask] if verb is None else [ask, form(f"{here}/{verb}", verb.capitalize(), (), "post")]


@router.post("/runs/{name}/cancel")
def cancel(request: Request, name: str) -> Response:
    """Stop a run at its next step, and go back to it."""
    api.cancelled(request, name)
    return _back(name)


@router.post("/runs/{name}/resume")
def resume(request: Request, name: str) -> Response:
    """Continue a run where it ran before, and go back to it."""
    run_dir = runs_of(request).run(name).path
    verbs.resume(run_dir, [], str(job_file.read(run_dir)["on"]))
    return _back(name)


@router.post("/runs/{name}/predict")
def predict(request: Request, name: str, image: Annotated[UploadFile, File()]) -> Response:
    """Show the cluster of an image, and the images that are nearest to it."""
    answer = api.predicted(request, name, image.file.read())
    known = ("cluster", "class", "distance", "second", "margin", "round")
    here = f"{run_path(name)}/clusters/{answer['cluster']}"
    return page(
        f"An image, by {name}", crumbs=[cell("Runs", "/"), cell(name, run_path(name))],
        columns=["Fact", "Value"],
        rows=[[cell(key), cell(answer[key])] for key in known if answer.get(key) is not None],
        images=images_of(name, answer.get("neighbours", []), "distance"),
        links=[cell(f"All images of cluster {answer['cluster']}", here)],
    )  # fmt: skip


@router.get("/runs/{name}/report")
def show_report(request: Request, name: str) -> Response:
    """Show the report of a run: one page with its own style and script, which loads nothing."""
    reports: Reports = request.app.state.reports
    text = reports.page(runs_of(request).run(name))
    return HTMLResponse(text, headers={"Content-Security-Policy": OF_REPORT})


@router.get("/compare")
def compare(
    request: Request,
    run: Annotated[list[str], Query(max_length=20)] = [],  # noqa: B006
) -> Response:
    """Show the page that compares the runs that were chosen."""
    text = api_more.compared(request, run)
    return HTMLResponse(text, headers={"Content-Security-Policy": OF_REPORT})


@router.get("/submit")
def show_submit(request: Request, recipe: str = "") -> Response:
    """Show the form of a new run: first its recipe, then a field for each of its keys."""
    if request.app.state.read_only:
        return page("Submit a run", note="This server is read-only.")
    if not recipe:
        choice = field("Recipe", "recipe", options=shipped(), value="small-photos")
        return page("Submit a run", forms=[form("/submit", "Go on", [choice])])
    fields = [
        field("Name of the run", "name", required=True),
        field("Where", "on", options=WHERE, value="local"),
        field("What to do", "what", options=["plan only", "estimate", "submit"], value="plan only"),
        field("Device of the estimate", "device", options=sorted(DEVICES), value="h100"),
        field("More keys, one a line, such as cluster.k=50", "keys", "lines"),
    ]
    made = form("/submit", "Go", fields, "post") | {
        "sections": sections_of(api.known_recipe(recipe)), "hidden": {"recipe": recipe}
    }  # fmt: skip
    return page(f"Submit {recipe}", crumbs=[cell("Recipes", "/submit")], forms=[made])


@router.post("/submit")
def submit(request: Request, sent: Annotated[dict[str, str], Depends(sent_form)]) -> Response:
    """Plan, estimate or submit a run, and show what came of it."""
    name, recipe, what = (sent.get(key, "") for key in ("name", "recipe", "what"))
    keys = [line.strip() for line in sent.get("keys", "").splitlines() if line.strip()]
    overrides = overrides_of(api.known_recipe(recipe), sent) + keys
    if what == "estimate":
        made = api_more.estimated(recipe, sent.get("device", ""), overrides, None)
        return page(f"Estimate of {name}", text="\n".join(lines(made)))
    where = sent.get("on", "local")
    wanted = api.Submission(
        name=name, recipe=recipe, on=where if where in WHERE else "local", overrides=overrides,
        dry_run=what != "submit",
    )  # fmt: skip
    plan = api.submitted(request, wanted)
    return page(f"Plan of {name}", text=plan) if wanted.dry_run else _back(name)


def _back(name: str) -> Response:
    """Lead on to the page of a run."""
    return RedirectResponse(f"/runs/{quote(name, safe='')}", 303)


@router.get("/api.html")
def list_operations(request: Request) -> Response:
    """Show what the API can do, without a script from elsewhere."""
    rows = [
        [cell(method.upper()), cell(path), cell(one.get("description"))]
        for path, methods in request.app.openapi()["paths"].items()
        for method, one in methods.items()
    ]
    columns, links = ["Method", "Path", "What it does"], [cell("OpenAPI", "/openapi.json")]
    return page("API", columns=columns, rows=rows, links=links)


@router.get("/static/{file}")
def static(file: str) -> Response:
    """Return the style or the script of the pages."""
    kinds = {"web.css": "text/css", "web.js": "text/javascript"}
    if file not in kinds:
        raise NotThereError(f"there is no /static/{file[:100]}")
    text = (files("cluster_jobs.web") / file).read_text("utf-8")
    return Response(text, media_type=kinds[file])
