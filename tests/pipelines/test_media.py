"""Strangers' bytes become previews on one clock, or fail for a named reason."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tempfile
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


def parts_of(
    path: Path, *, config: MediaConfig | None = None, grid: ClipGrid = GRID, preview: Path | None = None
) -> list[media.Part]:
    """All parts of a video, checked for what holds of any list of parts."""
    config = config or MediaConfig()
    found = media.probe(str(path), config=config)
    with tempfile.TemporaryDirectory() as folder:
        made = media.transcode(str(path), found=found, grid=grid, config=config, folder=Path(folder), preview=preview)
        parts = list(made)
        assert list(Path(folder).iterdir()) == []
    assert [part.index for part in parts] == list(range(len(parts)))
    assert [part.is_last for part in parts] == [False] * (len(parts) - 1) + [True]
    assert [part.first_frame for part in parts] == [sum(p.num_frames for p in parts[:i]) for i in range(len(parts))]
    assert all(part.first_frame % grid.stride_frames == 0 and part.num_frames >= grid.num_frames for part in parts)
    return parts


def transcoded(path: Path, *, config: MediaConfig | None = None) -> media.Part:
    """A short video: one part."""
    (part,) = parts_of(path, config=config)
    return part


def frames_of(part: media.Part, *, pixels: int = 32) -> np.ndarray:
    """All pictures of a part, [num_frames, pixels, pixels, 3] uint8."""
    every = ClipGrid(fps=GRID.fps, num_frames=1, stride_frames=1)
    return np.concatenate(list(media.clips(part.preview, grid=every, pixels=pixels)))


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
    path = make_video("v.mp4", seconds=10)
    one, cut = parts_of(path), parts_of(path, config=MediaConfig(part_seconds=4))
    assert [part.num_frames for part in cut] == [60, 60, 80]  # whole clips only; a rest of 20 frames would hold none
    whole, pieces = frames_of(one[0]), np.concatenate([frames_of(part) for part in cut])
    assert np.array_equal(whole, pieces)
    assert one[0].preview == b"".join(part.preview for part in cut)


@pytest.mark.parametrize(("fps", "frames", "stride"), [(30.0, 32, 32), (23.976, 30, 30), (12.0, 8, 8), (20.0, 40, 10)])
def test_parts_are_cut_at_the_right_frame_on_any_grid(
    make_video: MakeVideo, fps: float, frames: int, stride: int
) -> None:
    grid = ClipGrid(fps=fps, num_frames=frames, stride_frames=stride)
    cut = parts_of(make_video("v.mp4", seconds=10, sound=True), config=MediaConfig(part_seconds=3), grid=grid)
    assert len(cut) >= 3
    for part in cut:
        assert sum(1 for _ in media.clips(part.preview, grid=grid, pixels=32)) == grid.num_clips(part.num_frames)
        assert len(part.sound) == pytest.approx(part.num_frames / fps * media.SAMPLE_RATE, abs=2000)
    assert sum(part.num_frames for part in cut) == pytest.approx(10 * fps, abs=1)


def test_parts_end_where_it_is_quietest_in_their_last_fifth(tmp_path: Path) -> None:
    """Loud all the time but for a pause around 16.5 s: of the borders at 15, 16.5 and 18 s that one is taken."""
    path = tmp_path / "pause.mkv"
    sound = "sine=duration=30,volume='if(between(t,16.2,16.8),0,1)':eval=frame"
    bars = ("-f", "lavfi", "-i", "testsrc2=size=64x64:rate=10:duration=30", "-f", "lavfi", "-i", sound)
    ffmpeg(*bars, "-c:v", "libx264", "-preset", "ultrafast", "-c:a", "pcm_s16le", str(path))
    cut = parts_of(path, config=MediaConfig(part_seconds=18))
    assert [part.num_frames for part in cut] == [330, 270]


def test_parts_without_sound_end_at_a_shot_change(tmp_path: Path) -> None:
    path = tmp_path / "cut.mkv"
    colours = [f"color={c}:size=64x64:rate=10:duration={s}" for c, s in (("red", 16.4), ("blue", 13.6))]
    inputs = [word for colour in colours for word in ("-f", "lavfi", "-i", colour)]
    ffmpeg(*inputs, "-filter_complex", "concat=n=2", "-c:v", "libx264", "-preset", "ultrafast", str(path))
    cut = parts_of(path, config=MediaConfig(part_seconds=18))
    assert [part.num_frames for part in cut] == [330, 270]  # the change at 16.4 s is closest to the border at 16.5 s
    assert [part.shots for part in cut] == [(328,), ()]


def test_parts_without_either_have_their_full_length(make_video: MakeVideo) -> None:
    cut = parts_of(make_video("v.mkv", seconds=24), config=MediaConfig(part_seconds=9))
    assert [part.num_frames for part in cut] == [180, 180, 120]


@pytest.mark.parametrize("sound", [False, True])
def test_the_preview_holds_all_the_pictures_and_changes_no_part(
    make_video: MakeVideo, tmp_path: Path, sound: bool
) -> None:
    path, preview = make_video("v.mp4", seconds=8, sound=sound), tmp_path / "out" / "preview.mp4"
    preview.parent.mkdir()
    config = MediaConfig(part_seconds=3)
    without, cut = parts_of(path, config=config), parts_of(path, config=config, preview=preview)
    assert [part.preview for part in without] == [part.preview for part in cut]
    assert all(np.array_equal(a.sound, b.sound) for a, b in zip(without, cut, strict=True))
    with av.open(str(preview)) as container:
        assert len(container.streams.audio) == sound
        shown = [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]
    assert len(shown) == sum(part.num_frames for part in cut)
    assert preview.read_bytes().index(b"moov") < preview.read_bytes().index(b"mdat")


@pytest.mark.integration
def test_the_first_part_comes_while_ffmpeg_runs_and_closing_ends_it(make_video: MakeVideo, tmp_path: Path) -> None:
    path = str(make_video("long.mkv", seconds=900, fps=5, size="64x48"))
    config = MediaConfig(part_seconds=6)
    found = media.probe(path, config=config)
    parts = media.transcode(path, found=found, grid=GRID, config=config, folder=tmp_path)
    assert next(parts).num_frames <= 120
    assert running_in(tmp_path) == 1
    parts.close()
    assert running_in(tmp_path) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["long.mkv"]


@pytest.mark.integration
def test_an_interrupt_leaves_nothing_running(make_video: MakeVideo, tmp_path: Path) -> None:
    make_video("long.mkv", seconds=3600, fps=1, size="64x48")
    code = (
        "import pathlib, signal; from pipelines import media; from pipelines.dataset import ClipGrid\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs inherit deaf ears
        "config, here = media.MediaConfig(), pathlib.Path.cwd()\n"
        "found = media.probe('long.mkv', config=config)\n"
        "print('up', flush=True)\n"
        "list(media.transcode('long.mkv', found=found, grid=ClipGrid(), config=config, folder=here))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(media.__file__).parents[1])}
    worker = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=tmp_path, env=environment
    )
    assert worker.stdout is not None
    assert worker.stdout.readline() == b"up\n"
    while running_in(tmp_path) < 2 and worker.poll() is None:  # the worker and ffmpeg
        time.sleep(0.05)
    worker.send_signal(signal.SIGINT)
    assert worker.wait(timeout=30) != 0
    worker.stdout.close()
    assert running_in(tmp_path) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["long.mkv"]


def running_in(folder: Path) -> int:
    """Processes that work in this folder."""
    found = 0
    for place in Path("/proc").glob("[0-9]*/cwd"):
        try:
            found += place.resolve().is_relative_to(folder)
        except OSError:
            continue
    return found


def test_a_container_without_a_duration_is_held_to_the_longest_allowed(make_video: MakeVideo, tmp_path: Path) -> None:
    live = make_video("live.mkv", seconds=6, extra=("-f", "matroska", "-live", "1"))
    assert media.probe(str(live), config=MediaConfig())["duration_s"] is None
    assert reason_of(live, config=MediaConfig(max_seconds=3.0)) == "too_large"


def test_transcoding_twice_gives_the_same_bytes(make_video: MakeVideo) -> None:
    path = make_video("v.mp4", seconds=4, sound=True)
    first, second = (parts_of(path, config=MediaConfig(part_seconds=1.5)) for _ in range(2))
    assert [part.preview for part in first] == [part.preview for part in second]
    assert all(np.array_equal(a.sound, b.sound) for a, b in zip(first, second, strict=True))
    assert [(p.motion, p.contrast, p.shots) for p in first] == [(p.motion, p.contrast, p.shots) for p in second]


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
        media.run_limited([sys.executable, "-c", child], config=MediaConfig(), timeout_s=0.5)
    time.sleep(1.8)
    assert not marker.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal")
def test_a_child_ends_with_the_worker_that_started_it() -> None:
    code = (
        "import threading, time; from pipelines import media\n"
        "run = lambda: media.run_limited(['sleep', '41.5'], config=media.MediaConfig())\n"
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


SPIN = "while True: pass"
GREEDY = "b = bytearray(1 << 30)"
WORDY = (
    "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_DFL); f = open('out', 'wb')\n"
    "while True: f.write(bytes(1 << 20))"
)


@pytest.mark.parametrize(
    ("code", "limit"),
    [
        (GREEDY, {"memory_bytes": 512 << 20}),
        (SPIN, {"cpu_s": 1.0}),
        (WORDY, {"output_bytes": 4 << 20}),
    ],
)
def test_a_child_that_breaks_a_limit_says_which(
    code: str, limit: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StageError, match=f"limit_exceeded.*{next(iter(limit))}"):
        media.run_limited([sys.executable, "-c", code], config=MediaConfig(**limit), timeout_s=30)


@pytest.mark.integration
@pytest.mark.parametrize("limit", [{"cpu_s": 1.0}, {"output_bytes": 1 << 20}])
def test_ffmpeg_that_breaks_a_limit_is_quarantined(make_video: MakeVideo, limit: dict[str, float]) -> None:
    path = make_video("v.mkv", seconds=900, fps=20, size="64x48")
    with pytest.raises(StageError, match=f"limit_exceeded.*{next(iter(limit))}"):
        parts_of(path, config=MediaConfig(**limit))


@pytest.mark.integration
def test_ffmpeg_that_takes_too_long_is_quarantined(make_video: MakeVideo) -> None:
    path = make_video("v.mkv", seconds=1800, fps=20, size="64x48")
    assert reason_of(path, config=MediaConfig(timeout_s=1.0)) == "timeout"


@pytest.mark.skipif(sys.platform != "linux", reason="network namespaces")
def test_a_child_sees_no_network() -> None:
    """Only where the kernel lets us; there is no way to know but to try."""
    _, out, _ = media.run_limited(["cat", "/proc/net/dev"], config=MediaConfig())
    if subprocess.run(["unshare", "--net", "--map-current-user", "true"], capture_output=True).returncode != 0:
        pytest.skip("this kernel gives no network namespace away")
    assert [line.split(b":")[0].strip() for line in out.splitlines()[2:]] == [b"lo"]
    assert out.splitlines()[2].split()[1] == b"0"  # its own loopback, on which nothing was ever received


@pytest.mark.integration
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


def test_limits_are_also_held_midway(make_video: MakeVideo, tmp_path: Path) -> None:
    """A picture that grows beyond max_pixels is not decoded; a stream count is held by the probe."""
    small, large = (
        make_video("a.ts", seconds=2, size="64x48"),
        make_video("b.ts", seconds=2, size="640x480", extra=("-output_ts_offset", "2")),
    )
    joined = tmp_path / "grows.ts"
    joined.write_bytes(small.read_bytes() + large.read_bytes())
    assert transcoded(joined).num_frames == pytest.approx(80, abs=1)
    assert transcoded(joined, config=MediaConfig(max_pixels=100 * 100)).num_frames < 45
    two = make_video("two.mkv", seconds=2, sound=True)
    assert reason_of(two, config=MediaConfig(max_streams=1)) == "too_large"


@pytest.mark.integration
@pytest.mark.parametrize(("name", "scenes"), [("dj1.mp4", 3), ("dj2.mp4", 1), ("dj3.mp4", 2)])
def test_scenes_are_counted_as_pyscenedetect_counts_them(shared_media: Path, name: str, scenes: int) -> None:
    assert 1 + len(transcoded(shared_media / name).shots) == scenes


def test_motion_and_contrast_tell_moving_still_and_blank_pictures_apart(tmp_path: Path) -> None:
    made = {}
    for name, source in (("moving", "testsrc2"), ("still", "smptebars"), ("blank", "color=gray")):
        path = tmp_path / f"{name}.mkv"
        join = ":" if "=" in source else "="
        ffmpeg("-f", "lavfi", "-i", f"{source}{join}size=160x120:rate=25:duration=3", "-c:v", "ffv1", str(path))
        made[name] = transcoded(path)
    assert made["moving"].motion > 1
    assert made["still"].motion == made["blank"].motion == 0
    assert made["moving"].contrast > 20
    assert made["still"].contrast > 20
    assert made["blank"].contrast < 1


def test_clips_can_begin_at_given_frames(make_video: MakeVideo) -> None:
    part = transcoded(make_video("v.mp4", seconds=6))
    frames = frames_of(part)
    chosen = list(media.clips(part.preview, grid=GRID, pixels=32, first_frames=(7, 37, 80, 115)))
    assert len(chosen) == 3  # the one at 115 would reach beyond frame 120
    assert all(np.array_equal(clip, frames[at : at + 30]) for clip, at in zip(chosen, (7, 37, 80), strict=True))
    assert list(media.clips(part.preview, grid=GRID, pixels=32, first_frames=())) == []
    with pytest.raises(ValueError, match="ascend"):
        list(media.clips(part.preview, grid=GRID, pixels=32, first_frames=(0, 20)))


def test_overlapping_and_sparse_grids_take_the_same_pictures(make_video: MakeVideo) -> None:
    part = transcoded(make_video("v.mp4", seconds=5))
    frames = frames_of(part)
    for num, stride in ((30, 10), (10, 30), (8, 8)):
        grid = ClipGrid(num_frames=num, stride_frames=stride)
        found = list(media.clips(part.preview, grid=grid, pixels=32))
        assert len(found) == grid.num_clips(part.num_frames)
        assert all(np.array_equal(clip, frames[i * stride : i * stride + num]) for i, clip in enumerate(found))


# One clock. The pictures say when they were made: brightness of the left half is the fraction of the second, that of
# the right half the second. The sound says it too: a beep with each change from even to odd seconds.
TICKING = (
    "color=black:size=64x32:rate={fps}:duration={seconds},format=gray,"
    "geq=lum='if(lt(X,32),20+200*mod(T,1),20+20*floor(T))',format=yuv420p"
)
BEEPS = "sine=frequency=1000:duration={seconds},volume='gt(mod(t,2),1)':eval=frame:precision=float"


def made_at(picture: np.ndarray) -> float:
    """Seconds that a picture of TICKING shows."""
    height, width = picture.shape[:2]
    left, right = (
        picture[height // 4 : -height // 4, begin : begin + width // 4].mean() for begin in (width // 8, 5 * width // 8)
    )
    limited = [(value * 219 / 255 + 16 - 20) for value in (left, right)]  # RGB is full range
    return round(limited[1] / 20) + limited[0] / 200


def ticking(path: Path, *extra: str, seconds: int = 9, fps: int = 50, codec: tuple[str, ...] = ()) -> Path:
    pictures, beeps = TICKING.format(fps=fps, seconds=seconds), BEEPS.format(seconds=seconds)
    inputs = ("-f", "lavfi", "-i", pictures, "-f", "lavfi", "-i", beeps)
    ffmpeg(
        *inputs, *(codec or ("-c:v", "libx264", "-preset", "ultrafast", "-crf", "10", "-c:a", "aac")), *extra, str(path)
    )
    return path


def variable(path: Path) -> Path:
    """Dense for a second, then sparse for two, and so on."""
    return ticking(path, "-vf", "select='lt(mod(t,3),1)+not(mod(n,20))'", "-fps_mode", "vfr")


def offset(path: Path) -> Path:
    return ticking(path, "-output_ts_offset", "7.3")


def edited(path: Path) -> Path:
    whole = ticking(path.with_name("whole.mp4"), "-g", "500")
    ffmpeg("-ss", "1.7", "-i", str(whole), "-c", "copy", str(path))
    return path


def late_pictures(path: Path) -> Path:
    """The sound begins 1.3 s before the pictures."""
    whole = ticking(path.with_name("whole.mkv"))
    ffmpeg(
        "-itsoffset", "1.3", "-i", str(whole), "-i", str(whole), "-map", "0:v", "-map", "1:a", "-c", "copy", str(path)
    )
    return path


def late_sound(path: Path) -> Path:
    whole = ticking(path.with_name("whole.mkv"))
    ffmpeg(
        "-i", str(whole), "-itsoffset", "1.3", "-i", str(whole), "-map", "0:v", "-map", "1:a", "-c", "copy", str(path)
    )
    return path


CLOCKS = {
    "variable.mkv": variable,
    "variable.mp4": variable,
    "offset.mkv": offset,
    "offset.ts": offset,
    "edited.mp4": edited,
    "late_pictures.mkv": late_pictures,
    "late_sound.mkv": late_sound,
}
FRAME_S = 1 / GRID.fps


def shown(path: Path, *, start_s: float) -> list[tuple[float, float]]:
    """(time stamp on the clock from the container's start, what the picture shows) as PyAV decodes the source."""
    with av.open(str(path)) as container:
        frames = [(float(frame.time) - start_s, frame) for frame in container.decode(video=0) if frame.time is not None]
        return sorted((at, made_at(frame.to_ndarray(format="rgb24"))) for at, frame in frames)


@pytest.mark.integration
@pytest.mark.parametrize("name", CLOCKS)
def test_every_picture_is_within_one_frame_of_its_time_stamp_in_every_part(tmp_path: Path, name: str) -> None:
    path = CLOCKS[name](tmp_path / name)
    parts = parts_of(path, config=MediaConfig(part_seconds=3))
    assert len(parts) >= 2
    source = shown(path, start_s=media.probe(str(path), config=MediaConfig())["start_s"])
    ends = [at for at, _ in source[1:]] + [source[-1][0] + 1.0]
    number = 0
    for part in parts:
        for picture in frames_of(part, pixels=224):
            now = number * FRAME_S
            visible = [
                seen
                for (at, seen), end in zip(source, ends, strict=True)
                if at <= now + FRAME_S and end > now - FRAME_S
            ]
            visible = visible or [source[0][1]]  # before the first picture that one is shown
            error = min(abs(made_at(picture) - seen) for seen in visible)
            assert min(error, abs(1 - error)) < 0.03, (name, number)  # the fraction wraps around
            number += 1
    assert number * FRAME_S <= ends[-1] + FRAME_S


@pytest.mark.integration
@pytest.mark.parametrize("name", CLOCKS)
def test_sound_is_heard_when_its_packets_say_in_every_part(tmp_path: Path, name: str) -> None:
    """Where beeps begin, against the time stamps and samples as PyAV decodes them."""
    path = CLOCKS[name](tmp_path / name)
    start_s = media.probe(str(path), config=MediaConfig())["start_s"]
    expected = []
    with av.open(str(path)) as container:
        was_loud = True
        for frame in container.decode(audio=0):
            heard, rate = np.abs(frame.to_ndarray()).max(axis=0), frame.sample_rate
            for piece in range(0, len(heard) - rate // 200, rate // 200):
                is_loud = heard[piece : piece + rate // 200].max() > 0.02
                if is_loud and not was_loud:
                    expected.append(float(frame.time) - start_s + piece / rate)
                was_loud = is_loud
    found = []
    for part in parts_of(path, config=MediaConfig(part_seconds=3)):
        begin = part.first_frame / GRID.fps
        loud = np.abs(part.sound[: len(part.sound) // 80 * 80].astype(int)).reshape(-1, 80).max(axis=1) > 650
        found += [begin + 0.005 * i for i in np.flatnonzero(loud[1:] & ~loud[:-1]) + 1]
    assert len(expected) >= 2
    for beep in expected:
        assert min(abs(beep - heard) for heard in found) < FRAME_S, (name, expected, found)


def test_a_change_of_sample_rate_or_size_midway_moves_neither_sound_nor_pictures(tmp_path: Path) -> None:
    """White and loud from 4.0 s on, where everything about the streams changes."""
    for name, colour, size, rate, volume in (("a", "black", "64x48", 48000, 0), ("b", "white", "48x64", 44100, 1)):
        sound = f"sine=sample_rate={rate}:duration=4,volume={volume}"
        inputs = ("-f", "lavfi", "-i", f"color={colour}:size={size}:rate=25:duration=4", "-f", "lavfi", "-i", sound)
        codecs = ("-c:v", "libx264", "-preset", "ultrafast", "-c:a", "mp2", "-ac", "1" if name == "a" else "2")
        late = ("-output_ts_offset", "4" if name == "b" else "0")
        ffmpeg(*inputs, *codecs, *late, str(tmp_path / f"{name}.ts"))
    joined = tmp_path / "joined.ts"
    joined.write_bytes((tmp_path / "a.ts").read_bytes() + (tmp_path / "b.ts").read_bytes())
    part = transcoded(joined)
    white = np.flatnonzero(frames_of(part).mean(axis=(1, 2, 3)) > 128)
    loud = np.flatnonzero(np.abs(part.sound) > 1000)
    assert part.num_frames == pytest.approx(160, abs=1)
    assert white[0] / GRID.fps == pytest.approx(4.0, abs=FRAME_S + 0.001)
    assert loud[0] / media.SAMPLE_RATE == pytest.approx(4.0, abs=FRAME_S)
    assert loud[-1] / media.SAMPLE_RATE == pytest.approx(8.0, abs=0.1)
