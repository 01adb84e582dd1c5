"""Strangers' bytes become previews on one clock, or fail for a named reason."""

from __future__ import annotations

import io
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

from pipelines import media
from pipelines.dataset import ClipGrid
from pipelines.errors import StageError
from pipelines.media import MediaConfig
from tests.conftest import ffmpeg

GRID = ClipGrid()
MakeVideo = Callable[..., Path]


def transcoded(path: Path, *, config: MediaConfig | None = None) -> media.Transcoded:
    config = config or MediaConfig()
    return media.transcode(str(path), found=media.probe(str(path), config=config), grid=GRID, config=config)


def reason_of(path: Path, *, config: MediaConfig | None = None) -> str:
    with pytest.raises(StageError) as failure:
        transcoded(path, config=config)
    return failure.value.reason


@pytest.mark.parametrize("fps", [1, 24, 29.97, 60])
def test_preview_has_twenty_frames_a_second_whatever_the_source_has(make_video: MakeVideo, fps: float) -> None:
    made = transcoded(make_video("v.mp4", seconds=4, fps=fps))
    assert made.num_frames == pytest.approx(80, abs=1)
    assert len(list(media.clips(made.preview, grid=GRID, pixels=64))) == 2


def test_preview_keeps_the_aspect_and_crops_the_centre(make_video: MakeVideo) -> None:
    wide = make_video("wide.mp4", size="480x120", seconds=2)
    (clip,) = media.clips(transcoded(wide).preview, grid=GRID, pixels=224)
    assert clip.shape == (30, 224, 224, 3)
    assert clip.dtype == np.uint8


def test_small_pictures_are_scaled_up(make_video: MakeVideo) -> None:
    with av.open(io.BytesIO(transcoded(make_video("s.mp4", size="64x48", seconds=2)).preview)) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.codec_context.pix_fmt) == (224, 224, "yuv420p")


def test_variable_frame_rate_keeps_presentation_time(make_video: MakeVideo, tmp_path: Path) -> None:
    """Frame index over average rate would put the switch to white seconds off; presentation time puts it at 3.0 s."""
    slow, fast = tmp_path / "slow.mkv", tmp_path / "fast.mkv"
    encoding = ("-c:v", "libx264", "-preset", "ultrafast")
    ffmpeg("-f", "lavfi", "-i", "color=black:size=64x64:rate=5:duration=3", *encoding, str(slow))
    ffmpeg("-f", "lavfi", "-i", "color=white:size=64x64:rate=50:duration=3", *encoding, str(fast))
    parts = tmp_path / "parts.txt"
    parts.write_text(f"file '{slow}'\nfile '{fast}'\n")
    joined = tmp_path / "vfr.mkv"
    ffmpeg("-f", "concat", "-safe", "0", "-i", str(parts), "-c", "copy", str(joined))
    brightness = [
        float(frame.mean()) for clip in media.clips(transcoded(joined).preview, grid=GRID, pixels=32) for frame in clip
    ]
    switch = next(index for index, value in enumerate(brightness) if value > 128)
    assert switch / GRID.fps == pytest.approx(3.0, abs=1 / GRID.fps)


def test_a_container_that_starts_late_keeps_its_start(make_video: MakeVideo) -> None:
    late = make_video("late.mkv", seconds=3, extra=("-output_ts_offset", "5"))
    found = media.probe(str(late), config=MediaConfig())
    assert found["start_s"] == pytest.approx(5.0, abs=0.05)
    assert transcoded(late).num_frames == pytest.approx(60, abs=1)


def test_sound_is_sixteen_kilohertz_mono_and_as_long_as_the_pictures(make_video: MakeVideo) -> None:
    made = transcoded(make_video("v.mp4", seconds=3, sound=True))
    assert made.sound.dtype == np.dtype("<i2")
    assert len(made.sound) / media.SAMPLE_RATE == pytest.approx(3.0, abs=0.1)
    assert np.abs(made.sound).max() > 1000


def test_long_videos_are_cut_into_parts_with_the_same_frames(make_video: MakeVideo) -> None:
    cut = transcoded(make_video("v.mp4", seconds=10), config=MediaConfig(part_seconds=4))
    assert cut.part_frames == 60  # whole clips only: 4 s hold two of them
    assert len(cut.parts) == 3
    one = list(media.clips(cut.preview, grid=GRID, pixels=64))
    many = [clip for part in cut.parts for clip in media.clips(part, grid=GRID, pixels=64)]
    assert len(one) == len(many)
    assert all(np.array_equal(a, b) for a, b in zip(one, many, strict=True))


@pytest.mark.parametrize(("fps", "frames"), [(30.0, 32), (23.976, 30), (12.0, 8)])
def test_parts_are_cut_at_the_right_frame_on_any_grid(make_video: MakeVideo, fps: float, frames: int) -> None:
    grid, config = ClipGrid(fps=fps, num_frames=frames, stride_frames=frames), MediaConfig(part_seconds=3)
    path = str(make_video("v.mp4", seconds=10))
    cut = media.transcode(path, found=media.probe(path, config=config), grid=grid, config=config)
    num = [sum(1 for _ in media.clips(part, grid=grid, pixels=32)) for part in cut.parts]
    assert num[:-1] == [cut.part_frames // frames] * (len(num) - 1)
    assert sum(num) == grid.num_clips(cut.num_frames)


def test_a_container_without_a_duration_is_held_to_the_longest_allowed(make_video: MakeVideo, tmp_path: Path) -> None:
    live = make_video("live.mkv", seconds=6, extra=("-f", "matroska", "-live", "1"))
    assert media.probe(str(live), config=MediaConfig())["duration_s"] is None
    assert reason_of(live, config=MediaConfig(max_seconds=3.0)) == "too_large"


def test_transcoding_twice_gives_the_same_bytes(make_video: MakeVideo) -> None:
    path = make_video("v.mp4", seconds=2, sound=True)
    assert transcoded(path).preview == transcoded(path).preview


def test_the_last_clip_is_never_longer_than_what_decodes(make_video: MakeVideo, tmp_path: Path) -> None:
    """A fast-start file cut in half still claims its full length in its header."""
    whole = make_video("whole.mp4", seconds=10, extra=("-movflags", "+faststart"))
    half = tmp_path / "half.mp4"
    half.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    assert media.probe(str(half), config=MediaConfig())["duration_s"] == pytest.approx(10.0, abs=0.1)
    assert transcoded(half).num_frames < 150


def test_text_renamed_to_mp4_is_unreadable(tmp_path: Path) -> None:
    fake = tmp_path / "fake.mp4"
    fake.write_text("<html>404 not found</html>")
    assert reason_of(fake) == "unreadable"


def test_an_empty_file_is_unreadable(tmp_path: Path) -> None:
    empty = tmp_path / "empty.mp4"
    empty.touch()
    assert reason_of(empty) == "unreadable"


def test_a_playlist_is_refused_before_it_can_read_another_file(make_video: MakeVideo, tmp_path: Path) -> None:
    """Both name a real video, so without the whitelist they would open."""
    make_video("secret.ts", seconds=2)
    concat = tmp_path / "concat.mkv"
    concat.write_text("ffconcat version 1.0\nfile secret.ts\n")
    assert reason_of(concat) == "forbidden_format"
    playlist = tmp_path / "list.m3u8"
    playlist.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:2,\nsecret.ts\n#EXT-X-ENDLIST\n")
    assert reason_of(playlist) == "forbidden_format"


def test_sound_without_pictures_is_filtered(tmp_path: Path) -> None:
    path = tmp_path / "a.m4a"
    ffmpeg("-f", "lavfi", "-i", "sine=duration=3", "-c:a", "aac", str(path))
    assert reason_of(path) == "no_video"


def test_cover_art_is_not_a_video(tmp_path: Path) -> None:
    picture, song = tmp_path / "cover.png", tmp_path / "song.mp3"
    ffmpeg("-f", "lavfi", "-i", "testsrc2=size=64x64:duration=1:rate=1", "-frames:v", "1", str(picture))
    both = ("-f", "lavfi", "-i", "sine=duration=3", "-i", str(picture), "-map", "0", "-map", "1")
    ffmpeg(*both, "-c:v", "copy", "-disposition:v", "attached_pic", str(song))
    assert reason_of(song) == "no_video"


def test_less_than_one_clip_is_too_short(make_video: MakeVideo) -> None:
    assert reason_of(make_video("v.mp4", seconds=1.0)) == "too_short"


def test_limits_are_refused_with_their_reason(make_video: MakeVideo) -> None:
    path = make_video("v.mp4", seconds=3)
    assert reason_of(path, config=MediaConfig(max_pixels=100)) == "too_large"
    assert reason_of(path, config=MediaConfig(max_seconds=1.0)) == "too_large"


def test_a_child_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    marker = tmp_path / "alive"
    grandchild = f"import time, pathlib; time.sleep(1.5); pathlib.Path({str(marker)!r}).touch()"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    with pytest.raises(StageError, match="timeout"):
        media.run_limited([sys.executable, "-c", child], timeout_s=0.5, memory_bytes=1 << 30)
    time.sleep(1.8)
    assert not marker.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal")
def test_a_child_ends_with_the_worker_that_started_it() -> None:
    code = (
        "import threading, time; from pipelines import media\n"
        "run = lambda: media.run_limited(['sleep', '41.5'], timeout_s=60, memory_bytes=1 << 30)\n"
        "threading.Thread(target=run, daemon=True).start(); time.sleep(0.5); print('up', flush=True); time.sleep(60)"
    )
    worker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    assert worker.stdout.readline() == "up\n"
    assert running("41.5") == 1
    worker.kill()
    worker.wait()
    time.sleep(0.3)
    assert running("41.5") == 0


def running(argument: str) -> int:
    """Processes whose last argument is this one."""
    commands = (path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline"))
    return sum(command.rstrip(b"\0").split(b"\0")[-1] == argument.encode() for command in commands)


def test_a_child_cannot_take_more_memory_than_it_is_given() -> None:
    greedy = [sys.executable, "-c", "b = bytearray(1 << 30)"]
    status, _, err = media.run_limited(greedy, timeout_s=30, memory_bytes=512 << 20)
    assert status != 0
    assert "MemoryError" in err


def test_undecodable_sound_is_given_up_and_the_pictures_kept(shared_media: Path) -> None:
    made = transcoded(shared_media / "broken" / "failing_audio.mp4")
    assert GRID.num_clips(made.num_frames) == 7


def test_a_sound_track_without_one_packet_is_given_up_with_a_note(make_video: MakeVideo, tmp_path: Path) -> None:
    loud, mute = make_video("loud.mkv", seconds=2, sound=True), tmp_path / "mute.mkv"
    ffmpeg("-i", str(loud), "-map", "0", "-c", "copy", "-bsf:a", "noise=drop=1", str(mute))
    made = transcoded(mute)
    assert (made.num_frames, len(made.sound)) == (40, 0)
    assert made.note.startswith("sound given up")


def test_captions_come_out_of_the_container(make_video: MakeVideo) -> None:
    cue = "1\n00:00:00,500 --> 00:00:01,500\nchop the onion\n"
    path = make_video("v.mp4", seconds=3, captions=cue)
    (track,) = media.probe(str(path), config=MediaConfig())["subtitles"]
    text = media.read_captions(str(path), index=track["index"], config=MediaConfig())
    assert "00:00:00,500 --> 00:00:01,500\nchop the onion" in text
