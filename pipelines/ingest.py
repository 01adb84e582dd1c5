"""A run of ingestion: list, take what the ledger does not hold yet, run the graph, stop when too much fails.

The one place where streaming pauses: the first run of a dataset has no visual vocabulary, so it extracts the features
of a sample of the sources, fits the vocabulary, and goes on with those same features.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data

from pipelines import features, report, sink, sources, transcribe, vocabulary
from pipelines.dataset import LEDGER_SCHEMA, DatasetInfo, Folder, read_ledger
from pipelines.errors import REASONS
from pipelines.graph import Graph, allot_workers
from pipelines.progress import Counter, Reporter
from pipelines.rows import ROW_SCHEMA, Row
from pipelines.stages import IngestConfig

JUDGED_AFTER = 100  # sources, before max_failure_rate may stop a run


@dataclass(frozen=True, kw_only=True, slots=True)
class IngestResult:
    num_sources: int  # listed
    num_new: int  # handled by this run
    run_id: str
    stage_s: dict[str, float]  # wall seconds by phase of the run


class FailureRateExceeded(ValueError):
    """Too many sources failed; the message names the reason that dominates."""


def ingest(
    places: Sequence[str],
    *,
    dataset: str,
    config: IngestConfig,
    retry: Sequence[str] = (),
    dry_run: bool = False,
    connect: Callable[[], AbstractContextManager[None]] = nullcontext,
    say: Callable[[str], None] = print,
) -> IngestResult:
    """Bring a dataset up to date with some places (see `sources.discover`); safe to repeat.

    Sources that the ledger knows are left alone, except quarantined ones whose reason is in `retry`. A dry run says
    what would be handled and writes nothing. Ray must run inside `connect()`, which is entered when there is work.
    Raises ValueError or FileNotFoundError for places, folder or configuration that do not fit, FailureRateExceeded
    above `config.max_failure_rate`.
    """
    listed = sources.discover(places, outside=dataset)
    say(f"{len(listed)} sources listed.")
    run = _Run(dataset=dataset, config=config, say=say)
    todo = run.subtract_ledger(listed, retry=retry)
    if not todo.rows and not todo.ledger_rows:
        say("nothing new: every source is in the ledger.")
    elif dry_run:
        say(f"{len(todo.rows)} would be handled.")
    else:
        run.record(todo)
        if todo.rows:
            with connect():
                run.process(todo.rows)
    return IngestResult(num_sources=len(listed), num_new=len(todo.rows), run_id=run.run_id, stage_s=run.phases_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class Todo:
    """What a run has to do, and what it has to write down first."""

    rows: list[Row]  # sources to work on, the largest first
    ledger_rows: list[Row]  # each new source as pending, and the verdict over each exact duplicate


class _Run:
    """One run of the graph over one dataset folder."""

    def __init__(self, *, dataset: str, config: IngestConfig, say: Callable[[str], None]) -> None:
        self.config = config
        self.say = say
        self.folder = Folder.at(dataset)
        self.phases_s: dict[str, float] = {}
        self.run_id = f"{time.strftime('%Y%m%dT%H%M%S')}-{os.urandom(3).hex()}"
        self.code_version = code_version()
        self.info = self._existing_info()
        self.ledger = read_ledger(self.folder)
        origin, note = transcribe.choose_recogniser(config.transcribe)
        if note:
            say(f"{note} Speech without captions goes to {origin or 'nobody'}.")

    def _require_writable(self) -> None:
        try:
            self.folder.write("ledger/.writable", b"")
            self.folder.fs.delete_file(self.folder.path("ledger/.writable"))
        except OSError as error:
            raise PermissionError(
                f"cannot write to the dataset folder {self.folder.root} ({error.strerror or error}): "
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
                f"the dataset holds features of {info.extractor} ({info.extractor_digest[:12]}), "
                f"the configuration names {name} ({digest[:12]}): use those weights and pixels, or another --dataset."
            )
        if info.clip_grid != self.config.clip_grid:
            raise ValueError(
                f"the dataset has the clip grid {info.clip_grid}, the configuration {self.config.clip_grid}: "
                "use that grid, or another --dataset."
            )
        return info

    def subtract_ledger(self, listed: list[sources.Source], *, retry: Sequence[str]) -> Todo:
        """What is left to do of a listing."""
        outcomes = report.source_outcomes(self.ledger)
        known = {outcome["source_id"]: outcome for outcome in outcomes.to_pylist()}
        kept_ids = outcomes.filter(pc.equal(outcomes["outcome"], "kept"))["source_id"]
        kept = self.ledger.filter(pc.is_in(self.ledger["source_id"], kept_ids.combine_chunks()))
        orphans = self._orphaned_duplicates(kept)
        attempts: dict[str, int] = {}
        for source in listed:
            outcome = known.get(source.source_id, {"outcome": "new", "attempt": 0, "reason": None})
            again = outcome["outcome"] == "quarantined" and outcome["reason"] in retry
            orphaned = outcome["reason"] == "duplicate" and source.source_id in orphans
            if outcome["outcome"] in ("new", "pending") or again or orphaned:
                attempts[source.source_id] = outcome["attempt"] + 1
        chosen = [source for source in listed if source.source_id in attempts]
        repeated = sources.duplicates(chosen, kept)
        rows, ledger_rows = [], []
        for source in chosen:
            row = listing_row(source, attempt=attempts[source.source_id])
            if source.source_id not in known:
                ledger_rows.append(listing_row(source, attempt=0, status="pending"))
            if source.source_id in repeated:
                video_id, original = repeated[source.source_id]
                verdict = {"status": "filtered", "stage": "discover", "reason": "duplicate", "video_id": video_id}
                ledger_rows.append(row | verdict | {"detail": f"the same bytes as {original}"})
            else:
                rows.append(row)
        rows.sort(key=lambda row: -row["size_bytes"])  # a long video that starts last is waited for alone
        return Todo(rows=rows, ledger_rows=ledger_rows)

    def _orphaned_duplicates(self, kept: pa.Table) -> set[str]:
        """Sources that were filtered as copies of one that has not been kept since: their turn has come."""
        verdicts = self.ledger.filter(pc.equal(self.ledger["reason"], "duplicate"))
        alive = pc.is_in(verdicts["video_id"], pc.unique(kept["video_id"]).drop_null())
        return set(verdicts.filter(pc.invert(alive))["source_id"].to_pylist())

    def record(self, todo: Todo) -> None:
        """Write down what is listed before any work, so that a crash leaves it pending and not forgotten."""
        self._require_writable()
        if todo.ledger_rows:
            rows = [row | self._common for row in todo.ledger_rows]
            listing = pa.Table.from_pylist(rows, schema=LEDGER_SCHEMA)
            sink.write_ledger(listing, folder=self.folder, name="listing")

    @property
    def _common(self) -> dict[str, str]:
        return {"run_id": self.run_id, "code_version": self.code_version}

    def process(self, todo: list[Row]) -> None:
        """Run the graph over the rows and judge what comes out."""
        resources = ray.cluster_resources()
        workers = allot_workers(cpus=resources.get("CPU", 0.0), gpus=resources.get("GPU", 0.0), num_sources=len(todo))
        ray.data.DataContext.get_current().enable_progress_bars = False
        counter = ray.remote(num_cpus=0)(Counter).remote()
        graph = Graph(config=self.config, folder=self.folder, workers=workers, counter=counter)
        with Reporter(counter, num_sources=len(todo), say=self.say):
            if self.info is None:
                sample, rest = self._sample(todo)
                rows = self._fit_vocabulary(graph.extracted(sample))
                if self.info is None:
                    self._commit_failures(rows)
                    return
                rows = rows.union(graph.extracted(rest)) if rest.num_rows else rows
            else:
                rows = graph.extracted(_row_table(todo))
            tree = vocabulary.load(self.info.vocabulary, self.folder)
            lineage = self._common | {"config_digest": self.config.digest}
            self._consume(graph.committed(rows, tree=tree, info=self.info, lineage=lineage))

    def _sample(self, todo: list[Row]) -> tuple[pa.Table, pa.Table]:
        """Sources for the first vocabulary, and the others; chosen by hash, so neither by name nor by age."""
        shuffled = sorted(todo, key=lambda row: hashlib.sha256(row["source_id"].encode()).digest())
        cut = self.config.vocabulary.sample_videos
        return _row_table(shuffled[:cut]), _row_table(shuffled[cut:])

    def _fit_vocabulary(self, rows: ray.data.Dataset) -> ray.data.Dataset:
        """Extract, fit, save, write dataset.json and set `self.info`, which stays None if no source gave features."""
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
            return rows
        name, digest, dim = features.identity(self.config.features)
        tree = vocabulary.fit(np.concatenate(found), config=self.config.vocabulary, extractor=f"{name} {digest}")
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
            f"visual vocabulary {tree.id}: {tree.k} x {tree.depth}, "
            f"{tree.used_leaves()} of {tree.num_tokens} leaves used by {sum(map(len, found))} clips."
        )
        return rows

    def _commit_failures(self, rows: ray.data.Dataset) -> None:
        """A first sample without one usable source still says what became of each; the others stay pending."""
        failures = list(rows.iter_rows())
        sink.publish(failures, {}, folder=self.folder, common=self._common)
        self.say(f"none of {len(failures)} sources gave features, so there is no visual vocabulary and no dataset yet.")

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


def listing_row(source: sources.Source, *, attempt: int, status: str | None = None) -> Row:
    """A row of the graph (status null) or of the ledger for a source as it was listed."""
    known = {f.name: getattr(source, f.name) for f in dataclasses.fields(source)}
    return known | {"source_id": source.source_id, "attempt": attempt, "status": status}


def _row_table(rows: list[Row]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=ROW_SCHEMA)


def code_version() -> str:
    """The version of this code, as it goes into every sample."""
    return f"videobert {importlib.metadata.version('videobert')}"
