"""A run of ingestion: list, take what the ledger does not hold yet, run the graph, stop when too much fails.

The one place where streaming pauses: the first run of a dataset has no visual vocabulary, so it extracts the features
of a sample of the sources to the spool, fits the vocabulary, and goes on with those same features.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from ray.exceptions import RayTaskError

from pipelines import features, ledger, near_duplicates, scratch, sink, sources, todo, transcribe, vocabulary
from pipelines.dataset import DatasetInfo
from pipelines.errors import REASONS
from pipelines.estimate import Bill, estimate
from pipelines.graph import Graph, allot_workers
from pipelines.ledger import LEDGER_SCHEMA
from pipelines.live import Reporter, start_counter, until_stalled
from pipelines.progress import StageTimes
from pipelines.spool import Spool
from pipelines.stages import IngestConfig
from pipelines.storage import Folder, sweep_partials
from pipelines.todo import Removed, isin, with_columns

JUDGED_AFTER = 100  # sources, before max_failure_rate may stop a run
COMPACTED_ABOVE = 1000  # ledger files


@dataclass(frozen=True, kw_only=True, slots=True)
class IngestResult:
    num_sources: int  # listed
    num_new: int  # handled by this run
    run_id: str
    phases_s: dict[str, float]  # wall seconds of extract_s, fit_vocabulary_s, commit_s
    stage_times: StageTimes | None  # None where there was no work


class FailureRateExceeded(ValueError):
    """Too many sources failed; the message names the reason that dominates."""


def ingest(
    places: Sequence[str],
    *,
    dataset: str,
    config: IngestConfig,
    retry: Sequence[str] = (),
    removed: Removed = "keep",
    connect: Callable[[], AbstractContextManager[None]] = nullcontext,
    say: Callable[[str], None] = print,
) -> IngestResult:
    """Bring a dataset up to date with some places (see `sources.discover`); safe to repeat.

    Sources that the ledger knows are left alone, except quarantined ones whose reason is in `retry` and who have not
    failed `config.max_attempts` times. A changed file replaces its older version; one that is gone from its place
    stays in the dataset unless `removed` is "drop". Ray must run inside `connect()`, which is entered when there is
    work.
    Raises ValueError or FileNotFoundError for places, folder or configuration that do not fit, FailureRateExceeded
    above `config.max_failure_rate`, OSError where the storage refuses.
    """
    listing, run, plan = _prepare(places, dataset=dataset, config=config, retry=retry, removed=removed, say=say)
    if not plan.rows.num_rows and not plan.ledger_rows.num_rows:
        say("nothing new: every source is in the ledger.")
    else:
        run.require_writable()
        if plan.rows.num_rows:
            run.require_same_extractor()
        run.record(plan)
        if plan.rows.num_rows:
            with connect():
                run.process(plan.rows)
        run.finish()
    return IngestResult(
        num_sources=len(listing.sources),
        num_new=plan.rows.num_rows,
        run_id=run.run_id,
        phases_s=run.phases_s,
        stage_times=run.stage_times,
    )


def dry_run(
    places: Sequence[str],
    *,
    dataset: str,
    config: IngestConfig,
    retry: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> Bill | None:
    """What `ingest` would have to do and what that would cost, from a sample; writes nothing. None: nothing to do.

    Raises what `ingest` raises for places and configuration that do not fit.
    """
    listing, run, plan = _prepare(places, dataset=dataset, config=config, retry=retry, removed="keep", say=say)
    wanted = set(plan.rows["source_id"].to_pylist())
    say(f"{len(wanted)} would be handled.")
    if not wanted:
        return None
    run.require_same_extractor()
    chosen = [source for source in listing.sources if source.source_id in wanted]
    return estimate(chosen, config=config, say=say)


def _prepare(
    places: Sequence[str],
    *,
    dataset: str,
    config: IngestConfig,
    retry: Sequence[str],
    removed: Removed,
    say: Callable[[str], None],
) -> tuple[sources.Listing, _Run, todo.Plan]:
    listing = sources.discover(places, outside=dataset)
    ignored = f", {listing.num_ignored} files left out that are no media by their name" if listing.num_ignored else ""
    say(f"{len(listing.sources)} sources listed{ignored}.")
    for note in listing.notes:
        say(note)
    run = _Run(dataset=dataset, config=config, say=say)
    plan = todo.plan(listing, run.ledger, retry=retry, removed=removed, max_attempts=config.max_attempts, say=say)
    return listing, run, plan


class _Run:
    """One run of the graph over one dataset folder."""

    def __init__(self, *, dataset: str, config: IngestConfig, say: Callable[[str], None]) -> None:
        self.config = config
        self.say = say
        self.folder = Folder.at(dataset)
        self.phases_s: dict[str, float] = {}
        self.stage_times: StageTimes | None = None
        self.reporter: Reporter
        self.run_id = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{os.urandom(3).hex()}"
        self.code_version = code_version()
        self.info = self._existing_info()
        self.ledger = ledger.read_ledger(self.folder)
        self.spool = Spool(folder=self.folder, digest=config.digest)
        origin, note = transcribe.choose_recogniser(config.transcribe)
        if note:
            say(f"{note} Speech without captions goes to {origin or 'nobody'}.")

    def _existing_info(self) -> DatasetInfo | None:
        """What the dataset already is. Raises ValueError if the configuration has another clip grid."""
        if not self.folder.exists("dataset.json"):
            return None
        info = DatasetInfo.from_json(self.folder.read("dataset.json"))
        if info.clip_grid != self.config.clip_grid:
            raise ValueError(
                f"the dataset has the clip grid {info.clip_grid}, the configuration {self.config.clip_grid}: "
                "use that grid, or another --dataset."
            )
        return info

    def require_writable(self) -> None:
        """Raises PermissionError."""
        try:
            self.folder.write("ledger/.writable", b"")
            self.folder.delete("ledger/.writable")
        except OSError as error:
            why = error.__cause__ if isinstance(error.__cause__, OSError) else error  # without the folder's own remedy
            raise PermissionError(
                f"cannot write to the dataset folder {self.folder.root} ({why.strerror or why}): "
                "name another --dataset or mend its permissions."
            ) from error

    def require_same_extractor(self) -> None:
        """Raises ValueError if the configuration names no features, or others than those of the dataset."""
        name, digest, _ = features.identity(self.config.features)
        if self.info and (self.info.extractor, self.info.extractor_digest) != (name, digest):
            raise ValueError(
                f"the dataset holds features of {self.info.extractor} ({self.info.extractor_digest[:12]}), "
                f"the configuration names {name} ({digest[:12]}): use those weights and pixels, or another --dataset."
            )

    def record(self, plan: todo.Plan) -> None:
        """Write down what is listed before any work, so that a crash leaves it pending and not forgotten."""
        swept = scratch.sweep() + sweep_partials(self.folder)
        if swept:
            self.say(f"{swept} temporary files of an earlier run that was killed are removed.")
        if plan.ledger_rows.num_rows:
            sink.write_ledger(with_columns(plan.ledger_rows, **self._common), folder=self.folder, name="listing")

    def finish(self) -> None:
        """What concerns the dataset as a whole, after the last source."""
        if self.config.filters.near_duplicate is not None and self.info is not None:
            verdicts = near_duplicates.verdicts(self.folder, threshold=self.config.filters.near_duplicate)
            if verdicts:
                table = pa.Table.from_pylist(verdicts, schema=LEDGER_SCHEMA)
                sink.write_ledger(with_columns(table, **self._common), folder=self.folder, name="near-duplicates")
                self.say(f"{len(verdicts)} videos are nearly the same as others and are filtered.")
        if len(self.folder.names("ledger", suffix=".parquet")) > COMPACTED_ABOVE:
            ledger.compact(self.folder)
        scratch.sweep()

    @property
    def _common(self) -> dict[str, str]:
        return {"run_id": self.run_id, "code_version": self.code_version}

    def process(self, listed: pa.Table) -> None:
        resources = ray.cluster_resources()
        workers = allot_workers(cpus=resources.get("CPU", 0), gpus=resources.get("GPU", 0), num_sources=listed.num_rows)
        counter = start_counter(
            crews=workers.crews(samples_per_shard=self.config.samples_per_shard),
            num_sources=listed.num_rows,
            num_bytes=pc.sum(listed["size_bytes"]).as_py() or 0,
        )
        graph = Graph(config=self.config, folder=self.folder, workers=workers, counter=counter)
        # A stage may be silent as long as its longest child may run.
        stall_timeout_s = 2 * self.config.media.timeout_s
        try:
            with Reporter(counter, say=self.say, stall_timeout_s=stall_timeout_s) as self.reporter:
                spooled = self.spool.complete(listed)
                if self.info is None:
                    spooled = self._first_vocabulary(graph, listed, spooled)
                if self.info is not None:
                    self._commit(graph, listed, spooled)
            self.stage_times = self.reporter.stage_times
        finally:
            with contextlib.suppress(Exception):  # the cluster may be gone
                ray.kill(counter)  # workers hold handles to it, and they may live as long as the cluster

    def _first_vocabulary(self, graph: Graph, listed: pa.Table, spooled: pa.Table) -> pa.Table:
        """Extract a sample of the sources to the spool, fit the vocabulary on it, write dataset.json and set
        `self.info`, which stays None if no source gave features. Returns what the spool holds."""
        began_s = time.perf_counter()
        if spooled.num_rows:
            self.say(f"{pc.count_distinct(spooled['source_id'])} sources are there already from a run that was ended.")
        missing = _without(self._sample(listed), spooled)
        if missing.num_rows:
            self.reporter.feed("fetch", missing.num_rows)
            self._pull(graph.spooled(graph.extracted(missing), self.spool))
        spooled = self.spool.complete(listed)
        self.phases_s["extract_s"] = time.perf_counter() - began_s
        began_s = time.perf_counter()
        clips = self.spool.features(pc.unique(spooled["name"]).to_pylist())
        if len(clips) == 0:
            self._commit_failures(spooled)
            return spooled
        name, digest, dim = features.identity(self.config.features)
        tree = vocabulary.fit(clips, config=self.config.vocabulary, extractor=f"{name} {digest}")
        self.info = DatasetInfo(
            clip_grid=self.config.clip_grid,
            extractor=name,
            extractor_digest=digest,
            feature_dim=dim,
            vocabulary=vocabulary.save(tree, self.folder),
            num_visual_tokens=tree.num_tokens,
        )
        self.folder.write("dataset.json", self.info.to_json())
        self.phases_s["fit_vocabulary_s"] = time.perf_counter() - began_s
        self.say(
            f"visual vocabulary {tree.id}: {tree.k} x {tree.depth}, "
            f"{tree.used_leaves()} of {tree.num_tokens} leaves used by {len(clips)} clips."
        )
        return spooled

    def _sample(self, listed: pa.Table) -> pa.Table:
        """Sources for the first vocabulary; chosen by hash, so neither by name nor by age."""
        keys = [hashlib.sha256(source_id.encode()).hexdigest() for source_id in listed["source_id"].to_pylist()]
        chosen = sorted(range(listed.num_rows), key=keys.__getitem__)[: self.config.vocabulary.sample_videos]
        return listed.take(sorted(chosen))  # the largest stays first

    def _commit(self, graph: Graph, listed: pa.Table, spooled: pa.Table) -> None:
        """What is spooled, then the other sources."""
        assert self.info is not None
        began_s = time.perf_counter()
        lineage = self._common | {"config_digest": self.config.digest}
        names, rest = pc.unique(spooled["name"]).to_pylist(), _without(listed, spooled)
        committed = functools.partial(graph.committed, info=self.info, lineage=lineage)
        if names:
            self.reporter.feed("tokens", pc.sum(pc.is_null(spooled["status"])).as_py())
            self._pull(committed(graph.unspooled(sorted(names), self.spool)))
        if rest.num_rows:
            self.reporter.feed("fetch", rest.num_rows)
            self._pull(committed(graph.extracted(rest)))
        self.spool.clear()
        self.phases_s["commit_s"] = time.perf_counter() - began_s

    def _commit_failures(self, spooled: pa.Table) -> None:
        """A first sample without one usable source still says what became of each; the others stay pending."""
        names = pc.unique(spooled["name"]).to_pylist()
        failures = self.spool.get(pa.table({"name": names})).to_pylist()
        sink.publish(failures, {}, folder=self.folder, common=self._common)
        self.spool.clear()
        num_sources = len({row["source_id"] for row in failures})
        self.say(f"none of {num_sources} sources gave features, so there is no visual vocabulary and no dataset yet.")

    def _pull(self, rows: ray.data.Dataset) -> None:
        """Run a graph to its end; stop it when too much fails."""
        seen: dict[str, str | None] = {}
        for batch in until_stalled(_batches(rows), self.reporter):
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


def _batches(rows: ray.data.Dataset) -> Iterator[pa.Table]:
    """What a graph gives; the storage errors of its workers as such, and not as a page of Ray's."""
    try:
        yield from rows.iter_batches(batch_size=None, batch_format="pyarrow")
    except RayTaskError as error:
        cause = error.cause
        while isinstance(cause, Exception) and not isinstance(cause, OSError) and cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, OSError):
            raise OSError(*cause.args) from None
        raise


def _without(listed: pa.Table, spooled: pa.Table) -> pa.Table:
    return listed.filter(pc.invert(isin(listed["source_id"], spooled["source_id"])))


def code_version() -> str:
    """The version of this code, as it goes into every sample."""
    return f"videobert {importlib.metadata.version('videobert')}"
