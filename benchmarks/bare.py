"""The bare tools, in plain processes: what the same work costs without a pipeline.

- ffmpeg with exactly the arguments that the transcode stage uses, writing the same files.
- S3D over the clips of those previews, decoded as the stage decodes them.
- The recogniser over that sound.

The last two run as `python -m benchmarks.bare`, one process per core with its share of the files, and report CPU
seconds of the work alone: loading a network or a language model is start-up, which the pipeline shows apart too.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.corpus import Video
from benchmarks.harness import Spent, num_cores, run_children
from pipelines import features, media, stages, transcribe
from pipelines.rows import ROW_SCHEMA, Row
from pipelines.sources import Source
from pipelines.stages import IngestConfig
from pipelines.storage import Folder


@dataclass(frozen=True, kw_only=True)
class Transcoding:
    """A source as the bare ffmpeg takes it."""

    video: Video
    found: dict[str, Any]  # by media.probe
    command: list[str]
    folder: Path  # where it writes

    @property
    def needs_ears(self) -> bool:
        """Whether the pipeline would ask the recogniser: there is sound, and no caption track."""
        return self.found["audio"] is not None and not self.found["subtitles"]


def transcodings(videos: Sequence[Video], *, config: IngestConfig, folder: Path) -> list[Transcoding]:
    """The stage's own ffmpeg command for each video, each with a folder of its own."""
    made = []
    for index, video in enumerate(videos):
        found = media.probe(video.path, config=config.media)
        command = media.transcode_command(
            video.path, found=found, grid=config.clip_grid, config=config.media, preview=config.media.keep_previews
        )
        made.append(Transcoding(video=video, found=found, command=command, folder=folder / f"{index:04d}"))
    return made


def run_ffmpeg(jobs: Sequence[Transcoding], *, at_once: int | None = None) -> Spent:
    """The bare loop over all of them; afterwards each folder holds `preview.h264` and perhaps `sound.s16`."""
    for job in jobs:
        shutil.rmtree(job.folder, ignore_errors=True)
        job.folder.mkdir(parents=True)
    folders = [job.folder for job in jobs]
    spent = run_children([job.command for job in jobs], at_once=at_once or num_cores(), folders=folders)
    for job in jobs:
        chunks = sorted(job.folder.glob("chunk-*.h264"))
        (job.folder / "preview.h264").write_bytes(b"".join(chunk.read_bytes() for chunk in chunks))
        for chunk in chunks:
            chunk.unlink()
    return spent


def run_models(tool: str, jobs: Sequence[Transcoding], *, config: IngestConfig, at_once: int | None = None) -> float:
    """CPU seconds of S3D ("s3d") or the recogniser ("asr") over what `run_ffmpeg` left, split among plain processes."""
    shares: list[list[str]] = [[] for _ in range(at_once or num_cores())]
    for index, job in enumerate(sorted(jobs, key=lambda job: -job.video.seconds)):
        shares[index % len(shares)].append(str(job.folder))
    settings = {"weights": config.features.weights, "pixels": config.features.pixels}
    settings |= {"batch_clips": config.features.batch_clips, "whisper": config.transcribe.whisper_checkpoint}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.bare", tool, json.dumps(settings), *share],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for share in shares
        if share
    ]
    told = [child.communicate()[0] for child in running]
    if any(child.returncode for child in running):
        raise RuntimeError(f"the bare {tool} failed; its own words are above.")
    return sum(float(text.strip().splitlines()[-1]) for text in told)


def decode_cpu_s(videos: Sequence[Video]) -> float:
    """CPU seconds of decoding the pictures once, and nothing else."""
    commands = [_quiet("-i", video.path, "-map", "0:V:0", "-f", "null", "-") for video in videos]
    return run_children(commands, at_once=num_cores()).cpu_s


def two_passes_cpu_s(jobs: Sequence[Transcoding]) -> float:
    """CPU seconds of the same files from two processes a source: the preview, and a second decode for the rest."""
    first, second = [], []
    for job in jobs:
        pictures = _filters(job.command)
        index = job.found["video"]["index"]
        whole, small = pictures.split(",split[pictures][small];[small]")
        sound = ["-map", f"0:{job.found['audio']['index']}"] if job.found["audio"] else []
        encoding = [*media.PREVIEW_ENCODING, "-threads:v", "1"]
        kept = [*sound, "-ac", "1", *media.SOUND_ENCODING] if sound else []
        output = ["-f", "mp4", "-movflags", "+faststart", str(job.folder / "two.mp4")]
        first.append(_quiet("-i", job.video.path, "-map", f"0:{index}", "-vf", whole, *encoding, *kept, *output))
        thumbs = re.sub(r"\[thumbs\]$", "", small)
        raw = ["-vf", f"{whole},{thumbs}", "-c:v", "rawvideo", "-f", "rawvideo", str(job.folder / "two.rgb")]
        heard = [*sound, "-ar", "16000", "-ac", "1", "-f", "s16le", str(job.folder / "two.s16")] if sound else []
        second.append(_quiet("-i", job.video.path, "-map", f"0:{index}", *raw, *heard))
    spent = run_children(first + second, at_once=num_cores())
    for job in jobs:
        for made in job.folder.glob("two.*"):
            made.unlink()
    return spent.cpu_s


def _filters(command: Sequence[str]) -> str:
    """The picture filters of the stage's command, without its input and output labels."""
    graph = command[command.index("-filter_complex") + 1]
    return re.sub(r"^\[[^\]]*\]", "", graph)


def _quiet(*arguments: str) -> list[str]:
    return [media.ffmpeg_path(), "-hide_banner", "-nostdin", "-loglevel", "error", "-y", "-threads", "1", *arguments]


def run_stage_pool(jobs: Sequence[Transcoding], *, config: IngestConfig, at_once: int | None = None) -> Spent:
    """The transcode stage itself over the same sources, in as many warm processes as the bare loop has children."""
    workers = at_once or num_cores()
    rows = [next(stages.fetch_and_probe(source_row(job.video), config=config)) for job in jobs]  # local files stay
    given = [(row, config, str(job.folder)) for row, job in zip(rows, jobs, strict=True)]
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_warm, range(workers)))
        began_s = time.perf_counter()
        cpu_s = sum(pool.map(_transcode_one, given))
        return Spent(wall_s=time.perf_counter() - began_s, cpu_s=cpu_s)


def _warm(_: int) -> None:
    time.sleep(1.0)  # long enough for every worker to get one


def _transcode_one(given: tuple[Row, IngestConfig, str]) -> float:
    """CPU seconds of one source in the stage, captions left out, which are another ffmpeg's work."""
    row, config, folder = given
    config = dataclasses.replace(config, transcribe=dataclasses.replace(config.transcribe, transcripts=()))
    began_s = _cpu_s()
    parts = list(stages.transcode(row, config=config, folder=Folder.at(folder)))
    if any(part["status"] is not None for part in parts):
        raise RuntimeError(f"{row['uri']} was dropped: {parts[-1]['detail']}")
    return _cpu_s() - began_s


def source_row(video: Video) -> Row:
    """A row of a listing for one file."""
    stat = os.stat(video.path)
    source = Source(
        uri=video.path,
        version=f"{stat.st_size}-{stat.st_mtime_ns}",
        size_bytes=stat.st_size,
        title=Path(video.path).stem,
    )
    listed = {name: getattr(source, name) for name in ("uri", "version", "size_bytes", "title", "source_id")}
    return dict.fromkeys(ROW_SCHEMA.names) | listed | {"attempt": 1}


def _cpu_s() -> float:
    """CPU seconds so far, of this process and of its ended children."""
    kinds = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(kind.ru_utime + kind.ru_stime for kind in kinds)


def _s3d(folders: Sequence[Path], settings: dict[str, Any]) -> Callable[[], None]:
    import torch

    torch.set_num_threads(1)
    names = ("weights", "pixels", "batch_clips")
    config = IngestConfig(features=features.FeaturesConfig(**{name: settings[name] for name in names}))
    extractor = features.load_extractor(config.features)
    pixels = config.features.pixels
    extractor.extract(np.zeros((1, config.clip_grid.num_frames, pixels, pixels, 3), np.uint8))  # compiles its kernels

    def work() -> None:
        for folder in folders:
            preview = (folder / "preview.h264").read_bytes()
            features.extract(preview, extractor=extractor, grid=config.clip_grid, config=config.features)

    return work


def _asr(folders: Sequence[Path], settings: dict[str, Any]) -> Callable[[], None]:
    recogniser = transcribe.make_recogniser(transcribe.TranscribeConfig(whisper_checkpoint=settings["whisper"]))

    def work() -> None:
        for folder in folders:
            sound = np.frombuffer((folder / "sound.s16").read_bytes(), "<i2")
            if recogniser is not None and len(sound):
                recogniser.transcribe(sound)

    return work


def main(argv: Sequence[str]) -> int:
    tool, settings, *folders = argv
    work = {"s3d": _s3d, "asr": _asr}[tool]([Path(folder) for folder in folders], json.loads(settings))
    began_s = time.process_time()
    work()
    print(time.process_time() - began_s)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
