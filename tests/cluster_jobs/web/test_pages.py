"""The pages of `deepclust serve`: they link to one another, and escape what a run holds."""

from __future__ import annotations

import re

import pytest
from starlette.testclient import TestClient

from cluster_jobs.web.serve import make_app
from tests.cluster_jobs.synthetic import make_run
from tests.images import make_shards


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
