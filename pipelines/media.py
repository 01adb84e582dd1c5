"""The only place where ffmpeg and PyAV touch strangers' bytes.

A source is transcoded once, by one ffmpeg process, into what every later stage needs: an H.264 preview on the clip
grid's frame rate and 16 kHz sound. Later stages and people read the preview, never the source, so the decoder's attack
surface is here: children with limits on wall time, CPU and memory, one process group that is killed as a whole,
whitelisted protocols and formats. The price is one lossy generation (crf 18) before the features.

Clock: ffmpeg subtracts the container's start time and the filters pad picture and sound to begin there, so preview time
t is clock time `start_s + t`, whatever the frame rate of the source does and whichever stream begins late.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import wave
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import ffmpeg
import imageio_ffmpeg
import numpy as np

from pipelines import probe as probe_script
from pipelines.dataset import ClipGrid
from pipelines.errors import StageError

# Linux ends a child whose parent was killed; elsewhere an orphan runs until its CPU limit.
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1

SAMPLE_RATE = 16_000
PREVIEW_PIXELS = 224


@dataclass(frozen=True, kw_only=True)
class MediaConfig:
    """Limits for strangers' media, and how long videos are cut."""

    part_seconds: float = 300.0
    """Longer videos are cut into parts of this many seconds, rounded down to whole clips; no clip lies across a cut."""
    max_bytes: int = 8 << 30
    """Largest source accepted, in bytes."""
    max_seconds: float = 6 * 3600.0
    """Longest source accepted, in seconds as its container states it."""
    max_pixels: int = 8192 * 4352
    """Largest picture accepted, in pixels."""
    timeout_s: float = 3600.0
    """Wall seconds for one child process before its group is killed."""
    memory_bytes: int = 8 << 30
    """Address space of one child process, in bytes."""
    keep_previews: bool = True
    """Keep media/VIDEO_ID.mp4 in the dataset: pictures in the report need it, training does not."""

    def __post_init__(self) -> None:
        if self.part_seconds <= 0 or self.timeout_s <= 0:
            raise ValueError("media.part_seconds and media.timeout_s must be above 0 seconds.")


@functools.cache
def ffmpeg_path() -> str:
    """The ffmpeg on PATH if it can encode H.264 with libx264, else the one that the imageio-ffmpeg wheel ships."""
    on_path = shutil.which("ffmpeg")
    if on_path and "libx264" in _encoders(on_path):
        return on_path
    return str(imageio_ffmpeg.get_ffmpeg_exe())


def _encoders(binary: str) -> str:
    return subprocess.run([binary, "-hide_banner", "-encoders"], capture_output=True, text=True, timeout=30).stdout


def run_limited(args: Sequence[str], *, timeout_s: float, memory_bytes: int) -> tuple[int, bytes, str]:
    """Run a child in its own process group under limits. Returns exit status, standard output, end of standard error.

    Raises StageError("timeout") after killing the whole group.
    """

    def limit() -> None:  # between fork and exec: no imports, no locks
        for kind, value in ((resource.RLIMIT_AS, memory_bytes), (resource.RLIMIT_CPU, int(timeout_s * 4) + 1)):
            hard = resource.getrlimit(kind)[1]
            allowed = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (allowed, allowed))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if _LIBC is not None:
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

    child = subprocess.Popen(
        list(args),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=limit,
    )
    try:
        out, err = child.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise StageError("timeout", f"{Path(args[0]).name} was stopped after {timeout_s:g} s") from None
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
    return child.returncode, out, err.decode(errors="replace")[-2000:].strip()


def probe(path: str, *, config: MediaConfig) -> dict[str, Any]:
    """What `pipelines.probe.probe` finds in a file, looked at by a child.

    Raises StageError: unreadable, forbidden_format, no_video, too_large, timeout.
    """
    command = [sys.executable, probe_script.__file__, path]
    status, out, err = run_limited(command, timeout_s=min(60.0, config.timeout_s), memory_bytes=config.memory_bytes)
    if status != 0:
        raise StageError("unreadable", f"the probe died with status {status}: {err}")
    found: dict[str, Any] = json.loads(out)
    if "error" in found:
        # libavformat answers EINVAL for a format that it knows and the whitelist does not hold.
        raise StageError("forbidden_format" if found["errno"] == 22 else "unreadable", found["error"])
    if found["video"] is None:
        raise StageError("no_video", f"{found['format']} with {found['num_streams']} streams, none of moving pictures")
    pixels = found["video"]["width"] * found["video"]["height"]
    if pixels > config.max_pixels or (found["duration_s"] or 0) > config.max_seconds:
        raise StageError("too_large", f"{pixels} pixels a picture, {found['duration_s']} s")
    return found


@dataclass(frozen=True, slots=True)
class Transcoded:
    """A source in the shape that every later stage uses."""

    preview: bytes  # H.264 + AAC in MP4, grid.fps frames a second, 224x224
    parts: list[bytes]  # the preview's pictures cut every `part_frames`; one part: the preview itself
    part_frames: int
    num_frames: int
    sound: np.ndarray  # [num_samples] int16 at 16 kHz; empty if there is none
    note: str  # what had to be given up, for people


def transcode(path: str, *, found: dict[str, Any], grid: ClipGrid, config: MediaConfig) -> Transcoded:
    """Transcode a probed source. Aspect is kept, then the centre is cropped; small pictures are scaled up.

    A sound track that cannot be decoded is given up with a note, the pictures are kept.
    Raises StageError: decode_failed, too_short, timeout.
    """
    with tempfile.TemporaryDirectory(prefix="videobert-") as folder:
        preview, sound, note = Path(folder, "preview.mp4"), Path(folder, "sound.wav"), ""
        part_frames = max(1, int(config.part_seconds / grid.stride_s)) * grid.stride_frames
        status, err = _run_ffmpeg(path, preview, sound, found=found, grid=grid, part_frames=part_frames, config=config)
        if found["audio"] and (status != 0 or not sound.exists()):
            silent, note = {**found, "audio": None}, f"sound given up: {err[-300:]}"
            status, err = _run_ffmpeg(
                path, preview, sound, found=silent, grid=grid, part_frames=part_frames, config=config
            )
        num_frames = _count_frames(preview) if preview.exists() else 0
        if num_frames == 0:
            raise StageError("decode_failed", err or f"ffmpeg ended with status {status} and wrote no picture")
        if num_frames / grid.fps > config.max_seconds:
            raise StageError("too_large", f"more than media.max_seconds={config.max_seconds:g} s decode")
        if grid.num_clips(num_frames) == 0:
            raise StageError("too_short", f"{num_frames / grid.fps:.2f} s decode; a clip takes {grid.clip_s:g} s")
        if status != 0:
            note = (note + f" ffmpeg ended with status {status}, what decoded is kept: {err[-300:]}").strip()
        return Transcoded(
            preview=preview.read_bytes(),
            parts=_cut(preview, num_frames=num_frames, part_frames=part_frames, grid=grid, config=config),
            part_frames=part_frames,
            num_frames=num_frames,
            sound=_read_wav(sound) if sound.exists() and not note.startswith("sound") else np.empty(0, np.int16),
            note=note,
        )


def _run_ffmpeg(
    path: str,
    preview: Path,
    sound: Path,
    *,
    found: dict[str, Any],
    grid: ClipGrid,
    part_frames: int,
    config: MediaConfig,
) -> tuple[int, str]:
    source = _open(path)
    pixels = PREVIEW_PIXELS
    pictures = (
        source[str(found["video"]["index"])]
        .filter("fps", fps=grid.fps, start_time=0)
        .filter("scale", w="if(gt(sar,0),iw*sar,iw)", h="ih")  # square pixels first
        .filter("scale", w=pixels, h=pixels, force_original_aspect_ratio="increase", flags="bicubic")
        .filter("crop", pixels, pixels)
        .filter("setsar", 1)
        .filter("format", "yuv420p")
    )
    encoding = {
        "c:v": "libx264",
        "preset": "veryfast",
        "crf": 18,
        "g": int(2 * grid.fps),
        "force_key_frames": f"expr:eq(mod(n,{part_frames}),0)",  # parts are cut without decoding
        "t": config.max_seconds + grid.clip_s,  # containers without a duration tell only here how long they are
        "threads": 1,  # libx264's output depends on the number of threads
        "map_metadata": -1,
        "map_chapters": -1,
        "fflags": "+bitexact",
        "movflags": "+faststart",
    }
    if found["audio"] is None:
        outputs = ffmpeg.output(pictures, str(preview), **encoding)
    else:
        heard = source[str(found["audio"]["index"])].filter("aresample", SAMPLE_RATE, **{"async": 1, "first_pts": 0})
        heard = heard.filter("aformat", sample_fmts="s16", channel_layouts="mono").filter_multi_output("asplit")
        outputs = ffmpeg.merge_outputs(
            ffmpeg.output(pictures, heard[0], str(preview), **encoding, **{"c:a": "aac", "b:a": "48k"}),
            ffmpeg.output(heard[1], str(sound), acodec="pcm_s16le", f="wav", fflags="+bitexact", t=encoding["t"]),
        )
    status, _, err = _run(outputs, config=config)
    return status, err


def _open(path: str) -> Any:
    return ffmpeg.input(
        path, protocol_whitelist="file,pipe", format_whitelist=",".join(probe_script.SAFE_FORMATS), threads=1
    )


def _run(outputs: Any, *, config: MediaConfig) -> tuple[int, bytes, str]:
    quiet = outputs.global_args("-hide_banner", "-nostdin", "-loglevel", "error").overwrite_output()
    command = ffmpeg.compile(quiet, cmd=ffmpeg_path())
    return run_limited(command, timeout_s=config.timeout_s, memory_bytes=config.memory_bytes)


def _count_frames(preview: Path) -> int:
    try:
        with av.open(str(preview)) as container:
            return sum(1 for packet in container.demux(video=0) if packet.size)
    except (av.FFmpegError, IndexError):
        return 0


def _cut(preview: Path, *, num_frames: int, part_frames: int, grid: ClipGrid, config: MediaConfig) -> list[bytes]:
    """The preview's pictures in parts, cut at the key frames that were forced there."""
    num_parts = 1 + (num_frames - grid.num_frames) // part_frames  # each holds at least one clip
    if num_parts <= 1:
        return [preview.read_bytes()]
    borders = ",".join(str(part * part_frames) for part in range(1, num_parts))
    pattern = preview.with_name("part-%05d.mp4")
    cut = ffmpeg.input(str(preview))["v"].output(
        str(pattern), f="segment", segment_frames=borders, reset_timestamps=1, c="copy", fflags="+bitexact"
    )
    status, _, err = _run(cut, config=config)
    parts = [preview.with_name(f"part-{part:05d}.mp4") for part in range(num_parts)]
    if status != 0 or [_count_frames(part) for part in parts[:-1]] != [part_frames] * (num_parts - 1):
        raise StageError("decode_failed", f"cutting into {num_parts} parts ended with status {status}: {err}")
    return [part.read_bytes() for part in parts]


def _read_wav(path: Path) -> np.ndarray:
    with wave.open(str(path), "rb") as file:
        return np.frombuffer(file.readframes(file.getnframes()), dtype="<i2")


def read_captions(path: str, *, index: int | None, config: MediaConfig) -> str:
    """A text track of a container (or a whole .srt/.vtt file, index None) as SubRip text; "" if ffmpeg cannot read it.

    Times in it count from the container's start.
    """
    stream = _open(path) if index is not None else ffmpeg.input(path, protocol_whitelist="file,pipe")
    track = stream[str(index)] if index is not None else stream["s:0"]
    status, out, _ = _run(ffmpeg.output(track, "pipe:", f="srt", c="srt"), config=config)
    return out.decode("utf-8", errors="replace") if status == 0 else ""


def clips(preview: bytes, *, grid: ClipGrid, pixels: int) -> Iterator[np.ndarray]:
    """The clips of a preview in order, each [num_frames, pixels, pixels, 3] uint8 RGB. At most one clip is in memory.

    The bytes are our own encoder's, so this runs in the worker, without a child.
    """
    import io

    frames: list[np.ndarray] = []
    with av.open(io.BytesIO(preview)) as container:
        container.streams.video[0].thread_type = "NONE"
        for frame in container.decode(video=0):
            picture = frame.reformat(width=pixels, height=pixels, format="rgb24", interpolation="AREA")
            frames.append(picture.to_ndarray())
            if len(frames) == grid.num_frames:
                yield np.stack(frames)
                frames = frames[grid.stride_frames :]
