"""Mixed video to measure with: real clips where there are some, trimmed and re-encoded, and narrated kitchens.

No two files are alike and none is a duplicate of another, so that nothing is filtered. What is decoded is what users
have: H.264 of several sizes from 192x144 to 1080p, 20 to 30 fps, with AAC, Opus, MP3 or no sound; captions in most
kitchens, speech without captions in the rest.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import av

from benchmarks.harness import say
from pipelines.kitchen import KitchenConfig, make_kitchen
from pipelines.media import ffmpeg_path

REAL_CLIPS = (
    "nasa_subtitles.mp4",
    "pancake.mkv",
    "arm_wrestling.mp4",
    "dj1.mp4",
    "dj2.mp4",
    "dj3.mp4",
    "dj4.mp4",
    "sintel_10s.mp4",
    "small_192x144.mp4",
    "cockatoo.mp4",
)
LONG_CLIP = "narrated_1080p.mp4"
MARKER = "corpus.json"


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """What to make."""

    clips: str | None
    """Folder of real clips; None for kitchens only."""
    num_kitchens: int
    """Narrated kitchens of about 40 s."""
    num_real: int
    """How many of the short real clips."""
    trims: tuple[tuple[float, float, int], ...]
    """Cuts of the long real clip: start, seconds, height in pixels (0: the original pictures, not encoded again)."""


FULL = CorpusConfig(
    clips=None,
    num_kitchens=9,
    num_real=len(REAL_CLIPS),
    trims=(*((24.0 * i, 24.0, 0) for i in range(5)), (3.0, 30.0, 720), (40.0, 30.0, 720), (80.0, 30.0, 480)),
)
QUICK = CorpusConfig(clips=None, num_kitchens=2, num_real=4, trims=((12.0, 20.0, 0),))


@dataclass(frozen=True, kw_only=True)
class Video:
    path: str
    seconds: float
    width: int
    height: int

    @property
    def landscape(self) -> bool:
        return self.width >= self.height


def make_corpus(folder: Path, config: CorpusConfig) -> list[Video]:
    """The corpus in `folder`, made if another one or none is there. Its longest video comes first."""
    marker = folder / MARKER
    wanted = json.dumps(asdict(config), sort_keys=True)
    if not marker.is_file() or marker.read_text() != wanted:
        say(f"making the corpus in {folder}")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _kitchens(folder, num=config.num_kitchens)
        if config.clips is not None:
            _real(folder, Path(config.clips), config)
        marker.write_text(wanted)
    videos = [_look(path) for path in sorted(folder.iterdir()) if path.suffix in (".mp4", ".mkv")]
    return sorted(videos, key=lambda video: -video.seconds)


def _kitchens(folder: Path, *, num: int) -> None:
    small = num // 2  # half at the demo's size, half larger; one of them has no captions and must be listened to
    for name, count, width, height, mute in (("small", small, 320, 240, 0), ("large", num - small, 640, 480, 1)):
        if count:
            config = KitchenConfig(num_videos=count, width=width, height=height, seed=width, num_without_captions=mute)
            for video in make_kitchen(folder / name, config):
                video.rename(folder / f"kitchen-{name}-{video.stem[-3:]}.mp4")
            shutil.rmtree(folder / name)


def _real(folder: Path, clips: Path, config: CorpusConfig) -> None:
    for name in REAL_CLIPS[: config.num_real]:
        shutil.copy(clips / name, folder / name)
    for start_s, seconds, height in config.trims:
        how = ["-c", "copy"]
        if height:
            how = ["-vf", f"scale=-2:{height},hflip", "-c:v", "libx264", "-preset", "fast", "-c:a", "copy"]
        cut = ["-ss", str(start_s), "-t", str(seconds), "-i", str(clips / LONG_CLIP), "-map", "0:v:0", "-map", "0:a:0"]
        target = folder / f"narrated-{start_s:g}s-{height or 1080}p.mp4"
        command = [ffmpeg_path(), "-hide_banner", "-loglevel", "error", "-y", *cut, *how, str(target)]
        subprocess.run(command, check=True, timeout=600)


def _look(path: Path) -> Video:
    with av.open(str(path)) as container:
        pictures = container.streams.video[0]
        seconds = float((container.duration or 0) / av.time_base)
        return Video(path=str(path), seconds=seconds, width=pictures.width, height=pictures.height)


def describe(videos: list[Video]) -> dict[str, Any]:
    sizes: dict[str, int] = {}
    for video in videos:
        name = f"{video.width}x{video.height}"
        sizes[name] = sizes.get(name, 0) + 1
    return {"videos": len(videos), "video_s": round(sum(v.seconds for v in videos), 1), "sizes": sizes}
