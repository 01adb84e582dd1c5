"""The stages one after the other on real clips, without Ray."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines import stages
from pipelines.dataset import ClipGrid
from pipelines.filters import FiltersConfig
from pipelines.media import MediaConfig
from pipelines.rows import ROW_SCHEMA, Row
from pipelines.sources import discover
from pipelines.stages import IngestConfig
from pipelines.storage import Folder
from pipelines.todo import source_table
from pipelines.transcribe import Sphinx, TranscribeConfig
from tests.conftest import ffmpeg

MakeVideo = Callable[..., Path]
CUE = "1\n00:00:00,500 --> 00:00:01,500\nchop the onion\n"


def parts_of(path: Path, folder: Path, *, config: IngestConfig | None = None) -> list[Row]:
    """The rows of a source after fetch, probe and transcode."""
    return decoded(listed(path), folder, config=config)


def listed(path: Path) -> pa.Table:
    table = source_table(discover([str(path)]).sources)
    return pa.Table.from_pylist([row | {"attempt": 1} for row in table.to_pylist()], schema=ROW_SCHEMA)


def decoded(table: pa.Table, folder: Path, *, config: IngestConfig | None = None) -> list[Row]:
    run = stages.decoding(config=config or IngestConfig(), folder=Folder.at(str(folder)), counter=None)
    return [row for out in run(table) for row in out.to_pylist()]


def heard(row: Row, recogniser: Sphinx | None = None, *, config: IngestConfig | None = None) -> Row:
    (done,) = stages.transcribe_row(row, recogniser=recogniser, config=config or IngestConfig())
    return done


@pytest.mark.integration
def test_a_famous_sentence_muxed_onto_a_clip_is_heard_by_half_at_least(
    make_video: MakeVideo, shared_media: Path, tmp_path: Path
) -> None:
    path = tmp_path / "jfk.mp4"
    pictures, speech = make_video("bars.mp4", seconds=11), shared_media / "jfk.flac"
    ffmpeg(
        "-i", str(pictures), "-i", str(speech), "-map", "0:v", "-map", "1:a", "-c:v", "copy", "-c:a", "aac", str(path)
    )
    (row,) = parts_of(path, tmp_path / "d")
    done = heard(row, Sphinx())
    reference = "and so my fellow americans ask not what your country can do for you "
    reference += "ask what you can do for your country"
    words, expected = " ".join(s["text"] for s in done["sentences"]).split(), reference.split()
    matched = sum(min(words.count(word), expected.count(word)) for word in set(expected))
    assert matched >= len(expected) / 2
    assert all(0 <= s["start_s"] < s["end_s"] <= 11.5 for s in done["sentences"])
    assert (done["asr_name"], done["language"]) == ("sphinx", "en")


@pytest.mark.integration
def test_a_video_with_a_caption_track_needs_no_recogniser(shared_media: Path, tmp_path: Path) -> None:
    (row,) = parts_of(shared_media / "nasa_subtitles.mp4", tmp_path / "d")
    done = heard(row)
    assert done["asr_name"] == "captions"
    assert "Webb" in done["sentences"][0]["text"]
    assert done["language"] == "eng"


def test_times_are_the_containers_where_it_starts_late(make_video: MakeVideo, tmp_path: Path) -> None:
    late = make_video("late.mkv", seconds=3, captions=CUE, extra=("-output_ts_offset", "5"))
    (row,) = parts_of(late, tmp_path / "d")
    (sentence,) = heard(row)["sentences"]
    assert row["part_start_s"] == pytest.approx(5.0, abs=0.05)
    assert sentence["start_s"] == pytest.approx(5.5, abs=0.05)


def test_a_sidecar_goes_before_the_track_and_an_empty_one_does_not(make_video: MakeVideo, tmp_path: Path) -> None:
    path = make_video("v.mp4", seconds=3, captions=CUE)
    sidecar = path.with_suffix(".en.vtt")
    sidecar.write_text("WEBVTT\n\n00:01.000 --> 00:02.000\nstir the soup\n")
    assert heard(parts_of(path, tmp_path / "d")[0])["sentences"][0]["text"] == "stir the soup"
    sidecar.write_text("")
    assert heard(parts_of(path, tmp_path / "d")[0])["sentences"][0]["text"] == "chop the onion"


def test_captions_can_be_left_out(make_video: MakeVideo, tmp_path: Path) -> None:
    config = IngestConfig(transcribe=TranscribeConfig(transcripts=("sphinx",)))
    (row,) = parts_of(make_video("v.mp4", seconds=3, captions=CUE), tmp_path / "d", config=config)
    assert row["captions"] is None


def test_silent_parts_of_a_captioned_video_are_not_recognised(make_video: MakeVideo, tmp_path: Path) -> None:
    config = IngestConfig(media=MediaConfig(part_seconds=3))
    rows = list(parts_of(make_video("v.mp4", seconds=7, sound=True, captions=CUE), tmp_path / "d", config=config))
    assert [len(heard(row, Sphinx())["sentences"]) for row in rows] == [1, 0]
    assert [row["num_parts"] for row in rows] == [None, 2]  # nobody knows before the last


def test_the_preview_is_kept_under_the_id_of_its_content(make_video: MakeVideo, tmp_path: Path) -> None:
    (row,) = parts_of(make_video("v.mp4", seconds=2), tmp_path / "d")
    assert [p.name for p in (tmp_path / "d" / "media").iterdir()] == [f"{row['video_id']}.mp4"]


def test_a_source_that_went_away_has_its_reason(make_video: MakeVideo, tmp_path: Path) -> None:
    path = make_video("v.mp4", seconds=2)
    table = listed(path)
    path.unlink()
    (row,) = decoded(table, tmp_path / "d")
    assert (row["status"], row["stage"], row["reason"]) == ("quarantined", "fetch", "fetch_failed")


def test_what_is_known_of_a_source_goes_to_the_ledger_with_its_failure(make_video: MakeVideo, tmp_path: Path) -> None:
    (row,) = parts_of(make_video("v.mp4", seconds=0.5), tmp_path / "d")
    assert (row["stage"], row["reason"], round(row["declared_s"], 1)) == ("transcode", "too_short", 0.5)
    assert row["video_id"]


def test_a_filter_on_pictures_leaves_out_parts_and_not_their_video(make_video: MakeVideo, tmp_path: Path) -> None:
    """Six seconds of moving bars, then six of one grey."""
    bars, path = make_video("bars.mp4", seconds=6), tmp_path / "v.mp4"
    grey = ["-f", "lavfi", "-i", "color=gray:size=160x120:rate=25:duration=6"]
    ffmpeg("-i", str(bars), *grey, "-filter_complex", "[0:v][1:v]concat=n=2,format=yuv420p", str(path))
    config = IngestConfig(media=MediaConfig(part_seconds=6), filters=FiltersConfig(min_contrast=5))
    first, second = parts_of(path, tmp_path / "d", config=config)
    assert first["status"] is None
    assert (second["status"], second["reason"], second["part_index"]) == ("filtered", "blank", 1)
    assert second["num_parts"] == 2


def test_key_frames_take_one_clip_a_shot(make_video: MakeVideo, tmp_path: Path) -> None:
    """Three shots of 3 s: red, testing bars, blue; the uniform grid would take six clips."""
    bars, path = make_video("bars.mp4", seconds=3), tmp_path / "v.mp4"
    red, blue = (["-f", "lavfi", "-i", f"color={name}:size=160x120:rate=25:duration=3"] for name in ("red", "blue"))
    ffmpeg(*red, "-i", str(bars), *blue, "-filter_complex", "[0:v][1:v][2:v]concat=n=3,format=yuv420p", str(path))
    config = IngestConfig(clip_grid=ClipGrid(choice="keyframes"))
    (row,) = parts_of(path, tmp_path / "d", config=config)
    assert row["clip_frames"] == [0, 60, 120]
    (uniform,) = parts_of(path, tmp_path / "d")
    assert uniform["clip_frames"] is None


def test_settings_have_one_digest_whatever_the_command_adds() -> None:
    from jobs.ingest import IngestJob

    plain = IngestConfig(samples_per_shard=3).digest
    assert IngestJob(sources=("a",), dataset="d", samples_per_shard=3).digest == plain
    assert IngestConfig(samples_per_shard=4).digest == plain  # how a run goes about it leaves no trace in a sample
    assert IngestConfig(media=MediaConfig(part_seconds=60)).digest != plain
