"""The whole path, small: it ends with a registered model, a page with pictures and an answer, and runs again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import demo, vocabulary
from pipelines.report import report_of

pytestmark = pytest.mark.integration
SMALL = ["kitchen.num_videos=5", "kitchen.steps_per_video=2,3", "kitchen.num_without_captions=0", "steps=12"]
SMALL += ["ingest.features.pixels=32", "ingest.vocabulary.k=4"]


def videobert(*arguments: str) -> str:
    """What a command prints, in a process of its own with a Ray of its own."""
    command = [sys.executable, "-m", "jobs", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_demo_goes_from_nothing_to_a_registered_model_and_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    printed = videobert("demo", "--out", str(tmp_path / "out"), *SMALL)
    for promised in ("where the time went", "balanced", "most frequent", "models:/videobert/1", "answer"):
        assert promised in printed
    report = report_of(str(tmp_path / "out" / "dataset")).to_dict()
    assert report["sources"]["kept"] == 5
    assert report["transcripts"] == {"captions": 5}
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/") >= 5
    assert demo.main(["--out", str(tmp_path / "out"), *SMALL]) == 0
    again = capsys.readouterr().out
    assert "nothing new" in again
    assert "models:/videobert/1" in again
    assert "MLFLOW_TRACKING_URI" not in os.environ  # a command leaves the process as it found it
    assert vocabulary.main(["show", "--dataset", str(tmp_path / "out" / "dataset")]) == 0
    assert "perplexity" in capsys.readouterr().out


@pytest.mark.slow
def test_demo_runs_on_real_clips(shared_media: Path, tmp_path: Path) -> None:
    printed = videobert("demo", "--videos", str(shared_media), "--out", str(tmp_path / "out"), "steps=20")
    assert "no known truth" in printed
    report = report_of(str(tmp_path / "out" / "dataset")).to_dict()
    assert report["sources"] == {"total": 29, "kept": 25, "filtered": 4, "quarantined": 0, "pending": 0}
    assert report["balanced"] is True
