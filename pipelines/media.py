"""The only place where ffmpeg and PyAV touch strangers' bytes.

A source is decoded once, by one ffmpeg process, into what every later stage needs: an H.264 preview on the clip grid's
frame rate, 16 kHz sound, and thumbnails of 32x32 from which shot changes, motion and contrast are told. Parts come out
while ffmpeg still runs, so memory holds one part however long the video is. Later stages and people read the preview,
never the source, so the decoder's attack surface is here: children with limits on wall time, CPU time, memory, pixels,
streams and bytes written, without a network where the kernel allows that, one process group that is killed as a whole,
whitelisted protocols and formats. The price is one lossy generation (48.8 dB, 35 kB a second) before the features;
chunks and thumbnails cost 3 % of CPU over an ffmpeg that writes preview and sound alone, a second decode of 1080p would
cost 52 %.

Clock: ffmpeg subtracts the container's start time, and pictures and sound are each placed by their own timestamps from
there, so preview time t is clock time `start_s + t`, whatever the frame rate of the source does, whichever stream
begins late, and whatever changes its size or sample rate midway.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import io
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import av
import ffmpeg
import imageio_ffmpeg
import numpy as np

from pipelines import probe as probe_script
from pipelines.dataset import ClipGrid
from pipelines.errors import StageError

_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_PUNCH_HOLE_KEEP_SIZE = 3

SAMPLE_RATE = 16_000
PREVIEW_PIXELS = 224
THUMB_PIXELS = 32
_THUMB_BYTES = THUMB_PIXELS * THUMB_PIXELS * 3
# As close to the source as veryfast at crf 18, for a third of its CPU and 1.45 times its bytes; decodes faster, too.
PREVIEW_ENCODING = ("-c:v", "libx264", "-preset", "ultrafast", "-crf", "23")
SOUND_ENCODING = ("-c:a", "aac", "-aac_coder", "fast", "-b:a", "48k")
_CHUNK_S = 1.5  # about as long as the paper's clip: a finer cut costs bits for key frames, a coarser one choice
_SHORTEST_SHOT_S = 0.6
_QUIETLY = ("-hide_banner", "-nostdin", "-loglevel", "error")
_QUIET_S = 0.4  # loudness of a border is that of so many seconds around it


@dataclass(frozen=True, kw_only=True)
class MediaConfig:
    """Limits for strangers' media, and how long videos are cut."""

    part_seconds: float = 300.0
    """Longer videos are cut into parts of at most this many seconds, each at the quietest clip border of its last fifth
    (without sound: at a shot change). No clip lies across a cut; a rest too short for a clip stays with the last part.
    """
    shot_threshold: float = 27.0
    """Change of hue, saturation and brightness between two pictures, 0 to 255, from which a new shot begins."""
    max_seconds: float = 6 * 3600.0
    """Longest source accepted, in seconds as its container states it and as it decodes."""
    max_pixels: int = 8192 * 4352
    """Largest picture accepted, in pixels."""
    max_streams: int = 64
    """Most streams accepted in one container."""
    timeout_s: float = 3600.0
    """Wall seconds for one child process before its group is killed."""
    cpu_s: float = 4 * 3600.0
    """CPU seconds for one child process, all its threads together."""
    memory_bytes: int = 8 << 30
    """Address space of one child process, in bytes."""
    output_bytes: int = 8 << 30
    """Largest file that a child process may write, in bytes."""
    keep_previews: bool = True
    """Keep media/VIDEO_ID.mp4 in the dataset: pictures in the report need it, training does not."""

    def __post_init__(self) -> None:
        if min(self.part_seconds, self.timeout_s, self.cpu_s, self.max_seconds) <= 0:
            raise ValueError("media.part_seconds, timeout_s, cpu_s and max_seconds must be above 0 seconds.")
        if min(self.memory_bytes, self.output_bytes, self.max_pixels, self.max_streams) <= 0:
            raise ValueError("media.memory_bytes, output_bytes, max_pixels and max_streams must be above 0.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A stretch of a video in the shape that every later stage uses."""

    index: int
    first_frame: int  # in the whole video, at the grid's frame rate; a multiple of grid.stride_frames
    num_frames: int
    preview: bytes  # H.264 (Annex B), 224x224, exactly num_frames pictures, decodable on its own
    sound: np.ndarray  # [num_samples] int16 at 16 kHz; empty if there is none
    shots: tuple[int, ...]  # first frames of new shots, counted from the part's first frame, without 0
    motion: float  # mean absolute difference of neighbouring thumbnails' brightness, 0..255
    contrast: float  # mean over frames of the standard deviation of brightness in a thumbnail, 0..127.5
    is_last: bool
    note: str  # what had to be given up, for people; only on the last part


@functools.cache
def ffmpeg_path() -> str:
    """The ffmpeg on PATH if it can encode H.264 with libx264, else the one that the imageio-ffmpeg wheel ships."""
    on_path = shutil.which("ffmpeg")
    if on_path and "libx264" in _encoders(on_path):
        return on_path
    return str(imageio_ffmpeg.get_ffmpeg_exe())


def _encoders(binary: str) -> str:
    return subprocess.run([binary, "-hide_banner", "-encoders"], capture_output=True, text=True, timeout=30).stdout


class Child:
    """A process group under limits: `with Child(...) as child: child.wait()`. Nothing of it runs after the block.

    The wall clock runs from the start and does not need the caller: a thread kills the group when it is over.
    """

    def __init__(
        self,
        args: Sequence[str],
        *,
        config: MediaConfig,
        stderr: IO[bytes],
        stdout: IO[bytes] | int = subprocess.DEVNULL,
        timeout_s: float | None = None,
        folder: Path | None = None,
    ) -> None:
        self._name, self._config, self._stderr = Path(args[0]).name, config, stderr
        self._timeout_s = config.timeout_s if timeout_s is None else timeout_s
        self._timed_out, self._killed, self._lock = False, False, threading.Lock()
        self.status: int | None = None
        self.cpu_s = 0.0
        self.peak_bytes = 0
        self._process = subprocess.Popen(
            list(args),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
            preexec_fn=functools.partial(_confine, config),
        )
        self._timer = threading.Timer(self._timeout_s, self._time_out)
        self._timer.daemon = True
        self._timer.start()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.status is None:
            self._kill()
            self._reap(os.WEXITED)

    def _time_out(self) -> None:
        self._timed_out = True
        self._kill()

    def _kill(self) -> None:
        with self._lock:  # the id is ours until the process is reaped
            if self.status is None:
                self._killed = True
                os.killpg(self._process.pid, signal.SIGKILL)

    def _reap(self, options: int) -> bool:
        """Take the exit status; whatever the process left behind in its group ends with it."""
        pid = self._process.pid
        if os.waitid(os.P_PID, pid, options | os.WNOWAIT) is None:
            return False
        with self._lock:
            os.killpg(pid, signal.SIGKILL)
            _, status, usage = os.wait4(pid, 0)
            self.status = self._process.returncode = os.waitstatus_to_exitcode(status)
        self._timer.cancel()
        self.cpu_s, self.peak_bytes = usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024
        return True

    def has_ended(self) -> bool:
        return self.status is not None or self._reap(os.WEXITED | os.WNOHANG)

    def wait(self) -> int:
        """Wait for the end. Returns the exit status; raises what `check` raises."""
        if self.status is None:
            self._reap(os.WEXITED)
        return self.check()

    def check(self) -> int:
        """The exit status of an ended child.

        Raises StageError("timeout" | "limit_exceeded") if it was stopped, OSError if the disk is full.
        """
        assert self.status is not None
        name, config, said = self._name, self._config, self.stderr_tail()
        if self._timed_out:
            raise StageError("timeout", f"{name} was stopped after {self._timeout_s:g} s")
        if self.status == -signal.SIGXCPU or (self.status != 0 and self.cpu_s >= config.cpu_s):
            raise StageError("limit_exceeded", f"{name} took more than media.cpu_s={config.cpu_s:g} CPU seconds")
        if self.status == -signal.SIGXFSZ:
            raise StageError("limit_exceeded", f"{name} wrote more than media.output_bytes={config.output_bytes}")
        if self.status != 0 and any(words in said for words in _OUT_OF_MEMORY):
            raise StageError("limit_exceeded", f"{name}: media.memory_bytes={config.memory_bytes} were used up: {said}")
        if self.status == -signal.SIGKILL and not self._killed:
            raise StageError("limit_exceeded", f"{name} was killed from outside; is this machine short of memory?")
        if self.status != 0 and os.strerror(errno.ENOSPC) in said:
            raise OSError(errno.ENOSPC, f"no space left for {name} to write; free some or set TMPDIR to a larger disk")
        return self.status

    def stderr_tail(self) -> str:
        """The end of what the child said on standard error."""
        size = os.fstat(self._stderr.fileno()).st_size
        return os.pread(self._stderr.fileno(), 2000, max(0, size - 2000)).decode(errors="replace").strip()


_OUT_OF_MEMORY = ("Cannot allocate memory", "MemoryError", "bad_alloc")


def _confine(config: MediaConfig) -> None:
    """Between fork and exec: no imports, no locks."""
    limits = (
        (resource.RLIMIT_AS, config.memory_bytes, 0),
        (resource.RLIMIT_CPU, int(config.cpu_s) + 1, 5),  # SIGXCPU first, SIGKILL at the hard limit
        (resource.RLIMIT_FSIZE, config.output_bytes, 0),
        (resource.RLIMIT_CORE, 0, 0),
    )
    for kind, soft, more in limits:
        hard = resource.getrlimit(kind)[1]
        upper = soft + more if hard == resource.RLIM_INFINITY else min(soft + more, hard)
        resource.setrlimit(kind, (min(soft, upper), upper))
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # elsewhere an orphan runs until its CPU limit
        # An empty network namespace, best effort (1.5 ms). Root needs no user namespace for it, and would lose the
        # right to read others' files in one; a kernel that forbids both leaves the network to the whitelists.
        if _LIBC.unshare(_CLONE_NEWNET) != 0:
            _LIBC.unshare(_CLONE_NEWUSER | _CLONE_NEWNET)


def run_limited(args: Sequence[str], *, config: MediaConfig, timeout_s: float | None = None) -> tuple[int, bytes, str]:
    """Run a child under limits. Returns exit status, standard output (at most 64 MiB), end of standard error.

    Raises StageError("timeout" | "limit_exceeded") after killing the whole group.
    """
    with (
        tempfile.TemporaryFile(prefix="videobert-") as out,
        tempfile.TemporaryFile(prefix="videobert-") as err,
        Child(args, config=config, timeout_s=timeout_s, stdout=out, stderr=err) as child,
    ):
        status = child.wait()
        out.seek(0)
        return status, out.read(64 << 20), child.stderr_tail()


def probe(path: str, *, config: MediaConfig) -> dict[str, Any]:
    """What `pipelines.probe.probe` finds in a file, looked at by a child.

    Raises StageError: unreadable, forbidden_format, no_video, too_large, timeout, limit_exceeded.
    """
    command = [sys.executable, probe_script.__file__, os.path.abspath(path)]
    status, out, err = run_limited(command, config=config, timeout_s=min(60.0, config.timeout_s))
    if status != 0:
        raise StageError("unreadable", f"the probe died with status {status}: {err}")
    found: dict[str, Any] = json.loads(out)
    if "error" in found:
        raise StageError("forbidden_format" if found["forbidden"] else "unreadable", found["error"])
    if found["num_streams"] > config.max_streams:
        raise StageError("too_large", f"{found['num_streams']} streams, media.max_streams is {config.max_streams}")
    if found["video"] is None:
        raise StageError("no_video", f"{found['format']} with {found['num_streams']} streams, none of moving pictures")
    pixels = found["video"]["width"] * found["video"]["height"]
    if pixels > config.max_pixels or (found["duration_s"] or 0) > config.max_seconds:
        raise StageError("too_large", f"{pixels} pixels a picture, {found['duration_s']} s")
    return found


def transcode(
    path: str,
    *,
    found: dict[str, Any],
    grid: ClipGrid,
    config: MediaConfig,
    folder: Path,
    preview: Path | None = None,
) -> Iterator[Part]:
    """The parts of a probed source, in order, while ffmpeg still runs; closing the iterator kills ffmpeg.

    Aspect is kept, then the centre is cropped; small pictures are scaled up. A sound track that cannot be decoded is
    given up with a note, the pictures are kept. What comes out depends on the source's bytes and the settings only.
    Scratch files go to a new folder inside `folder` and are removed; on disk lie, at most, 32 kB a second of sound and
    what ffmpeg is ahead of the caller. If `preview` is given, the whole video lies there as a fast-start MP4 with AAC
    when the iterator is exhausted, unless ffmpeg crashed before it could finish one.

    Raises StageError, possibly after parts were yielded, which then do not count: decode_failed, too_short, too_large,
    timeout, limit_exceeded. Raises OSError if the disk is full.
    """
    plan = _Plan.of(grid, config)
    note = ""
    for audio in (found["audio"], None) if found["audio"] else (None,):
        with tempfile.TemporaryDirectory(prefix="videobert-", dir=folder) as scratch:
            command = transcode_command(
                path, found=found | {"audio": audio}, grid=grid, config=config, preview=preview is not None
            )
            with _Run(command, plan=plan, config=config, folder=Path(scratch), has_sound=audio is not None) as run:
                try:
                    yield from _parts(run, plan=plan, config=config, note=note)
                except _SoundFailedError as failure:
                    note = f"sound given up: {failure}"
                    continue
            if preview is not None and Path(scratch, "preview.mp4").exists():
                shutil.move(Path(scratch, "preview.mp4"), preview)
            return


class _SoundFailedError(Exception):
    """ffmpeg failed with sound before anything was yielded: worth a try without."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """Where a video may be cut, in frames. Chunks are what ffmpeg writes; parts are whole chunks."""

    grid: ClipGrid
    chunk_frames: int  # a multiple of the clip grid's stride
    min_frames: int  # of a part that is not the last
    max_frames: int

    @classmethod
    def of(cls, grid: ClipGrid, config: MediaConfig) -> _Plan:
        part_strides = max(1, int(config.part_seconds / grid.stride_s))
        chunk = grid.stride_frames * max(1, min(round(_CHUNK_S / grid.stride_s), part_strides))
        clip = -(-grid.num_frames // chunk)
        most = max(clip, part_strides * grid.stride_frames // chunk)
        least = max(clip, -(-4 * most // 5))
        return cls(grid, chunk, least * chunk, most * chunk)


def scaling(found: dict[str, Any]) -> str:
    """The filters that bring a probed source's pictures to the preview's size: aspect kept, centre cropped.

    Large pictures are averaged over areas, which is six times cheaper than a bicubic filter and does not alias.
    """
    pixels = PREVIEW_PIXELS
    method = "area" if min(found["video"]["width"], found["video"]["height"]) > pixels else "bicubic"
    return (
        "scale=w='if(gt(sar,0),iw*sar,iw)':h=ih,"  # square pixels first
        f"scale={pixels}:{pixels}:force_original_aspect_ratio=increase:flags={method},crop={pixels}:{pixels},setsar=1"
    )


def transcode_command(
    path: str, *, found: dict[str, Any], grid: ClipGrid, config: MediaConfig, preview: bool
) -> list[str]:
    """The arguments of `transcode`'s ffmpeg, which writes into its working directory under names of ours, so that
    nothing needs escaping.

    Written out where they have two filter graphs: ffmpeg-python draws one.
    """
    rate, seconds, chunk_frames = _rate(grid), config.max_seconds + grid.clip_s, _Plan.of(grid, config).chunk_frames
    # Not fps=start_time=0: ffmpeg builds the filters anew when the picture's size changes midway, and that would fill
    # from 0 again. `-fps_mode cfr` below fills before the first picture, once.
    pictures = (
        f"fps={rate},{scaling(found)},"
        f"format=yuv420p,split[pictures][small];[small]scale={THUMB_PIXELS}:{THUMB_PIXELS}:flags=area,format=rgb24"
    )
    until = ["-t", f"{seconds:.6f}"]  # containers without a duration tell only here how long they are
    evenly = ["-r", rate, "-fps_mode", "cfr", *until]
    encoding = [*PREVIEW_ENCODING, "-flags:v", "+global_header"]
    encoding += ["-threads:v", "1"]  # libx264's output depends on the number of threads
    # A key frame at each chunk's first picture and nowhere else; each key frame begins a file.
    encoding += ["-g", str(chunk_frames), "-keyint_min", str(chunk_frames), "-sc_threshold", "0"]
    slaves = "[f=segment:select=v:segment_format=h264:segment_time=0.001:bsfs/v=dump_extra]chunk-%07d.h264"
    heard: list[str] = []
    sound: list[str] = []
    if found["audio"] is not None:
        # A filter graph of its own: in one with the pictures, either would wait for the other to begin.
        heard = [f"[0:{found['audio']['index']}]aresample={SAMPLE_RATE}:async=1:min_hard_comp=0.04,"]
        heard[0] += "aformat=sample_fmts=s16:channel_layouts=mono" + (",asplit[said]" if preview else "") + "[sound]"
        heard = ["-filter_complex", heard[0]]
        sound = ["-map", "[sound]", "-c:a", "pcm_s16le", "-fflags", "+bitexact", *until, "-f", "tee"]
        sound += ["[f=s16le:flush_packets=1]sound.s16|[f=framecrc:flush_packets=1]sound.txt"]  # in this order
    if preview:
        slaves = "[f=mp4:movflags=+faststart]preview.mp4|" + slaves
        encoding += ["-map", "[said]", *SOUND_ENCODING] if heard else []
    return [
        *(ffmpeg_path(), *_QUIETLY, "-y"),
        *ffmpeg.get_args(_source(path, config=config).output("-"))[:-1],
        *("-filter_complex", f"[0:{found['video']['index']}]{pictures}[thumbs]", *heard),
        *("-map", "[pictures]", *encoding, *evenly, "-map_metadata", "-1", "-map_chapters", "-1"),
        *("-fflags", "+bitexact", "-f", "tee", slaves),
        *("-map", "[thumbs]", "-c:v", "rawvideo", *evenly, "-f", "rawvideo", "thumbs.rgb"),
        *sound,
    ]


def _rate(grid: ClipGrid) -> str:
    rate = Fraction(grid.fps).limit_denominator(100_000)
    return f"{rate.numerator}/{rate.denominator}"


def _source(path: str, *, config: MediaConfig) -> Any:
    """ffmpeg-python's input. `file:` keeps a name from being taken for a protocol."""
    return ffmpeg.input(
        f"file:{os.path.abspath(path)}",
        protocol_whitelist="file",
        format_whitelist=",".join(probe_script.SAFE_FORMATS),
        max_streams=config.max_streams,
        max_pixels=config.max_pixels,
        threads=1,
    )


@dataclass(frozen=True, slots=True)
class _Chunk:
    data: bytes
    num_frames: int
    motion: np.ndarray  # [num_frames] float32: change of brightness against the frame before; 0 for the video's first
    contrast: np.ndarray  # [num_frames] float32
    shots: tuple[int, ...]  # counted from the video's first frame


class _Run:
    """One ffmpeg at work, and what it has written so far."""

    def __init__(
        self, command: Sequence[str], *, plan: _Plan, config: MediaConfig, folder: Path, has_sound: bool
    ) -> None:
        self.has_sound = has_sound
        self._folder, self._plan = folder, plan
        self._shots = _Shots(threshold=config.shot_threshold, shortest=round(_SHORTEST_SHOT_S * plan.grid.fps))
        self._sound = _Sound(folder)
        with contextlib.ExitStack() as stack:
            self._thumbs = stack.enter_context(open(folder / "thumbs.rgb", "w+b", buffering=0))
            log = stack.enter_context(open(folder / "ffmpeg.log", "w+b", buffering=0))
            stack.enter_context(self._sound)
            self.child = stack.enter_context(Child(command, config=config, stderr=log, folder=folder))
            self._open = stack.pop_all()

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._open.__exit__(kind, error, at)

    def chunks(self) -> Iterator[_Chunk]:
        """The chunks as they are finished; all but the last have plan.chunk_frames pictures.

        Raises StageError("decode_failed") if ffmpeg's files contradict each other.
        """
        first = 0
        for index in itertools.count():
            path, following = (self._folder / f"chunk-{i:07d}.h264" for i in (index, index + 1))
            self._until(following.exists)  # then this one is closed
            if not path.exists():
                return
            data = path.read_bytes()
            path.unlink()
            num = _num_pictures(data)
            if num != self._plan.chunk_frames and following.exists():
                raise StageError("decode_failed", f"chunk {index} has {num} pictures, not {self._plan.chunk_frames}")
            if num == 0:
                return
            thumbs = self._read_thumbs(first, num)
            motion, contrast, shots = self._shots.feed(thumbs)
            yield _Chunk(data, num, motion, contrast, shots)
            first += num

    def _read_thumbs(self, first: int, num: int) -> np.ndarray:
        begin, end = first * _THUMB_BYTES, (first + num) * _THUMB_BYTES
        file = self._thumbs.fileno()
        self._until(lambda: os.fstat(file).st_size >= end)
        data = os.pread(file, end - begin, begin)
        if len(data) < end - begin:  # ffmpeg ended early; the pictures count
            data += bytes(end - begin - len(data))
        if _LIBC is not None:  # give back what was read: a long video's thumbnails would fill a gigabyte
            _LIBC.fallocate(file, _PUNCH_HOLE_KEEP_SIZE, ctypes.c_long(begin), ctypes.c_long(end - begin))
        return np.frombuffer(data, np.uint8).reshape(num, THUMB_PIXELS, THUMB_PIXELS, 3)

    @property
    def num_samples(self) -> int:
        return self._sound.end

    def sound(self, first: int, last: int, *, ahead: int) -> np.ndarray:
        """Samples `first` to `last` as far as there are any, once `ahead` samples are known or no more will come."""
        if not self.has_sound:
            return np.empty(0, np.int16)
        self._until(lambda: self._sound.known(ahead))
        return self._sound.read(first, last)

    def _until(self, ready: Callable[[], bool]) -> None:
        while not ready():
            if self.child.has_ended():
                self._sound.known(sys.maxsize)  # what was written last
                return
            time.sleep(0.01)


class _Sound:
    """Samples in a raw file, and beside it the list of packets that says when each is heard."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._samples: IO[bytes] | None = None
        self._packets: IO[bytes] | None = None
        self._rest = b""
        self._num_written = 0  # samples in the file, as far as their packets are listed
        self._runs: list[tuple[int, int, int]] = []  # (clock, position in the file, length), in samples
        self.end = 0

    def __enter__(self) -> _Sound:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for file in (self._samples, self._packets):
            if file is not None:
                file.close()

    def known(self, end: int) -> bool:
        """Whether sound is known up to sample `end`, after looking for news."""
        if self.end < end:
            self._look()
        return self.end >= end

    def _look(self) -> None:
        if self._packets is None or self._samples is None:
            names = [self._folder / "sound.s16", self._folder / "sound.txt"]
            if not all(name.exists() for name in names):
                return
            self._samples, self._packets = (open(name, "rb", buffering=0) for name in names)  # noqa: SIM115
        *lines, self._rest = (self._rest + self._packets.read()).split(b"\n")
        for line in lines:
            if not line.startswith(b"#"):
                _, _, begin, _, num_bytes = line.split(b",")[:5]
                self._place(int(begin), int(num_bytes) // 2)

    def _place(self, begin: int, length: int) -> None:
        position, self._num_written = self._num_written, self._num_written + length
        overlap = max(0, self.end - begin)  # time that was heard already
        begin, position, length = begin + overlap, position + overlap, length - overlap
        if length <= 0:
            return
        clock, place, before = self._runs[-1] if self._runs else (0, 0, 0)
        if self._runs and (clock + before, place + before) == (begin, position):
            self._runs[-1] = (clock, place, before + length)
        else:
            self._runs.append((begin, position, length))
        self.end = begin + length

    def read(self, first: int, last: int) -> np.ndarray:
        """[<= last - first] int16: samples of this stretch of the clock, silence where there are none."""
        samples = np.zeros(max(0, min(last, self.end) - first), np.int16)
        for clock, position, length in self._runs:
            begin, end = max(clock, first), min(clock + length, last)
            if begin < end and self._samples is not None:
                data = os.pread(self._samples.fileno(), 2 * (end - begin), 2 * (position + begin - clock))
                samples[begin - first : begin - first + len(data) // 2] = np.frombuffer(data, "<i2", len(data) // 2)
        self._runs = [run for run in self._runs if run[0] + run[2] > first]
        return samples


def _parts(run: _Run, *, plan: _Plan, config: MediaConfig, note: str) -> Iterator[Part]:
    """Whole chunks gathered into parts. A part is cut once a clip is known to follow it, so timing decides nothing."""
    chunks: deque[_Chunk] = deque()
    index = first = held = 0
    for chunk in run.chunks():
        chunks.append(chunk)
        held += chunk.num_frames
        if held >= plan.max_frames + plan.grid.num_frames:
            num, sound = _border(run, chunks, first=first, plan=plan)
            taken = [chunks.popleft() for _ in range(num // plan.chunk_frames)]
            yield _part(taken, sound, index=index, first=first, is_last=False, note="")
            index, first, held = index + 1, first + num, held - num
    status, said = run.child.wait(), run.child.stderr_tail()
    rest = run.sound(_sample(first, plan), _sample(first + held, plan), ahead=0)
    is_silent = run.has_sound and run.num_samples == 0
    if status != 0 and run.has_sound and index == 0:
        raise _SoundFailedError(said[-300:])
    if first + held == 0:
        raise StageError("decode_failed", said or f"ffmpeg ended with status {status} and wrote no picture")
    seconds = (first + held) / plan.grid.fps
    if seconds > config.max_seconds:
        raise StageError("too_large", f"more than media.max_seconds={config.max_seconds:g} s decode")
    if held < plan.grid.num_frames:
        raise StageError("too_short", f"{seconds:.2f} s decode; a clip takes {plan.grid.clip_s:g} s")
    if is_silent:
        note = f"{note} sound given up: nothing of it decodes {said[-300:]}".strip()
    if status != 0:
        note = f"{note} ffmpeg ended with status {status}, what decoded is kept: {said[-300:]}".strip()
    yield _part(list(chunks), rest, index=index, first=first, is_last=True, note=note)


def _part(chunks: Sequence[_Chunk], sound: np.ndarray, *, index: int, first: int, is_last: bool, note: str) -> Part:
    num_frames = sum(chunk.num_frames for chunk in chunks)
    return Part(
        index=index,
        first_frame=first,
        num_frames=num_frames,
        preview=b"".join(chunk.data for chunk in chunks),
        sound=sound,
        shots=tuple(shot - first for chunk in chunks for shot in chunk.shots if shot > first),
        motion=float(np.concatenate([chunk.motion for chunk in chunks])[1:].mean()) if num_frames > 1 else 0.0,
        contrast=float(np.concatenate([chunk.contrast for chunk in chunks]).mean()),
        is_last=is_last,
        note=note,
    )


def _border(run: _Run, chunks: Sequence[_Chunk], *, first: int, plan: _Plan) -> tuple[int, np.ndarray]:
    """How many frames the part that begins at frame `first` gets, and its sound.

    The quietest border of its last fifth; without sound there, the one closest to a shot change; else the last.
    """
    borders = range(plan.max_frames, plan.min_frames - 1, -plan.chunk_frames)  # the later wins a draw
    begin, around = _sample(first, plan), round(_QUIET_S / 2 * SAMPLE_RATE)
    end = _sample(first + plan.max_frames, plan) + around
    sound = run.sound(begin, end, ahead=end)
    at = {border: _sample(first + border, plan) - begin for border in borders}
    if len(sound) > at[borders[-1]]:
        energy = {border: _energy(sound[max(0, at[border] - around) : at[border] + around]) for border in borders}
        best = min(borders, key=lambda border: energy[border])
    else:
        shots = [shot - first for chunk in chunks for shot in chunk.shots]
        near = [s for s in shots if abs(s - (borders[0] + borders[-1]) / 2) <= (borders[0] - borders[-1] + 1) / 2]
        best = min(borders, key=lambda border: min((abs(shot - border) for shot in near), default=0))
    return best, sound[: at[best]]


def _energy(samples: np.ndarray) -> int:
    return int((samples.astype(np.int64) ** 2).sum())


def _sample(frame: int, plan: _Plan) -> int:
    return round(frame / plan.grid.fps * SAMPLE_RATE)


class _Shots:
    """Shot changes, motion and contrast of a stream of thumbnails.

    A shot begins where hue, saturation and brightness change by more than `threshold` on average: PySceneDetect's
    content score, on 32x32 pictures at the grid's frame rate. Brightness alone, or differences of Y, U and V, do not
    tell the cuts of our test clips from their camera shake; this does, at PySceneDetect's own threshold of 27.
    """

    def __init__(self, *, threshold: float, shortest: int) -> None:
        self._threshold, self._shortest = threshold, shortest
        self._frame = self._begin = 0
        self._last: np.ndarray | None = None  # the hue, saturation and brightness of the frame before

    def feed(self, thumbs: np.ndarray) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
        """[n, 32, 32, 3] uint8 RGB -> motion [n], contrast [n], first frames of the shots that begin here."""
        now = _hue_saturation_brightness(thumbs)
        before = np.concatenate([now[:1] if self._last is None else self._last, now[:-1]])
        change = np.abs(now - before).mean((1, 2))  # [n, 3]
        found = []
        for frame, score in enumerate(change.mean(1), start=self._frame):
            if score >= self._threshold and frame - self._begin >= self._shortest:
                self._begin = frame
                found.append(frame)
        self._frame += len(thumbs)
        self._last = now[-1:]
        return change[:, 2], now[..., 2].std((1, 2)), tuple(found)


def _hue_saturation_brightness(rgb: np.ndarray) -> np.ndarray:
    """uint8 RGB -> float32 with OpenCV's ranges for 8 bits: hue 0..180, saturation and brightness (maximum) 0..255."""
    red, green, blue = (rgb[..., i].astype(np.float32) for i in range(3))
    top = np.maximum(np.maximum(red, green), blue)
    span = top - np.minimum(np.minimum(red, green), blue)
    safe = np.maximum(span, 1)
    hue = np.where(top == red, green - blue, np.where(top == green, blue - red, red - green)) / safe
    hue += np.where(top == red, 6 * (hue < 0), np.where(top == green, 2, 4))
    return np.stack([30 * hue, 255 * span / np.maximum(top, 1), top], axis=-1)


_SLICES = (1, 5)  # NAL unit types of a picture


def _num_pictures(stream: bytes) -> int:
    """Pictures in our own H.264: one slice each, because one thread encodes them."""
    return sum(1 for unit in stream.split(b"\0\0\1")[1:] if unit and unit[0] & 0x1F in _SLICES)


def read_captions(path: str, *, index: int, config: MediaConfig) -> str:
    """A text track of a container as SubRip text; "" if ffmpeg cannot read it. Times count from the container's start.

    Raises StageError: timeout, limit_exceeded.
    """
    track = ffmpeg.output(_source(path, config=config)[str(index)], "pipe:1", c="srt", f="srt")
    command = ffmpeg.compile(track.global_args(*_QUIETLY), cmd=ffmpeg_path())
    status, out, _ = run_limited(command, config=config)
    return out.decode("utf-8", errors="replace") if status == 0 else ""


def clips(
    preview: bytes, *, grid: ClipGrid, pixels: int, first_frames: Sequence[int] | None = None
) -> Iterator[np.ndarray]:
    """The clips of a preview in order, each [num_frames, pixels, pixels, 3] uint8 RGB. At most one clip is in memory.

    Clips lie on the grid, or begin at `first_frames`: ascending, not overlapping; those that reach beyond the end are
    left out. The bytes are our own encoder's, so this runs in the worker, without a child.
    """
    if first_frames is not None and any(b - a < grid.num_frames for a, b in itertools.pairwise(first_frames)):
        raise ValueError(f"first_frames must ascend by at least {grid.num_frames}, got {list(first_frames)}.")
    begins = itertools.count(0, grid.stride_frames) if first_frames is None else iter(first_frames)
    begin = next(begins, None)
    frames: list[np.ndarray] = []
    with av.open(io.BytesIO(preview), format="h264" if preview.startswith(b"\0\0\0\1") else None) as container:
        container.streams.video[0].thread_type = "NONE"
        for index, frame in enumerate(container.decode(video=0)):
            if begin is None:
                return
            if index < begin:
                continue
            picture = frame.reformat(width=pixels, height=pixels, format="rgb24", interpolation="AREA")
            frames.append(picture.to_ndarray())
            if len(frames) == grid.num_frames:
                yield np.stack(frames)
                following = next(begins, None)
                frames = [] if following is None else frames[following - begin :]
                begin = following
