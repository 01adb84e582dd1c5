"""The stages of ingestion: what each does to a row, and the actors that hold what is slow to load.

The functions are plain Python on one row (tests call them without Ray); `on_batches` and the classes below
them are how Ray Data runs them on Arrow batches.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines import features, media, sink, transcribe, vocabulary
from pipelines.dataset import ClipGrid, DatasetInfo, Folder, Sentence, content_id, filesystem_of
from pipelines.errors import StageError
from pipelines.rows import Row, run_stage


@dataclass(frozen=True, kw_only=True)
class IngestConfig:
    """Everything that decides what becomes of a source."""

    clip_grid: ClipGrid = field(default_factory=ClipGrid)
    media: media.MediaConfig = field(default_factory=media.MediaConfig)
    transcribe: transcribe.TranscribeConfig = field(default_factory=transcribe.TranscribeConfig)
    features: features.FeaturesConfig = field(default_factory=features.FeaturesConfig)
    vocabulary: vocabulary.VocabularyConfig = field(default_factory=vocabulary.VocabularyConfig)
    samples_per_shard: int = 64
    """Samples in one shard; also how much work an interruption can cost."""
    max_failure_rate: float = 0.5
    """Share of quarantined sources above which the run stops, judged after 100 sources."""

    def __post_init__(self) -> None:
        if self.media.part_seconds < self.clip_grid.clip_s:
            raise ValueError(f"media.part_seconds must hold a clip of {self.clip_grid.clip_s:g} s at least.")
        if self.samples_per_shard < 1 or not 0 < self.max_failure_rate <= 1:
            raise ValueError("samples_per_shard must be at least 1 and max_failure_rate within (0, 1].")

    @property
    def digest(self) -> str:
        """Names the settings; what a command adds to them (its sources, its dataset) does not count."""
        settings = dataclasses.asdict(self)
        own = {f.name: settings[f.name] for f in dataclasses.fields(IngestConfig)}
        return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:16]


def fetch_and_probe(row: Row, *, config: IngestConfig) -> Iterator[Row]:
    """Adds video_id, probe, and the bytes where the file is not on this machine."""
    if row["size_bytes"] > config.media.max_bytes:
        raise StageError("too_large", f"{row['size_bytes']} bytes, media.max_bytes is {config.media.max_bytes}")
    remote = "://" in row["uri"]
    try:
        data = _read(row["uri"]) if remote else None
        with _as_file(row | {"media": data}) as path:
            video_id = content_id(path)
            found = media.probe(path, config=config.media)
    except OSError as error:
        raise StageError("fetch_failed", str(error)) from error
    yield row | {"media": data, "video_id": video_id, "probe": json.dumps(found), "source_s": found["duration_s"]}


def transcode(row: Row, *, config: IngestConfig, folder: Folder) -> Iterator[Row]:
    """One row per part: preview, sound and captions, on the clock."""
    grid, found = config.clip_grid, json.loads(row["probe"])
    with _as_file(row) as path:
        made = media.transcode(path, found=found, grid=grid, config=config.media)
        captions, language = None, None
        if "captions" in config.transcribe.transcripts:
            captions, language = _captions(row, path, found, config=config)
    if config.media.keep_previews:
        folder.write(f"media/{row['video_id']}.mp4", made.preview)
    part_s, start_s = made.part_frames / grid.fps, found["start_s"]
    for index, preview in enumerate(made.parts):
        is_last = index == len(made.parts) - 1
        begin_s, end_s = index * part_s, made.num_frames / grid.fps if is_last else (index + 1) * part_s
        first, last = (round(t * media.SAMPLE_RATE) for t in (begin_s, end_s))
        in_part = None
        if captions is not None:
            relative = [c for c in captions if begin_s <= c.start_s and (is_last or c.start_s < end_s)]
            in_part = [dataclasses.asdict(c) for c in transcribe.shifted(relative, by_s=start_s)]
        yield row | {
            "media": None,
            "detail": made.note or None,
            "source_s": made.num_frames / grid.fps,
            "num_parts": len(made.parts),
            "part_index": index,
            "part_start_s": start_s + begin_s,
            "part_end_s": start_s + end_s,
            "preview": preview,
            "audio": made.sound[first:last].astype("<i2").tobytes(),
            "captions": in_part,
            "language": language,
        }


def transcribe_row(row: Row, *, recogniser: transcribe.Recogniser | None) -> Iterator[Row]:
    """Adds the sentences of the part: its captions, else what the recogniser hears."""
    heard: list[Sentence] = []
    name, version, language = "none", "", None
    if row["captions"] is not None:
        name, language = "captions", row["language"]
        heard = [Sentence(**caption) for caption in row["captions"]]
    elif row["audio"] and recogniser is not None:
        try:
            relative = recogniser.transcribe(np.frombuffer(row["audio"], "<i2"))
        except (RuntimeError, ValueError) as error:
            raise StageError("transcribe_failed", f"{recogniser.name}: {error}") from error
        heard = transcribe.shifted(relative, by_s=row["part_start_s"])
        name, version, language = recogniser.name, recogniser.version, recogniser.language
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
    found = features.extract(row["preview"], extractor=extractor, grid=config.clip_grid, config=config.features)
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
            if cues := transcribe.parse_captions(transcribe.decode_captions(_read(row["captions_uri"]))):
                return cues, None
        except (OSError, ValueError):  # gone since the listing: the source may still carry a track of its own
            pass
    wanted = config.transcribe.language
    for track in sorted(found["subtitles"], key=lambda t: not (t["language"] or "und").startswith((wanted, "und"))):
        text = media.read_captions(path, index=track["index"], config=config.media)
        if cues := transcribe.parse_captions(text):
            return cues, track["language"]
    return None, None


def _read(uri: str) -> bytes:
    fs, path = filesystem_of(uri)
    with fs.open_input_stream(path) as stream:
        return bytes(stream.read())


@contextmanager
def _as_file(row: Row) -> Iterator[str]:
    """The source as a file of this machine."""
    if row["media"] is None:
        yield row["uri"]
        return
    with tempfile.NamedTemporaryFile(prefix="videobert-", suffix=os.path.splitext(row["uri"])[1]) as file:
        file.write(row["media"])
        file.flush()
        yield file.name


def on_batches(
    function: Callable[..., Iterator[Row]], *, stage: str, counter: Any = None, **kwargs: Any
) -> Callable[[pa.Table], pa.Table]:
    """A stage's function on rows as a function on Arrow batches, under the same name in Ray's plan and dashboard."""

    def batch(table: pa.Table) -> pa.Table:
        rows = run_stage(stage, functools.partial(function, **kwargs), table)
        if counter is not None:
            counter.add.remote(stage, rows.num_rows)
        return rows

    batch.__name__ = function.__name__
    return batch


class Transcribe:
    """Actor: holds a speech recogniser."""

    def __init__(self, *, config: IngestConfig, counter: Any) -> None:
        recogniser = transcribe.make_recogniser(config.transcribe)
        self._batch = on_batches(transcribe_row, stage="transcribe", counter=counter, recogniser=recogniser)

    def __call__(self, table: pa.Table) -> pa.Table:
        return self._batch(table)


class Features:
    """Actor: holds the feature extractor."""

    def __init__(self, *, config: IngestConfig, counter: Any, num_threads: int) -> None:
        import torch

        torch.set_num_threads(num_threads)
        extractor = features.load_extractor(config.features)
        self._batch = on_batches(
            extract_features, stage="features", counter=counter, extractor=extractor, config=config
        )

    def __call__(self, table: pa.Table) -> pa.Table:
        return self._batch(table)


def commit(
    table: pa.Table, *, folder: Folder, info: DatasetInfo, lineage: dict[str, str], counter: Any = None
) -> pa.Table:
    """Publish a batch of finished and failed rows; returns their ledger rows."""
    rows: list[Row] = table.to_pylist()
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
    ledger = sink.publish(rows, {sample.key: sample for sample in samples}, folder=folder, common=common)
    if counter is not None:
        counter.add.remote("commit", ledger.num_rows)
    return ledger
