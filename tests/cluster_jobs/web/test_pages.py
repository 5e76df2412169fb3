"""The pages of `deepclust serve`: they link to one another, and escape what a run holds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from cluster_jobs.web.pages import REFRESH_S, _forms, _refresh
from cluster_jobs.web.serve import make_app
from deepclust import open_index
from deepclust.run.directory import Run
from tests.cluster_jobs.synthetic import make_run
from tests.images import draw, encode, make_shards


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> TestClient:
    root = tmp_path_factory.mktemp("pages")
    make_run(root / "runs" / "first", make_shards(root / "shards", n=96, classes=3))
    (root / "runs" / "<b>").mkdir()
    (root / "runs" / "<b>" / "recipe.yaml").write_text("a: [")
    return TestClient(make_app(root / "runs", ""), "http://localhost")


def test_every_link_and_picture_of_the_pages_leads_somewhere(web: TestClient) -> None:
    waiting, seen = ["/"], set[str]()
    while waiting and len(seen) < 60:
        path = waiting.pop(0)
        seen.add(path)
        got = web.get(path)
        assert got.status_code == 200 or "%3Cb%3E" in path, (path, got.text)
        if got.headers["content-type"].startswith("text/html"):
            links = re.findall(r'(?:href|src)="(/[^"]*)"', got.text)
            waiting += [one.replace("&amp;", "&") for one in links if one not in (*seen, *waiting)]
    assert {"/runs/first/clusters", "/runs/first/search", "/static/web.css"} <= seen
    assert any("picture" in path for path in seen)


def test_names_are_escaped_and_no_script_may_run(web: TestClient) -> None:
    got = web.get("/")
    assert "&lt;b&gt;" in got.text
    assert "<b>" not in got.text
    assert "default-src 'none'" in got.headers["content-security-policy"]
    assert "&lt;i&gt;" in web.get("/runs/first/search?key=<i>").text


def test_an_uploaded_image_is_answered_with_its_cluster_and_neighbours(final_run: Path) -> None:
    web = TestClient(make_app(final_run.parent, ""), "http://localhost")
    index = open_index(Run(final_run).recipe.data.shards)
    body = encode(draw(3, label=1))
    got = web.post(f"/runs/{final_run.name}/predict", files={"image": body})
    assert got.status_code == 200, got.text
    assert "All images of cluster" in got.text
    assert any(key in got.text for key in index.keys)


def test_a_page_follows_a_run_that_lives_and_offers_what_can_be_done() -> None:
    assert (_refresh("SUCCEEDED", "RUNNING"), _refresh("FAILED")) == (REFRESH_S, 0)
    buttons = {
        state: [form["button"] for form in _forms("/runs/a", state)]
        for state in ("RUNNING", "STOPPED", "SUCCEEDED")
    }
    assert buttons == {
        "RUNNING": ["Ask", "Cancel"], "STOPPED": ["Ask", "Resume"], "SUCCEEDED": ["Ask"],
    }  # fmt: skip


def test_a_read_only_server_offers_nothing_to_change(tmp_path: Path) -> None:
    web = TestClient(make_app(tmp_path, "", read_only=True), "http://localhost")
    assert "<form" not in web.get("/submit").text
    assert web.post("/submit", data={"name": "a", "recipe": "small-photos"}).status_code == 403
