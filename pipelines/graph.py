"""The ingestion graph: discover -> fetch+probe -> transcode -> transcribe -> features -> tokens -> sink, on Ray Data.

Two chains, because a dataset's first run has to see features before it can make tokens: `extracted_rows` ends where the
vocabulary is needed and `committed_rows` begins there. `pipelines.ingest` joins them into a run. What moves between
stages is declared in `pipelines.rows`; each stage has its own resources, derived by `allot_workers` so that the sum
always fits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
import ray.data

from pipelines import stages, vocabulary
from pipelines.dataset import DatasetInfo, Folder
from pipelines.stages import IngestConfig


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


def allot_workers(*, cpus: float, gpus: float, num_sources: int) -> Workers:
    """Workers for a cluster's resources.

    S3D is the bottleneck, ten to one over decoding, so it gets a worker for every core (or GPU) and the lighter stages
    run in its shadow: logical CPUs are shares that let Ray start all stages at once, not time slices. Ray Data would
    wait for ever if the shares of running pools left no room for a task; the sum is checked here.
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
            stages.apply,
            fn_kwargs={"stage": "fetch", "function": stages.fetch_and_probe, "config": config},
            num_cpus=cpus,
            compute=ray.data.TaskPoolStrategy(size=workers.num_transcode),
            **batch,
        )
        .map_batches(
            stages.apply,
            fn_kwargs={"stage": "transcode", "function": stages.transcode, "folder": folder, **counted},
            num_cpus=cpus,
            compute=ray.data.TaskPoolStrategy(size=workers.num_transcode),
            **batch,
        )
        .map_batches(
            stages.Transcribe,
            fn_constructor_kwargs=counted,
            num_cpus=workers.transcribe_cpus,
            compute=ray.data.ActorPoolStrategy(size=workers.num_transcribe),
            **batch,
        )
        .map_batches(
            stages.Features,
            fn_constructor_kwargs=counted | {"num_threads": workers.features_threads},
            num_cpus=workers.features_cpus,
            num_gpus=workers.features_gpus or None,
            compute=ray.data.ActorPoolStrategy(size=workers.num_features),
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
        stages.apply,
        fn_kwargs={"stage": "tokens", "function": stages.assign_tokens, "tree": tree, "config": config},
        num_cpus=workers.light_cpus,
        batch_size=1,
        batch_format="pyarrow",
    ).map_batches(
        stages.commit,
        fn_kwargs={"folder": folder, "info": info, "lineage": lineage, "counter": counter},
        num_cpus=workers.light_cpus,
        batch_size=config.samples_per_shard,
        batch_format="pyarrow",
    )


def _blocks(listing: pa.Table, *, max_blocks: int = 4096) -> list[pa.Table]:
    """One source a block, so that work spreads and a slow source holds up nothing but itself; larger corpora share
    blocks."""
    rows = max(1, -(-listing.num_rows // max_blocks))
    return [listing.slice(first, rows) for first in range(0, listing.num_rows, rows)]
