"""The pages of a run's clusters: all of them, one with its members, one image, search and map."""

from __future__ import annotations

from typing import Literal

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from cluster_jobs.report.map import has_map
from cluster_jobs.web import members
from cluster_jobs.web.api import Offset, runs_of, views_of
from cluster_jobs.web.api_more import mapped
from cluster_jobs.web.clusters import SORTS
from cluster_jobs.web.html import (
    EACH,
    Part,
    cell,
    field,
    form,
    images_of,
    next_links,
    page,
    run_path,
)

router = APIRouter(include_in_schema=False)
CARDS = 24  # clusters of a page
ZOOMS = ("small", "large")
SIDES = {"small": 128, "large": 320}  # pixels
Zoom = Literal["small", "large"]
KINDS = ("near", "far", "borderline", "duplicates", "lineage")
WITHOUT_FEATURES = ("near", "far", "lineage")
TITLES = {
    "near": "Nearest to the centre", "far": "Outliers", "borderline": "Borderline",
    "duplicates": "Duplicates", "lineage": "Earlier rounds",
}  # fmt: skip


@router.get("/runs/{name}/clusters")
def list_clusters(
    request: Request,
    name: str,
    sort: str = "size",
    order: str = "descending",
    text: str = "",
    zoom: Zoom = "small",
    offset: Offset = 0,
) -> Response:
    """Show the clusters of the last round, each with its images."""
    here = f"{run_path(name)}/clusters"
    with views_of(request).open(runs_of(request).run(name), None, 0) as view:
        found = view.page(sort, order == "descending", offset, CARDS, text[:500])
        every = view.several([i for one in found["clusters"] for i in one["samples"]])
        known = {one["id"]: one for one in every}
        cards = [
            {
                "title": f"Cluster {one['id']}",
                "href": f"{here}/{one['id']}",
                "facts": _facts(one),
                "images": images_of(name, [known[i] for i in one["samples"]], side=SIDES[zoom]),
            }
            for one in found["clusters"]
        ]
    fields = [
        field("Class, seed or number", "text", value=text),
        field("Sort by", "sort", options=SORTS, value=sort),
        field("Order", "order", options=["descending", "ascending"], value=order),
        field("Pictures", "zoom", options=ZOOMS, value=zoom),
    ]
    asked = {"sort": sort, "order": order, "text": text, "zoom": zoom}
    note = "" if cards else "No cluster has that."
    return page(
        f"Clusters of {name}", crumbs=_crumbs(name), cards=cards, zoom=zoom, note=note,
        forms=[form(here, "Show", fields)],
        after=next_links(here, offset, found["total"], CARDS, **asked),
    )  # fmt: skip


def _facts(one: Part) -> str:
    """Return the numbers of a cluster as a line."""
    parts = [f"{one['size']:,} images"]
    parts += [f"seeded by {one['seed']}"] if one["seed"] else []
    parts += [f"{one['purity']:.0%} {one['class']}"] if one["class"] is not None else []
    parts += [f"distance {one['tightness']:.3g}"] if one["size"] else []
    parts += [f"drift {one['drift']:.0%}"] if one["drift"] == one["drift"] else []
    return " · ".join(parts)


def _crumbs(name: str, *more: Part) -> list[Part]:
    return [cell("Runs", "/"), cell(name, run_path(name)), *more]


@router.get("/runs/{name}/clusters/{cluster}")
def show_cluster(
    request: Request,
    name: str,
    cluster: int,
    order: Literal["near", "far", "borderline", "duplicates", "lineage"] = "near",
    zoom: Zoom = "small",
    offset: Offset = 0,
) -> Response:
    """Show the members of a cluster in one of several orders, or where they were before."""
    run = runs_of(request).run(name)
    here, side = f"{run_path(name)}/clusters/{cluster}", SIDES[zoom]
    parts: Part = {}
    with views_of(request).open(run, None, 0) as view:
        facts = _facts(view.cluster(cluster))
        if order in ("near", "far"):
            found = view.images(cluster, order, offset, EACH)
            parts["images"] = images_of(name, found["images"], "distance", side)
            parts["after"] = next_links(here, offset, found["total"], order=order, zoom=zoom)
        elif order == "borderline":
            found = members.borderline(run, view, cluster)
            parts["images"] = images_of(name, found["images"][:EACH], "margin", side)
        elif order == "duplicates":
            groups = members.duplicates(run, view, cluster, 0.98)["groups"]
            parts["groups"] = [
                {"title": f"{len(one)} alike", "images": images_of(name, one, side=side)}
                for one in groups
            ]
            facts += "" if groups else ". No images of it are nearly alike."
        else:
            parts |= _lineage(members.lineage(run, view.round, 0, cluster, 50))
    links = [
        cell(TITLES[kind], f"{here}?order={kind}&zoom={zoom}", current=kind == order)
        for kind in (KINDS if has_map(run) else WITHOUT_FEATURES)
    ]
    other = ZOOMS[zoom == "small"]
    links.append(cell(f"{other.capitalize()} pictures", f"{here}?order={order}&zoom={other}"))
    crumbs = _crumbs(name, cell("Clusters", f"{run_path(name)}/clusters"))
    return page(
        f"Cluster {cluster} of {name}", crumbs=crumbs, links=links, note=facts, zoom=zoom, **parts
    )


def _lineage(found: list[Part]) -> Part:
    """Return the table of the clusters that a cluster came from."""
    keys = ("round", "id", "size", "share")
    return {
        "columns": ["Round", "Cluster", "Images", "Share of the later one"],
        "rows": [[cell(one[key]) for key in keys] for one in found],
    }


@router.get("/runs/{name}/images/{sample}")
def show_image(request: Request, name: str, sample: int) -> Response:
    """Show an image, and those that are nearest to it."""
    run = runs_of(request).run(name)
    with views_of(request).open(run, None, 0) as view:
        own, near, note = view.image(sample), [], ""
        if not has_map(run):
            note = "The features are not kept (keep.features), so no neighbours are known."
        elif own["cluster"] >= 0:
            near = members.neighbours(run, view, sample, "cluster", 24)["images"]
    cluster = f"{run_path(name)}/clusters/{own['cluster']}"
    rows = [[cell(key), cell(own[key])] for key in ("id", "key", "class", "distance")]
    links = [cell(f"Cluster {own['cluster']}", cluster)] if near else []
    groups = [{"title": "The image", "images": images_of(name, [own], side=320)}]
    groups += [{"title": "The nearest of its cluster", "images": images_of(name, near, "distance")}]
    return page(
        f"Image {sample} of {name}", crumbs=_crumbs(name), columns=["Fact", "Value"], rows=rows,
        links=links, groups=groups[: 2 if near else 1], note=note,
    )  # fmt: skip


@router.get("/runs/{name}/search")
def search(request: Request, name: str, key: str = "") -> Response:
    """Search the images of a run by their keys."""
    with views_of(request).open(runs_of(request).run(name), None, 0) as view:
        hits = view.search(key[:500])
    here = f"{run_path(name)}/clusters"
    rows = [[cell(one["key"]), cell(one["cluster"], f"{here}/{one['cluster']}")] for one in hits]
    fields = [field("A part of the key", "key", value=key)]
    return page(
        f"Search {name}", crumbs=_crumbs(name), columns=["Key", "Cluster"], rows=rows,
        forms=[form("", "Search", fields)], images=images_of(name, hits),
        note=f"No key has {key!r}." if key and not hits else "",
    )  # fmt: skip


@router.get("/runs/{name}/map")
def show_map(request: Request, name: str) -> Response:
    """Show the images of the last round in two dimensions, for a lasso."""
    found = mapped(request, runs_of(request).run(name))
    ids, xs, ys, clusters = (np.array(one) for one in zip(*found["points"], strict=True))
    places = zip(ids.tolist(), _scaled(xs, 600), _scaled(ys, 400), clusters.tolist(), strict=True)
    points = [
        {"id": one, "x": x, "y": y, "cluster": own, "colour": own % 10} for one, x, y, own in places
    ]
    label = f"{len(points)} images by {found['way']}, coloured by cluster; neighbours are alike"
    known = sorted(set(clusters.tolist()))
    shown = {"run": run_path(name).removeprefix("/runs/"), "points": points, "clusters": known}
    return page(f"Map of {name}", crumbs=_crumbs(name), map=shown | {"label": label}, note=label)


def _scaled(values: np.ndarray, size: int) -> list[float]:
    spread = float(np.ptp(values)) or 1.0
    scaled: list[float] = ((values - values.min()) / spread * size).round(1).tolist()
    return scaled
