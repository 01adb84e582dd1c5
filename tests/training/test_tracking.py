from __future__ import annotations

import logging
from pathlib import Path

import pytest

from tests.training.conftest import Kitchen, small_config
from training import tracking
from training.loop import Rank
from training.run import prepare, work

DEAD = "http://127.0.0.1:1"  # nothing listens there


def test_tracker_outage_does_not_stop_training_and_is_said_once(
    small_kitchen: Kitchen, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    spec = prepare(small_config(), small_kitchen.url, storage=str(tmp_path), name=None, tracking_uri=DEAD)
    with caplog.at_level(logging.WARNING, logger="training.tracking"):
        metrics = work(replace(spec, run_id="0" * 32), rank=Rank(), report=lambda _: None, say=lambda _: None)
    assert "masked_text_nats" in metrics
    warnings = [record.getMessage() for record in caplog.records]
    assert sum("training goes on" in line for line in warnings) == 1
    assert any("points of the curves were lost" in line for line in warnings)


def test_failed_attempt_is_nothing_and_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> str:
        raise RuntimeError("no route\nto host")

    assert tracking.attempt("starting the run", fail) is None
    assert "starting the run failed (no route)" in caplog.text


def test_points_beyond_the_queue_are_counted() -> None:
    logger = tracking.MetricLogger(DEAD, None)
    for step in range(5):
        logger.log({"loss": 1.0}, step=step)
    logger.close(deadline_s=5.0)
    assert logger.num_lost == 0


def test_local_dataset_has_its_own_store_and_the_variable_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking.tracking_uri(str(tmp_path)) == f"sqlite:///{tmp_path}/mlflow/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", DEAD)
    assert tracking.tracking_uri(str(tmp_path)) == DEAD
