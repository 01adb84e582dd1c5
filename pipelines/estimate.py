"""The bill before the work: a dry run takes a sample of the sources through the real stages and extrapolates.

The sample is chosen by hash, so neither by name nor by age. Each source in it goes through the same functions that a
run calls, one after another in this process (ffmpeg in its children, as always), for at most `seconds_each` of decoded
video; what they make is thrown away. Rates are CPU seconds and not wall seconds, so that other work on the machine does
not end up on the bill, and each stage's are set beside what its bare tool took of them: ffmpeg's own processes, the
recogniser, the network. Nothing is written.

A sample of four takes a minute or two and says what dominates and what the order of size is; how sure the shares of
dropped sources are is said with them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import resource
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines import features, scratch, stages, transcribe
from pipelines.progress import StageClock
from pipelines.rows import ROW_SCHEMA, Row, run_stage
from pipelines.sources import Source
from pipelines.stages import IngestConfig
from pipelines.storage import Folder

# Share of the cores' time that becomes useful work in a run (benchmarks/ingest.py measures it, goal 0.90).
EFFICIENCY = 0.9
STAGES = ("fetch", "transcode", "transcribe", "features")
TOOLS = {"transcode": "ffmpeg", "transcribe": "recogniser", "features": "S3D"}
_SOUND_BYTES_PER_S = 6_000  # AAC at 48 kbit/s, in the kept preview beside its pictures
_MEMBER_BYTES = 1024  # tar header and padding of a file in a shard


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How much a dry run looks at."""

    share: float = 0.01
    """Share of the sources."""
    min_sources: int = 4
    """Fewest sources."""
    max_sources: int = 24
    """Most sources."""
    seconds_each: float = 40.0
    """Seconds of video decoded of each, at most; its beginning."""
    clips_each: int = 12
    """Clips of each that go through the feature extractor: its work per clip hardly varies."""
    budget_s: float = 150.0
    """Wall seconds after which the rest of the sample is only fetched and probed."""

    def num_of(self, num_sources: int) -> int:
        """Sources in the sample of a corpus of so many."""
        wanted = max(self.min_sources, min(self.max_sources, math.ceil(self.share * num_sources)))
        return min(num_sources, wanted)


@dataclass(frozen=True, kw_only=True)
class StageBill:
    """What a stage costs per second of video."""

    stage: str
    cpu_s_per_video_s: float
    wall_s_per_video_s: float
    share: float  # of the whole work
    tool: str | None
    tool_share: float | None  # of the stage's CPU seconds: how much the bare tool would have taken


@dataclass(frozen=True, kw_only=True)
class Drop:
    """Sources expected to be filtered or quarantined, with the 95 % interval that the sample leaves."""

    reason: str
    seen: int  # in the sample
    expected: int
    at_least: int
    at_most: int


@dataclass(frozen=True, kw_only=True)
class Bill:
    """What ingesting some sources will take, extrapolated from a sample."""

    num_sources: int
    num_sampled: int
    num_run: int  # of the sample: those taken through all stages
    sampled_video_s: float  # decoded
    took_s: float
    cores: int
    gpus: int
    stages: tuple[StageBill, ...]
    bottleneck: str | None
    video_hours: float
    wall_hours: float
    gpu_hours: float
    bytes_read: int
    num_unknown_sizes: int  # sources whose size is not listed
    shard_bytes: int
    preview_bytes: int
    drops: tuple[Drop, ...]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def text(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield (
            f"dry run: {self.num_sampled} of {self.num_sources:,} sources, {self.num_run} of them through all stages, "
            f"{self.sampled_video_s:,.0f} s of video in {self.took_s:,.0f} s. All below is extrapolated from them; "
            "nothing was written."
        )
        if self.stages:
            yield f"{'stage':<12}{'CPU s/video s':>14}{'wall':>8}{'share':>8}   of that the bare tool"
        for one in self.stages:
            bare = f"{one.tool_share:.0%} {one.tool}" if one.tool_share is not None else "-"
            mark = "  <- bottleneck" if one.stage == self.bottleneck else ""
            rates = f"{one.cpu_s_per_video_s:>14.3f}{one.wall_s_per_video_s:>8.3f}"
            yield f"{one.stage:<12}{rates}{one.share:>8.0%}   {bare}{mark}"
        where = f"{self.cores} cores" + (f" and {self.gpus} GPUs" if self.gpus else "")
        yield f"video        {_hours(self.video_hours)}"
        yield f"time         {_hours(self.wall_hours)} on {where}, at {EFFICIENCY:.0%} of their time"
        if self.gpus:
            yield f"GPU          {_hours(self.gpu_hours)} of one GPU"
        unknown = f" and {self.num_unknown_sizes:,} of unknown size" if self.num_unknown_sizes else ""
        yield f"read         {_bytes(self.bytes_read)}{unknown}"
        yield f"written      {_bytes(self.shard_bytes)} of shards, {_bytes(self.preview_bytes)} of previews"
        if not self.drops:
            yield f"dropped      none of the sample; at most {_at_most(0, self.num_sampled):.0%} of all (95 % sure)"
        for drop in self.drops:
            yield (
                f"dropped      {drop.reason}: {drop.seen} of {self.num_sampled} in the sample, "
                f"{drop.expected:,} expected ({drop.at_least:,} to {drop.at_most:,}, 95 %)"
            )


def estimate(
    sources: Sequence[Source],
    *,
    config: IngestConfig,
    sample: SampleConfig | None = None,
    cores: int | None = None,
    gpus: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Bill:
    """The bill for ingesting `sources` on a cluster of so many cores and GPUs (default: this machine's).

    Takes up to `sample.budget_s` and one more source; writes nothing but scratch files that are gone when it returns.
    Raises ValueError where the configuration names no feature weights.
    """
    sample = sample or SampleConfig()
    began_s = time.perf_counter()
    chosen = sorted(sources, key=lambda s: hashlib.sha256(s.source_id.encode()).digest())[: sample.num_of(len(sources))]
    with scratch.scratch_folder() as place, _one_thread():
        tester = _Tester(config=config, sample=sample, folder=Folder.at(str(place)))
        looks: list[_Look] = []
        for source in chosen:
            is_late = time.perf_counter() - began_s > sample.budget_s
            looks.append(tester.look(source, probe_only=is_late and bool(looks)))
            say(f"{len(looks)} of {len(chosen)} sources looked at, {time.perf_counter() - began_s:.0f} s.")
    return _bill(
        sources,
        looks,
        config=config,
        cores=cores or os.cpu_count() or 1,
        gpus=(_num_gpus() if gpus is None else gpus) if tester.on_gpu else 0,
        took_s=time.perf_counter() - began_s,
    )


@dataclass(kw_only=True)
class _Spent:
    """What a stage took on one source, for how many seconds of its video."""

    video_s: float = 0.0
    cpu_s: float = 0.0
    wall_s: float = 0.0
    tool_s: float = 0.0


@dataclass(kw_only=True)
class _Look:
    """What the sample shows of one source."""

    source: Source
    declared_s: float | None = None
    num_bytes: int = 0
    is_run: bool = False  # through all stages, at least in part
    reason: str | None = None  # why it would be dropped
    spent: dict[str, _Spent]
    video_s: float = 0.0
    num_clips: int = 0  # through the feature extractor
    shard_bytes: float = 0.0  # for video_s of video, like the next
    preview_bytes: float = 0.0


class _Tester:
    """Takes sources through the stages, with a clock around each and around the tool inside it."""

    def __init__(self, *, config: IngestConfig, sample: SampleConfig, folder: Folder) -> None:
        # Short parts, so that a long video can be left after a while and ffmpeg is not far ahead by then.
        part_s = max(config.clip_grid.clip_s, min(config.media.part_seconds, sample.seconds_each / 4))
        self._config = dataclasses.replace(config, media=dataclasses.replace(config.media, part_seconds=part_s))
        self._members = 3 if config.features.store else 2  # files of a sample in a shard
        self._part_s = config.media.part_seconds
        self._sample, self._folder = sample, folder
        self._extractor = _Timed(features.load_extractor(config.features))
        recogniser = transcribe.make_recogniser(config.transcribe)
        self._recogniser = _Timed(recogniser) if recogniser is not None else None

    @property
    def on_gpu(self) -> bool:
        return str(self._extractor.device).startswith("cuda")

    def look(self, source: Source, *, probe_only: bool) -> _Look:
        look = _Look(source=source, spent={stage: _Spent() for stage in STAGES}, num_bytes=source.size_bytes)
        listed = {f.name: getattr(source, f.name) for f in dataclasses.fields(source)}
        row: Row = dict.fromkeys(ROW_SCHEMA.names) | listed | {"source_id": source.source_id, "attempt": 1}
        # The file lives as long as this generator.
        with contextlib.closing(self._stage("fetch", stages.fetch_and_probe, row, look)) as fetched:
            found = next(fetched)
            look.declared_s, look.num_bytes = found["declared_s"], found["size_bytes"] or 0
            look.spent["fetch"].video_s = look.declared_s or 0.0
            if found["status"] is not None:
                look.reason = found["reason"]
            elif not probe_only:
                look.is_run = True
                parts = [self._understand(part, look) for part in self._decode(found, look)]
                look.reason = _verdict(parts)
        return look

    def _decode(self, found: Row, look: _Look) -> list[Row]:
        """Parts of the first `seconds_each`; all before any is looked at, or ffmpeg would run ahead meanwhile."""
        parts: list[Row] = []
        with contextlib.closing(
            self._stage("transcode", stages.transcode, found, look, folder=self._folder)
        ) as decoded:
            for part in decoded:
                parts.append(part)
                if part["part_end_s"] is not None:
                    look.video_s += part["part_end_s"] - part["part_start_s"]
                if look.video_s >= self._sample.seconds_each:
                    break
        look.spent["transcode"].video_s = look.video_s
        return parts

    def _understand(self, part: Row, look: _Look) -> Row:
        """Transcribe a part, and extract features while clips are left to look at."""
        if part["status"] is not None:
            return part
        seconds = part["part_end_s"] - part["part_start_s"]
        look.preview_bytes += len(part["preview"]) + _SOUND_BYTES_PER_S * seconds
        [part] = self._stage("transcribe", stages.transcribe_row, part, look, recogniser=self._recogniser)
        look.spent["transcribe"].video_s += seconds
        if part["status"] is not None or look.num_clips >= self._sample.clips_each:
            return part
        text_bytes = len(json.dumps(part["sentences"]))
        [part] = self._stage("features", stages.extract_features, part, look, extractor=self._extractor)
        look.spent["features"].video_s += seconds
        if part["status"] is None:
            look.num_clips += part["num_clips"]
            stored = len(part["features"]) if self._config.features.store else 0
            look.shard_bytes += stored + 2 * part["num_clips"] + text_bytes
            whole_s = min(self._part_s, look.declared_s or look.video_s) or seconds
            look.shard_bytes += self._members * _MEMBER_BYTES * min(1.0, seconds / whole_s)
        return part

    def _stage(
        self, name: str, function: Callable[..., Iterator[Row]], row: Row, look: _Look, **more: Any
    ) -> Generator[Row]:
        """A stage as `run_stage` runs it, on the clock while it works: until each row is there, and as it closes."""
        partial = functools.partial(function, config=self._config, **more)
        ran = run_stage(name, partial, [row], clock=StageClock(None, name))
        assert isinstance(ran, Generator)  # it is to be closed, and the children of its stage with it
        try:
            while True:
                with self._on_the_clock(name, look.spent[name]):
                    out = next(ran, None)
                if out is None:
                    return
                yield out
        finally:
            with self._on_the_clock(name, look.spent[name]):
                ran.close()

    @contextlib.contextmanager
    def _on_the_clock(self, stage: str, spent: _Spent) -> Iterator[None]:
        began = _Clock.now()
        tool_before_s = self._tool_s(stage, began)
        yield
        now = _Clock.now()
        spent.cpu_s += now.cpu_s - began.cpu_s
        spent.wall_s += now.wall_s - began.wall_s
        spent.tool_s += self._tool_s(stage, now) - tool_before_s

    def _tool_s(self, stage: str, now: _Clock) -> float:
        if stage == "transcode":
            return now.children_s
        tool = {"transcribe": self._recogniser, "features": self._extractor}.get(stage)
        return tool.spent_s if tool is not None else 0.0


def _verdict(parts: Sequence[Row]) -> str | None:
    """Why a source would be dropped: a part of it fails, or none of its parts is kept."""
    failed = [part["reason"] for part in parts if part["status"] == "quarantined"]
    if failed:
        return str(failed[0])
    if any(part["status"] is None for part in parts):
        return None
    return str(parts[0]["reason"]) if parts else None


@dataclass(frozen=True, slots=True)
class _Clock:
    """Seconds so far: of the wall, of this process and its ended children together, and of those children."""

    wall_s: float
    cpu_s: float
    children_s: float

    @classmethod
    def now(cls) -> _Clock:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        children_s = children.ru_utime + children.ru_stime
        return cls(time.perf_counter(), time.process_time() + children_s, children_s)


class _Timed:
    """A recogniser or an extractor, with the CPU seconds of its own calls counted."""

    def __init__(self, tool: Any) -> None:
        self._tool = tool
        self.spent_s = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tool, name)

    def transcribe(self, sound: np.ndarray) -> Any:
        return self._clocked(self._tool.transcribe, sound)

    def extract(self, frames: np.ndarray) -> Any:
        return self._clocked(self._tool.extract, frames)

    def _clocked(self, call: Callable[[np.ndarray], Any], given: np.ndarray) -> Any:
        began_s = time.process_time()
        try:
            return call(given)
        finally:
            self.spent_s += time.process_time() - began_s


def _num_gpus() -> int:
    import torch

    return int(torch.cuda.device_count())


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Torch on one thread, as in a worker of its own core."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _bill(
    sources: Sequence[Source], looks: Sequence[_Look], *, config: IngestConfig, cores: int, gpus: int, took_s: float
) -> Bill:
    total_s = _total_video_s(sources, looks)
    run = [look for look in looks if look.is_run and look.video_s]
    sampled_s = sum(look.video_s for look in run)
    kept_s = total_s * (1 - sum(look.reason is not None for look in looks) / len(looks)) if looks else 0.0
    stage_bills = _stage_bills(run, gpus=gpus)
    on_gpu = {"features"} if gpus else set[str]()
    cpu_hours = sum(one.cpu_s_per_video_s for one in stage_bills if one.stage not in on_gpu) * total_s / 3600
    gpu_hours = sum(one.wall_s_per_video_s for one in stage_bills if one.stage in on_gpu) * total_s / 3600
    wall = {"cores": cpu_hours / cores / EFFICIENCY, "gpus": gpu_hours / gpus / EFFICIENCY if gpus else 0.0}
    features_s = sum(look.spent["features"].video_s for look in run)
    per_video_s = 1 / sampled_s if sampled_s else 0.0
    previews = sum(look.preview_bytes for look in run) * per_video_s if config.media.keep_previews else 0.0
    return Bill(
        num_sources=len(sources),
        num_sampled=len(looks),
        num_run=len(run),
        sampled_video_s=sampled_s,
        took_s=took_s,
        cores=cores,
        gpus=gpus,
        stages=stage_bills,
        bottleneck=_bottleneck(stage_bills, on_gpu=on_gpu, wall=wall),
        video_hours=total_s / 3600,
        wall_hours=max(wall.values()),
        gpu_hours=gpu_hours,
        bytes_read=sum(source.size_bytes for source in sources),
        num_unknown_sizes=sum(not source.size_bytes for source in sources),
        shard_bytes=round(sum(look.shard_bytes for look in run) / features_s * kept_s) if features_s else 0,
        preview_bytes=round(previews * kept_s),
        drops=_drops(looks, num_sources=len(sources)),
    )


def _total_video_s(sources: Sequence[Source], looks: Sequence[_Look]) -> float:
    """By bytes where sizes are listed, by the mean of the sample where not.

    Sources without any video count with 0 s; a duration that is not stated counts as far as it was decoded.
    """
    known = [look for look in looks if look.is_run or look.declared_s or look.reason]
    sample_s = sum(look.declared_s or look.video_s for look in known)
    sample_bytes = sum(look.num_bytes for look in known)
    per_byte = sample_s / sample_bytes if sample_bytes else 0.0
    mean_s = sample_s / len(known) if known else 0.0
    return sum(source.size_bytes * per_byte if source.size_bytes else mean_s for source in sources)


def _stage_bills(run: Sequence[_Look], *, gpus: int) -> tuple[StageBill, ...]:
    rates: dict[str, tuple[float, float, float | None]] = {}
    for stage in STAGES:
        spent = [look.spent[stage] for look in run]
        video_s = sum(one.video_s for one in spent)
        if not video_s:
            continue
        cpu_s, wall_s, tool_s = (sum(getattr(one, name) for one in spent) for name in ("cpu_s", "wall_s", "tool_s"))
        tool_share = tool_s / cpu_s if stage in TOOLS and cpu_s and not (stage == "features" and gpus) else None
        rates[stage] = (cpu_s / video_s, wall_s / video_s, tool_share)
    work = sum(cpu for cpu, _, _ in rates.values()) or 1.0
    return tuple(
        StageBill(
            stage=stage,
            cpu_s_per_video_s=cpu,
            wall_s_per_video_s=wall,
            share=cpu / work,
            tool=TOOLS.get(stage),
            tool_share=tool_share,
        )
        for stage, (cpu, wall, tool_share) in rates.items()
    )


def _bottleneck(stage_bills: Sequence[StageBill], *, on_gpu: set[str], wall: dict[str, float]) -> str | None:
    """The stage with most of the work, among those that the scarcer of cores and GPUs does."""
    scarce = [one for one in stage_bills if (one.stage in on_gpu) == (wall["gpus"] > wall["cores"])]
    return max(scarce, key=lambda one: one.cpu_s_per_video_s).stage if scarce else None


def _drops(looks: Sequence[_Look], *, num_sources: int) -> tuple[Drop, ...]:
    seen: dict[str, int] = {}
    for look in looks:
        if look.reason is not None:
            seen[look.reason] = seen.get(look.reason, 0) + 1
    num = len(looks)
    return tuple(
        Drop(
            reason=reason,
            seen=count,
            expected=round(count / num * num_sources),
            at_least=max(count, math.floor((1 - _at_most(num - count, num)) * num_sources)),
            at_most=min(num_sources - num + count, math.ceil(_at_most(count, num) * num_sources)),
        )
        for reason, count in sorted(seen.items(), key=lambda item: (-item[1], item[0]))
    )


def _at_most(count: int, num: int, z: float = 1.96) -> float:
    """Upper end of Wilson's 95 % interval for a share of which `count` of `num` were seen.

    E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).
    """
    if num == 0:
        return 1.0
    share = count / num
    middle = share + z * z / (2 * num)
    half = z * math.sqrt(share * (1 - share) / num + z * z / (4 * num * num))
    return min(1.0, (middle + half) / (1 + z * z / num))


def _hours(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 1 else f"{hours * 60:,.1f} minutes"


def _bytes(num: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num < 1000:
            return f"{num:,.0f} {unit}"
        num /= 1000
    return f"{num:,.1f} TB"
