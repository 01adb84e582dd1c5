"""What travels between stages, and how a failure travels with it.

Rows are plain Arrow columns of one declared schema: encoded bytes may travel, raw frames and Python objects never do. A
stage is a function from a row to rows. If it raises `StageError` the row goes on with status, stage, reason and detail
filled in, and every later stage lets it through untouched: one bad source never costs another. (An exception that
escapes a Ray Data task ends the whole run, and with `max_errored_blocks` it drops the good rows of the block too.)
Stages are generators, so that the first part of a five-hour video is transcribed while its last is not yet decoded.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import pyarrow as pa

from pipelines.errors import StageError
from pipelines.progress import StageClock, row_video_s

Row = dict[str, Any]

MAX_LOST_WORKERS = 3  # Ray gives a task no more tries than one after that

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
        ("language", pa.string()),  # as stated by a list, a caption track or the recogniser
        ("metadata", pa.string()),  # JSON object of a list's other columns
        ("attempt", pa.int32()),
        # outcome so far: null while all is well
        ("status", pa.string()),
        ("stage", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        # fetch and probe
        ("video_id", pa.string()),
        ("declared_s", pa.float64()),  # duration as the container states it
        ("fetch_s", pa.float64()),  # wall seconds of work, like those of the other stages below
        # transcode: from here on one row per part
        ("source_s", pa.float64()),  # duration as decoded; null except on the last part, like num_parts
        ("num_parts", pa.int32()),
        ("part_index", pa.int32()),
        ("part_start_s", pa.float64()),
        ("part_end_s", pa.float64()),
        ("preview", pa.large_binary()),  # H.264: the part at the clip grid's rate, 224x224
        ("clip_frames", pa.list_(pa.int32())),  # first frame of each clip in the part; null on the uniform grid
        ("audio", pa.large_binary()),  # 16 kHz mono, 16 bit little endian; empty where there is no sound
        ("captions", pa.list_(_SENTENCE)),  # of the part, from a sidecar or an embedded track
        ("transcode_s", pa.float64()),
        # transcribe
        ("sentences", pa.list_(_SENTENCE)),
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


def run_stage(
    name: str, function: Callable[[Row], Iterator[Row]], rows: Iterable[Row], *, clock: StageClock
) -> Iterator[Row]:
    """Apply a stage, a generator function, to each row that is still well; the others pass through.

    The wall seconds of its work go into column `{name}_s`, if there is one.
    """
    is_timed = f"{name}_s" in ROW_SCHEMA.names
    for row in rows:
        if row["status"] is not None:
            yield row
            continue
        key = f"{row['source_id']} {row['part_index']}"
        with clock.row(key=key) as told, contextlib.closing(_caught(name, function, row)) as results:
            if told.num_lost >= MAX_LOST_WORKERS:
                told.out(rows=0, failures=1, video_s=row_video_s(row))
                yield failed(row, stage=name, error=StageError("worker_lost", f"{told.num_lost} workers died of it"))
                continue
            while True:
                began_s = time.perf_counter()
                out = next(results, None)  # the time in which the consumer holds a row is not this stage's
                if out is None:
                    break
                if is_timed:
                    out = {**out, f"{name}_s": time.perf_counter() - began_s}
                is_well = out["status"] is None
                told.out(
                    rows=int(is_well),
                    failures=int(not is_well),
                    video_s=row_video_s(out),
                    num_bytes=(row["size_bytes"] or 0) if name == "fetch" else 0,
                )
                with told.handed():
                    yield out


def _caught(name: str, function: Callable[[Row], Iterator[Row]], row: Row) -> Generator[Row]:
    """The rows of a stage; what it raises becomes the last of them."""
    try:
        yield from function(row)
    except StageError as error:
        yield failed(row, stage=name, error=error)
    except OSError:  # the storage under the dataset fails: every row would, so the run ends and is run again
        raise
    except Exception as error:  # whatever a stranger's file provokes, it is that file's outcome and not the run's
        yield failed(row, stage=name, error=StageError("stage_failed", f"{type(error).__name__}: {error}"))


_PAYLOADS = ("preview", "audio", "features", "captions", "sentences")


def failed(row: Row, *, stage: str, error: StageError) -> Row:
    """The row as it goes to the ledger: its outcome, without the payloads it no longer needs."""
    outcome = {"status": error.status, "stage": stage, "reason": error.reason, "detail": error.detail}
    return _without_payloads(row) | outcome


def _without_payloads(row: Row) -> Row:
    return {name: value for name, value in row.items() if name not in _PAYLOADS}


def to_table(rows: list[Row]) -> pa.Table:
    """Rows as Arrow; keys that are not in ROW_SCHEMA (a path of this machine, say) do not travel."""
    return pa.Table.from_pylist(rows, schema=ROW_SCHEMA)
