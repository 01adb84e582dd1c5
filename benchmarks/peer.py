"""video2dataset 1.3.0 at the same job, in an environment of its own: local files -> 20 fps, 224x224 -> WebDataset.

What it took to make the peer run, all of it in its favour:
- Its pins (torch 2.1.2 with CUDA, transformers, ...) serve stages that this job does not touch, but are imported at its
  start. Empty stand-ins answer those imports, which makes it start faster than a full installation.
- As published it fails with any video subsampler in its download stage (issues 263 and 311 of its repository, and a
  dictionary changed while it is iterated). The two lines are mended as its own subset stage has them; the way round,
  writing shards first and subsampling them in a second run, would cost it another copy.
- Sound is left out: its sound track needs ffprobe, and its pictures lose theirs in the subsamplers.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av

from benchmarks.corpus import Video
from benchmarks.harness import Spent, run_children, say
from pipelines.media import ffmpeg_path

VERSION = "1.3.0"
PINS = (
    "numpy==1.26.4",
    "pyarrow==16.1.0",
    "pandas==2.1.4",
    "fsspec==2026.9.0",
    "webdataset==0.2.86",
    "ffmpeg-python==0.2.0",
    "omegaconf==2.3.0",
    "fire==0.5.0",
    "requests==2.34.2",
    "tqdm==4.70.1",
    "webvtt-py==0.5.1",
    "yt-dlp==2026.10.26",
)
_MENDS = (
    ('.subsamplers["audio"][0].encode_formats["audio"]', '.subsamplers["audio"][0].encode_format'),
    ('.subsamplers["video"][0].encode_formats["video"]', '.subsamplers["video"][0].encode_format'),
    ("for modality in subsampled_streams:", "for modality in list(subsampled_streams):"),
)
_STAND_INS = '''"""Empty modules for what video2dataset imports and this job never calls."""
import importlib.abc, importlib.machinery, sys, types

NAMES = set("torch torchdata torchaudio transformers einops scenedetect cv2 decord langdetect wandb soundfile".split())

class _Any(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing
    def __getitem__(cls, item):
        return cls

class Nothing(metaclass=_Any):
    def __init__(self, *args, **kwargs):
        pass
    def __call__(self, value=None, *args, **kwargs):
        return value

class StandIn(types.ModuleType):
    __path__ = []
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (Nothing,), {})

class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in NAMES:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
    def create_module(self, spec):
        return StandIn(spec.name)
    def exec_module(self, module):
        pass

sys.meta_path.append(Finder())
'''


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How the peer divides a job."""

    processes: int
    threads: int
    samples_per_shard: int


@dataclass(frozen=True, kw_only=True)
class PeerRun:
    spent: Spent  # the whole command
    busy_s: float  # from the start of its first shard to the end of its last, by its own statistics
    out: Path


class PeerMissing(RuntimeError):
    """The peer cannot be had here; the message says why."""


def make_environment(folder: Path) -> Path:
    """The peer's Python, installed on first use (0.4 GB, half a minute). Raises PeerMissing."""
    environment = folder / f"video2dataset-{VERSION}"
    python, ready = environment / "bin" / "python", environment / "ready"
    if ready.is_file() and ready.read_text() == _recipe():
        return python
    say(f"installing video2dataset {VERSION} into {environment}")
    try:
        _run([sys.executable, "-m", "venv", "--clear", str(environment)])
        _run([str(python), "-m", "pip", "install", "--quiet", *PINS])
        _run([str(python), "-m", "pip", "install", "--quiet", "--no-deps", f"video2dataset=={VERSION}"])
    except (subprocess.SubprocessError, OSError) as error:
        told = getattr(error, "stderr", "") or str(error)
        raise PeerMissing(f"video2dataset {VERSION} could not be installed: {told.strip()[-500:]}") from error
    packages = next(environment.glob("lib/python*/site-packages"))
    (packages / "sitecustomize.py").write_text(_STAND_INS)
    worker = packages / "video2dataset" / "workers" / "download_worker.py"
    text = worker.read_text()
    for published, mended in _MENDS:
        if published not in text:
            raise PeerMissing(f"video2dataset {VERSION} is not the code that this benchmark knows: no {published!r}.")
        text = text.replace(published, mended)
    worker.write_text(text)
    shim = environment / "shim"
    shim.mkdir()
    (shim / "ffmpeg").symlink_to(ffmpeg_path())  # the same binary as ours
    ready.write_text(_recipe())
    return python


def run(python: Path, videos: list[Video], *, setting: Setting, fps: float, pixels: int, out: Path) -> PeerRun:
    """The job, from a table of files to shards in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    table, config = out / "videos.csv", out / "config.json"  # JSON is YAML
    table.write_text("\n".join(["url", *(video.path for video in videos)]) + "\n")
    config.write_text(json.dumps(_config(setting, fps=fps, pixels=pixels)))
    options = {"output_folder": out / "shards", "output_format": "webdataset", "input_format": "csv", "config": config}
    flags = [f"--{name}={value}" for name, value in options.items()]
    flags += [f"--url_list={table}", '--encode_formats={"video":"mp4"}', f"--tmp_dir={out}"]
    shim = python.parent.parent / "shim"
    spent = run_children(
        [[str(python), "-m", "video2dataset.main", *flags]],
        at_once=1,
        env={**os.environ, "PATH": f"{shim}:{os.environ['PATH']}"},
    )
    stats = [json.loads(path.read_text()) for path in sorted(out.glob("shards/*_stats.json"))]
    busy_s = max(s["end_time"] for s in stats) - min(s["start_time"] for s in stats)
    return PeerRun(spent=spent, busy_s=busy_s, out=out / "shards")


def samples(shards: Path) -> Iterator[tuple[dict[str, Any], bytes | None]]:
    """What its shards hold: the metadata of each sample, and its video."""
    for shard in sorted(shards.glob("*.tar")):
        with tarfile.open(shard) as tar:
            files = {member.name: tar.extractfile(member) for member in tar}
            content = {name: file.read() for name, file in files.items() if file is not None}
        for name in sorted(content):
            if name.endswith(".json"):
                yield json.loads(content[name]), content.get(f"{name.removesuffix('.json')}.mp4")


def look(video: bytes) -> tuple[int, int, int]:
    """Pictures of an encoded video, their width and height."""
    with av.open(io.BytesIO(video)) as container:
        pictures = container.streams.video[0]
        return sum(1 for _ in container.decode(pictures)), pictures.width, pictures.height


def _config(setting: Setting, *, fps: float, pixels: int) -> dict[str, Any]:
    return {
        "subsampling": {
            "ResolutionSubsampler": {"args": {"video_size": pixels, "resize_mode": "scale,crop"}},
            "FrameSubsampler": {"args": {"frame_rate": fps}},
        },
        "reading": {"yt_args": {}, "timeout": 60, "sampler": None},
        "storage": {
            "number_sample_per_shard": setting.samples_per_shard,
            "oom_shard_count": 5,
            "captions_are_subtitles": False,
        },
        "distribution": {
            "processes_count": setting.processes,
            "thread_count": setting.threads,
            "subjob_size": 1000,
            "distributor": "multiprocessing",
        },
    }


def _recipe() -> str:
    return json.dumps([VERSION, PINS, _MENDS, _STAND_INS])


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=900)
