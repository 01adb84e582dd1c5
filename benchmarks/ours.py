"""The pipeline at the two jobs that are measured: previews into WebDataset like the peer, and the whole graph.

The first job uses the real fetch, probe and transcode stage on Ray Data, and a thin sink of this benchmark: the
product's shards hold tokens and its previews lie beside them, while the peer's shards hold video. The second is
`pipelines.graph` as a run uses it, with a vocabulary at hand as in every run but a dataset's first; in place of the
progress counter, an actor that writes down when each worker began and ended each row.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import webdataset as wds
from ray.data import TaskPoolStrategy

from benchmarks.bare import source_row
from benchmarks.corpus import Video
from benchmarks.harness import TreeSampler, num_cores
from pipelines import features, stages, vocabulary
from pipelines.dataset import DatasetInfo
from pipelines.graph import Graph, allot_workers
from pipelines.rows import ROW_SCHEMA
from pipelines.stages import IngestConfig
from pipelines.storage import Folder


def listing(videos: Sequence[Video]) -> pa.Table:
    """The rows of a run over some files, the largest first."""
    rows = sorted(map(source_row, videos), key=lambda row: -row["size_bytes"])
    return pa.Table.from_pylist(rows, schema=ROW_SCHEMA)


def preview_job(videos: Sequence[Video], *, config: IngestConfig, out: Path, per_shard: int = 8) -> float:
    """Local files -> previews (20 fps, 224x224, H.264 + AAC) -> WebDataset in `out`. Wall seconds; Ray must run."""
    began_s = time.perf_counter()
    shards = out / "shards"
    shards.mkdir(parents=True)
    table = listing(videos)
    rows = ray.data.from_arrow([table.slice(i, 1) for i in range(table.num_rows)]).map_batches(
        stages.decoding(config=config, folder=Folder.at(str(out)), counter=None),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=0.5,
        compute=TaskPoolStrategy(size=num_cores()),
    )
    written = rows.map_batches(
        _thin_sink,
        fn_kwargs={"folder": str(out)},
        batch_size=per_shard,
        batch_format="pyarrow",
        num_cpus=0.05,
        compute=TaskPoolStrategy(size=1),  # without a bound Ray starts as many processes as the share allows
    )
    num = sum(batch.num_rows for batch in written.iter_batches(batch_size=None, batch_format="pyarrow"))
    if num != len(videos):
        raise RuntimeError(f"{num} of {len(videos)} previews were written.")
    return time.perf_counter() - began_s


def _warm_up() -> None:
    """Worker processes with the stages imported, as the peer's have their imports behind them at its first shard."""

    def touch(table: pa.Table) -> pa.Table:
        assert stages
        time.sleep(0.5)  # long enough for every worker to get one
        return table

    blocks = [pa.table({"i": [i]}) for i in range(2 * num_cores())]
    ray.data.from_arrow(blocks).map_batches(touch, batch_format="pyarrow", num_cpus=0.5).materialize()


def _thin_sink(table: pa.Table, *, folder: str) -> pa.Table:
    """A shard of the previews that the rows' sources have left, named after the first."""
    done = [row for row in table.to_pylist() if row["num_parts"] is not None and row["status"] is None]
    if done:
        with wds.TarWriter(os.path.join(folder, "shards", f"{done[0]['source_id']}.tar"), encoder=False) as shard:
            for row in done:
                preview = Path(folder, "media", f"{row['video_id']}.mp4")
                shard.write(
                    {
                        "__key__": row["video_id"],
                        "mp4": preview.read_bytes(),
                        "json": json.dumps({"url": row["uri"]}).encode(),
                    }
                )
                preview.unlink()
    return pa.table({"video_id": [row["video_id"] for row in done]}, schema=pa.schema([("video_id", pa.string())]))


@dataclass(frozen=True, kw_only=True)
class Event:
    at_s: float  # epoch
    what: str  # begin, end
    stage: str
    worker: str


class Timeline:
    """Actor with the messages of `progress.Counter`: remembers them with their time."""

    def __init__(self) -> None:
        self._events: list[Event] = []

    def feed(self, *_: Any, **__: Any) -> None: ...

    def ready(self, *_: Any, **__: Any) -> None: ...

    def out(self, *_: Any, **__: Any) -> None: ...

    def begin(self, stage: str, worker: str, *_: Any, **__: Any) -> None:
        self._events.append(Event(at_s=time.time(), what="begin", stage=stage, worker=worker))

    def end(self, stage: str, worker: str, *_: Any, **__: Any) -> None:
        self._events.append(Event(at_s=time.time(), what="end", stage=stage, worker=worker))

    def events(self) -> list[Event]:
        return self._events


@dataclass(frozen=True, kw_only=True)
class GraphRun:
    """The whole graph over a corpus."""

    wall_s: float  # from the first call to the last ledger row; Ray ran before
    began_s: float  # epoch, like the intervals
    intervals: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  # stage -> rows in hand
    num_features_workers: int
    num_kept: int
    num_clips: int

    def steady(self) -> tuple[float, float]:
        """From the first row in the last heavy stage to the last moment at which each of its workers has one (epoch
        seconds): before that the pipeline fills, after that it runs dry.

        Raises RuntimeError where its workers never all had one.
        """
        steps = sorted(step for a, b in self.intervals["features"] for step in ((a, 1), (b, -1)))
        busy, full_until_s = 0, None
        for at_s, change in steps:
            if busy == self.num_features_workers and change < 0:
                full_until_s = at_s
            busy += change
        if full_until_s is None:
            raise RuntimeError("the features workers never all had work: give the benchmark more video.")
        return steps[0][0], full_until_s

    def share_within(self, stage: str, begin_s: float, end_s: float) -> float:
        """Share of a stage's work in a stretch of time, by the time its rows were in hand."""
        rows = self.intervals.get(stage, [])
        whole = sum(b - a for a, b in rows)
        return sum(max(0.0, min(b, end_s) - max(a, begin_s)) for a, b in rows) / whole if whole else 0.0


def graph_run(videos: Sequence[Video], *, config: IngestConfig, out: Path) -> GraphRun:
    """The product's graph, from listing to ledger, into a new dataset in `out`. Ray must run."""
    name, digest, dim = features.identity(config.features)
    folder = Folder.at(str(out))
    noise = np.random.default_rng(0).normal(size=(2000, dim)).astype(np.float16)
    tree = vocabulary.fit(noise, config=config.vocabulary, extractor=f"{name} {digest}")
    info = DatasetInfo(
        clip_grid=config.clip_grid,
        extractor=name,
        extractor_digest=digest,
        feature_dim=dim,
        vocabulary=vocabulary.save(tree, folder),
        num_visual_tokens=tree.num_tokens,
    )
    folder.write("dataset.json", info.to_json())
    lineage = {"run_id": "benchmark", "code_version": "benchmark", "config_digest": config.digest}
    timeline = ray.remote(num_cpus=0)(Timeline).remote()
    resources = ray.cluster_resources()
    workers = allot_workers(cpus=resources["CPU"], gpus=resources.get("GPU", 0.0), num_sources=len(videos))
    ray.data.DataContext.get_current().enable_progress_bars = False
    began_s, began = time.time(), time.perf_counter()
    graph = Graph(config=config, folder=folder, workers=workers, counter=timeline)
    rows = graph.committed(graph.extracted(listing(videos)), info=info, lineage=lineage)
    ledger = pa.concat_tables(rows.iter_batches(batch_size=None, batch_format="pyarrow")).to_pylist()
    wall_s = time.perf_counter() - began
    kept = [row for row in ledger if row["status"] == "kept"]
    return GraphRun(
        wall_s=wall_s,
        began_s=began_s,
        intervals=_intervals(ray.get(timeline.events.remote())),
        num_features_workers=workers.num_features,
        num_kept=len({row["source_id"] for row in kept}),
        num_clips=sum(row["num_clips"] for row in kept),
    )


def object_store_bytes() -> int:
    """What the object stores of the cluster hold now; 0 where no Ray runs."""
    if not ray.is_initialized():  # asking would start one
        return 0
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    reply = get_memory_info_reply(get_state_from_address(ray.get_runtime_context().gcs_address))
    return int(reply.store_stats.object_store_bytes_used)


def _intervals(events: Sequence[Event]) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, list[tuple[float, float]]] = {}
    since: dict[tuple[str, str], float] = {}
    for event in events:
        key = (event.stage, event.worker)
        if event.what == "begin":
            since[key] = event.at_s
        elif key in since:
            found.setdefault(event.stage, []).append((since.pop(key), event.at_s))
    return found


def main(argv: Sequence[str]) -> int:
    """The preview job as a command, so that it can be timed from outside like the peer's."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ours")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("files", nargs="+")
    given = parser.parse_args(argv)
    from jobs.cluster import connected

    began_s = time.perf_counter()
    videos = [Video(path=path, seconds=0.0, width=0, height=0) for path in given.files]
    with connected():
        ray.data.DataContext.get_current().enable_progress_bars = False
        _warm_up()
        start_up_s = time.perf_counter() - began_s
        with TreeSampler(every_s=0.2) as sampler:
            job_s = preview_job(videos, config=IngestConfig(), out=given.out)
    cpu_s = sampler.moments[-1].own_s - sampler.moments[0].own_s
    (given.out / "result.json").write_text(json.dumps({"start_up_s": start_up_s, "job_s": job_s, "cpu_s": cpu_s}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
