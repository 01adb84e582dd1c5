"""A failure is a value: it stays with its row, and the rest goes on."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pytest

from pipelines.errors import StageError
from pipelines.rows import ROW_SCHEMA, Row, run_stage


def table(*uris: str) -> pa.Table:
    return pa.Table.from_pylist([{"uri": uri} for uri in uris], schema=ROW_SCHEMA)


def stage(row: Row) -> Iterator[Row]:
    if row["uri"] == "short":
        raise StageError("too_short", "1 frame")
    if row["uri"] == "odd":
        raise KeyError("codec")
    if row["uri"] == "disk":
        raise OSError("no space left")
    yield row | {"video_id": "v", "media": b"bytes"}


def test_a_failed_row_carries_its_reason_and_the_others_go_on() -> None:
    rows = run_stage("transcode", stage, table("good", "short", "good")).to_pylist()
    assert [row["reason"] for row in rows] == [None, "too_short", None]
    assert (rows[1]["status"], rows[1]["stage"], rows[1]["detail"]) == ("filtered", "transcode", "1 frame")


def test_an_unforeseen_error_of_one_row_is_its_outcome_too() -> None:
    rows = run_stage("fetch", stage, table("odd", "good")).to_pylist()
    assert (rows[0]["reason"], rows[0]["detail"]) == ("stage_failed", "KeyError: 'codec'")
    assert rows[1]["status"] is None


def test_a_storage_error_ends_the_run() -> None:
    with pytest.raises(OSError, match="no space left"):
        run_stage("transcode", stage, table("disk"))


def test_failed_rows_pass_later_stages_untouched_and_drop_their_payload() -> None:
    failed = run_stage("transcode", stage, table("short"))
    assert run_stage("features", stage, failed) == failed
    assert failed["media"].null_count == 1


def test_reasons_are_a_closed_set() -> None:
    with pytest.raises(AssertionError, match="not in pipelines"):
        StageError("bad_luck", "")


def test_wall_seconds_are_shared_among_the_parts_of_a_source() -> None:
    def parts(row: Row) -> Iterator[Row]:
        yield row | {"part_index": 0}
        yield row | {"part_index": 1}

    first, second = run_stage("transcode", parts, table("a"))["transcode_s"].to_pylist()
    assert first == second > 0
