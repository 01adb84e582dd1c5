"""The ingestion graph: discover -> fetch+probe -> transcode -> transcribe -> features -> tokens -> sink, on Ray Data.

Everything streams, with one exception: the first run of a dataset has no visual vocabulary yet, so it extracts the features
of a sample of the sources, fits the vocabulary, and goes on with those same features. What moves between stages is declared
in `pipelines.stage`; each stage has its own resources, derived by `allot_workers` so that the sum always fits.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data

from pipelines import features, media, report, sink, sources, transcribe, vocabulary
from pipelines.dataset import LEDGER_SCHEMA, ClipGrid, DatasetInfo, Folder, Sentence, filesystem_of, read_ledger
from pipelines.errors import REASONS, StageError
from pipelines.progress import Counter, Reporter
from pipelines.stage import ROW_SCHEMA, Row, run_stage

JUDGED_AFTER = 100  # sources, before max_failure_rate may stop a run


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
        if self.samples_per_shard < 1 or not 0 < self.max_failure_rate <= 1:
            raise ValueError("samples_per_shard must be at least 1 and max_failure_rate within (0, 1].")

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True, slots=True)
class Workers:
    """Workers of each stage, and the logical CPUs that each of them reserves."""

    num_features: int
    features_cpus: float
    features_gpus: float
    features_threads: int
    num_transcribe: int
    transcribe_cpus: float
    num_transcode: int
    transcode_cpus: float = 0.15
    light_cpus: float = 0.05  # tokens, sink


@dataclass(frozen=True, kw_only=True, slots=True)
class IngestResult:
    num_sources: int  # listed
    num_new: int  # handled by this run
    run_id: str
    stage_s: dict[str, float]  # wall seconds by phase of the run


class FailureRateExceeded(RuntimeError):
    """Too many sources failed; the message names the reason that dominates."""


def allot_workers(*, cpus: float, gpus: float, num_sources: int) -> Workers:
    """Workers for a cluster's resources.

    S3D is the bottleneck, ten to one over decoding, so it gets a worker for every core (or GPU) and the lighter stages run
    in its shadow: logical CPUs are shares that let Ray start all stages at once, not time slices. Ray Data would wait for
    ever if the shares of running pools left no room for a task; the sum is checked here.
    Raises ValueError if the cluster is too small.
    """
    cores = max(1, int(cpus))
    num_features = max(1, min(int(gpus) or cores, num_sources))
    num_transcribe = max(1, min(cores // 2, num_sources))
    workers = Workers(
        num_features=num_features,
        features_cpus=0.5 * cpus / max(num_features, cpus / 2),  # never above one CPU each
        features_gpus=1.0 if gpus >= 1 else 0.0,
        features_threads=max(1, cores // num_features),
        num_transcribe=num_transcribe,
        transcribe_cpus=0.2 * cpus / max(num_transcribe, cpus / 5),
        num_transcode=max(1, cores // 2),
    )
    reserved = num_features * workers.features_cpus + num_transcribe * workers.transcribe_cpus
    needed = reserved + workers.transcode_cpus + 2 * workers.light_cpus
    if needed > cpus:
        raise ValueError(
            f"the cluster offers {cpus:g} CPUs and the stages need {needed:.2f} at once: "
            "start Ray with at least 1 CPU, or wait until other jobs have ended."
        )
    return workers


# --- the stages, row by row -----------------------------------------------------------------------------------------


def fetch_and_probe(row: Row, *, config: IngestConfig) -> Iterator[Row]:
    """Adds video_id, probe, and the bytes where the file is not on this machine."""
    if row["size_bytes"] > config.media.max_bytes:
        raise StageError("too_large", f"{row['size_bytes']} bytes, media.max_bytes is {config.media.max_bytes}")
    remote = "://" in row["uri"]
    try:
        data = _read(row["uri"]) if remote else None
        with _as_file(row | {"media": data}) as path:
            video_id = media.content_id(path)
            found = media.probe(path, config=config.media)
    except OSError as error:
        raise StageError("fetch_failed", str(error)) from error
    yield row | {"media": data, "video_id": video_id, "probe": json.dumps(found)}


def transcode(row: Row, *, config: IngestConfig, folder: Folder) -> Iterator[Row]:
    """One row per part: preview, sound and captions, on the clock."""
    grid, found = config.clip_grid, json.loads(row["probe"])
    with _as_file(row) as path:
        made = media.transcode(path, found=found, grid=grid, config=config.media)
        captions = _captions(row, path, found, config=config) if "captions" in config.transcribe.transcripts else []
    if config.media.keep_previews:
        folder.write(f"media/{row['video_id']}.mp4", made.preview)
    part_s, start_s = made.part_frames / grid.fps, found["start_s"]
    for index, preview in enumerate(made.parts):
        begin_s, end_s = index * part_s, min((index + 1) * part_s, made.num_frames / grid.fps)
        first, last = (round(t * media.SAMPLE_RATE) for t in (begin_s, end_s))
        in_part = [c for c in captions if begin_s <= c.start_s < end_s]
        yield row | {
            "media": None,
            "title": row["title"] or found["title"],
            "detail": made.note or None,
            "source_s": made.num_frames / grid.fps,
            "num_parts": len(made.parts),
            "part_index": index,
            "part_start_s": start_s + begin_s,
            "part_end_s": start_s + end_s,
            "preview": preview,
            "audio": made.sound[first:last].astype("<i2").tobytes(),
            "captions": [dataclasses.asdict(c) for c in transcribe.shifted(in_part, by_s=start_s)],
        }


def transcribe_row(row: Row, *, recogniser: transcribe.Recogniser | None) -> Iterator[Row]:
    """Adds the sentences of the part: its captions, else what the recogniser hears."""
    heard: list[Sentence] = []
    name, version = "none", ""
    if row["captions"]:
        name, version, heard = "captions", "", [Sentence(**caption) for caption in row["captions"]]
    elif row["audio"] and recogniser is not None:
        try:
            relative = recogniser.transcribe(np.frombuffer(row["audio"], "<i2"))
        except (RuntimeError, ValueError) as error:
            raise StageError("transcribe_failed", f"{recogniser.name}: {error}") from error
        heard = transcribe.shifted(relative, by_s=row["part_start_s"])
        name, version = recogniser.name, recogniser.version
    yield row | {
        "audio": None,
        "captions": None,
        "sentences": [dataclasses.asdict(sentence) for sentence in heard],
        "asr_name": name if heard else "none",
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


def _captions(row: Row, path: str, found: dict[str, Any], *, config: IngestConfig) -> list[Sentence]:
    """Captions of a source, from a sidecar or its own text track; times from the container's start."""
    if row["captions_uri"]:
        try:
            return transcribe.parse_captions(_read(row["captions_uri"]).decode("utf-8-sig", errors="replace"))
        except OSError:  # the sidecar has gone since the listing: the source may still carry a track of its own
            pass
    wanted = config.transcribe.language
    tracks = sorted(found["subtitles"], key=lambda t: not (t["language"] or "und").startswith((wanted, "und")))
    texts = (media.read_captions(path, index=track["index"], config=config.media) for track in tracks)
    return next((cues for cues in map(transcribe.parse_captions, texts) if cues), [])


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


# --- the stages, as Ray Data runs them ------------------------------------------------------------------------------


def _apply(
    table: pa.Table, *, stage: str, function: Callable[..., Iterator[Row]], counter: Any = None, **kwargs: Any
) -> pa.Table:
    rows = run_stage(stage, functools.partial(function, **kwargs), table)
    if counter is not None:
        counter.add.remote(stage, rows.num_rows)
    return rows


class Transcribe:
    """Actor: holds a speech recogniser."""

    def __init__(self, *, config: IngestConfig, counter: Any) -> None:
        self._recogniser = transcribe.make_recogniser(config.transcribe)
        self._counter = counter

    def __call__(self, table: pa.Table) -> pa.Table:
        return _apply(
            table, stage="transcribe", function=transcribe_row, counter=self._counter, recogniser=self._recogniser
        )


class Features:
    """Actor: holds the feature extractor."""

    def __init__(self, *, config: IngestConfig, num_threads: int, counter: Any) -> None:
        import torch

        torch.set_num_threads(num_threads)
        self._extractor = features.load_extractor(config.features)
        self._config = config
        self._counter = counter

    def __call__(self, table: pa.Table) -> pa.Table:
        kwargs = {"extractor": self._extractor, "config": self._config}
        return _apply(table, stage="features", function=extract_features, counter=self._counter, **kwargs)


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


def extracted_rows(
    listing: pa.Table, *, config: IngestConfig, folder: Folder, workers: Workers, counter: Any = None
) -> ray.data.Dataset:
    """Sources (rows of ROW_SCHEMA) to rows with features: one chain, top to bottom."""
    batch = {"batch_size": 1, "batch_format": "pyarrow"}
    counted = {"config": config, "counter": counter}
    cpus = workers.transcode_cpus  # the same for both, so that Ray fuses them and fetched bytes stay in the process
    return (
        ray.data.from_arrow(_blocks(listing))
        .map_batches(
            _apply,
            fn_kwargs={"stage": "fetch", "function": fetch_and_probe, "config": config},
            num_cpus=cpus,
            concurrency=workers.num_transcode,
            **batch,
        )
        .map_batches(
            _apply,
            fn_kwargs={"stage": "transcode", "function": transcode, "folder": folder, **counted},
            num_cpus=cpus,
            concurrency=workers.num_transcode,
            **batch,
        )
        .map_batches(
            Transcribe,
            fn_constructor_kwargs=counted,
            num_cpus=workers.transcribe_cpus,
            concurrency=workers.num_transcribe,
            **batch,
        )
        .map_batches(
            Features,
            fn_constructor_kwargs=counted | {"num_threads": workers.features_threads},
            num_cpus=workers.features_cpus,
            num_gpus=workers.features_gpus or None,
            concurrency=workers.num_features,
            **batch,
        )
    )


def committed_rows(
    rows: ray.data.Dataset,
    *,
    tree: vocabulary.Vocabulary,
    info: DatasetInfo,
    config: IngestConfig,
    folder: Folder,
    lineage: dict[str, str],
    workers: Workers,
    counter: Any = None,
) -> ray.data.Dataset:
    """Rows with features to ledger rows: tokens, then one shard per batch."""
    return rows.map_batches(
        _apply,
        fn_kwargs={"stage": "tokens", "function": assign_tokens, "tree": tree, "config": config},
        num_cpus=workers.light_cpus,
        batch_size=1,
        batch_format="pyarrow",
    ).map_batches(
        commit,
        fn_kwargs={"folder": folder, "info": info, "lineage": lineage, "counter": counter},
        num_cpus=workers.light_cpus,
        batch_size=config.samples_per_shard,
        batch_format="pyarrow",
    )


def _blocks(listing: pa.Table, *, max_blocks: int = 4096) -> list[pa.Table]:
    """One source a block, so that work spreads and a slow source holds up nothing but itself; larger corpora share blocks."""
    rows = max(1, -(-listing.num_rows // max_blocks))
    return [listing.slice(first, rows) for first in range(0, listing.num_rows, rows)]


# --- a run ----------------------------------------------------------------------------------------------------------


def ingest(
    places: Sequence[str],
    *,
    dataset: str,
    config: IngestConfig,
    retry: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> IngestResult:
    """Bring a dataset up to date with some places (see `sources.discover`). Needs a running Ray; safe to repeat.

    Sources that the ledger knows are left alone, except quarantined ones whose reason is in `retry`.
    Raises ValueError or FileNotFoundError for places, folder or configuration that do not fit, FailureRateExceeded above
    `config.max_failure_rate`.
    """
    run = _Run(dataset=dataset, config=config, say=say)
    listed = sources.discover(places)
    say(f"{len(listed)} sources listed.")
    todo = run.record_listing(listed, retry=retry)
    if not todo:
        say("nothing new: every source is in the ledger.")
    else:
        run.process(todo)
    return IngestResult(num_sources=len(listed), num_new=len(todo), run_id=run.lineage["run_id"], stage_s=run.phases_s)


class _Run:
    """One run of the graph over one dataset folder."""

    def __init__(self, *, dataset: str, config: IngestConfig, say: Callable[[str], None]) -> None:
        self.config = config
        self.say = say
        self.folder = Folder.at(dataset)
        self.phases_s: dict[str, float] = {}
        self._require_writable(dataset)
        self.info = self._existing_info()
        self.ledger = read_ledger(self.folder)
        self.lineage = {
            "run_id": f"{time.strftime('%Y%m%dT%H%M%S')}-{os.urandom(3).hex()}",
            "code_version": code_version(),
            "config_digest": config.digest,
        }
        origin, note = transcribe.choose_recogniser(config.transcribe)
        if note:
            say(f"{note} Speech without captions goes to {origin or 'nobody'}.")

    def _require_writable(self, dataset: str) -> None:
        try:
            self.folder.write("ledger/.writable", b"")
            self.folder.fs.delete_file(self.folder.path("ledger/.writable"))
        except OSError as error:
            raise PermissionError(
                f"cannot write to the dataset folder {dataset} ({error.strerror or error}): "
                "name another --dataset or mend its permissions."
            ) from error

    def _existing_info(self) -> DatasetInfo | None:
        """What the dataset already is. Raises ValueError if the configuration would make it two things."""
        name, digest, _ = features.identity(self.config.features)
        if not self.folder.exists("dataset.json"):
            return None
        info = DatasetInfo.from_json(self.folder.read("dataset.json"))
        if (info.extractor, info.extractor_digest) != (name, digest):
            raise ValueError(
                f"the dataset holds features of {info.extractor} ({info.extractor_digest[:12]}), the configuration names "
                f"{name} ({digest[:12]}): use those weights and pixels, or another --dataset."
            )
        if info.clip_grid != self.config.clip_grid:
            raise ValueError(
                f"the dataset has the clip grid {info.clip_grid}, the configuration {self.config.clip_grid}: "
                "use that grid, or another --dataset."
            )
        return info

    def record_listing(self, listed: list[sources.Source], *, retry: Sequence[str]) -> list[Row]:
        """Write new sources into the ledger as pending, exact duplicates as filtered; returns the rows to work on."""
        outcomes = report.source_outcomes(self.ledger).to_pylist()
        known = {outcome["source_id"]: outcome for outcome in outcomes}
        new = [source for source in listed if source.source_id not in known]
        repeated = sources.duplicates(new, self.ledger)
        rows = [_listing_row(source, attempt=0, status="pending") for source in new]
        for source in new:
            if source.source_id in repeated:
                video_id, original = repeated[source.source_id]
                verdict = {"status": "filtered", "stage": "discover", "reason": "duplicate", "video_id": video_id}
                rows.append(_listing_row(source, attempt=1) | verdict | {"detail": f"the same bytes as {original}"})
        if rows:
            common = {"run_id": self.lineage["run_id"], "code_version": self.lineage["code_version"]}
            listing = pa.Table.from_pylist([row | common for row in rows], schema=LEDGER_SCHEMA)
            sink.write_ledger(listing, folder=self.folder, name="listing")
        todo = []
        for source in listed:
            outcome = known.get(source.source_id)
            again = outcome is not None and (
                outcome["outcome"] == "pending" or (outcome["outcome"] == "quarantined" and outcome["reason"] in retry)
            )
            if source.source_id not in repeated and (outcome is None or again):
                failed_before = outcome is not None and outcome["outcome"] == "quarantined"
                attempt = (outcome["attempt"] if outcome and failed_before else 0) + 1
                todo.append(_listing_row(source, attempt=attempt, status=None))
        return todo

    def process(self, todo: list[Row]) -> None:
        """Run the graph over the rows and judge what comes out."""
        resources = ray.cluster_resources()
        workers = allot_workers(
            cpus=resources.get("CPU", 1.0), gpus=resources.get("GPU", 0.0), num_sources=len(todo)
        )
        ray.data.DataContext.get_current().enable_progress_bars = False
        counter = Counter.remote()
        chain = functools.partial(
            extracted_rows, config=self.config, folder=self.folder, workers=workers, counter=counter
        )
        with Reporter(counter, num_sources=len(todo), say=self.say):
            if self.info is None:
                sample, rest = self._sample(todo)
                tree, rows = self._fit_vocabulary(chain(sample))
                rows = rows.union(chain(rest)) if rest.num_rows else rows
            else:
                tree = vocabulary.load(self.info.vocabulary, self.folder)
                rows = chain(_row_table(todo))
            if tree is None or self.info is None:
                self._commit_failures_only(rows)
                return
            committed = committed_rows(
                rows,
                tree=tree,
                info=self.info,
                config=self.config,
                folder=self.folder,
                lineage=self.lineage,
                workers=workers,
                counter=counter,
            )
            self._consume(committed)

    def _sample(self, todo: list[Row]) -> tuple[pa.Table, pa.Table]:
        """Sources for the first vocabulary, and the others; chosen by hash, so neither by name nor by age."""
        shuffled = sorted(todo, key=lambda row: hashlib.sha256(row["source_id"].encode()).digest())
        cut = self.config.vocabulary.sample_videos
        return _row_table(shuffled[:cut]), _row_table(shuffled[cut:])

    def _fit_vocabulary(self, rows: ray.data.Dataset) -> tuple[vocabulary.Vocabulary | None, ray.data.Dataset]:
        """Extract, fit, save, and write dataset.json; (None, rows) if no source gave features."""
        began_s = time.perf_counter()
        rows = rows.materialize()
        self.phases_s["transcode, transcribe, features"] = time.perf_counter() - began_s
        began_s = time.perf_counter()
        found = [
            np.frombuffer(row["features"], np.float16).reshape(row["num_clips"], -1)
            for row in rows.select_columns(["status", "num_clips", "features"]).iter_rows()
            if row["status"] is None
        ]
        if not found:
            return None, rows
        name, digest, dim = features.identity(self.config.features)
        tree = vocabulary.fit(
            np.concatenate(found), config=self.config.vocabulary, extractor=f"{name} {digest}"
        )
        self.info = DatasetInfo(
            clip_grid=self.config.clip_grid,
            extractor=name,
            extractor_digest=digest,
            feature_dim=dim,
            vocabulary=vocabulary.save(tree, self.folder),
            num_visual_tokens=tree.num_tokens,
        )
        self.folder.write("dataset.json", self.info.to_json())
        self.phases_s["fit vocabulary"] = time.perf_counter() - began_s
        self.say(
            f"visual vocabulary {tree.id}: {tree.k} x {tree.depth}, {tree.used_leaves()} of {tree.num_tokens} leaves used "
            f"by {sum(map(len, found))} clips."
        )
        return tree, rows

    def _commit_failures_only(self, rows: ray.data.Dataset) -> None:
        """A first run without one usable source still says what became of each."""
        common = {"run_id": self.lineage["run_id"], "code_version": self.lineage["code_version"]}
        sink.publish(list(rows.iter_rows()), {}, folder=self.folder, common=common)

    def _consume(self, committed: ray.data.Dataset) -> None:
        """Pull the graph; stop it when too much fails."""
        began_s = time.perf_counter()
        seen: dict[str, str | None] = {}
        for batch in committed.iter_batches(batch_size=None, batch_format="pyarrow"):
            for row in batch.select(["source_id", "status", "reason"]).to_pylist():
                failed = row["status"] == "quarantined"
                seen[row["source_id"]] = row["reason"] if failed else seen.get(row["source_id"])
            failures = [reason for reason in seen.values() if reason is not None]
            if len(seen) >= JUDGED_AFTER and len(failures) > self.config.max_failure_rate * len(seen):
                worst = max(set(failures), key=failures.count)
                raise FailureRateExceeded(
                    f"{len(failures)} of {len(seen)} sources failed, {failures.count(worst)} of them with {worst} "
                    f"({REASONS[worst].meaning}); mend that or raise max_failure_rate, then run again."
                )
        self.phases_s["tokens, shards"] = time.perf_counter() - began_s


def _listing_row(source: sources.Source, *, attempt: int, status: str | None = None) -> Row:
    known = {f.name: getattr(source, f.name) for f in dataclasses.fields(source)}
    return known | {"source_id": source.source_id, "attempt": attempt, "status": status}


def _row_table(rows: list[Row]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=ROW_SCHEMA)


def code_version() -> str:
    """The version of this code, as it goes into every sample."""
    return f"videobert {importlib.metadata.version('videobert')}"


