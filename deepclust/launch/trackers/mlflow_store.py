"""MLflow: into `mlflow.db` beside the run, or to the server that MLFLOW_TRACKING_URI names.

All runs of a folder share that store: `mlflow ui --backend-store-uri sqlite:///runs/mlflow.db`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from PIL.Image import Image

from deepclust.launch.trackers import Tracked
from deepclust.run.varying import Point

MOST = 100  # parameters or metrics of a request; MLflow takes no more parameters
MOST_TEXT = 500  # letters of a parameter
ENDS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class Store:
    """A run in MLflow's store."""

    def __init__(self, tracked: Tracked) -> None:
        folder = tracked.run.path.absolute().parent
        place = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlflow.db'}"
        self.client = MlflowClient(place)
        self.id = str(tracked.notes.get("run_id", ""))
        if self.id:
            self.client.update_run(self.id, "RUNNING")
            return
        own = None if "MLFLOW_TRACKING_URI" in os.environ else (folder / "mlartifacts").as_uri()
        begun = self.client.create_run(self._experiment(own), run_name=tracked.name)
        self.id = tracked.notes["run_id"] = str(begun.info.run_id)
        pairs = [Param(key, str(value)[:MOST_TEXT]) for key, value in tracked.parameters.items()]
        for first in range(0, len(pairs), MOST):
            self.client.log_batch(self.id, params=pairs[first : first + MOST])

    def _experiment(self, artifacts: str | None) -> Any:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "deepclust")
        known = self.client.get_experiment_by_name(name)
        if known is not None:
            return known.experiment_id
        try:
            return self.client.create_experiment(name, artifacts)
        except MlflowException:  # of another run that began at the same moment
            known = self.client.get_experiment_by_name(name)
            if known is None:
                raise
            return known.experiment_id

    def curves(self, points: Mapping[str, list[Point]]) -> None:
        """Send points in few requests."""
        now = int(1000 * time.time())
        metrics = [Metric(name, v, now, step) for name, p in points.items() for step, v in p]
        for first in range(0, len(metrics), MOST):
            self.client.log_batch(self.id, metrics=metrics[first : first + MOST])

    def picture(self, name: str, step: int, image: Image) -> None:
        """Send a picture, as an artifact."""
        self.client.log_image(self.id, image, f"{name}/{step:08d}.png")

    def close(self, state: str) -> None:
        """Say how the run has ended."""
        self.client.set_terminated(self.id, ENDS[state])


TRACKER = Store
