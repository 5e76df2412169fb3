"""The API of `deepclust serve`: complete, guarded, and calm with whatever a run holds."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pyarrow.parquet import read_table
from starlette.testclient import TestClient

from cluster_jobs.results.duplicates import kept_rows
from cluster_jobs.web import folder as web_folder
from cluster_jobs.web import guard
from cluster_jobs.web.folder import Runs
from cluster_jobs.web.live import last_offset, lines_from
from cluster_jobs.web.serve import make_app
from deepclust.run.directory import Run
from deepclust.run.round_files import read_array, read_assignments
from tests.cluster_jobs.synthetic import make_run
from tests.images import make_shards
from tools.bench import serve

TOKEN = "a-token-of-tests"
LOCAL = "http://127.0.0.1:8080"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one finished run of six clusters; nobody writes there."""
    root = tmp_path_factory.mktemp("serve")
    make_run(root / "runs" / "first", make_shards(root / "shards", n=96, classes=3))
    (root / "runs" / "first" / "logs" / "rank-00000.log").write_text("one\ntwo\nthree\n")
    return root / "runs"


def client(folder: Path, token: str = TOKEN, read_only: bool = False) -> TestClient:
    app = make_app(folder, token, read_only=read_only)
    headers = {"Authorization": f"Bearer {TOKEN}"}
    return TestClient(app, LOCAL, headers=headers, raise_server_exceptions=False)


@pytest.fixture
def web(folder: Path) -> Iterator[TestClient]:
    with client(folder) as one:
        yield one


def image(size: int = 40) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((size, size), 90).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def test_runs_are_listed_by_state_and_name(web: TestClient) -> None:
    assert [one["name"] for one in web.get("/api/runs").json()["runs"]] == ["first"]
    assert web.get("/api/runs?state=succeeded&text=FIR").json()["total"] == 1
    assert web.get("/api/runs?state=RUNNING").json()["runs"] == []
    assert web.get("/api/runs/first").json()["state"] == "SUCCEEDED"
    assert "shards:" in web.get("/api/runs/first/recipe").text


def test_metrics_have_a_window_and_a_bound(web: TestClient) -> None:
    every = web.get("/api/runs/first/metrics").json()
    assert every["total"] == len(every["metrics"]) > 5
    few = web.get("/api/runs/first/metrics?points=3").json()["metrics"]
    assert [few[0], few[-1]] == [every["metrics"][0], every["metrics"][-1]]
    assert len(few) == 3
    some = web.get("/api/runs/first/metrics?first=2&last=4").json()["metrics"]
    assert {2 <= one["step"] <= 4 for one in some} == {True}


def test_events_and_logs_stream_until_the_run_has_ended(web: TestClient) -> None:
    text = web.get("/api/runs/first/events/stream").text
    said = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert said == web.get("/api/runs/first/events").json()["events"]
    assert text.endswith("event: end\ndata: \n\n")
    last = next(line for line in text.splitlines() if line.startswith("id: "))[4:]
    rest = web.get("/api/runs/first/events/stream", headers={"Last-Event-ID": last}).text
    assert rest.count("id: ") == text.count("id: ") - 1
    assert web.get("/api/runs/first/logs?lines=2").text == "two\nthree\n"
    assert "data: three\n" in web.get("/api/runs/first/logs/stream?lines=1").text


def test_a_line_that_is_not_whole_yet_waits(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("one\ntw")
    assert lines_from(log, 0) == ([(4, "one")], 4)
    assert lines_from(tmp_path / "none", 7) == ([], 0)
    log.write_text("1\n")  # it was made anew
    assert lines_from(log, 4) == ([(2, "1")], 2)
    assert last_offset(log, 5) == 0


def test_clusters_are_those_of_the_round_in_the_order_asked(web: TestClient, folder: Path) -> None:
    run = Run(folder / "first")
    assignments = read_assignments(run, run.rounds()[-1])[0]
    sizes = np.bincount(assignments[assignments >= 0])
    page = web.get("/api/runs/first/clusters").json()
    assert [one["size"] for one in page["clusters"]] == sorted(sizes.tolist(), reverse=True)
    for sort in ("purity", "tightness", "id"):
        url = f"/api/runs/first/clusters?sort={sort}&descending=false&limit=4"
        values = [one[sort] for one in web.get(url).json()["clusters"]]
        assert values == sorted(values)
        assert len(values) == 4
    images = web.get("/api/runs/first/clusters/2/images?limit=500").json()
    assert {one["id"] for one in images["images"]} == {*np.flatnonzero(assignments == 2).tolist()}
    far = web.get("/api/runs/first/clusters/2/images?order=far&limit=500").json()["images"]
    assert far == images["images"][::-1]


def test_an_image_has_a_key_a_picture_and_is_there_by_its_key(web: TestClient) -> None:
    one = web.get("/api/runs/first/images/7").json()
    assert one in web.get("/api/runs/first/search", params={"key": one["key"]}).json()["images"]
    picture = web.get("/api/runs/first/images/7/picture?side=16")
    assert Image.open(io.BytesIO(picture.content)).size <= (16, 16)
    assert web.get("/api/runs/first/images/96/picture").status_code == 404


def test_the_table_of_assignments_is_that_of_the_command(web: TestClient) -> None:
    got = web.get("/api/runs/first/assignments.parquet").content
    assert read_table(io.BytesIO(got)).num_rows == 96
    assert web.get("/api/runs/first/assignments.csv").text.startswith('"sample_id"')
    assert web.get("/api/runs/first/assignments.exe").status_code == 422


def test_an_uploaded_image_gets_the_cluster_and_neighbours_of_the_run(final_run: Path) -> None:
    with client(final_run) as web:
        answer = web.post(f"/api/runs/{final_run.name}/predict", files={"image": image()}).json()
        assert answer["cluster"] >= 0
        assert {one["cluster"] for one in answer["neighbours"]} == {answer["cluster"]}
        bad = web.post(f"/api/runs/{final_run.name}/predict", files={"image": b"none"})
        assert bad.status_code == 422
        assert "image" in bad.json()["error"]


def test_nobody_enters_without_the_token(folder: Path) -> None:
    with client(folder) as web:
        for path in ("/", "/api/runs", "/openapi.json", "/static/web.js", "/api/nothing"):
            for header in ("", "Bearer wrong", f"Basic {TOKEN}", "Bearer é"):
                got = web.get(path, headers={"Authorization": header.encode()})
                assert got.status_code == 401
        entered = web.get(f"/?token={TOKEN}", headers={"Authorization": ""})
        cookie = entered.headers["set-cookie"]
        assert TOKEN not in entered.text
        assert "HttpOnly" in cookie
        assert "SameSite=strict" in cookie
        assert web.get("/api/runs", headers={"Authorization": ""}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "a b", "[::1", ""])
def test_a_name_that_is_not_ours_is_refused(web: TestClient, host: str) -> None:
    assert web.get("/api/runs", headers={"Host": host}).status_code == 400


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1"])
def test_requests_from_other_sites_are_refused(web: TestClient, origin: str) -> None:
    assert web.get("/api/runs", headers={"Origin": origin}).status_code == 403
    assert web.post("/api/runs", headers={"Origin": origin}, json={}).status_code == 403
    assert "access-control-allow-origin" not in web.options("/api/runs").headers


def test_a_read_only_server_refuses_whatever_changes(folder: Path) -> None:
    with client(folder, read_only=True) as web:
        for path in ("", "/first/cancel", "/first/resume", "/first/predict"):
            assert web.post(f"/api/runs{path}", json={}).status_code == 403
        assert web.delete("/api/runs/first").status_code == 403
        assert web.get("/api/runs").status_code == 200


@pytest.mark.parametrize("path", ["/api/runs", "/api/runs/first/predict"])
def test_a_body_is_bounded_with_or_without_its_length(
    web: TestClient, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(guard, "MOST_BODY", 1000)
    monkeypatch.setattr(guard, "MOST_UPLOAD", 1000)
    assert web.post(path, content=b"x" * 1001).status_code == 413
    assert web.post(path, content=(b"x" * 500 for _ in range(3))).status_code == 413
    assert web.post(path, content=b"x" * 1000).status_code == 422


NAMES = ["..", "%2e%2e", "..%2fruns", "first%2f..", "%00", ".hidden", "a" * 300, "link", "inner"]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_lead_out_of_the_folder_are_404(folder: Path, name: str, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    root.mkdir()
    (root / "link").symlink_to(folder / "first")
    shutil.copytree(folder / "first", root / "inner")
    (root / "inner" / "logs" / "rank-00000.log").unlink()
    (root / "inner" / "logs" / "rank-00000.log").symlink_to("/etc/passwd")
    with client(root) as web:
        assert web.get(f"/api/runs/{name}/logs").status_code == 404
        assert [one["name"] for one in web.get("/api/runs").json()["runs"]] == ["inner"]


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("clusters?sort=colour", "colour"),
        ("clusters?round=9", "no round 9"),
        ("clusters?head=3", "head 3"),
        ("clusters/99/images", "cluster 99"),
        ("clusters/1/images?order=odd", "odd"),
        ("clusters?limit=100000", "limit"),
        ("images/-1", "-1"),
        (f"images/{10**30}", "image"),
        ("metrics?points=0", "points"),
        ("search", "key"),
        ("nothing", "nothing"),
    ],
)
def test_what_is_asked_wrongly_is_named(web: TestClient, path: str, says: str) -> None:
    got = web.get(f"/api/runs/first/{path}")
    assert 400 <= got.status_code < 500
    assert says in got.json()["error"]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("recipe.yaml", "a: ["),
        ("recipe.yaml", "train: {epochs: 1e999}"),
        ("events.jsonl", '{"event": "clustered", "time": NaN}\n\xff\n'),
        ("metrics.jsonl", '{"kind": "train", "step": 1, "round": 0, "loss": Infinity}\n'),
        ("rounds/0002/assignments/manifest.json", "{}"),
        ("rounds/0002/assignments/statistics.json", "[]"),
    ],
)
def test_a_damaged_run_is_never_an_error_of_the_server(
    folder: Path, tmp_path: Path, file: str, text: str
) -> None:
    shutil.copytree(folder / "first", tmp_path / "runs" / "bad")
    (tmp_path / "runs" / "bad" / file).write_text(text)
    parts = ("", "/metrics", "/events", "/rounds", "/clusters", "/recipe", "/images/1")
    with client(tmp_path / "runs") as web:
        assert web.get("/api/runs").status_code == 200
        for part in (*parts, "/events/stream", "/search?key=a", "/assignments.csv"):
            assert web.get(f"/api/runs/bad{part}").status_code < 500


def test_a_submission_is_planned_and_what_is_wrong_with_it_is_said(folder: Path) -> None:
    with client(folder) as web:
        wanted = {"name": "second", "recipe": "small-photos", "dry_run": True}
        planned = web.post("/api/runs", json=wanted | {"overrides": ["cluster.k=7"]})
        assert planned.status_code == 201
        assert not (folder / "second").exists()
        wrong = [
            ({"name": "../second"}, "cannot name"),
            ({"name": "first"}, "already"),
            ({"recipe": "/etc/passwd"}, "no recipe"),
            ({"text": "a: ["}, "give the name"),
            ({"recipe": "", "text": "a: ["}, "recipe"),
            ({"overrides": ["cluster.kk=1"]}, "cluster.kk"),
            ({"on": "moon"}, "on"),
            ({"more": 1}, "more"),
        ]
        for change, says in wrong:
            got = web.post("/api/runs", json=wanted | change)
            assert 400 <= got.status_code < 500
            assert says in got.json()["error"]
        assert web.post("/api/runs/first/resume", json={"on": "moon"}).status_code == 422
        assert web.post("/api/runs/none/resume").status_code == 404


def test_the_list_reads_the_runs_of_its_page_alone_and_each_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(5):
        shutil.copytree(folder / "first", tmp_path / f"run-{number}")
    runs, seen = Runs(tmp_path), []
    read = web_folder.status
    monkeypatch.setattr(
        web_folder, "status", lambda run, jobs: seen.append(run.path.name) or read(run, jobs)
    )
    for _ in range(2):
        total, page = runs.page("", "RUN", 1, 2)
        assert total == 5
        assert [one.name for one in page] == ["run-1", "run-2"]
    assert seen == ["run-1", "run-2"]
    (tmp_path / "run-1" / "events.jsonl").write_text("")
    assert runs.page("", "", 1, 1)[1][0].state == "PENDING"


def test_runs_are_sorted_and_those_without_a_value_come_last(folder: Path, tmp_path: Path) -> None:
    for name, loss in {"a": 2.0, "b": 1.0, "c": 3.0}.items():
        shutil.copytree(folder / "first", tmp_path / name)
        line = {"kind": "train", "attempt": 1, "step": 10**6, "round": 2, "loss": loss}
        with (tmp_path / name / "metrics.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
    shutil.copytree(folder / "first", tmp_path / "d")
    (tmp_path / "d" / "metrics.jsonl").unlink()
    with client(tmp_path) as web:
        for query, order in {"sort=loss": "bacd", "sort=loss&descending=true": "cabd",
                             "descending=true": "dcba"}.items():  # fmt: skip
            got = web.get(f"/api/runs?{query}").json()["runs"]
            assert "".join(one["name"] for one in got) == order
        assert web.get("/api/runs?sort=colour").status_code == 422


def test_many_who_ask_at_once_read_a_run_that_goes_on_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder / "first", tmp_path / "run")
    (tmp_path / "run" / "events.jsonl").write_text("")
    runs, seen = Runs(tmp_path), []
    read = web_folder.status
    monkeypatch.setattr(web_folder, "FRESH_S", 600.0)
    monkeypatch.setattr(
        web_folder, "status", lambda run, jobs: seen.append(run.path.name) or read(run, jobs)
    )
    with ThreadPoolExecutor(16) as pool:
        states = list(pool.map(runs.status, [runs.run("run")] * 50))
    assert {one.state for one in states} == {"PENDING"}
    assert seen == ["run"]


@pytest.fixture
def real(final_run: Path) -> Iterator[tuple[TestClient, str]]:
    with client(final_run.parent) as web:
        yield web, f"/api/runs/{final_run.name}"


def test_the_least_sure_members_are_those_with_the_smallest_margin(
    real: tuple[TestClient, str], final_run: Path
) -> None:
    web, here = real
    run = Run(final_run)
    number = run.rounds()[-1]
    ids = np.flatnonzero(read_assignments(run, number)[0] == 1)
    rows = kept_rows(run, number)[ids].astype(np.float32)
    centroids = read_array(run.round(number) / "centroids", "centroids.npy")[0].astype(np.float32)
    squared = ((rows[:, None] - centroids) ** 2).sum(-1)
    expected = np.sort(np.delete(squared, 1, axis=1).min(1) - squared[:, 1])
    got = web.get(f"{here}/clusters/1/borderline").json()
    assert got["compared"] == len(ids)
    margins = [one["margin"] for one in got["images"]]
    np.testing.assert_allclose(margins, expected, atol=2e-3)
    assert {one["second"] for one in got["images"]}.isdisjoint({1})


def test_neighbours_are_the_nearest_by_the_features(
    real: tuple[TestClient, str], final_run: Path
) -> None:
    web, here = real
    run = Run(final_run)
    rows = kept_rows(run, run.rounds()[-1]).astype(np.float32)
    squared = ((rows - rows[3]) ** 2).sum(1)
    squared[3] = np.inf
    got = web.get(f"{here}/images/3/neighbours?within=all&limit=5").json()["images"]
    np.testing.assert_allclose([one["distance"] for one in got], np.sort(squared)[:5], atol=1e-4)
    own = web.get(f"{here}/images/3/neighbours").json()["images"]
    assert {one["cluster"] for one in own} == {web.get(f"{here}/images/3").json()["cluster"]}


def test_duplicates_are_groups_of_members_that_are_alike(real: tuple[TestClient, str]) -> None:
    web, here = real
    groups = web.get(f"{here}/clusters/1/duplicates?similarity=0.3").json()["groups"]
    assert groups
    assert all(len(group) > 1 and {one["cluster"] for one in group} == {1} for group in groups)
    assert web.get(f"{here}/clusters/1/duplicates?similarity=1").json()["groups"] == []


def test_lineage_and_drift_are_counted_from_the_assignments(web: TestClient, folder: Path) -> None:
    run = Run(folder / "first")
    now, before = (read_assignments(run, one)[0] for one in (2, 1))
    told = web.get("/api/runs/first/clusters/2/lineage").json()["lineage"]
    assert [one["round"] for one in told] == [2, 1, 0]
    counts = np.bincount(before[(now == 2) & (before >= 0)])
    assert told[1]["id"] == counts.argmax()
    assert told[1]["share"] == pytest.approx(counts.max() / (now == 2).sum())
    clusters = web.get("/api/runs/first/clusters?sort=drift").json()["clusters"]
    drifts = {one["id"]: one["drift"] for one in clusters}
    assert drifts[2] == pytest.approx(1 - counts.max() / counts.sum())
    assert list(drifts.values()) == sorted(drifts.values(), reverse=True)


def test_clusters_are_filtered_by_class_and_size(web: TestClient) -> None:
    every = web.get("/api/runs/first/clusters").json()["clusters"]
    name = every[0]["class"]
    some = web.get("/api/runs/first/clusters", params={"text": name.upper()}).json()
    assert [one["id"] for one in some["clusters"]] == [
        one["id"] for one in every if one["class"] == name
    ]
    least = every[1]["size"]
    big = web.get(f"/api/runs/first/clusters?least={least}").json()
    assert big["total"] == sum(one["size"] >= least for one in every)


def test_exports_are_listed_and_nothing_else_is_handed_out(
    real: tuple[TestClient, str], final_run: Path
) -> None:
    web, here = real
    assert web.get(f"{here}/exports").json()["files"] == ["export/backbone.safetensors"]
    got = web.get(f"{here}/exports/export/backbone.safetensors")
    assert got.content == (final_run / "export" / "backbone.safetensors").read_bytes()
    for path in ("export/..%2frecipe.yaml", "../recipe.yaml", "logs/rank-00000.log", "export/a"):
        assert web.get(f"{here}/exports/{path}").status_code == 404


def test_a_recipe_an_estimate_a_map_and_a_comparison_are_answered(
    folder: Path, tmp_path: Path, final_run: Path
) -> None:
    for name in ("a", "b"):
        shutil.copytree(folder / "first", tmp_path / name)
    with client(tmp_path) as web:
        got = web.get("/api/recipes/small-photos?overrides=cluster.k=7").json()
        assert "k: 7" in got["recipe"]
        assert "train" in got["schema"]["properties"]
        asked = {"recipe": "small-photos", "device": "h100", "samples": 1000}
        assert web.get("/api/estimate", params=asked).json()["total_seconds"] > 0
        assert web.get("/api/estimate", params=asked | {"recipe": "/etc/passwd"}).status_code == 400
        assert web.get("/api/estimate", params=asked | {"device": "abacus"}).status_code == 400
        assert "<svg" in web.get("/api/compare?run=a&run=b").text
        assert web.get("/api/compare?run=a&run=a").status_code == 400
        assert web.get("/api/runs/a/map").status_code == 404
    with client(final_run.parent) as web:
        points = web.get(f"/api/runs/{final_run.name}/map").json()["points"]
    assert len(points) > 100


def test_random_requests_of_the_openapi_document_never_end_in_an_error_of_the_server(
    tmp_path: Path,
) -> None:
    make_run(tmp_path / "runs" / "first", make_shards(tmp_path / "shards", n=48, classes=3))
    made = serve.requests(tmp_path / "runs", 300)
    assert made["failed"] == []
    assert made["requests"] >= 300
    assert made["statuses"][200] > 30
