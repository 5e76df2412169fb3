"""The browser of all clusters: true numbers, bounded, and usable in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from cluster_jobs.report import browser as under_test
from cluster_jobs.report import write_report
from cluster_jobs.report.browser import Browser, browse
from deepclust import open_index
from tests.cluster_jobs.synthetic import EXCLUDED, make_run
from tests.images import make_shards

N, K = 96, 8


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("browser") / "shards", n=N, classes=3)


def browsed(shards: Path) -> tuple[Browser, np.ndarray, np.ndarray]:
    """Return the browser of drawn clusters, of which one is empty, with two images excluded."""
    draw = np.random.default_rng(0)
    assignments = draw.integers(0, K - 1, N).astype(np.int32)
    assignments[[3, 50]] = -1
    distances = draw.random(N).astype(np.float32)
    index = open_index(shards)
    return browse(index, assignments, distances, [None] * K, 10**8), assignments, distances


def test_sizes_purity_and_distance_are_those_of_the_members(shards: Path) -> None:
    page, assignments, distances = browsed(shards)
    labels = np.asarray(open_index(shards).labels)
    assert [one["size"] for one in page.clusters] == sorted(
        np.bincount(assignments[assignments >= 0]), reverse=True
    )
    for one in page.clusters:
        members = np.flatnonzero(assignments == one["id"])
        assert one["purity"] == pytest.approx(
            np.bincount(labels[members]).max() / len(members), abs=1e-4
        )
        assert one["distance"] == pytest.approx(distances[members].mean(), abs=1e-4)
    assert page.keys is not None
    assert page.keys["clusters"] == assignments.tolist()


def test_drift_is_what_was_not_together_a_round_before(shards: Path) -> None:
    now = np.repeat(np.arange(4, dtype=np.int32), N // 4)
    before = now.copy()
    before[: N // 8] = 3  # half of cluster 0 comes from cluster 3, half from 0
    before[N // 4] = -1  # an image that was excluded does not count
    index, near = open_index(shards), np.ones(N, np.float32)
    page = browse(index, now, near, [None] * 4, 10**8, before)
    assert [one["drift"] for one in sorted(page.clusters, key=lambda one: one["id"])] == [
        0.5, 0, 0, 0
    ]  # fmt: skip
    assert page.compared
    assert not browse(index, now, near, [None] * 4, 10**8).compared


def test_the_nearest_come_first_and_no_image_twice(shards: Path) -> None:
    page, assignments, distances = browsed(shards)
    index = open_index(shards)
    for one in page.clusters:
        members = np.flatnonzero(assignments == one["id"])
        by_distance = [index.keys[i] for i in members[np.argsort(distances[members])].tolist()]
        near, far = ([key for key, _ in one[kind]] for kind in ("near", "far"))
        assert near == by_distance[: len(near)]
        assert far == by_distance[::-1][: len(far)]
        assert len({*near, *far}) == min(len(members), under_test.MOST)


def test_a_page_of_many_clusters_is_bounded_and_says_so(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(under_test, "MOST_CLUSTERS", 3)
    monkeypatch.setattr(under_test, "MOST_IMAGES", 9)
    monkeypatch.setattr(under_test, "MOST_KEYS", 10)
    page, _, _ = browsed(shards)
    assert (len(page.clusters), page.keys) == (3, None)
    assert all(len(one["near"]) + len(one["far"]) == 3 for one in page.clusters)
    assert "3 largest of 7 clusters" in page.note
    assert "too many to search" in page.note


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium")
def test_a_browser_draws_the_clusters_sorted_and_finds_a_key(tmp_path: Path, shards: Path) -> None:
    page = write_report(make_run(tmp_path / "run", shards), tmp_path / "report.html")
    key = json.dumps(open_index(shards).keys[next(i for i in range(N) if i not in EXCLUDED)])
    act = """<script>
      const root = document.getElementById("browser"), set = (name, value, kind) => {
        const one = root.querySelector(`[name=${name}]`);
        one.value = value; one.dispatchEvent(new Event(kind));
      };
      const spans = () => [...root.querySelectorAll("article header span")];
      const sizes = () => spans().map((span) => parseInt(span.textContent));
      set("order", "smallest", "change"); const smallest = sizes();
      set("order", "largest", "change"); const largest = sizes();
      root.querySelector("[name=key]").value = KEY; root.querySelector("form button").click();
      const answer = root.querySelector(".answer").textContent;
      document.title = JSON.stringify({smallest, largest, answer, cards: sizes().length});
    </script></body>"""
    page.write_text(page.read_text().replace("</body>", act.replace("KEY", key)))
    command = ["chromium", "--headless=new", "--no-sandbox", "--dump-dom", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    title = re.search("<title>(.*?)</title>", dom)
    assert title is not None
    seen = json.loads(title[1])
    assert seen["smallest"] == sorted(seen["largest"])
    assert len(seen["largest"]) > 1
    assert seen["answer"].startswith(f"{json.loads(key)} is in cluster")
    assert seen["cards"] == 1
