"""The report: complete, self-contained, safe with hostile names, and never in the way."""

from __future__ import annotations

import re
import shutil
import threading
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest

from cluster_jobs import cli
from cluster_jobs.report import write_report
from cluster_jobs.report.charts import Chart, bin_edges, charts, curves_chart
from cluster_jobs.report.cost import by_stage, cost
from cluster_jobs.report.facts import gather
from cluster_jobs.report.gallery import choose, gallery
from deepclust.errors import DataError, RecipeError
from deepclust.files import read_json, write_json
from deepclust.recipe import Recipe
from deepclust.run import labels
from deepclust.run.directory import Run, manifest
from tests.cluster_jobs.synthetic import (
    EXCLUDED,
    evaluate,
    make_run,
    make_simclr,
    pin,
    rename_classes,
    reseal,
)
from tests.images import make_shards

OWN_SCRIPTS = 2  # the data of the browser of clusters, and the script itself


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return make_shards(tmp_path / "shards", n=96, classes=3)


@pytest.fixture
def run(tmp_path: Path, shards: Path) -> Path:
    return make_run(tmp_path / "first-run", shards)


def page(run: Path) -> str:
    return write_report(run, run / "report.html").read_text()


class Outline(HTMLParser):
    """The tags that are open, and every tag and address seen; complains about wrong nesting."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "br", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_shows_what_the_run_is_and_did(run: Path) -> None:
    evaluate(run)
    text = page(run)
    fingerprint = manifest(run / "rounds" / "0002" / "assignments")["inputs"]["data"]
    for words in ("first-run", "SUCCEEDED", "resnet18_small", fingerprint, "Training loss"):
        assert words in text
    rounds, scores = (text.split(f"<h2>{name}")[1] for name in ("Rounds", "Evaluations"))
    for part, count in ((rounds, 3), (scores, 4)):
        assert part.split("</section>")[0].count('<th scope="row">') == count
    assert "0.8765" in text


def test_the_page_needs_no_other_file(run: Path) -> None:
    outline = Outline(page(run))
    assert {"link", "iframe"}.isdisjoint(outline.tags)
    assert outline.tags.count("script") == OWN_SCRIPTS
    pictures = [one for one in outline.addresses if one.startswith("data:image/")]
    assert len(pictures) > 20
    assert all(one.startswith(("data:image/", "#")) for one in outline.addresses)


def test_the_same_run_gives_the_same_page(run: Path) -> None:
    first, second = (re.sub("Written .* by", "", page(run)) for _ in range(2))
    assert first == second


def test_class_names_cannot_break_out_of_the_page(run: Path, shards: Path) -> None:
    evil = '"><script>alert(1)</script>'
    rename_classes(shards, [evil, "{{ 7 * 7 }}", "a & b"])
    text = page(run)
    assert Outline(text).tags.count("script") == OWN_SCRIPTS
    assert evil not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "{{ 7 * 7 }}" in text


def test_a_run_without_rounds_has_a_page(tmp_path: Path, shards: Path) -> None:
    text = page(make_run(tmp_path / "new", shards, rounds=0))
    assert "DIED" in text
    assert "No round is finished yet" in text
    assert "after the first round" in text
    assert "deepclust resume" in text
    Outline(text)


def test_a_run_without_clusters_is_described_without_them(tmp_path: Path, shards: Path) -> None:
    text = page(make_simclr(tmp_path / "simclr", shards))
    Outline(text)
    assert "SUCCEEDED" in text
    assert "Training loss" in text
    assert "Signs of collapse" in text
    assert "has not collapsed" in text
    assert "<dt>Samples</dt><dd>96</dd>" in text
    for words in ("not known", "<h2>Rounds", "<h2>Clusters", "deepclust assignments"):
        assert words not in text


def test_several_heads_have_a_table_and_the_pictures_are_of_head_0(run: Path) -> None:
    stage = run / "rounds" / "0002" / "assignments"
    one = read_json(stage / "statistics.json")
    second = {"inertia": 0.123, "sizes": {"min": 77}}  # fewer statistics than ours
    write_json(stage / "statistics.json", {**one, "heads": [one, second]})
    for name in ("assignments", "distances"):
        rows = np.load(stage / f"{name}.npy")
        np.save(stage / f"{name}.npy", np.concatenate([rows, rows[:, ::-1]]))
    reseal(stage)
    text = page(run)
    Outline(text)
    assert "Each round has 2 heads" in text
    assert "<td>0.123</td>" in text
    assert "<td>77</td>" in text
    assert "Of round 2, head 0" in text


def test_missing_statistics_are_shown_as_dashes(run: Path) -> None:
    for number in range(3):
        file = run / "rounds" / f"{number:04d}" / "assignments" / "statistics.json"
        write_json(file, {"round": number, "k": 6, "n": 96})
        reseal(file.parent)
    text = page(run)
    Outline(text)
    assert '<th scope="row">2</th>' in text
    assert "<td>–</td>" in text


def test_seeds_are_shown_by_cluster_and_on_the_cards(tmp_path: Path, shards: Path) -> None:
    run = make_run(tmp_path / "run", shards, rounds=1, seeds={"labels": "shards"})
    pin(run, 0, ["red & blue", "green"])
    text = page(run)
    assert "labelled classes. Judged by 10 labels" in " ".join(text.split())
    assert "Labels only measure" not in text
    assert '<th scope="col">Cluster</th>' in text
    seeds = {card.cluster: card.seed for card in gallery(Run(run)).groups[0][1]}
    assert seeds == {0: "red & blue", 1: "green", 2: None, 3: None, 4: None, 5: None}
    assert text.count("Seed class: ") == 2
    assert "Seed class: red &amp; blue" in text


def test_seeded_super_clusters_are_named_as_such(tmp_path: Path, shards: Path) -> None:
    sections = {"cluster": {"k": 6, "dim": 8, "supers": 3}, "method": {"name": "deepercluster"}}
    run = make_run(tmp_path / "run", shards, 1, seeds={"labels": "shards"}, **sections)
    pin(run, 0, ["red"])
    text = page(run)
    assert '<th scope="col">Super-cluster</th>' in text
    assert "The first super-clusters are pinned" in text
    seeds = {card.cluster: card.seed for card in gallery(Run(run)).groups[0][1]}
    assert [cluster for cluster, seed in sorted(seeds.items()) if seed == "red"] == [0, 1]


def test_images_without_labels_have_a_gallery_without_purity(tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "plain", n=64, labels=False)
    run = make_run(tmp_path / "run", shards, rounds=1)
    text = page(run)
    assert "Agreement with the labels" not in text
    assert 'class="purity"' not in text
    assert text.count("data:image/png") > 20


def test_missing_shards_leave_out_only_the_gallery(run: Path, shards: Path) -> None:
    shutil.rmtree(shards)
    text = page(run)
    assert "The images cannot be shown" in text
    assert str(shards) in text
    assert "Cluster sizes" in text


def test_other_shards_under_the_old_name_are_not_shown(run: Path, shards: Path) -> None:
    shutil.rmtree(shards)
    make_shards(shards, n=96, classes=2)
    text = page(run)
    assert "clustered" in text
    assert "data:image/png" not in text


def test_the_gallery_shows_the_nearest_images_and_no_excluded_one(run: Path) -> None:
    stage = run / "rounds" / "0002" / "assignments"
    assignments = np.load(stage / "assignments.npy")[0]
    distances = np.load(stage / "distances.npy")[0]
    for _, cards in gallery(Run(run)).groups:
        for card in cards:
            members = np.flatnonzero(assignments == card.cluster)
            nearest = members[np.argsort(distances[members])][:10]
            shown = [int(one.title.rsplit(" ", 1)[1]) for one in card.nearest]
            assert shown == nearest.tolist()
            others = {int(one.title.rsplit(" ", 1)[1]) for one in card.random}
            assert others <= set(members.tolist()) - set(shown) - set(EXCLUDED)


def test_purity_is_the_share_of_the_most_frequent_class(run: Path, shards: Path) -> None:
    assignments = np.load(run / "rounds" / "0002" / "assignments" / "assignments.npy")[0]
    for card in gallery(Run(run)).groups[0][1]:
        labels = np.flatnonzero(assignments == card.cluster) % 3
        counts = np.bincount(labels)
        assert card.purity == pytest.approx(counts.max() / counts.sum())
        assert card.majority == f"class {counts.argmax()}"


def test_many_clusters_are_shown_by_kind_each_once() -> None:
    sizes = np.random.default_rng(0).integers(0, 50, 1000)
    sizes[[3, 700]] = 1000, 0
    chosen = choose(sizes, seed=0)
    everything = np.concatenate(list(chosen.values()))
    assert list(map(len, chosen.values())) == [4, 4, 4]
    assert len(set(everything.tolist())) == 12
    assert chosen["The largest"][0] == 3
    median = np.median(sizes[sizes > 0])
    assert np.abs(sizes[chosen["Of median size"]] - median).max() <= 1
    assert (sizes[everything] > 0).all()


@pytest.mark.parametrize("wide", [False, True])
def test_the_histogram_counts_every_cluster(wide: bool) -> None:
    for sizes in (np.array([43, 60, 185]), np.array([0, 0, 7]), np.array([5, 5]), np.arange(999)):
        low = 1 if wide else 0  # a logarithmic axis has no place for the empty ones
        assert np.histogram(sizes, bin_edges(sizes, wide))[0].sum() == (sizes >= low).sum()


def test_large_photos_keep_the_page_small(tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "large", n=60, shards=2, size=200, format="jpg")
    run = make_run(tmp_path / "run", shards, rounds=1, k=13)
    assert len(page(run)) < 2_000_000


def test_a_folder_that_is_not_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is not a run"):
        write_report(tmp_path, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_report_is_html_and_nothing_else(run: Path) -> None:
    with pytest.raises(RecipeError, match=r"a\.pdf.*name it \*\.html"):
        write_report(run, run / "a.pdf")


def test_images_larger_than_the_recipe_allows_are_not_shown(run: Path) -> None:
    assert gallery(Run(run)).groups[0][1][0].nearest
    Recipe.load(run / "recipe.yaml", "data.max_pixels=100").save(run / "recipe.yaml")
    assert not gallery(Run(run)).groups[0][1][0].nearest


def test_a_report_writes_nothing_but_its_page(run: Path, shards: Path) -> None:
    shutil.rmtree(shards / "deepclust-index")
    before = set(run.parent.rglob("*"))
    assert "data:image" in page(run)
    assert set(run.parent.rglob("*")) - before == {run / "report.html"}


def test_a_recipe_of_somebody_else_opens_no_url_unless_it_may(run: Path) -> None:
    asked = []

    class Server(BaseHTTPRequestHandler):
        def handle(self) -> None:
            asked.append(self.client_address)

    with HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/a.tar"
        Recipe.load(run / "recipe.yaml", f"data.shards={url}").save(run / "recipe.yaml")
        assert "--remote" in gallery(Run(run)).note
        assert asked == []
        assert "cannot be shown" in gallery(Run(run), remote=True).note
        assert asked != []
        server.shutdown()


@pytest.mark.parametrize("name", ["assignments.npy", "statistics.json", "manifest.json"])
def test_a_damaged_round_is_one_sentence_with_its_file(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    file = Run(run).round(Run(run).rounds()[-1]) / "assignments" / name
    file.write_bytes(file.read_bytes()[:40])
    monkeypatch.setattr("sys.argv", ["deepclust", "report", str(run)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    begun, said = capsys.readouterr().err.splitlines()
    assert begun == f"reporting on {run}"
    assert ended.value.code == 3
    assert said.startswith("error: ")
    assert name in said


@pytest.mark.parametrize(
    "change", [{"time": 1e300}, {"git": 5}, {"git": [1]}, {"packages": 3}, {"time": None}]
)
def test_an_environment_that_cannot_be_read_is_told_on_the_page(
    run: Path, change: dict[str, object]
) -> None:
    file = run / "env.json"
    written = {"time": 1.0, "host": "h", "packages": {}, "git": "abc"}
    write_json(file, {**written, **change})
    assert "Created" in page(run)


@pytest.mark.parametrize("values", [3, {"top1": "x"}, {"top1": None}, {"top1": 10**400}])
def test_scores_that_are_no_numbers_are_an_error_that_names_the_file(
    run: Path, values: object
) -> None:
    record = {"step": 4, "train": "a", "test": "b", "scores": {"knn": values}}
    (run / "evaluations").mkdir(exist_ok=True)
    write_json(run / "evaluations" / "00000099.json", record)
    with pytest.raises(DataError, match=r"00000099\.json is damaged: its scores of 'knn'"):
        page(run)


def answered(run: Path, names: list[str], rows: list[list[int]]) -> None:
    """Add the tables of the evaluator `classifier` to the record of an evaluation."""
    evaluate(run)
    (file,) = (run / "evaluations").glob("*.json")
    record = read_json(file)
    counts = [[4, sum(row), row[i] / sum(row)] for i, row in enumerate(rows)]
    record["scores"]["classifier"] = {
        "top1": 0.75,
        "classes": {"rows": names, "columns": ["labels", "images", "recall"], "values": counts},
        "calibration": {
            "rows": ["0.4 to 0.5", "0.9 to 1.0"],
            "columns": ["images", "confidence", "accuracy"],
            "values": [[10, 0.45, 0.3], [30, 0.97, 0.9]],
        },
        "confusion": {"rows": names, "columns": names, "values": rows},
    }
    write_json(file, record)


def test_the_own_answers_of_a_run_without_clusters_are_shown_with_labels_and_calibration(
    tmp_path: Path, shards: Path
) -> None:
    run = make_simclr(tmp_path / "online", shards)
    labels.write(Run(run), "abc", [3, 4], ["ant", "<bee>"])
    assert '<th scope="row">&lt;bee&gt;</th><td>4</td>' in page(run)
    answered(run, ["ant", "<bee>"], [[8, 2], [1, 29]])
    text = page(run)
    Outline(text)
    for words in ("Its own answers", 'class="heat"', "--share:96.7%", "Calibration", "0.967"):
        assert words in text
    assert "ant as &lt;bee&gt; (2), &lt;bee&gt; as ant (1)" in text


def test_a_confusion_of_many_classes_is_its_most_frequent_pairs(run: Path) -> None:
    names = [f"c{i}" for i in range(60)]
    rows = np.eye(60, dtype=int) * 5
    rows[3, 7] = 4
    answered(run, names, rows.tolist())
    text = page(run)
    assert 'class="heat"' not in text
    assert "c3 as c7 (4)" in text


def test_a_damaged_table_of_an_evaluation_is_named(run: Path) -> None:
    answered(run, ["a", "b"], [[1, 2], [3, 4]])
    (file,) = (run / "evaluations").glob("*.json")
    record = read_json(file)
    whole = record["scores"]["classifier"]["confusion"]
    for damage in ({"values": [[1], [3, 4]]}, {"columns": [["a"], "b"]}, {"rows": 2}):
        record["scores"]["classifier"]["confusion"] = {**whole, **damage}
        write_json(file, record)
        with pytest.raises(DataError, match="scores of 'classifier' are no numbers"):
            page(run)


def test_the_page_gives_a_curve_as_a_table_too_and_one_round_as_one_place(run: Path) -> None:
    panels = {chart.title: chart for chart in charts(Run(run), gather(Run(run)))}
    balance = panels["Balance"]
    assert balance.columns == ["round", "entropy", "largest share"]
    assert [row[0] for row in balance.rows] == ["0", "1", "2"]
    sizes = panels["Cluster sizes"]
    k = Run(run).recipe.clustering.k
    assert sum(int(count.replace(",", "")) for _, count in sizes.rows) == k
    one = panels["Agreement with the previous round"]
    assert "0.9" not in re.sub(r"<[^>]*>", "", str(_one_place(one)))


def _one_place(chart: Chart) -> str:
    """Return a panel of the first point alone."""
    curve = ("NMI", np.array([0.0, 1.0]), np.array([np.nan, 0.5]))
    return str(curves_chart(chart.title, "", "round", [curve], None).svg)


def test_the_page_says_what_each_stage_took(run: Path) -> None:
    took = cost(Run(run))
    assert took is not None
    assert took.seconds == pytest.approx(sum(seconds for _, seconds in took.stages))
    events = [
        {"attempt": 1, "time": 0.0, "event": "started"},
        {"attempt": 1, "time": 2.0, "event": "checkpoint", "step": 0},
        {"attempt": 1, "time": 5.0, "event": "extracted"},
        {"attempt": 1, "time": 6.0, "event": "training"},
        {"attempt": 1, "time": 16.0, "event": "checkpoint", "step": 9},
        {"attempt": 2, "time": 99.0, "event": "started"},
        {"attempt": 2, "time": 100.0, "event": "finished"},
    ]
    assert by_stage(events) == {"start": 2, "extraction": 3, "other": 2, "training": 10}
