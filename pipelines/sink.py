"""Rows to shards and ledger: the last stage, and the only one that publishes.

A shard is written first and its ledger file last, under the same name; the name is a hash of the shard's bytes, and the
bytes depend on the samples only (members sorted by key, times and owners zero). So a write that is repeated after a
crash lands on itself, and a shard that was written without its ledger file does not exist for readers.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.dataset import LEDGER_SCHEMA, ClipGrid, Sample, Sentence, token_dtype
from pipelines.rows import Row
from pipelines.storage import Folder


def sample_of(
    row: Row,
    *,
    grid: ClipGrid,
    extractor: Mapping[str, str],
    vocabulary: str,
    num_tokens: int,
    lineage: Mapping[str, str],
) -> Sample:
    """The sample that a finished row stands for."""
    features = row["features"]
    return Sample(
        key=f"{row['video_id']}-{row['part_index']:04d}",
        video_id=row["video_id"],
        source=row["uri"],
        title=row["title"] or "",
        part_index=row["part_index"],
        part_start_s=row["part_start_s"],
        part_end_s=row["part_end_s"],
        clip_grid=grid,
        sentences=tuple(Sentence(**sentence) for sentence in row["sentences"] or ()),
        language=row["language"],
        metadata={name: str(value) for name, value in json.loads(row["metadata"] or "{}").items()},
        clip_starts_s=_clip_starts_s(row, grid),
        asr={"name": row["asr_name"], "version": row["asr_version"]},
        extractor=dict(extractor),
        vocabulary=vocabulary,
        lineage=dict(lineage),
        visual_tokens=np.frombuffer(row["visual_tokens"], token_dtype(num_tokens)),
        features=None if features is None else np.frombuffer(features, np.float16).reshape(row["num_clips"], -1),
    )


def _clip_starts_s(row: Row, grid: ClipGrid) -> tuple[float, ...] | None:
    if row["clip_frames"] is None:
        return None
    return tuple(row["part_start_s"] + frame / grid.fps for frame in row["clip_frames"])


def build_shard(samples: list[Sample]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """A WebDataset tar of samples sorted by key, and where each lies in it: key -> (offset, number of bytes)."""
    buffer, places = io.BytesIO(), {}
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in sorted(samples, key=lambda sample: sample.key):
            offset = buffer.tell()
            for name, data in sample.members().items():
                member = tarfile.TarInfo(name)
                member.size, member.mode = len(data), 0o644
                tar.addfile(member, io.BytesIO(data))
            places[sample.key] = (offset, buffer.tell() - offset)
    return buffer.getvalue(), places


def publish(rows: list[Row], samples: Mapping[str, Sample], *, folder: Folder, common: Mapping[str, str]) -> pa.Table:
    """Write the samples as one shard and the outcome of every row as one ledger file; returns the ledger rows.

    `samples` maps the keys of the rows that are well; `common` holds the columns that all ledger rows share (run_id,
    code_version, vocabulary). Raises OSError if the storage refuses; nothing of these rows then counts.
    """
    shard, places = build_shard(list(samples.values()))
    shard_name = f"{hashlib.sha256(shard).hexdigest()[:20]}.tar" if samples else None
    ledger = pa.Table.from_pylist(
        [_ledger_row(row, samples, places, shard_name) | dict(common) for row in rows], schema=LEDGER_SCHEMA
    )
    if shard_name is not None:
        folder.write(f"shards/{shard_name}", shard)
    write_ledger(ledger, folder=folder, name=shard_name.removesuffix(".tar") if shard_name else None)
    return ledger


def write_ledger(ledger: pa.Table, *, folder: Folder, name: str | None = None) -> None:
    """Commit ledger rows, sorted, under a name derived from the shard or from the rows themselves."""
    ledger = ledger.sort_by([("source_id", "ascending"), ("part_index", "ascending")])
    buffer = io.BytesIO()
    pq.write_table(ledger, buffer, write_page_checksum=True)
    stable = ledger.select([c for c in LEDGER_SCHEMA.names if not c.endswith("_s") and c != "run_id"])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, stable.schema) as stream:
        stream.write_table(stable.combine_chunks())
    rows_hash = hashlib.sha256(sink.getvalue()).hexdigest()[:12]
    # Two runs may make the same shard but judge other sources beside it: the rows are part of the name.
    folder.write(f"ledger/{name or 'outcomes'}-{rows_hash}.parquet", buffer.getvalue())


def _ledger_row(
    row: Row, samples: Mapping[str, Sample], places: Mapping[str, tuple[int, int]], shard: str | None
) -> dict[str, Any]:
    record = {name: row.get(name) for name in LEDGER_SCHEMA.names}
    if row["status"] is not None:
        return record
    sample = samples[f"{row['video_id']}-{row['part_index']:04d}"]
    offset, num_bytes = places[sample.key]
    return record | {
        "status": "kept",
        "key": sample.key,
        "shard": shard,
        "offset": offset,
        "num_bytes": num_bytes,
        "num_sentences": len(sample.sentences),
        "num_words": sum(len(sentence.text.split()) for sentence in sample.sentences),
        "transcript": sample.asr["name"],
    }
