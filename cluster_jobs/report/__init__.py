"""`deepclust report`: a run as one static HTML page that needs no server or network.

The page shows what is in the run directory. The only other files that are read are the shards, for
the images of the gallery. Where something is missing, a sentence says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

import jinja2

from cluster_jobs.report.charts import charts, reliability
from cluster_jobs.report.checks import checks
from cluster_jobs.report.compare import compare
from cluster_jobs.report.cost import cost
from cluster_jobs.report.facts import gather
from cluster_jobs.report.gallery import Gallery, gallery
from cluster_jobs.report.map import feature_map
from cluster_jobs.terminal import duration
from deepclust.errors import RecipeError
from deepclust.files import write_text
from deepclust.run.directory import open_run


def write_report(
    run_dir: Path, out: Path, *, remote: bool = False, emit: Callable[[str], None] | None = None
) -> Path:
    """Write the page about a run in any state to `out` atomically, and return `out`.

    `remote`: read the images of the gallery also where they are behind a URL. `emit` gets a
    sentence about images that the page lacks.

    Raises `RecipeError` when `run_dir` is not a run, or for another suffix than .html. Raises
    `DiskError` when `out` cannot be written.
    """
    out = _page_path(out)
    run = open_run(run_dir)
    facts = gather(run)
    images, drawn = gallery(run, remote=remote), feature_map(run)
    page = _template("page.html").render(
        facts=facts,
        checks=checks(facts),
        charts=[*charts(run, facts), *([drawn] if drawn else [])],
        reliability=reliability(facts.answered),
        gallery=images,
        cost=cost(run),
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )
    write_text(out, page)
    for text in _lacks(images):
        if emit is not None:
            emit(text)
    return out


def _lacks(images: Gallery) -> list[str]:
    """Return a warning for pictures that the page should have."""
    if images.failed:
        return [f"warning: {images.note}"]
    if images.browser is not None and (count := images.browser.missing):
        return [f"warning: {count:,} images that the page should show cannot be decoded"]
    return []


def write_comparison(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write the page that compares runs, as `write_report` does one.

    Raises `RecipeError` also where a run is given twice, or too many are.
    """
    out = _page_path(out)
    write_text(out, _template("compare.html").render(**vars(compare(run_dirs))))
    return out


def _page_path(out: Path) -> Path:
    """Return the path of a page, if its suffix says that it is one."""
    if out.suffix.lower() not in (".html", ".htm"):
        raise RecipeError(f"cannot write {out}: the report is one HTML page; name it *.html")
    return out


def _template(name: str) -> jinja2.Template:
    """Return the template of a page, which escapes every value."""
    # class names and keys may be hostile: they come with the shards
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cluster_jobs.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, percent=percent, duration=duration)
    return environment.get_template(name)


def number(value: float | None, digits: int = 3) -> str:
    """Return a table's text for a number: a count, `digits` decimal places, or a dash for None."""
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"


def percent(share: float | None) -> str:
    """Return a table's text for a share, or a dash for None."""
    return "–" if share is None else f"{share:.1%}"
