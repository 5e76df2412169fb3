"""`deepclust report`: a run as one static HTML page that needs no server, network or script.

The page shows what the run directory says and nothing else; the only files read beside it are the
shards, for the images of the gallery. Whatever is missing is replaced by a sentence about it.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import jinja2

from cluster_jobs.report.charts import charts
from cluster_jobs.report.checks import checks
from cluster_jobs.report.facts import gather
from cluster_jobs.report.gallery import gallery
from deepclust.files import write_text
from deepclust.run.directory import open_run


def write_report(run: Path, out: Path) -> Path:
    """Write the page about `run` to `out`, atomically; returns `out`. Any state of a run will do.

    Raises `RecipeError` when `run` is not a run, `DiskError` when `out` cannot be written.
    """
    found = open_run(run)
    facts = gather(found)
    page = _template().render(
        facts=facts,
        checks=checks(facts),
        charts=charts(found, facts),
        gallery=gallery(found),
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )
    write_text(Path(out), page)
    return Path(out)


def _template() -> jinja2.Template:
    """Everything is escaped, because class names and keys come from whoever made the shards."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cluster_jobs.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, percent=percent)
    return environment.get_template("page.html")


def number(value: float | None, digits: int = 3) -> str:
    """A number for a table: counts whole, fractions to `digits` places, None as a dash."""
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"


def percent(share: float | None) -> str:
    """A share for a table, None as a dash."""
    return "–" if share is None else f"{share:.1%}"
