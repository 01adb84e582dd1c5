"""A run of ingestion in MLflow: complete where there is a tracker, one line where there is none."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from jobs.ingest_tracking import EXPERIMENT, flat, metrics, record_ingest
from pipelines.ledger import LEDGER_SCHEMA
from pipelines.progress import StageTime, StageTimes
from pipelines.report import Report, summarise
from pipelines.stages import IngestConfig
from training import tracking

DEAD = "http://127.0.0.1:1"  # nothing listens there
TIMES = StageTimes((StageTime(stage="features", num_workers=2, rows=3, video_s=30.0, busy_s=4.0, span_s=5.0),))


@pytest.fixture
def report() -> Report:
    """One source that failed."""
    import pyarrow as pa

    listed = {"source_id": "a", "uri": "/a.mp4", "attempt": 0, "status": "pending"}
    failed = listed | {"attempt": 1, "status": "quarantined", "stage": "fetch", "reason": "unreadable", "detail": "no"}
    return summarise(pa.Table.from_pylist([listed, failed], schema=LEDGER_SCHEMA))


def record(url: str, report: Report, said: list[str]) -> str | None:
    return record_ingest(
        url,
        places=["/videos"],
        config=IngestConfig(),
        run_id="20261123T120000Z-abc123",
        code_version="videobert 0.1.0",
        numbers={"num_new": 1, "seconds": 7.5},
        report=report,
        stage_times=TIMES,
        say=said.append,
    )


@pytest.mark.integration
def test_a_run_is_found_again_with_its_figures_and_settings(
    tmp_path: Path, report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    said: list[str] = []
    first, second = record(str(tmp_path), report, said), record(str(tmp_path), report, said)
    assert first is not None
    assert second not in (None, first)  # each run that did work is one
    assert said == []
    api = tracking.client(tracking.tracking_uri(str(tmp_path)))
    run = api.get_run(first)
    assert run.info.status == "FINISHED"
    assert api.get_experiment(run.info.experiment_id).name == EXPERIMENT
    assert run.data.tags["run_id"] == "20261123T120000Z-abc123"
    assert run.data.params["clip_grid.fps"] == "20.0"
    assert run.data.params["config_digest"] == IngestConfig().digest
    assert run.data.params["sources"] == "['/videos']"
    assert run.data.metrics["sources.quarantined"] == 1.0
    assert run.data.metrics["reasons.unreadable"] == 1.0
    assert run.data.metrics["stage.features.busy_s"] == 4.0
    assert run.data.metrics["run.seconds"] == 7.5
    files = {item.path for item in api.list_artifacts(first)}
    assert files == {"config.json", "report.json", "stage_times.json"}
    written = json.loads((tmp_path / "mlflow" / "artifacts" / first / "artifacts" / "report.json").read_text())
    assert written["failures"][0]["uri"] == "/a.mp4"


@pytest.mark.integration
def test_a_dead_tracker_costs_one_line(tmp_path: Path, report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", DEAD)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    said: list[str] = []
    assert record(str(tmp_path), report, said) is None
    (line,) = said
    assert "the run is not in MLflow at http://127.0.0.1:1 (" in line
    assert "the dataset is complete without it" in line
    assert "\n" not in line


def test_an_object_store_wants_a_server(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    said: list[str] = []
    assert record("s3://bucket/dataset?region=eu-west-1", report, said) is None
    (line,) = said
    assert "set MLFLOW_TRACKING_URI" in line


def test_metrics_have_names_that_mlflow_takes(report: Report) -> None:
    found = metrics(report, TIMES, {"tokens, shards": 1.0})
    assert all(re.fullmatch(r"[\w\-./ ]+", name) for name in found)
    assert found["run.tokens_ shards"] == 1.0
    assert {type(value) for value in found.values()} == {float}


def test_nested_settings_are_named_as_on_the_command_line() -> None:
    assert flat({"a": {"b": 1, "c": {"d": ()}}, "e": None}) == {"a.b": 1, "a.c.d": (), "e": None}
