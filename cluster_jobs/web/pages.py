"""The pages for a browser: HTML that the server writes, readable without a script."""

from __future__ import annotations

from importlib.resources import files
from typing import Any
from urllib.parse import quote

import jinja2
from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse, Response

from cluster_jobs.web.api import Offset, runs_of, views_of

router = APIRouter(include_in_schema=False)
EACH = 100  # of what a page lists
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
    return _page("Runs", columns=columns, rows=rows, links=_next("/", offset, total), note=note)


@router.get("/runs/{name}")
def show_run(request: Request, name: str) -> Response:
    """Show the status of a run, and where its clusters and files are."""
    facts = runs_of(request).status(runs_of(request).run(name)).as_dict()
    rows = [[_cell(key.replace("_", " ")), _cell(value)] for key, value in facts.items()]
    here, api = f"/runs/{quote(name, safe='')}", f"/api/runs/{quote(name, safe='')}"
    links = [
        _cell("All clusters", f"{here}/clusters"), _cell("Search by key", f"{here}/search"),
        _cell("Log", f"{api}/logs"), _cell("Recipe", f"{api}/recipe"),
        _cell("Which image is in which cluster (CSV)", f"{api}/assignments.csv"),
    ]  # fmt: skip
    return _page(name, columns=["Fact", "Value"], rows=rows, links=links)


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
        f"Search {name}", forms=["A part of the key"], columns=["Key", "Cluster"], rows=rows,
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
