"""A run from the form to its end in a real browser, and what axe-core says about each page."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_core_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from deepclust import open_index
from tests.cluster_jobs.web.conftest import TOKEN, serving
from tests.images import draw, encode
from tests.tiny import TREE

pytestmark = pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium")
WAIT_MS = 180_000
SMALL = [
    *(f"{section}.{key}={value}" for section in ("data", "cluster", "train")
      for key, value in TREE[section].items() if isinstance(value, int | float)),
    "backbone.name=conv4", "train.epochs=30",
]  # fmt: skip


@pytest.fixture
def visited(browser: Browser) -> Iterator[tuple[Page, list[str], list[str]]]:
    """A page, what its console says, and the addresses that it asks for."""
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    yield page, said, asked
    page.close()


def test_a_run_is_submitted_watched_cancelled_resumed_and_asked(
    visited: tuple[Page, list[str], list[str]], many_shards: Path, tmp_path: Path
) -> None:
    page, said, asked = visited
    with serving(tmp_path) as address:
        page.goto(f"{address}/?token={TOKEN}")
        page.click("text=Submit")
        page.select_option("select[name=recipe]", "small-photos")
        page.click("text=Go on")
        page.fill("input[name=name]", "live")
        page.fill("input[name='key:data.shards']", str(many_shards))
        page.fill("textarea[name=keys]", "\n".join(SMALL))
        page.select_option("select[name=what]", "submit")
        page.click("button")
        # without a reload by us: the page renews itself
        expect(page.locator("figure", has_text="Loss")).to_be_visible(timeout=WAIT_MS)
        page.click("text=Cancel")
        expect(page.locator(".state.STOPPED")).to_be_visible(timeout=WAIT_MS)
        page.click("text=Resume")
        expect(page.locator(".state.RUNNING")).to_be_visible(timeout=WAIT_MS)
        expect(page.locator(".state.SUCCEEDED")).to_be_visible(timeout=WAIT_MS)
        expect(page.locator("text=100% of the epochs")).to_be_visible()
        browse(page, many_shards)
    assert said == []
    assert all(url.startswith((address, "data:")) for url in asked)


def browse(page: Page, shards: Path) -> None:
    """Walk through the clusters of a run from its page, and ask it about an image."""
    here = page.url
    page.click("text=Clusters >> nth=0")
    page.select_option("select[name=sort]", "drift")
    page.click("text=Show")
    page.click(".cards a >> nth=0")
    for order in ("Outliers", "Borderline", "Duplicates", "Earlier rounds"):
        page.click(f"text={order}")
        expect(page.locator(".links [aria-current]")).to_have_text(order)
    page.goto(f"{here}/search")
    key = open_index(shards).keys[7]
    page.fill("input[name=key]", key)
    page.click("main button")
    expect(page.locator("td", has_text=key).first).to_be_visible()
    page.goto(f"{here}/map")
    points = page.locator("circle").count()
    box = page.locator(".map svg").bounding_box()
    assert box is not None
    # a corner of it is round, so that it starts a few pixels further in
    left, top = box["x"] + 5, box["y"] + 5
    right, bottom = left + box["width"] - 10, top + box["height"] - 10
    page.mouse.move(left, top)
    page.mouse.down()
    for x, y in ((right, top), (right, bottom), (left, bottom)):
        page.mouse.move(x, y)
    page.mouse.up()
    expect(page.locator(".chosen[role=status]")).to_contain_text(f"{points} images")
    page.goto(here)
    image = {"name": "a.png", "mimeType": "image/png", "buffer": encode(draw(3, label=1))}
    page.set_input_files("input[name=image]", image)
    page.click("text=Ask")
    expect(page.locator("h1")).to_contain_text("An image, by live")
    assert page.locator(".images img").count() > 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious_and_nothing_is_wider_than_a_phone(
    browser: Browser, final_run: Path, scheme: Any
) -> None:
    with serving(final_run.parent) as address:
        context = browser.new_context(
            viewport={"width": 390, "height": 800}, color_scheme=scheme, bypass_csp=True
        )
        page = context.new_page()
        page.goto(f"{address}/?token={TOKEN}")
        page.wait_for_selector("table")
        here = f"/runs/{final_run.name}"
        more = ["", "/clusters", "/clusters/1", "/clusters/1?order=lineage", "/images/3", "/map"]
        pages = ["/", "/submit?recipe=small-photos", *(here + one for one in more),
                 f"{here}/search?key=0", f"{here}/report"]  # fmt: skip
        # only colours differ in the dark, and those are the same on most pages
        for path in pages if scheme == "light" else ["/", here, f"{here}/report"]:
            page.goto(address + path)
            found = Axe().run(page)["violations"]
            serious = [
                (one["id"], [node["html"][:200] for node in one["nodes"][:3]])
                for one in found if one["impact"] in ("serious", "critical")
            ]  # fmt: skip
            assert serious == [], path
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, path
        context.close()
