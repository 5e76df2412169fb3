"""An image that a browser sends: its cluster by the run's newest network, and its neighbours."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

import numpy as np
import torch

from cluster_jobs.web.clusters import Views
from cluster_jobs.web.folder import Stamp, stamp_of
from deepclust.data.images.crops import CentreCrop
from deepclust.data.images.decode import DecodeError
from deepclust.data.images.reduced import decode_for
from deepclust.errors import DataError
from deepclust.run.directory import Run, has_file, is_done
from deepclust.run.round_files import read_array
from deepclust.trained.labelling import label
from deepclust.trained.trained_run import Labeller, labeller_of

MOST_NETWORKS = 2
MOST_COMPARED = 20_000  # members of the cluster, the nearest to its centroid
NEIGHBOURS = 12


class Networks:
    """The networks that were asked last, one request at a time."""

    def __init__(self, views: Views) -> None:
        self._views, self._lock = views, threading.Lock()
        self._known: OrderedDict[tuple[str, Stamp], Labeller] = OrderedDict()

    def predict(self, run: Run, data: bytes) -> dict[str, Any]:
        """Return the cluster of an image and its nearest images, or raise `DataError`."""
        with self._lock, torch.inference_mode():
            labeller = self._labeller(run)
            section = run.recipe.data
            crop = CentreCrop(section.size, section.short_side)
            try:
                pixels = decode_for([(crop, None)], data, section.max_pixels, section.decode)
            except DecodeError as error:
                raise DataError(f"this cannot be read as an image: {error}") from error
            row = labeller.rows(crop(pixels)[None]).cpu()
            labels = label(labeller.rule, row)
        cluster = int(labels.clusters[0])
        names = labeller.classes
        answer = {
            "cluster": cluster,
            "distance": float(labels.distances[0]),
            "second": int(labels.seconds[0]),
            "margin": float(labels.margins[0]),
            "class": None if names is None else names[cluster],
            "round": labeller.round,
        }
        return {**answer, **self._neighbours(run, labeller.round, cluster, row.numpy()[0])}

    def _labeller(self, run: Run) -> Labeller:
        key = (str(run.path), stamp_of(run.path))
        if key not in self._known:
            self._known[key] = labeller_of(run, None, lambda text: None)
        self._known.move_to_end(key)
        while len(self._known) > MOST_NETWORKS:
            self._known.popitem(last=False)
        return self._known[key]

    def _neighbours(
        self, run: Run, number: int | None, cluster: int, row: np.ndarray
    ) -> dict[str, Any]:
        """Return the images of the cluster whose features are nearest, where features are kept."""
        if number is None:
            return {"neighbours": [], "note": "A method without rounds keeps no features."}
        stage = run.round(number) / "features"
        with self._views.open(run, number, 0) as view:
            members = view.members(cluster)[:MOST_COMPARED]
            if not is_done(stage) or not has_file(stage, "rows.npy"):
                near = view.several(members[:NEIGHBOURS].tolist())
                note = "The features are not kept: these are nearest to the cluster's centre."
                return {"neighbours": near, "note": note}
            rows = np.asarray(read_array(stage, "rows.npy", dims=2)[members], np.float32)
            squared = ((rows - row) ** 2).sum(1)
            order = np.argsort(squared, kind="stable")[:NEIGHBOURS]
            near = [
                one | {"distance": float(squared[i])}
                for i, one in zip(order, view.several(members[order].tolist()), strict=True)
            ]
            return {"neighbours": near, "note": ""}
