"""The pages in a real browser: Debian's Chromium opens the printed link and walks through a run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page

from deepclust import open_index
from tests.cluster_jobs.synthetic import EXCLUDED, make_run
from tests.cluster_jobs.web.conftest import TOKEN, serving
from tests.images import make_shards

CHROMIUM = shutil.which("chromium")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("chromium")
    make_run(root / "runs" / "first", make_shards(root / "shards", n=96, classes=3))
    return root


@pytest.fixture(scope="module")
def address(root: Path) -> Iterator[str]:
    with serving(root / "runs") as address:
        yield address


@pytest.fixture(scope="module")
def page(browser: Browser) -> Iterator[Page]:
    opened = browser.new_page(viewport={"width": 390, "height": 800})
    yield opened
    opened.close()


def test_a_browser_walks_from_the_link_to_an_image_and_finds_a_key(
    page: Page, address: str, root: Path
) -> None:
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{address}/?token={TOKEN}")
    page.wait_for_selector("table")
    assert TOKEN not in page.url
    page.click("text=first")
    page.click("text=Clusters >> nth=0")
    page.click("text=Cluster 0")
    page.click("text=Outliers")
    page.wait_for_selector("li img")
    first = page.locator("li img").first
    assert first.evaluate("one => one.decode().then(() => one.naturalWidth)") > 0
    page.goto(f"{address}/runs/first/search")
    key = open_index(root / "shards").keys[next(i for i in range(96) if i not in EXCLUDED)]
    page.fill("input[name=key]", key)
    page.click("main button")
    page.wait_for_selector(f"td:has-text('{key}')")
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= 390
    assert said == []
    assert all(url.startswith(address) for url in asked)


def test_a_browser_reads_the_report_and_plans_a_run(page: Page, address: str, root: Path) -> None:
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.goto(f"{address}/?token={TOKEN}")
    page.wait_for_selector("table")
    page.click("text=first")
    page.click("text=Report")
    page.wait_for_selector("#browser article")
    page.goto(f"{address}/submit?recipe=small-photos")
    page.fill("input[name=name]", "planned")
    page.fill("input[name='key:data.shards']", str(root / "shards"))
    page.fill("input[name='key:train.epochs']", "3")
    page.click("button")
    page.wait_for_selector("pre")
    assert "epochs: 3" in page.inner_text("pre")
    assert not (root / "runs" / "planned").exists()
    assert said == []


def test_a_browser_without_the_token_sees_nothing(page: Page, address: str) -> None:
    page.context.clear_cookies()
    answer = page.goto(f"{address}/runs/first")
    assert answer is not None
    assert answer.status == 401
    assert "first" not in page.content().replace("/runs/first", "")
