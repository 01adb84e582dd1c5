"""What a user meets at the door of ingestion."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs import ingest as door
from jobs import report

MakeVideo = Callable[..., Path]
RANDOM = ["--features.weights", "random:0", "--features.pixels", "32", "--vocabulary.k", "3", "vocabulary.depth=2"]


def failure(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that a command says when it exits with 2."""
    assert door.main(list(argv)) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("videobert ingest: ")
    return line


def test_an_empty_folder_says_what_was_expected(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    assert "no media files in" in failure(capsys, str(tmp_path / "in"), "--dataset", str(tmp_path / "d"), *RANDOM)


def test_a_folder_of_text_files_says_the_same(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    assert "name a file itself" in failure(capsys, str(tmp_path), "--dataset", str(tmp_path / "d"), *RANDOM)
    assert not (tmp_path / "d").exists()


def test_a_missing_path_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    line = failure(capsys, str(tmp_path / "nowhere"), "--dataset", str(tmp_path / "d"), *RANDOM)
    assert "check the spelling" in line


def test_an_unwritable_dataset_folder_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("x")
    (tmp_path / "taken").write_text("a file where the folder should be")
    line = failure(capsys, str(tmp_path / "a.mp4"), "--dataset", str(tmp_path / "taken" / "d"), *RANDOM)
    assert "cannot write to the dataset folder" in line
    assert "name another --dataset" in line


def test_an_unknown_option_names_the_nearest(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    line = failure(capsys, str(tmp_path), "--dataset", str(tmp_path / "d"), "--samples_per_chard", "3")
    assert "samples_per_shard" in line


def test_missing_weights_name_the_three_ways(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("x")
    line = failure(capsys, str(tmp_path / "a.mp4"), "--dataset", str(tmp_path / "d"))
    assert "PATH" in line
    assert "sha256" in line
    assert "random:0" in line


def test_an_unknown_reason_to_retry_lists_the_known(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    line = failure(capsys, str(tmp_path), "--dataset", str(tmp_path / "d"), "--retry", "bad_luck")
    assert "timeout" in line


@pytest.mark.integration
def test_a_dry_run_writes_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("x")
    assert door.main([str(tmp_path / "a.mp4"), "--dataset", str(tmp_path / "d"), "--dry-run", *RANDOM]) == 0
    assert "1 would be handled" in capsys.readouterr().out
    assert not (tmp_path / "d").exists()


@pytest.mark.integration
def test_text_renamed_to_mp4_is_quarantined_and_the_rest_goes_on(
    ray_session: None, make_video: MakeVideo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_video("in/good.mp4", seconds=3.2)
    (tmp_path / "in" / "fake.mp4").write_text("not a video")
    assert door.main([str(tmp_path / "in"), "--dataset", str(tmp_path / "d"), *RANDOM]) == 0
    capsys.readouterr()
    assert report.main(["--dataset", str(tmp_path / "d"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sources"] == {"total": 2, "kept": 1, "filtered": 0, "quarantined": 1, "pending": 0}
    assert found["reasons"] == {"unreadable": 1}
    assert found["balanced"] is True


@pytest.mark.integration
def test_real_clips_end_as_their_description_says(
    ray_session: None, shared_media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A choice of ../shared/media that takes seconds; the slow test takes all."""
    names = "nasa_subtitles.mp4 arm_wrestling.mp4 asl_book.mkv av1.mkv dj1.mp4 dj6.mp4 bt709_full_range.mp4 jfk.flac"
    places = [str(shared_media / name) for name in names.split()]
    assert door.main([*places, "--dataset", str(tmp_path / "d"), "transcribe.transcripts=captions", *RANDOM]) == 0
    from pipelines.dataset import Dataset

    samples = {s.title: s for s in Dataset(str(tmp_path / "d")).samples()}
    clips = {title: len(s.visual_tokens) for title, s in samples.items()}
    assert clips == {"nasa_subtitles": 8, "arm_wrestling": 6, "asl_book": 2, "av1": 3, "dj1": 7}
    assert samples["nasa_subtitles"].asr["name"] == "captions"
    assert "Webb" in samples["nasa_subtitles"].sentences[0].text
    assert samples["arm_wrestling"].sentences == ()
    capsys.readouterr()
    report.main(["--dataset", str(tmp_path / "d"), "--json"])
    assert json.loads(capsys.readouterr().out)["reasons"] == {"duplicate": 1, "no_video": 1, "too_short": 1}
