"""The pages for a browser: HTML that the server writes, readable without a script."""

from __future__ import annotations

import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import jinja2
from fastapi import APIRouter, File, Form, Request, UploadFile
from starlette.responses import HTMLResponse, RedirectResponse, Response

from cluster_jobs import job_file
from cluster_jobs import runs as verbs
from cluster_jobs.report import write_report
from cluster_jobs.web import api
from cluster_jobs.web.api import Offset, runs_of, views_of
from deepclust.recipe import shipped

router = APIRouter(include_in_schema=False)
EACH = 100  # of what a page lists
REFRESH_S = 5
LIVE = {"PENDING", "RUNNING", "RECOVERING"}
SEARCH = {
    "method": "get", "action": "", "button": "Search",
    "fields": [{"label": "A part of the key", "name": "key", "type": "text"}],
}  # fmt: skip
OF_REPORT = (  # it holds its style and script, both ours, and every value in it is escaped
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; frame-ancestors 'none'; form-action 'none'"
)
PAGES = jinja2.Environment(
    loader=jinja2.PackageLoader("cluster_jobs.web", "."),
    autoescape=True,  # keys and class names come with the shards
)


def _cell(text: Any, href: str = "") -> dict[str, str]:
    shown = "–" if text is None or text != text else f"{text:.3g}" if type(text) is float else text
    return {"text": str(shown), "href": href}


def _page(title: str, **parts: Any) -> Response:
    return HTMLResponse(PAGES.get_template("page.html").render(title=title, **parts))


def _next(path: str, offset: int, total: int) -> list[dict[str, str]]:
    """Return the link to what follows, where there is more."""
    more = offset + EACH < total
    return [_cell(f"The next of {total:,}", f"{path}?offset={offset + EACH}")] if more else []


@router.get("/")
def list_runs(request: Request, offset: Offset = 0) -> Response:
    """Show the runs."""
    total, page = runs_of(request).page("", "", offset, EACH)
    rows = [
        [_cell(one.name, f"/runs/{quote(one.name, safe='')}"), _cell(one.state), _cell(one.phase),
         _cell(one.epoch), _cell(one.epochs), _cell(one.loss), _cell(one.reason)]
        for one in page
    ]  # fmt: skip
    columns = ["Run", "State", "Phase", "Epoch", "of", "Loss", "What to know"]
    note = "" if rows else "There are no runs in this folder yet."
    refresh = _refresh(*(one.state for one in page))
    links = _next("/", offset, total)
    return _page("Runs", columns=columns, rows=rows, links=links, note=note, refresh=refresh)


@router.get("/runs/{name}")
def show_run(request: Request, name: str) -> Response:
    """Show the status of a run, and where its clusters and files are."""
    status = runs_of(request).status(runs_of(request).run(name))
    facts = status.as_dict()
    rows = [[_cell(key.replace("_", " ")), _cell(value)] for key, value in facts.items()]
    here, api = f"/runs/{quote(name, safe='')}", f"/api/runs/{quote(name, safe='')}"
    links = [
        _cell("Report: curves, clusters, map, cost", f"{here}/report"),
        _cell("All clusters", f"{here}/clusters"), _cell("Search by key", f"{here}/search"),
        _cell("Log", f"{api}/logs"), _cell("Recipe", f"{api}/recipe"),
        _cell("Which image is in which cluster (CSV)", f"{api}/assignments.csv"),
    ]  # fmt: skip
    forms = [] if request.app.state.read_only else _forms(here, status.state)
    refresh, columns = _refresh(status.state), ["Fact", "Value"]
    return _page(name, columns=columns, rows=rows, links=links, forms=forms, refresh=refresh)


def _refresh(*states: str) -> int:
    """Return the seconds after which a page of such runs is asked for again, 0 for never."""
    return REFRESH_S if LIVE.intersection(states) else 0


def _forms(here: str, state: str) -> list[dict[str, Any]]:
    """Return what can be done with a run: cancel or resume it, and ask it about an image."""
    image = {
        "label": "An image, for its cluster",
        "name": "image",
        "type": "file",
        "required": True,
    }
    upload = {"action": f"{here}/predict", "enctype": "multipart/form-data", "button": "Ask"}
    forms = [{"method": "post", "fields": [image], **upload}]
    verb = "cancel" if state in LIVE else "resume" if state != "SUCCEEDED" else None
    if verb is not None:
        button = verb.capitalize()
        forms.append({"method": "post", "action": f"{here}/{verb}", "fields": [], "button": button})
    return forms


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
    here = f"/runs/{quote(name, safe='')}/clusters/{answer['cluster']}"
    return _page(
        f"An image, by {name}", columns=["Fact", "Value"],
        rows=[[_cell(key), _cell(answer[key])] for key in known if answer.get(key) is not None],
        images=_images(name, answer.get("neighbours", [])),
        links=[_cell(f"All images of cluster {answer['cluster']}", here)],
    )  # fmt: skip


@router.get("/runs/{name}/report")
def show_report(request: Request, name: str) -> Response:
    """Show the report of a run: one page with its own style and script, which loads nothing."""
    run = runs_of(request).run(name)
    with tempfile.TemporaryDirectory(prefix="deepclust-") as folder:
        page = write_report(run.path, Path(folder) / "report.html").read_text("utf-8")
    return HTMLResponse(page, headers={"Content-Security-Policy": OF_REPORT})


@router.get("/submit")
def show_submit(request: Request) -> Response:
    """Show the form of a new run."""
    fields = [
        {"label": "Name of the run", "name": "name", "type": "text", "required": True},
        {"label": "Recipe", "name": "recipe", "options": shipped()},
        {"label": "Where", "name": "on", "options": ["local", "ray", "slurm"]},
        {"label": "Keys, one a line, such as data.shards=/data", "name": "keys", "type": "lines"},
        {"label": "What to do", "name": "what", "options": ["plan only", "submit"]},
    ]
    form = {"method": "post", "action": "/submit", "fields": fields, "button": "Go"}
    note = "This server is read-only." if request.app.state.read_only else ""
    return _page("Submit a run", forms=[] if note else [form], note=note)


@router.post("/submit")
def submit(
    request: Request,
    name: Annotated[str, Form()],
    recipe: Annotated[str, Form()],
    on: Annotated[str, Form(pattern="^(local|ray|slurm)$")] = "local",
    keys: Annotated[str, Form()] = "",
    what: Annotated[str, Form()] = "plan only",
) -> Response:
    """Plan or submit a run, and show the plan."""
    overrides = [line.strip() for line in keys.splitlines() if line.strip()]
    wanted = api.Submission(
        name=name, recipe=recipe, on=on, overrides=overrides, dry_run=what != "submit"
    )
    plan = api.submitted(request, wanted)
    if not wanted.dry_run:
        return _back(name)
    return _page(f"Plan of {name}", text=plan)


def _back(name: str) -> Response:
    """Lead on to the page of a run."""
    return RedirectResponse(f"/runs/{quote(name, safe='')}", 303)


@router.get("/runs/{name}/clusters")
def list_clusters(request: Request, name: str, sort: str = "size", offset: Offset = 0) -> Response:
    """Show the clusters of the last round."""
    here = f"/runs/{quote(name, safe='')}/clusters"
    with views_of(request).open(runs_of(request).run(name), None, 0) as view:
        page = view.page(sort, sort != "id", offset, EACH)
    rows = [
        [_cell(f"Cluster {one['id']}", f"{here}/{one['id']}"), _cell(one["size"]),
         _cell(one["class"]), _cell(one["purity"]), _cell(one["tightness"])]
        for one in page["clusters"]
    ]  # fmt: skip
    links = [_cell(f"Sort by {key}", f"{here}?sort={key}") for key in ("size", "purity", "id")]
    links += [
        _cell("Next", f"{here}?sort={quote(sort)}&offset={offset + EACH}")
        for _ in range(offset + EACH < page["total"])
    ]
    columns = ["Cluster", "Images", "Most frequent class", "Purity", "Mean distance"]
    return _page(f"Clusters of {name}", columns=columns, rows=rows, links=links)


@router.get("/runs/{name}/clusters/{cluster}")
def show_cluster(
    request: Request, name: str, cluster: int, order: str = "near", offset: Offset = 0
) -> Response:
    """Show the images of a cluster."""
    here = f"/runs/{quote(name, safe='')}/clusters/{cluster}"
    with views_of(request).open(runs_of(request).run(name), None, 0) as view:
        page = view.images(cluster, order, offset, EACH)
    links = [
        _cell("The nearest to the centre first", here),
        _cell("The furthest from the centre first", f"{here}?order=far"),
        *_next(here, offset, page["total"]),
    ]
    return _page(f"Cluster {cluster} of {name}", images=_images(name, page["images"]), links=links)


@router.get("/runs/{name}/search")
def search(request: Request, name: str, key: str = "") -> Response:
    """Search the images of a run by their keys."""
    with views_of(request).open(runs_of(request).run(name), None, 0) as view:
        hits = view.search(key[:500])
    here = f"/runs/{quote(name, safe='')}/clusters"
    rows = [[_cell(one["key"]), _cell(one["cluster"], f"{here}/{one['cluster']}")] for one in hits]
    note = f"No key has {key!r}." if key and not hits else ""
    return _page(
        f"Search {name}", forms=[SEARCH], columns=["Key", "Cluster"], rows=rows,
        images=_images(name, hits), note=note,
    )  # fmt: skip


def _images(name: str, images: list[dict[str, Any]]) -> list[dict[str, str]]:
    path = f"/api/runs/{quote(name, safe='')}/images"
    return [{"src": f"{path}/{one['id']}/picture?side=128", "key": one["key"]} for one in images]


@router.get("/api.html")
def list_operations(request: Request) -> Response:
    """Show what the API can do, without a script from elsewhere."""
    rows = [
        [_cell(method.upper()), _cell(path), _cell(one.get("description"))]
        for path, methods in request.app.openapi()["paths"].items()
        for method, one in methods.items()
    ]
    columns, links = ["Method", "Path", "What it does"], [_cell("OpenAPI", "/openapi.json")]
    return _page("API", columns=columns, rows=rows, links=links)


@router.get("/static/web.css")
def style() -> Response:
    """Return the style of the pages."""
    text = (files("cluster_jobs.web") / "web.css").read_text("utf-8")
    return Response(text, media_type="text/css")
