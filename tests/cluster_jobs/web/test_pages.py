"""The pages of `deepclust serve`: they link to one another, and escape what a run holds."""

from __future__ import annotations

import html
import os
import re
import shutil
import threading
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from cluster_jobs.web.form import overrides_of
from cluster_jobs.web.html import REFRESH_S, curve, refresh_of
from cluster_jobs.web.pages import _forms
from cluster_jobs.web.reports import Reports, _stamp
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
    while waiting and len(seen) < 90:
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


def test_a_report_is_written_again_only_where_the_run_has_changed(tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "shards", n=48, classes=3)
    run = Run(make_run(tmp_path / "runs" / "one", shards))
    reports = Reports()
    first = reports.page(run)
    assert reports.page(run) is first
    os.utime(run.round(0) / "assignments" / "statistics.json")
    assert reports.page(run) is not first


def test_a_report_is_written_while_files_of_the_run_come_and_go(tmp_path: Path) -> None:
    run = Run(make_run(tmp_path / "one", make_shards(tmp_path / "shards", n=48, classes=3)))
    over = threading.Event()

    def come_and_go() -> None:
        while not over.is_set():
            for number in range(50):
                (run.path / f".file-{number}.tmp").mkdir()
                (run.path / f".file-{number}.tmp" / "part").touch()
            for folder in run.path.glob(".file-*.tmp"):
                shutil.rmtree(folder)

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        for _ in range(300):
            _stamp(run.path)
    finally:
        over.set()
        thread.join()
    assert "one" in Reports().page(run)


def test_an_uploaded_image_is_answered_with_its_cluster_and_neighbours(final_run: Path) -> None:
    web = TestClient(make_app(final_run.parent, ""), "http://localhost")
    index = open_index(Run(final_run).recipe.data.shards)
    body = encode(draw(3, label=1))
    got = web.post(f"/runs/{final_run.name}/predict", files={"image": body})
    assert got.status_code == 200, got.text
    assert "All images of cluster" in got.text
    assert any(key in got.text for key in index.keys)


def test_a_page_follows_a_run_that_lives_and_offers_what_can_be_done() -> None:
    assert (refresh_of("SUCCEEDED", "RUNNING"), refresh_of("FAILED")) == (REFRESH_S, 0)
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


def test_the_pages_of_a_run_show_curves_members_map_and_exports(final_run: Path) -> None:
    web = TestClient(make_app(final_run.parent, ""), "http://localhost")
    here = f"/runs/{final_run.name}"
    shown = web.get(here).text
    assert "export/backbone.safetensors" in shown
    assert shown.count("<polyline") >= 2
    for order in ("near", "far", "borderline", "duplicates", "lineage"):
        got = web.get(f"{here}/clusters/1?order={order}")
        assert got.status_code == 200, got.text
    assert web.get(f"{here}/map").text.count("<circle") > 100
    assert "nearest of its cluster" in web.get(f"{here}/images/3").text


def test_the_form_has_a_field_for_each_key_and_sends_what_was_changed(
    tmp_path: Path, final_run: Path
) -> None:
    web = TestClient(make_app(tmp_path, ""), "http://localhost")
    shown = web.get("/submit?recipe=small-photos").text
    fields = dict(re.findall(r'name="key:([^"]+)" maxlength="500" value="([^"]*)"', shown))
    assert {"data.shards", "cluster.k", "train.lr"} <= {*fields}
    shards = str(Run(final_run).recipe.data.shards)
    sent = {f"key:{key}": html.unescape(value) for key, value in fields.items()}
    sent |= {"key:data.shards": shards, "key:cluster.k": "7", "keys": "train.epochs=3"}
    sent |= {"name": "a", "recipe": "small-photos", "what": "plan only"}
    plan = web.post("/submit", data=sent).text
    assert "k: 7" in plan
    assert "epochs: 3" in plan
    assert overrides_of("small-photos", sent) == [f"data.shards={shards}", "cluster.k=7"]
    assert (
        "GPU-hours" in web.post("/submit", data=sent | {"what": "estimate", "device": "h100"}).text
    )


def test_a_curve_needs_two_points_and_leaves_out_what_is_no_number() -> None:
    assert curve("Loss", "epoch", [(0.0, 1.0), (1.0, float("nan"))]) is None
    made = curve("Loss", "epoch", [(0.0, 2.0), (1.0, float("inf")), (2.0, 1.0)])
    assert made is not None
    assert made["points"] == "0.0,0.0 600.0,160.0"


def test_another_name_of_the_machine_is_known_where_it_was_allowed(tmp_path: Path) -> None:
    app = make_app(tmp_path, "", allowed=["Runs.Example"])
    assert TestClient(app, "http://runs.example").get("/").status_code == 200
    assert TestClient(app, "http://other.example").get("/").status_code == 400
