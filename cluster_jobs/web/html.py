"""Parts that the pages share: cells, links, pictures, curves, and the template that shows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import quote, urlencode

import jinja2
import numpy as np
from starlette.responses import HTMLResponse, Response

EACH = 100  # of what a page lists
REFRESH_S = 5
LIVE = {"PENDING", "RUNNING", "RECOVERING"}
WIDE, HIGH = 600, 160  # of a curve, in its own units
PAGES = jinja2.Environment(
    loader=jinja2.PackageLoader("cluster_jobs.web", "."),
    autoescape=True,  # keys and class names come with the shards
)
Part = dict[str, Any]


def page(title: str, **parts: Any) -> Response:
    """Return a page of parts, each of which the template knows by its name."""
    return HTMLResponse(PAGES.get_template("page.html").render(title=title, **parts))


def cell(text: Any, href: str = "", **more: Any) -> Part:
    """Return a cell of a table, or a link."""
    shown = "–" if text is None or text != text else f"{text:.3g}" if type(text) is float else text
    return {"text": str(shown), "href": href, **more}


def run_path(name: str) -> str:
    """Return the address of a run's page."""
    return f"/runs/{quote(name, safe='')}"


def next_links(path: str, offset: int, total: int, each: int = EACH, **query: Any) -> list[Part]:
    """Return the links to what comes before and after, where there is more."""
    known = {key: value for key, value in query.items() if value not in ("", None)}
    places = [("Previous", offset - each)] if offset > 0 else []
    places += [("Next", offset + each)] if offset + each < total else []
    return [
        cell(f"{text} of {total:,}", f"{path}?{urlencode({**known, 'offset': max(0, at)})}")
        for text, at in places
    ]


def refresh_of(*states: str) -> int:
    """Return the seconds after which a page of such runs is asked for again, 0 for never."""
    return REFRESH_S if LIVE.intersection(states) else 0


def images_of(name: str, images: Sequence[Part], note: str = "", side: int = 128) -> list[Part]:
    """Return the pictures of images, each with a link to its page.

    `note` names a number of the image that is shown under its key.
    """
    path = f"/api{run_path(name)}/images"
    return [
        {
            "src": f"{path}/{one['id']}/picture?side={side}",
            "key": one["key"],
            "href": f"{run_path(name)}/images/{one['id']}",
            "note": f"{note} {one[note]:.3g}" if note in one else "",
        }
        for one in images
    ]


def field(label: str, name: str, kind: str = "text", **more: Any) -> Part:
    """Return a field of a form; `options` makes it a choice."""
    return {"label": label, "name": name, "type": kind, **more}


def form(action: str, button: str, fields: Sequence[Part] = (), method: str = "get") -> Part:
    """Return a form."""
    return {"method": method, "action": action, "button": button, "fields": list(fields)}


def curve(title: str, across: str, pairs: Sequence[tuple[float, float]]) -> Part | None:
    """Return a line through points, drawn by the template, or None for fewer than two."""
    known = [(x, y) for x, y in pairs if np.isfinite(x) and np.isfinite(y)]
    if len(known) < 2:
        return None
    xs, ys = np.array(known, np.float64).T
    if len(xs) > WIDE:  # a point for each unit of width
        chosen = np.linspace(0, len(xs) - 1, WIDE).round().astype(int)
        xs, ys = xs[chosen], ys[chosen]
    places = zip(_placed(xs, WIDE), HIGH - _placed(ys, HIGH), strict=True)
    low, high, last = f"{ys.min():.3g}", f"{ys.max():.3g}", f"{ys[-1]:.3g}"
    return {
        "title": title,
        "points": " ".join(f"{x:.1f},{y:.1f}" for x, y in places),
        "reading": f"{last} at {across} {xs[-1]:.3g}; from {low} to {high}",
    }


def _placed(values: np.ndarray, size: int) -> np.ndarray:
    spread = float(values.max() - values.min())
    return (values - values.min()) / spread * size if spread > 0 else np.full(len(values), size / 2)
