"""How long a ledger of a given size takes to open, to judge, and to subtract from a listing, and what memory it needs.

The ledger is made as runs leave it: one file with the listing, then one small file for each shard of 64 samples.
"""

from __future__ import annotations

import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.ledger import LEDGER_SCHEMA, compact, read_ledger, remaining, source_outcomes, unique_samples
from pipelines.storage import Folder

SAMPLES_PER_SHARD = 64
NUM_NEW = 1000


def measure_ledger(num_sources: int) -> dict[str, float]:
    """Wall and CPU seconds by step, and bytes, for a ledger of so many kept sources of one part each.

    `total_s` is what a run waits before it starts: read, outcomes, subtract. On a machine that is busy otherwise, CPU
    seconds are the ones to compare.

    Raises AssertionError if an answer is wrong: a fast wrong anti-join is worth nothing.
    """
    figures: dict[str, float] = {"num_sources": num_sources}
    with tempfile.TemporaryDirectory() as root:
        folder = Folder.at(root)
        figures["num_files"] = _write_ledger(Path(root), num_sources)

        def timed(name: str, function: Any) -> Any:
            began_s, began_cpu_s = time.perf_counter(), time.process_time()
            result = function()
            figures[f"{name}_s"] = round(time.perf_counter() - began_s, 3)
            figures[f"{name}_cpu_s"] = round(time.process_time() - began_cpu_s, 3)
            return result

        ledger = timed("read", lambda: read_ledger(folder))
        outcomes = timed("outcomes", lambda: source_outcomes(ledger))
        listed = _sources(0, num_sources + NUM_NEW)
        left = timed("subtract", lambda: remaining(listed, outcomes, retry=["timeout"], max_attempts=3))
        assert (left.todo.num_rows, left.superseded.num_rows, left.unlisted.num_rows) == (NUM_NEW, 0, 0)
        samples = timed("samples", lambda: unique_samples(ledger, outcomes=outcomes))
        assert samples.num_rows == num_sources
        figures["ledger_bytes"] = ledger.nbytes
        figures["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        ledger = samples = None  # the memory of compaction is its own
        timed("compact", lambda: compact(folder))
        again = timed("read_compacted", lambda: read_ledger(folder))
        assert source_outcomes(again).equals(outcomes)
        figures["compacted_bytes"] = sum(path.stat().st_size for path in Path(root, "ledger").iterdir())
        figures["peak_with_compaction_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for clock in ("s", "cpu_s"):
        figures[f"total_{clock}"] = round(
            sum(figures[f"{name}_{clock}"] for name in ("read", "outcomes", "subtract")), 3
        )
    return figures


def _sources(first: int, stop: int) -> pa.Table:
    """A listing: source ids that are spread as hashes are, and paths of usual length."""
    numbers = pa.array(range(first, stop))
    hashes = pa.array([f"{number * 0x9E3779B97F4A7C15 % 2**64:016x}" for number in range(first, stop)])
    uris = pc.binary_join_element_wise("s3://bucket/videos/2026/", pc.cast(numbers, pa.string()), ".mp4", "")
    size_bytes = pc.add(numbers, 10_000_000)
    return pa.table({"source_id": hashes, "uri": uris, "size_bytes": size_bytes})


def _write_ledger(root: Path, num_sources: int) -> int:
    """The number of files written."""
    (root / "ledger").mkdir(parents=True)
    listed = _sources(0, num_sources)
    version = pc.binary_join_element_wise(pc.cast(listed["size_bytes"], pa.string()), "1790000000000000000", "-")
    listed = listed.append_column("version", version).sort_by("source_id")
    pq.write_table(_conform(listed, attempt=0, status="pending"), root / "ledger" / "listing.parquet")
    num_shards = -(-num_sources // SAMPLES_PER_SHARD)
    for shard in range(num_shards):
        rows = listed.slice(shard * SAMPLES_PER_SHARD, SAMPLES_PER_SHARD)
        offsets = pa.array([index * 600_000 for index in range(rows.num_rows)])
        keys = pc.binary_join_element_wise(rows["source_id"], "0000", "-")
        rows = rows.append_column("video_id", rows["source_id"]).append_column("key", keys)
        kept = _conform(
            rows.append_column("offset", offsets), attempt=1, status="kept", num_bytes=600_000, part_index=0,
            num_parts=1, part_start_s=0.0, part_end_s=60.0, source_s=60.0, declared_s=60.04, num_clips=40,
            num_sentences=9, num_words=120, transcript="whisper", shard=f"{shard:020x}.tar", vocabulary="v" * 16,
            run_id="20261001T101010-abcdef", code_version="videobert 0.1.0", fetch_s=0.1, transcode_s=2.0,
            transcribe_s=4.0, features_s=8.0,
        )  # fmt: skip
        pq.write_table(kept, root / "ledger" / f"{shard:020x}.parquet")
    return 1 + num_shards


def _conform(rows: pa.Table, **constants: Any) -> pa.Table:
    """As LEDGER_SCHEMA, with constant columns; the rest is null."""
    columns = []
    for field in LEDGER_SCHEMA:
        if field.name in rows.column_names:
            columns.append(rows[field.name].cast(field.type))
        else:
            columns.append(pa.repeat(pa.scalar(constants.get(field.name), field.type), rows.num_rows))
    return pa.table(columns, schema=LEDGER_SCHEMA)
