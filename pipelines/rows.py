"""What travels between stages, and how a failure travels with it.

Rows are plain Arrow columns of one declared schema: encoded bytes may travel, raw frames and Python objects never do. A
stage is a function from a row to rows. If it raises `StageError` the row goes on with status, stage, reason and detail
filled in, and every later stage lets it through untouched: one bad source never costs another. (An exception that
escapes a Ray Data task ends the whole run, and with `max_errored_blocks` it drops the good rows of the block too.)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import pyarrow as pa

from pipelines.errors import StageError

Row = dict[str, Any]

_SENTENCE = pa.struct(
    [
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("text", pa.string()),
        ("confidence", pa.float64()),
        ("origin", pa.string()),
    ]
)

ROW_SCHEMA = pa.schema(
    [
        # discover
        ("source_id", pa.string()),
        ("uri", pa.string()),
        ("version", pa.string()),
        ("size_bytes", pa.int64()),
        ("title", pa.string()),
        ("captions_uri", pa.string()),  # sidecar .srt or .vtt
        ("attempt", pa.int32()),
        # outcome so far: null while all is well
        ("status", pa.string()),
        ("stage", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        # fetch and probe
        ("video_id", pa.string()),
        ("media", pa.large_binary()),  # the source's bytes; null where the worker can open the file itself
        ("probe", pa.string()),  # pipelines.probe's JSON
        # transcode: from here on one row per part
        ("source_s", pa.float64()),
        ("num_parts", pa.int32()),
        ("part_index", pa.int32()),
        ("part_start_s", pa.float64()),
        ("part_end_s", pa.float64()),
        ("preview", pa.large_binary()),  # H.264 in MP4: the part at the clip grid's rate, 224x224
        ("audio", pa.large_binary()),  # 16 kHz mono, 16 bit little endian; empty where there is no sound
        ("captions", pa.list_(_SENTENCE)),  # of the part, from a sidecar or an embedded track
        ("transcode_s", pa.float64()),
        # transcribe
        ("sentences", pa.list_(_SENTENCE)),
        ("language", pa.string()),
        ("asr_name", pa.string()),
        ("asr_version", pa.string()),
        ("transcribe_s", pa.float64()),
        # features
        ("num_clips", pa.int32()),
        ("features", pa.large_binary()),  # [num_clips, dim] float16, C order
        ("features_s", pa.float64()),
        # tokens
        ("visual_tokens", pa.large_binary()),  # [num_clips] uint16 or uint32
    ]
)


def run_stage(name: str, function: Callable[[Row], Iterable[Row]], table: pa.Table) -> pa.Table:
    """Apply a stage to each row that is still well, and account for its wall seconds in column `{name}_s` if there is
    one."""
    rows: list[Row] = []
    for row in table.to_pylist():
        if row["status"] is not None:
            rows.append(row)
            continue
        began_s = time.perf_counter()
        try:
            produced = list(function(row))
        except StageError as error:
            produced = [failed(row, stage=name, error=error)]
        except OSError:  # the storage under the dataset fails: every row would, so the run ends and is run again
            raise
        except Exception as error:  # whatever a stranger's file provokes, it is that file's outcome and not the run's
            told = StageError("stage_failed", f"{type(error).__name__}: {error}")
            produced = [failed(row, stage=name, error=told)]
        if f"{name}_s" in ROW_SCHEMA.names:
            share_s = (time.perf_counter() - began_s) / max(len(produced), 1)
            produced = [{**out, f"{name}_s": share_s} for out in produced]
        rows.extend(produced)
    return pa.Table.from_pylist(rows, schema=ROW_SCHEMA)


def failed(row: Row, *, stage: str, error: StageError) -> Row:
    """The row as it goes to the ledger: its outcome, without the payloads it no longer needs."""
    payloads = {"media": None, "preview": None, "audio": None, "features": None, "captions": None}
    return {**row, **payloads, "status": error.status, "stage": stage, "reason": error.reason, "detail": error.detail}
