"""The doctor on this machine, and on machines made worse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.doctor import DoctorJob, examine, main


def test_the_doctor_finds_what_the_main_path_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json", "--dataset", str(tmp_path / "new" / "dataset")]) == 0
    report = json.loads(capsys.readouterr().out)
    checks = {check["name"]: check for check in report["checks"]}
    assert report["ok"] is True
    assert "libx264" in checks["ffmpeg"]["found"]
    assert "h264" in checks["decoders"]["found"]
    assert checks["pocketsphinx"]["ok"]
    assert "random:SEED" in checks["s3d weights"]["remedy"]
    assert all(check["remedy"] for check in report["checks"] if not check["ok"])
    assert not (tmp_path / "new").exists()  # looking leaves nothing behind


def test_the_doctor_fails_when_something_asked_for_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--whisper-checkpoint", str(tmp_path / "none.pt"), "--s3d-weights", str(tmp_path / "none.pth")]
    assert main([*argv, "--dataset", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "The main path needs: s3d weights, whisper." in out
    assert "-> give the path of a .pt file of openai-whisper." in out


def test_a_tracking_store_that_cannot_be_opened_is_named_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/file/mlflow.db")
    mlflow = next(check for check in examine(DoctorJob(dataset=str(tmp_path))) if check.name == "mlflow")
    assert not mlflow.ok
    assert "MLFLOW_TRACKING_URI" in mlflow.remedy


def test_a_broken_installation_is_a_finding_and_not_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "none"))
    from pipelines.media import ffmpeg_path

    ffmpeg_path.cache_clear()
    try:
        checks = {check.name: check for check in examine(DoctorJob(dataset=str(tmp_path)))}
    finally:
        ffmpeg_path.cache_clear()
    assert not checks["ffmpeg"].ok
    assert checks["ffmpeg"].remedy
    assert checks["torch"].ok


@pytest.mark.integration
def test_ray_starts_when_asked(tmp_path: Path) -> None:
    ray = next(check for check in examine(DoctorJob(dataset=str(tmp_path), deep=True)) if check.name == "ray")
    assert ray.ok
    assert "ran a task" in ray.found
