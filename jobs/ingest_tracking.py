"""What a run of ingestion leaves in MLflow: one run of the experiment `videobert-ingest` each.

So a model's run and the runs that made its corpus lie in one place, tied by the digest of the dataset. It is written
after the work, from the ledger's own report, by a client that gives up on a dead server: a run that ingested does not
fail because nobody took notes. Price: 3 s of CPU to import MLflow, 1.5 s to make the sqlite store of a new dataset,
0.1 s to write; a dead server costs 4 s. A run that found nothing new pays nothing: this is not called.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipelines.dataset import Dataset
from pipelines.progress import StageTimes
from pipelines.report import Report
from pipelines.stages import IngestConfig
from pipelines.storage import absolute_url
from training import tracking

EXPERIMENT = "videobert-ingest"
MAX_FAILURES = 1000  # listed in report.json; the ledger has all
MAX_METRICS_PER_BATCH = 1000  # of the REST API
_COUNTS = ("samples", "sample_seconds", "visual_tokens", "sentences", "words")
_GROUPS = ("sources", "seconds", "reasons", "seconds_by_reason", "stage_seconds", "transcripts")


def record_ingest(
    dataset_url: str,
    *,
    places: Sequence[str],
    config: IngestConfig,
    run_id: str,
    code_version: str,
    numbers: Mapping[str, float],
    report: Report,
    stage_times: StageTimes,
    say: Callable[[str], None] = print,
) -> str | None:
    """Log a run of ingestion; returns the id of the MLflow run, None where the tracker did not take it.

    `numbers` are figures of the run itself (sources that are new, wall seconds), `report` is that of the dataset
    afterwards. Never raises for the tracker's sake: one line through `say` tells what was not logged and why.
    """
    try:
        uri = tracking.tracking_uri(dataset_url)
    except ValueError as error:  # an object store without MLFLOW_TRACKING_URI
        say(f"the run is not in MLflow: {error}")
        return None
    try:
        params = {"sources": list(places), "dataset": absolute_url(dataset_url), "code_version": code_version}
        params |= {"config_digest": config.digest, **flat(_settings(config))}
        tags = {"run_id": run_id, "config_digest": config.digest}
        if digest := _dataset_digest(dataset_url):
            tags["dataset_digest"] = digest
        return _write(
            uri,
            run_id,
            params=params,
            tags=tags,
            metrics=metrics(report, stage_times, numbers),
            files={
                "config.json": _settings(config),
                "report.json": _short(report.to_dict()),
                "stage_times.json": stage_times.to_dict(),
            },
        )
    except Exception as error:  # whatever a tracker and its client may raise; the work is done and in the ledger
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        say(f"the run is not in MLflow at {uri} ({reason}); the dataset is complete without it.")
        return None


def metrics(report: Report, stage_times: StageTimes, numbers: Mapping[str, float]) -> dict[str, float]:
    """The figures by their names in MLflow: `sources.kept`, `reasons.too_short`, `stage.features.busy_s`."""
    record = report.to_dict()
    found = {name: record[name] for name in _COUNTS}
    found |= flat({name: record[name] for name in _GROUPS if name in record})
    found |= flat({"stage": stage_times.to_dict(), "run": dict(numbers)})
    return {
        re.sub(r"[^\w\-./ ]", "_", name): float(value)
        for name, value in found.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def flat(nested: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings as one, names joined by dots, as the command line has them."""
    found: dict[str, Any] = {}
    for name, value in nested.items():
        inner = flat(value) if isinstance(value, Mapping) else None
        found |= {name: value} if inner is None else {f"{name}.{key}": leaf for key, leaf in inner.items()}
    return found


def _settings(config: IngestConfig) -> dict[str, Any]:
    """The configuration without what a command adds to it."""
    settings = dataclasses.asdict(config)
    return {f.name: settings[f.name] for f in dataclasses.fields(IngestConfig)}


def _dataset_digest(dataset_url: str) -> str | None:
    """None for a folder in which nothing was kept yet."""
    try:
        return Dataset(dataset_url).digest()
    except FileNotFoundError:
        return None


def _short(record: dict[str, Any]) -> dict[str, Any]:
    failures = record.get("failures", ())
    return record | {"failures": failures[:MAX_FAILURES], "failures_left_out": max(0, len(failures) - MAX_FAILURES)}


def _write(
    uri: str,
    name: str,
    *,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    metrics: Mapping[str, float],
    files: Mapping[str, Any],
) -> str:
    from mlflow.entities import Metric, Param

    api = tracking.client(uri)
    mlflow_id = str(
        api.create_run(tracking.experiment(api, uri, EXPERIMENT), run_name=name, tags=dict(tags)).info.run_id
    )
    now_ms = int(time.time() * 1000)
    points = [Metric(key, value, now_ms, 0) for key, value in sorted(metrics.items())]
    entries = [Param(key, str(value)[: tracking.MAX_VALUE_CHARS]) for key, value in sorted(params.items())]
    for first in range(0, len(entries), tracking.MAX_PARAMS_PER_BATCH):
        api.log_batch(mlflow_id, params=entries[first : first + tracking.MAX_PARAMS_PER_BATCH])
    for first in range(0, len(points), MAX_METRICS_PER_BATCH):
        api.log_batch(mlflow_id, metrics=points[first : first + MAX_METRICS_PER_BATCH])
    for file, content in files.items():
        api.log_text(mlflow_id, json.dumps(content, indent=1, sort_keys=True, default=str) + "\n", file)
    api.set_terminated(mlflow_id, status="FINISHED")
    return mlflow_id
