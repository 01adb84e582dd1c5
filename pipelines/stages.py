"""The stages of ingestion: what each does to a row, and the actors that hold what is slow to load.

The functions are plain generators over one row (tests call them without Ray); `on_batches` and the classes below them
are how Ray Data runs them on Arrow batches. Fetching and transcoding share a process, so that a source's bytes lie in
one file of that process's machine and never travel; the file lives as long as the generator that holds it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines import features, fetch, filters, media, scratch, sink, transcribe, vocabulary
from pipelines.dataset import ClipGrid, DatasetInfo, Sentence
from pipelines.errors import StageError
from pipelines.progress import StageClock, row_video_s
from pipelines.rows import Row, failed, run_stage, to_table
from pipelines.storage import Folder, content_id

MAX_CAPTIONS_BYTES = 16 << 20  # a day of speech as SubRip is 2 MB


@dataclass(frozen=True, kw_only=True)
class IngestConfig:
    """Everything that decides what becomes of a source."""

    clip_grid: ClipGrid = field(default_factory=ClipGrid)
    fetch: fetch.FetchConfig = field(default_factory=fetch.FetchConfig)
    media: media.MediaConfig = field(default_factory=media.MediaConfig)
    transcribe: transcribe.TranscribeConfig = field(default_factory=transcribe.TranscribeConfig)
    filters: filters.FiltersConfig = field(default_factory=filters.FiltersConfig)
    features: features.FeaturesConfig = field(default_factory=features.FeaturesConfig)
    vocabulary: vocabulary.VocabularyConfig = field(default_factory=vocabulary.VocabularyConfig)
    samples_per_shard: int = 64
    """Samples in one shard; also how much work an interruption can cost."""
    max_failure_rate: float = 0.5
    """Share of quarantined sources above which the run stops, judged after 100 sources."""
    max_attempts: int = 3
    """Times that a source may fail; --retry leaves it alone after that."""

    def __post_init__(self) -> None:
        if self.media.part_seconds < self.clip_grid.clip_s:
            raise ValueError(f"media.part_seconds must hold a clip of {self.clip_grid.clip_s:g} s at least.")
        if self.samples_per_shard < 1 or self.max_attempts < 1 or not 0 < self.max_failure_rate <= 1:
            raise ValueError("samples_per_shard and max_attempts must be at least 1, max_failure_rate within (0, 1].")

    @property
    def digest(self) -> str:
        """Names the settings that decide what a sample holds; how a run goes about it and what a command adds (its
        sources, its dataset) do not count."""
        settings = dataclasses.asdict(self)
        own = {f.name: settings[f.name] for f in dataclasses.fields(IngestConfig) if f.name not in _POLICY}
        return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:16]


_POLICY = frozenset({"fetch", "samples_per_shard", "max_failure_rate", "max_attempts"})


def fetch_and_probe(row: Row, *, config: IngestConfig) -> Iterator[Row]:
    """Adds video_id and declared_s, and for the next stage of this process what the probe found, and `path`: the source
    as a file of this machine, as long as the row is in use."""
    with (
        scratch.scratch_folder() as folder,
        fetch.local_file(row["uri"], size_bytes=row["size_bytes"], folder=folder, config=config.fetch) as path,
    ):
        try:
            known = row | {"video_id": content_id(str(path)), "size_bytes": row["size_bytes"] or path.stat().st_size}
        except OSError as error:
            raise StageError("fetch_failed", str(error)) from error
        try:
            found = media.probe(str(path), config=config.media)
            known |= {"probe": found, "declared_s": found["duration_s"]}
            filters.judge_source(found["duration_s"], config=config.filters, is_stated=True)
        except StageError as error:
            yield failed(known, stage="fetch", error=error)
            return
        yield known | {"path": str(path)}


def transcode(row: Row, *, config: IngestConfig, folder: Folder) -> Iterator[Row]:
    """One row per part, as they come out of ffmpeg: preview, sound and captions, on the clock."""
    grid, found, path = config.clip_grid, row["probe"], row["path"]
    captions, language = None, None
    if "captions" in config.transcribe.transcripts:
        captions, language = _captions(row, path, found, config=config)
    with scratch.scratch_folder() as place:
        preview = place / "preview.mp4" if config.media.keep_previews else None
        parts = media.transcode(path, found=found, grid=grid, config=config.media, folder=place, preview=preview)
        for part in parts:
            begin_s, end_s = part.first_frame / grid.fps, (part.first_frame + part.num_frames) / grid.fps
            made = row | {
                "detail": part.note or None,
                "source_s": end_s if part.is_last else None,
                "num_parts": part.index + 1 if part.is_last else None,
                "part_index": part.index,
                "part_start_s": found["start_s"] + begin_s,
                "part_end_s": found["start_s"] + end_s,
                "preview": part.preview,
                "audio": part.sound.astype("<i2").tobytes(),
                "clip_frames": _clip_frames(part, grid),
                "captions": _within(captions, begin_s, None if part.is_last else end_s, by_s=found["start_s"]),
                "language": language if filters.primary_language(language) else row["language"],
            }
            if part.is_last:
                _publish_preview(parts, preview, f"media/{row['video_id']}.mp4", folder)
                filters.judge_source(end_s, config=config.filters)
            try:
                filters.judge_part(part, config=config.filters)
            except StageError as verdict:
                made = failed(made, stage="transcode", error=verdict)
            yield made


def _publish_preview(parts: Iterator[media.Part], preview: Path | None, name: str, folder: Folder) -> None:
    """Before the last part leaves: once it is in the ledger nobody comes back to write the preview."""
    if next(parts, None) is not None:
        raise AssertionError("a part follows the last one")
    if preview is not None and preview.exists():
        folder.upload(name, preview)


def _clip_frames(part: media.Part, grid: ClipGrid) -> list[int] | None:
    return None if grid.choice == "uniform" else grid.first_frames(part.num_frames, part.shots)


def transcribe_row(row: Row, *, recogniser: transcribe.Recogniser | None, config: IngestConfig) -> Iterator[Row]:
    """Adds the sentences of the part: its captions, else what the recogniser hears."""
    heard: list[Sentence] = []
    name, version, language = "none", "", row["language"]
    if row["captions"] is not None:
        name = "captions"
        heard = [Sentence(**caption) for caption in row["captions"]]
    elif row["audio"] and recogniser is not None:
        try:
            relative = recogniser.transcribe(np.frombuffer(row["audio"], "<i2"))
        except (RuntimeError, ValueError) as error:
            raise StageError("transcribe_failed", f"{recogniser.name}: {error}") from error
        heard = transcribe.shifted(relative, by_s=row["part_start_s"])
        name, version, language = recogniser.name, recogniser.version, language or recogniser.language
    filters.judge_transcript(heard, language if heard else row["language"], config=config.filters)
    yield row | {
        "audio": None,
        "captions": None,
        "sentences": [dataclasses.asdict(sentence) for sentence in heard],
        "asr_name": name if heard else "none",
        "language": language if heard else None,
        "asr_version": version,
    }


def extract_features(row: Row, *, extractor: Any, config: IngestConfig) -> Iterator[Row]:
    """Adds the features of the part's clips, and lets go of its pictures."""
    found = features.extract(
        row["preview"],
        extractor=extractor,
        grid=config.clip_grid,
        config=config.features,
        first_frames=row["clip_frames"],
    )
    yield row | {"preview": None, "num_clips": len(found), "features": found.tobytes()}


def assign_tokens(row: Row, *, tree: vocabulary.Vocabulary, config: IngestConfig) -> Iterator[Row]:
    """Adds the visual tokens."""
    found = np.frombuffer(row["features"], np.float16).reshape(row["num_clips"], -1)
    kept = row["features"] if config.features.store else None
    yield row | {"features": kept, "visual_tokens": tree.assign(found).tobytes()}


def _captions(
    row: Row, path: str, found: dict[str, Any], *, config: IngestConfig
) -> tuple[list[Sentence] | None, str | None]:
    """Captions of a source, from a sidecar or its own text track, and their language as far as it is stated.

    Times count from the container's start; None where the source has no captions.
    """
    if row["captions_uri"]:
        try:
            data = fetch.read_bytes(row["captions_uri"], max_bytes=MAX_CAPTIONS_BYTES)
            if cues := transcribe.parse_captions(transcribe.decode_captions(data)):
                return cues, None
        except (
            OSError,
            ValueError,
            StageError,
        ):  # gone since the listing: the source may still carry a track of its own
            pass
    wanted = config.transcribe.language
    for track in sorted(found["subtitles"], key=lambda t: not (t["language"] or "und").startswith((wanted, "und"))):
        text = media.read_captions(path, index=track["index"], config=config.media)
        if cues := transcribe.parse_captions(text):
            return cues, track["language"]
    return None, None


def _within(
    captions: list[Sentence] | None, begin_s: float, end_s: float | None, *, by_s: float
) -> list[dict[str, Any]] | None:
    """The captions that begin in a part, on the clock; the last part (end None) takes all that follow."""
    if captions is None:
        return None
    inside = [c for c in captions if begin_s <= c.start_s and (end_s is None or c.start_s < end_s)]
    return [dataclasses.asdict(c) for c in transcribe.shifted(inside, by_s=by_s)]


Stage = tuple[str, Callable[[Row], Iterator[Row]]]


def on_batches(
    name: str, chain: Sequence[Stage], *, counter: Any = None, before: Callable[[], object] | None = None
) -> Callable[[pa.Table], Iterator[pa.Table]]:
    """Stages, one feeding the next, as a function on Arrow batches: one table of one row at a time, under `name` in
    Ray's plan and dashboard. `before` runs at every batch."""
    names = [stage for stage, _ in chain]
    clocks = [StageClock(counter, stage, feeds=after) for stage, after in zip(names, [*names[1:], None], strict=True)]

    def batch(table: pa.Table) -> Iterator[pa.Table]:
        if before is not None:
            before()
        rows: Iterable[Row] = table.to_pylist()
        for (stage, function), clock in zip(chain, clocks, strict=True):
            rows = run_stage(stage, function, rows, clock=clock)
        for row in rows:
            yield to_table([row])

    batch.__name__ = name
    return batch


def decoding(*, config: IngestConfig, folder: Folder, counter: Any) -> Callable[[pa.Table], Iterator[pa.Table]]:
    """fetch+probe and transcode, in one process."""
    chain: list[Stage] = [
        ("fetch", functools.partial(fetch_and_probe, config=config)),
        ("transcode", functools.partial(transcode, config=config, folder=folder)),
    ]
    return on_batches("fetch_and_transcode", chain, counter=counter, before=scratch.sweep)


class Transcribe:
    """Actor: holds a speech recogniser."""

    def __init__(self, *, config: IngestConfig, counter: Any) -> None:
        recogniser = transcribe.make_recogniser(config.transcribe)
        function = functools.partial(transcribe_row, recogniser=recogniser, config=config)
        self._batch = on_batches("transcribe", [("transcribe", function)], counter=counter)
        StageClock(counter, "transcribe").ready()

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        yield from self._batch(table)


class Features:
    """Actor: holds the feature extractor."""

    def __init__(self, *, config: IngestConfig, counter: Any, num_threads: int) -> None:
        import torch

        torch.set_num_threads(num_threads)
        extractor = features.load_extractor(config.features)
        function = functools.partial(extract_features, extractor=extractor, config=config)
        self._batch = on_batches("features", [("features", function)], counter=counter)
        StageClock(counter, "features").ready()

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        yield from self._batch(table)


class Commit:
    """Actor: holds the visual vocabulary; turns a batch of finished and failed rows into tokens, a shard and its ledger
    rows, which it returns."""

    def __init__(
        self, *, config: IngestConfig, folder: Folder, info: DatasetInfo, lineage: dict[str, str], counter: Any
    ) -> None:
        tree = vocabulary.load(info.vocabulary, folder)
        self._assign = functools.partial(assign_tokens, tree=tree, config=config)
        self._folder, self._info, self._lineage = folder, info, lineage
        self._tokens_clock, self._commit_clock = StageClock(counter, "tokens"), StageClock(counter, "commit")

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = list(run_stage("tokens", self._assign, table.to_pylist(), clock=self._tokens_clock))
        with self._commit_clock.row(rows=len(rows)) as told:
            published = publish(rows, folder=self._folder, info=self._info, lineage=self._lineage)
            told.out(rows=published.num_rows, video_s=sum(map(row_video_s, rows)))
        return published


def publish(rows: list[Row], *, folder: Folder, info: DatasetInfo, lineage: dict[str, str]) -> pa.Table:
    """Write finished and failed rows; returns their ledger rows."""
    extractor = {"name": info.extractor, "digest": info.extractor_digest}
    samples = [
        sink.sample_of(
            row,
            grid=info.clip_grid,
            extractor=extractor,
            vocabulary=info.vocabulary,
            num_tokens=info.num_visual_tokens,
            lineage={k: v for k, v in lineage.items() if k != "run_id"},
        )
        for row in rows
        if row["status"] is None
    ]
    common = {k: lineage[k] for k in ("run_id", "code_version")} | {"vocabulary": info.vocabulary}
    return sink.publish(rows, {sample.key: sample for sample in samples}, folder=folder, common=common)
