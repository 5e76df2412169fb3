"""The pages in a real browser: Debian's Chromium opens the printed link and walks through a run."""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from playwright.sync_api import Page, sync_playwright

from cluster_jobs.web.serve import make_app
from deepclust import open_index
from tests.cluster_jobs.synthetic import EXCLUDED, make_run
from tests.images import make_shards

CHROMIUM = shutil.which("chromium")
TOKEN = "a-token-of-the-test"

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("chromium")
    make_run(root / "runs" / "first", make_shards(root / "shards", n=96, classes=3))
    return root


@pytest.fixture(scope="module")
def address(root: Path) -> Iterator[str]:
    """Serve the folder as the command does, in a thread of this process."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(make_app(root / "runs", TOKEN), log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join(30)


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser.new_page(viewport={"width": 390, "height": 800})
        browser.close()


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
    page.click("text=All clusters")
    page.click("text=Cluster 0")
    page.wait_for_selector("li img")
    first = page.locator("li img").first
    assert first.evaluate("one => one.decode().then(() => one.naturalWidth)") > 0
    page.goto(f"{address}/runs/first/search")
    key = open_index(root / "shards").keys[next(i for i in range(96) if i not in EXCLUDED)]
    page.fill("input[name=key]", key)
    page.click("text=Search >> nth=-1")
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
    page.goto(f"{address}/submit")
    page.fill("input[name=name]", "planned")
    page.select_option("select[name=recipe]", "small-photos")
    page.fill("textarea[name=keys]", f"data.shards={root / 'shards'}\ntrain.epochs=3")
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
