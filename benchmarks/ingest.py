"""`python -m benchmarks.ingest --json`: ingestion beside its bare tools and beside video2dataset, in one run.

Bars:
- `versus_video2dataset`: our video seconds per second over the peer's at the same job, both without their start-up.
- `pipeline_efficiency`: CPU seconds that bare tools take for the same work, over wall seconds x cores, in steady state.
- `transcode_stage`: wall seconds of a loop of bare ffmpegs over those of the stage, same arguments, as many processes.
- `one_decode`: CPU seconds of two ffmpeg processes a source over those of the one that we run.
- `ledger_million_rows`: seconds for discover + anti-join over a ledger of a million rows.

A full run takes about 40 minutes on 2 cores, `--quick` under five: less video, smaller clips for S3D. Ray lets its
workers yield to other processes (niceness 15); here they do not, or what others do meanwhile would slow one side only.
What others took of the machine is in the details.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import bare, corpus, ours, peer
from benchmarks.corpus import Video
from benchmarks.harness import Bar, Outcome, TreeSampler, finish, num_cores, run_children, say
from pipelines import media
from pipelines.features import FeaturesConfig
from pipelines.stages import IngestConfig

WORK = Path("~/.cache/videobert/benchmarks").expanduser()
SHARED = Path(__file__).resolve().parents[2] / "shared" / "media"  # real clips beside the project, if there are any
PARTS = ("peer", "transcode", "efficiency", "ledger")
PEER_SETTINGS = ((2, 1), (1, 2), (2, 2))  # processes, threads
MIN_PSNR_DB = 30.0  # below it the pictures are others; encoders lose less
MEMORY_BOUNDS = {
    "fetch_and_transcode": "media.part_seconds: 32 kB of sound and some 20 kB of preview a second of one part",
    "ffmpeg": "media.memory_bytes, a hard limit on each child",
    "transcribe": "media.part_seconds and the recogniser's model",
    "features": "features.batch_clips x features.pixels: one batch of clips; the network",
    "object store": "encoded parts only, rows in flight: Ray Data's budgets, at most Ray's object_store_memory",
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """How much is measured, and where."""

    quick: bool
    work: Path
    videos: list[Video]
    config: IngestConfig

    @property
    def rounds(self) -> int:
        return 1 if self.quick else 3

    def folder(self, name: str) -> Path:
        """A new, empty place."""
        path = self.work / "runs" / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ingest", description="Ingestion beside its bare tools.")
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON object on standard output")
    parser.add_argument("--quick", action="store_true", help="less video, smaller clips: under five minutes on 2 cores")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to measure")
    parser.add_argument(
        "--pixels",
        type=int,
        help="size of the clips for S3D, 224 if not given (--quick: 112): a CPU without bfloat16 "
        "takes four times as long, which leaves the rest of the pipeline little to be measured by",
    )
    parser.add_argument("--clips", default=str(SHARED) if SHARED.is_dir() else None, help="folder of real clips")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for the corpus, the peer and what is written")
    given = parser.parse_args(argv)
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  # read by every Ray that starts below this process
    run = Run(quick=given.quick, work=given.work, videos=_videos(given), config=_config(given))
    pixels = run.config.features.pixels
    command = f"python -m benchmarks.ingest --json{' --quick' if run.quick else ''} --pixels {pixels}"
    command += f" --only {' '.join(given.only)}"
    outcome = Outcome(details={"command": command, "corpus": corpus.describe(run.videos), "cores": num_cores()})
    measures: dict[str, Callable[[Run, Outcome], None]] = {
        "peer": measure_peer,
        "transcode": measure_transcode,
        "efficiency": measure_efficiency,
        "ledger": measure_ledger,
    }
    for part in given.only:
        say(f"== {part}")
        measures[part](run, outcome)
    shutil.rmtree(given.work / "runs", ignore_errors=True)
    return finish(outcome, as_json=given.json)


def _videos(given: argparse.Namespace) -> list[Video]:
    if set(given.only) == {"ledger"}:
        return []
    wanted = dataclasses.replace(corpus.QUICK if given.quick else corpus.FULL, clips=given.clips)
    return corpus.make_corpus(given.work / ("corpus-quick" if given.quick else "corpus"), wanted)


def _config(given: argparse.Namespace) -> IngestConfig:
    pixels = given.pixels or (112 if given.quick else media.PREVIEW_PIXELS)
    return IngestConfig(features=FeaturesConfig(weights="random:0", pixels=pixels))


def measure_peer(run: Run, outcome: Outcome) -> None:
    """Ours and the peer's at the same job, taking turns; nothing of Ray runs while the peer does."""
    outcome.versions["video2dataset"] = peer.VERSION
    try:
        python = peer.make_environment(run.work / "peers")
    except peer.PeerMissing as missing:
        say(str(missing))
        outcome.details["video2dataset"] = {"missing": str(missing)}
        return
    setting, tried = _best_setting(run, python)
    videos, checked = _check_equal(run, python, setting)
    video_s = sum(video.seconds for video in videos)
    rates: dict[str, list[float]] = {"ours": [], "theirs": [], "ours_end_to_end": [], "theirs_end_to_end": []}
    cpu_s: dict[str, list[float]] = {"ours": [], "theirs": []}
    for turn in range(run.rounds):
        done = _run_peer(run, python, videos, setting=setting, name=f"peer-{turn}")
        rates["theirs"].append(video_s / done.busy_s)
        rates["theirs_end_to_end"].append(video_s / done.spent.wall_s)
        out = run.folder(f"ours-{turn}")
        whole_s, told = _run_ours(videos, out)
        rates["ours"].append(video_s / told["job_s"])
        rates["ours_end_to_end"].append(video_s / whole_s)
        cpu_s["theirs"].append(done.spent.cpu_s)
        cpu_s["ours"].append(told["cpu_s"])
        say(f"video s/s: { ({name: round(found[-1], 2) for name, found in rates.items()}) }")
    middle = {name: statistics.median(found) for name, found in rates.items()}
    outcome.bars["versus_video2dataset"] = Bar(value=middle["ours"] / middle["theirs"], goal=2.0, unit="ratio")
    outcome.details["video2dataset"] = {
        "video_s": round(video_s, 1),
        "video_s_per_s": {name: round(value, 2) for name, value in middle.items()},
        "cpu_s_per_video_s": {name: round(statistics.median(s) / video_s, 4) for name, s in cpu_s.items()},
        "end_to_end_ratio": round(middle["ours_end_to_end"] / middle["theirs_end_to_end"], 3),
        "its_setting": dataclasses.asdict(setting),
        "settings_tried_video_s_per_s": tried,
        "checked": checked,
        "our_sink": "a thin one of this benchmark; the product's shards hold tokens, its previews lie beside them",
        "it_lacks": [
            "sound: the subsamplers drop it; ours has AAC in the preview and 16 kHz samples for the recogniser",
            "captions of the container, transcripts, shots, motion and contrast",
            "presentation times: start offsets and what the frame rate did are gone after two encodings",
            "videos that are higher than wide: its crop fails on them, and neither shard nor statistics name them",
            "videos whose first stream is a caption track: it draws that instead of the pictures and says success",
            "pixels that are not square: they come out squeezed",
            "limits on what a stranger's file may do",
        ],
    }


def _best_setting(run: Run, python: Path) -> tuple[peer.Setting, dict[str, float]]:
    """The peer's settings on a few videos; the fastest is taken."""
    few = sorted((video for video in run.videos if video.landscape), key=lambda video: video.path)[
        :: 2 if run.quick else 3
    ]
    tried: dict[str, float] = {}
    best: tuple[float, peer.Setting] | None = None
    for processes, threads in PEER_SETTINGS[: 2 if run.quick else None]:
        setting = peer.Setting(processes=processes, threads=threads, samples_per_shard=_per_shard(few, processes))
        done = _run_peer(run, python, few, setting=setting, name="trial")
        rate = sum(video.seconds for video in few) / done.busy_s
        tried[f"{processes} processes x {threads} threads"] = round(rate, 2)
        if best is None or rate > best[0]:
            best = rate, setting
    assert best is not None
    return best[1], tried


def _per_shard(videos: Sequence[Video], processes: int) -> int:
    """Several shards a process, so that its tail is short; one process takes all in one."""
    return max(1, len(videos) // (3 * processes)) if processes > 1 else len(videos)


def _run_peer(run: Run, python: Path, videos: Sequence[Video], *, setting: peer.Setting, name: str) -> peer.PeerRun:
    setting = dataclasses.replace(setting, samples_per_shard=_per_shard(videos, setting.processes))
    grid = run.config.clip_grid
    out = run.folder(name)
    return peer.run(python, list(videos), setting=setting, fps=grid.fps, pixels=media.PREVIEW_PIXELS, out=out)


def _run_ours(videos: Sequence[Video], out: Path) -> tuple[float, dict[str, float]]:
    """Wall seconds of the whole command, and what it says of itself."""
    command = [sys.executable, "-m", "benchmarks.ours", "--out", str(out), *(video.path for video in videos)]
    spent = run_children([command], at_once=1)
    told: dict[str, float] = json.loads((out / "result.json").read_text())
    return spent.wall_s, told


def _check_equal(run: Run, python: Path, setting: peer.Setting) -> tuple[list[Video], dict[str, Any]]:
    """Videos that both deliver: same size, same number of pictures, recognisably those of the source.

    Raises RuntimeError if that holds for none of them, or if one of ours is wrong.
    """
    theirs = {
        str(told["url"]): video
        for told, video in peer.samples(_run_peer(run, python, run.videos, setting=setting, name="check-peer").out)
    }
    out = run.folder("check-ours")
    _run_ours(run.videos, out)
    made = {str(told["url"]): video for told, video in peer.samples(out / "shards")}
    equal: list[Video] = []
    quality: dict[str, list[float]] = {"ours": [], "theirs": []}
    wrong: dict[str, str] = {}
    for video in run.videos:
        name, own, other = Path(video.path).name, made.get(video.path), theirs.get(video.path)
        if own is None:
            raise RuntimeError(f"our own job did not deliver {name}.")
        if other is None:
            wrong[name] = "missing, without a word"
            continue
        (own_frames, *own_size), (frames, *size) = peer.look(own), peer.look(other)
        decibels = _psnr(video, own, ours_way=True), _psnr(video, other, ours_way=False)
        if decibels[0] < MIN_PSNR_DB:
            raise RuntimeError(f"our own preview of {name} is not its source: {decibels[0]} dB.")
        if own_size != size or abs(own_frames - frames) > 2 or decibels[1] < MIN_PSNR_DB:
            wrong[name] = f"delivered as a success: {frames} pictures of {own_frames}, {decibels[1]} dB to the source"
            continue
        equal.append(video)
        quality["ours"].append(decibels[0])
        quality["theirs"].append(decibels[1])
    if not equal:
        raise RuntimeError(f"nothing that the peer delivers can be compared: {wrong}.")
    sizes = [sum(len(found[video.path] or b"") for video in equal) for found in (made, theirs)]
    video_s = sum(video.seconds for video in equal)
    return equal, {
        "videos_that_both_deliver": len(equal),
        "videos_that_it_does_not": wrong,
        "median_psnr_db_to_the_scaled_source": {name: statistics.median(found) for name, found in quality.items()},
        "bytes_per_video_s": {"ours": round(sizes[0] / video_s), "theirs": round(sizes[1] / video_s)},
    }


def _psnr(video: Video, made: bytes, *, ours_way: bool) -> float:
    """Decibels between an output and its source, scaled without an encoder: each in its own way of rounding, of
    choosing among several streams of pictures, and of minding pixels that are not square or not."""
    pixels = media.PREVIEW_PIXELS
    scale, stream = f"scale=-2:{pixels},crop={pixels}:{pixels}", "v:0"
    if ours_way:
        found = media.probe(video.path, config=media.MediaConfig())
        scale, stream = media.scaling(found), str(found["video"]["index"])
    graph = f"[0:{stream}]fps=20,{scale},setsar=1,format=yuv420p[a];[1:v:0]fps=20,setsar=1,format=yuv420p[b];[b][a]psnr"
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        file.write(made)
        file.flush()
        command = [media.ffmpeg_path(), "-hide_banner", "-i", video.path, "-i", file.name]
        done = subprocess.run(
            [*command, "-lavfi", graph, "-f", "null", "-"], capture_output=True, text=True, timeout=600
        )
    told = re.search(r"average:([\d.]+)", done.stderr)
    return round(float(told.group(1)), 2) if told else 0.0


def measure_transcode(run: Run, outcome: Outcome) -> None:
    """The stage beside a bare loop, taking turns; and what decoding costs."""
    jobs = bare.transcodings(run.videos, config=run.config, folder=run.folder("bare"))
    video_s = sum(video.seconds for video in run.videos)
    ratios, walls, cpus, twice = [], [], [], []
    for _ in range(run.rounds):
        loop, stage = bare.run_ffmpeg(jobs), bare.run_stage_pool(jobs, config=run.config)
        ratios.append(loop.wall_s / stage.wall_s)
        walls.append((loop.wall_s, stage.wall_s))
        cpus.append((loop.cpu_s, stage.cpu_s))
        twice.append(bare.two_passes_cpu_s(jobs) / loop.cpu_s)
        say(f"transcode stage: {ratios[-1]:.3f} of the bare loop; two passes: {twice[-1]:.3f} of one")
    outcome.bars["transcode_stage"] = Bar(value=statistics.median(ratios), goal=0.9, unit="ratio")
    outcome.bars["one_decode"] = Bar(value=statistics.median(twice), goal=1.0, unit="ratio")
    loop_cpu_s, stage_cpu_s = (statistics.median(pair[i] for pair in cpus) for i in (0, 1))
    outcome.details["transcode"] = {
        "rounds_wall_s": [{"bare_loop": round(a, 2), "stage": round(b, 2)} for a, b in walls],
        "cpu_s_per_video_s": {
            "bare_ffmpeg": round(loop_cpu_s / video_s, 4),
            "stage": round(stage_cpu_s / video_s, 4),
            "decoding_alone": round(bare.decode_cpu_s(run.videos) / video_s, 4),
            "two_passes": round(statistics.median(twice) * loop_cpu_s / video_s, 4),
        },
        "video_s_per_cpu_s": round(video_s / stage_cpu_s, 2),
    }


def measure_efficiency(run: Run, outcome: Outcome) -> None:
    """The whole graph between two rounds of the bare tools."""
    from jobs.cluster import connected

    jobs = bare.transcodings(run.videos, config=run.config, folder=run.folder("bare"))
    rounds = [_bare_cpu_s(jobs, run)]
    with TreeSampler(store_bytes=ours.object_store_bytes) as memory, connected():
        found = ours.graph_run(run.videos, config=run.config, out=run.folder("graph"))
    if not run.quick:
        rounds.append(_bare_cpu_s(jobs, run))
    bare_s = {tool: statistics.mean(one[tool] for one in rounds) for tool in rounds[0]}
    begin_s, end_s = found.steady()
    stages = {"ffmpeg": "transcode", "s3d": "features", "asr": "transcribe"}
    shares = {tool: found.share_within(stage, begin_s, end_s) for tool, stage in stages.items()}
    useful_s = sum(bare_s[tool] * shares[tool] for tool in bare_s)
    steady_s, whole_s = end_s - begin_s, sum(bare_s.values())
    cores_s = memory.between(begin_s, end_s)
    outcome.bars["pipeline_efficiency"] = Bar(value=useful_s / (steady_s * num_cores()), goal=0.9, unit="ratio")
    outcome.details["efficiency"] = {
        "videos_kept": found.num_kept,
        "clips": found.num_clips,
        "wall_s": round(found.wall_s, 1),
        "start_up_s": round(begin_s - found.began_s, 1),
        "steady_s": round(steady_s, 1),
        "tail_s": round(found.began_s + found.wall_s - end_s, 1),
        "bare_cpu_s": [{tool: round(value, 1) for tool, value in one.items()} for one in rounds],
        "share_of_it_in_steady_state": {tool: round(value, 3) for tool, value in shares.items()},
        "whole_run_efficiency": round(whole_s / (found.wall_s * num_cores()), 3),
        "cores_s_in_steady_state": cores_s,
        "of_the_time_that_others_left": round(useful_s / (steady_s * num_cores() - cores_s["others"]), 3),
        "cpu_s_of_the_whole_run_by_process": memory.cpu_s(),
        "video_s_per_s": round(sum(video.seconds for video in run.videos) / found.wall_s, 2),
    }
    outcome.details["memory"] = memory.to_dict() | {"bounded_by": MEMORY_BOUNDS}


def _bare_cpu_s(jobs: Sequence[bare.Transcoding], run: Run) -> dict[str, float]:
    spent = {
        "ffmpeg": bare.run_ffmpeg(jobs).cpu_s,
        "s3d": bare.run_models("s3d", jobs, config=run.config),
        "asr": bare.run_models("asr", [job for job in jobs if job.needs_ears], config=run.config),
    }
    say(f"bare CPU seconds: { ({tool: round(value, 1) for tool, value in spent.items()}) }")
    return spent


def measure_ledger(run: Run, outcome: Outcome) -> None:
    """Discover and anti-join beside a made ledger."""
    from benchmarks.ledger import measure_ledger

    found = measure_ledger(100_000 if run.quick else 1_000_000)
    outcome.details["ledger"] = found
    seconds = float(found.get("total_s", sum(v for k, v in found.items() if k.endswith("_s"))))
    outcome.bars["ledger_million_rows"] = Bar(value=seconds, goal=60.0, unit="s", at_least=False)


if __name__ == "__main__":
    sys.exit(main())
