"""The ingestion graph: discover -> fetch+probe -> transcode -> transcribe -> features -> tokens -> sink, on Ray Data.

Two chains, because a dataset's first run has to see features before it can make tokens: `extracted` ends where the
vocabulary is needed and `committed` begins there; `spooled` and `unspooled` keep on disk what waits between them.
`pipelines.ingest` joins them into a run. What moves between
stages is declared in `pipelines.rows`; each stage has its own resources, derived by `allot_workers` so that the sum
always fits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray.data
from ray.data import ActorPoolStrategy, TaskPoolStrategy

from pipelines import stages
from pipelines.dataset import DatasetInfo
from pipelines.progress import Crew
from pipelines.spool import Spool
from pipelines.stages import IngestConfig
from pipelines.storage import Folder


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
    num_light: int = 1  # spool, tokens and sink
    light_cpus: float = 0.05

    def crews(self, *, samples_per_shard: int) -> tuple[Crew, ...]:
        """Who shares what, for the live view."""
        return (
            Crew(stages=("fetch", "transcode"), num_workers=self.num_transcode),
            Crew(stages=("transcribe",), num_workers=self.num_transcribe),
            Crew(stages=("features",), num_workers=self.num_features),
            Crew(stages=("tokens", "commit"), num_workers=self.num_light, batch_rows=samples_per_shard),
        )


def allot_workers(*, cpus: float, gpus: float, num_sources: int) -> Workers:
    """Workers for a cluster's resources.

    S3D is the bottleneck, ten to one over decoding, so it gets a worker for every core (or GPU) and the lighter stages
    run in its shadow: logical CPUs are shares that let Ray start all stages at once, not time slices. Ray Data would
    wait for ever if the shares of running pools left no room for a task; the sum is checked here.
    Raises ValueError if the cluster is too small.
    """
    cores = max(1, int(cpus))
    num_features = max(1, min(int(gpus) or cores, num_sources))
    num_transcribe = max(1, min(cores, num_sources))
    workers = Workers(
        num_features=num_features,
        features_cpus=min(1.0, 0.5 * cpus / num_features),  # Ray takes fractions below one CPU only
        features_gpus=1.0 if gpus >= 1 else 0.0,
        features_threads=max(1, cores // num_features),
        num_transcribe=num_transcribe,
        transcribe_cpus=min(1.0, 0.2 * cpus / num_transcribe),
        num_transcode=max(1, cores // 2),
        num_light=max(1, cores // 16),
    )
    reserved = num_features * workers.features_cpus + num_transcribe * workers.transcribe_cpus
    needed = reserved + workers.transcode_cpus + 2 * workers.num_light * workers.light_cpus
    if needed > cpus:
        raise ValueError(
            f"the cluster offers {cpus:g} CPUs and the stages need {needed:.2f} at once: "
            "start Ray with at least 1 CPU, or wait until other jobs have ended."
        )
    return workers


@dataclass(frozen=True, kw_only=True)
class Graph:
    """The two chains over one dataset folder."""

    config: IngestConfig
    folder: Folder
    workers: Workers
    counter: Any = None  # of live.start_counter

    def extracted(self, listing: pa.Table) -> ray.data.Dataset:
        """Sources (rows of ROW_SCHEMA) to rows with features, one per part."""
        told = {"config": self.config, "counter": self.counter}
        one = {"batch_size": 1, "batch_format": "pyarrow"}
        return (
            stream_of(_blocks(listing))
            .map_batches(
                stages.decoding(folder=self.folder, **told),
                num_cpus=self.workers.transcode_cpus,
                compute=TaskPoolStrategy(size=self.workers.num_transcode),
                **one,
            )
            .map_batches(
                stages.Transcribe,
                fn_constructor_kwargs=told,
                num_cpus=self.workers.transcribe_cpus,
                compute=ActorPoolStrategy(size=self.workers.num_transcribe),
                **one,
            )
            .map_batches(
                stages.Features,
                fn_constructor_kwargs=told | {"num_threads": self.workers.features_threads},
                num_cpus=self.workers.features_cpus,
                num_gpus=self.workers.features_gpus or None,
                compute=ActorPoolStrategy(size=self.workers.num_features),
                **one,
            )
        )

    def spooled(self, rows: ray.data.Dataset, spool: Spool) -> ray.data.Dataset:
        """Rows with features to the spool; what comes out names them, without payloads."""
        return rows.map_batches(spool.put, batch_size=1, **self._light())

    def unspooled(self, names: list[str], spool: Spool) -> ray.data.Dataset:
        """The rows of some spooled files."""
        return stream_of([pa.table({"name": [name]}) for name in names]).map_batches(
            spool.get, batch_size=1, **self._light()
        )

    def committed(self, rows: ray.data.Dataset, *, info: DatasetInfo, lineage: dict[str, str]) -> ray.data.Dataset:
        """Rows with features to ledger rows: tokens, then one shard per batch."""
        told = {"config": self.config, "folder": self.folder, "counter": self.counter, "info": info, "lineage": lineage}
        return rows.map_batches(
            stages.Commit,
            fn_constructor_kwargs=told,
            batch_size=self.config.samples_per_shard,
            **self._light() | {"compute": ActorPoolStrategy(size=self.workers.num_light)},
        )

    def _light(self) -> dict[str, Any]:
        """Few workers: without a bound Ray starts as many processes as their small shares of a CPU allow."""
        return {
            "batch_format": "pyarrow",
            "num_cpus": self.workers.light_cpus,
            "compute": TaskPoolStrategy(size=self.workers.num_light),
        }


def stream_of(blocks: list[pa.Table]) -> ray.data.Dataset:
    rows = ray.data.from_arrow(blocks)
    # Ray Data holds back what a stage yields until it makes a block; here each part of a video moves on at once.
    rows.context.target_max_block_size = 1
    # A worker that is killed while it loads its model is replaced like one that is killed at work.
    rows.context.max_consecutive_actor_init_deaths = 3
    return rows


def _blocks(listing: pa.Table, *, max_blocks: int = 4096) -> list[pa.Table]:
    """One source a block, so that work spreads and a slow source holds up itself only; large corpora share blocks."""
    rows = max(1, -(-listing.num_rows // max_blocks))
    return [listing.slice(first, rows) for first in range(0, listing.num_rows, rows)]
