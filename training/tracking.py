"""What a run leaves in MLflow, and the promise that a tracker can never stop training.

One run through all restarts: its id lies beside the checkpoints. Only rank 0 writes, through a thread and a bounded
queue, so a slow tracker costs no step and a dead one costs points of a curve, which are counted and said once.
Without MLFLOW_TRACKING_URI the store is a sqlite file in the dataset folder (MLflow's file store is gone in 3.17).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipelines.dataset import filesystem_of

if TYPE_CHECKING:  # importing MLflow takes 2.5 s, and of the workers only rank 0 needs it, in its thread
    from mlflow import MlflowClient

EXPERIMENT = MODEL_NAME = "videobert"
CANDIDATE, CHAMPION = "candidate", "champion"
MAX_PARAMS_PER_BATCH = 100
MAX_VALUE_CHARS = 6000
QUEUE_POINTS = 10_000

Result = TypeVar("Result")
logger = logging.getLogger(__name__)


def tracking_uri(dataset_url: str) -> str:
    """MLFLOW_TRACKING_URI, or the sqlite file of a local dataset.

    Raises ValueError for a dataset in an object store without the variable.
    """
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    return f"sqlite:///{_local_folder(dataset_url) / 'mlflow.db'}"


def client(uri: str) -> MlflowClient:
    """A client that gives up on a dead server within seconds, not minutes."""
    from mlflow import MlflowClient

    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    for name in ("alembic", "mlflow.store.db.utils"):  # MLflow narrates the making of its sqlite tables
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def start_run(
    uri: str,
    *,
    name: str,
    run_id: str | None,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
) -> str:
    """The id of the run: the given one where it exists, else a new one with parameters, tags and resolved config."""
    from mlflow.entities import Param

    api = client(uri)
    if run_id is not None and any(run.info.run_id == run_id for run in _runs_named(api, name)):
        api.update_run(run_id, status="RUNNING")
        return run_id
    run = api.create_run(experiment(api, uri, EXPERIMENT), run_name=name, tags=dict(tags))
    new_id = str(run.info.run_id)
    entries = [Param(key, str(value)[:MAX_VALUE_CHARS]) for key, value in params.items()]
    for first in range(0, len(entries), MAX_PARAMS_PER_BATCH):
        api.log_batch(new_id, params=entries[first : first + MAX_PARAMS_PER_BATCH])
    api.log_text(new_id, json.dumps(dict(params), indent=1, sort_keys=True, default=str) + "\n", "config.json")
    return new_id


def finish_run(uri: str, run_id: str, *, tags: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    api = client(uri)
    api.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
    api.set_terminated(run_id, status="FINISHED")


def loss_curves(run_id: str, *, uri: str) -> dict[str, list[tuple[int, float]]]:
    """Every metric of a run as points (step, value), one a step, ascending."""
    api = client(uri)
    curves = {}
    for key in sorted(api.get_run(run_id).data.metrics):
        # A step between the last checkpoint and a crash is logged twice, with the same value.
        points = {point.step: point.value for point in api.get_metric_history(run_id, key)}
        curves[key] = sorted(points.items())
    return curves


def attempt(what: str, action: Callable[[], Result]) -> Result | None:
    """The result of an action on the tracker, or None and a warning if the tracker fails."""
    try:
        return action()
    except Exception as error:
        logger.warning("tracker: %s failed (%s); going on without it.", what, _first_line(error))
        return None


def code_version() -> str:
    """A digest of the sources of this package: equal for equal code, installed or not, with git or without."""
    sha = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        sha.update(path.read_bytes())
    return sha.hexdigest()[:12]


class MetricLogger:
    """Sends points of curves from a thread of its own. `close` when done."""

    def __init__(self, uri: str, run_id: str | None) -> None:
        """Without a run id, points are dropped."""
        self.num_lost = 0
        self._failing = False
        self._points: queue.Queue[tuple[dict[str, float], int, int] | threading.Event | None]
        self._points = queue.Queue(QUEUE_POINTS)
        self._uri, self._run_id = uri, run_id
        self._thread = threading.Thread(target=self._send_all, name="metric-logger", daemon=True)
        self._thread.start()

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Never blocks and never raises."""
        try:
            self._points.put_nowait((dict(metrics), step, int(time.time() * 1000)))
        except queue.Full:
            self._lose("its queue is full")

    def flush(self, *, deadline_s: float = 5.0) -> None:
        """Wait until what is queued is sent; not at all while the tracker fails.

        Done before a checkpoint: what came before it is not computed again after a crash.
        """
        sent = threading.Event()
        if self._failing or self._points.full():
            return
        self._points.put_nowait(sent)
        sent.wait(deadline_s)

    def close(self, *, deadline_s: float = 30.0) -> None:
        """Wait for what is queued, up to the deadline."""
        try:
            self._points.put(None, timeout=deadline_s)
        except queue.Full:
            self._lose("it did not keep up")
        self._thread.join(deadline_s)
        if self.num_lost:
            logger.warning("tracker: %d points of the curves were lost.", self.num_lost)

    def _send_all(self) -> None:
        api = None
        while (point := self._points.get()) is not None:
            if isinstance(point, threading.Event):
                point.set()
                continue
            if self._run_id is None:
                continue
            metrics, step, now_ms = point
            try:
                from mlflow.entities import Metric

                api = api or client(self._uri)
                api.log_batch(self._run_id, metrics=[Metric(key, v, now_ms, step) for key, v in metrics.items()])
                self._failing = False
            except Exception as error:
                self._lose(_first_line(error))

    def _lose(self, why: str) -> None:
        if not self.num_lost:
            logger.warning("tracker: a point was lost (%s); training goes on.", why)
        self.num_lost += 1
        self._failing = True


def experiment(api: MlflowClient, uri: str, name: str) -> str:
    """The id of an experiment, which is made where it is not there; a local store keeps its artifacts beside itself."""
    found = api.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    path = uri.removeprefix("sqlite:///")
    artifacts = (Path(path).resolve().parent / "artifacts").as_uri() if path != uri else None
    return str(api.create_experiment(name, artifact_location=artifacts))


def _runs_named(api: MlflowClient, name: str) -> list[Any]:
    found = api.get_experiment_by_name(EXPERIMENT)
    query = f"attributes.run_name = '{name}'"
    return list(api.search_runs([found.experiment_id], query)) if found is not None else []


def _local_folder(dataset_url: str) -> Path:
    fs, root = filesystem_of(dataset_url)
    if fs.type_name != "local":
        raise ValueError(f"the dataset {dataset_url} is not local; set MLFLOW_TRACKING_URI to an MLflow server.")
    folder = Path(root) / "mlflow"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
