"""A failure is a value: it stays with its row, and the rest goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import pytest

from pipelines.errors import StageError
from pipelines.progress import StageClock
from pipelines.rows import ROW_SCHEMA, Row, run_stage, to_table


def rows(*uris: str) -> list[Row]:
    return [dict.fromkeys(ROW_SCHEMA.names) | {"uri": uri} for uri in uris]


def run(name: str, function: Callable[[Row], Iterator[Row]], given: Iterable[Row]) -> list[Row]:
    return list(run_stage(name, function, given, clock=StageClock(None, name)))


def stage(row: Row) -> Iterator[Row]:
    if row["uri"] == "short":
        raise StageError("too_short", "1 frame")
    if row["uri"] == "odd":
        raise KeyError("codec")
    if row["uri"] == "disk":
        raise OSError("no space left")
    yield row | {"video_id": "v", "preview": b"bytes"}


def test_a_failed_row_carries_its_reason_and_the_others_go_on() -> None:
    done = run("transcode", stage, rows("good", "short", "good"))
    assert [row["reason"] for row in done] == [None, "too_short", None]
    assert (done[1]["status"], done[1]["stage"], done[1]["detail"]) == ("filtered", "transcode", "1 frame")


def test_an_unforeseen_error_of_one_row_is_its_outcome_too() -> None:
    done = run("fetch", stage, rows("odd", "good"))
    assert (done[0]["reason"], done[0]["detail"]) == ("stage_failed", "KeyError: 'codec'")
    assert done[1]["status"] is None


def test_a_storage_error_ends_the_run() -> None:
    with pytest.raises(OSError, match="no space left"):
        run("transcode", stage, rows("disk"))


def test_failed_rows_pass_later_stages_untouched_and_drop_their_payload() -> None:
    def late(row: Row) -> Iterator[Row]:
        raise StageError("features_failed", "NaN")
        yield row

    failed = run("features", late, run("transcode", stage, rows("good")))
    assert run("tokens", stage, failed) == failed
    assert to_table(failed)["preview"].null_count == 1


def test_reasons_are_a_closed_set() -> None:
    with pytest.raises(AssertionError, match="not in pipelines"):
        StageError("bad_luck", "")


def test_parts_leave_a_stage_one_by_one_and_a_failure_comes_after_them() -> None:
    """A five-hour video is transcribed while it is decoded; what it fails with at the end still reaches the ledger."""
    made: list[int] = []

    def parts(row: Row) -> Iterator[Row]:
        for index in range(2):
            made.append(index)
            yield row | {"part_index": index}
        raise StageError("timeout", "stopped")

    results = run_stage("transcode", parts, rows("a"), clock=StageClock(None, "transcode"))
    assert next(results)["part_index"] == 0
    assert made == [0]
    rest = list(results)
    assert [row["reason"] for row in rest] == [None, "timeout"]
    assert rest[-1]["part_index"] is None


def test_a_file_of_one_stage_lives_while_the_next_works_on_its_rows(tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("source") / "bytes"

    def first(row: Row) -> Iterator[Row]:
        file.write_text("x")
        try:
            yield row | {"path": str(file)}
        finally:
            file.unlink()

    def second(row: Row) -> Iterator[Row]:
        assert file.exists()
        yield row | {"part_index": 0}
        assert file.exists()
        yield row | {"part_index": 1}

    chained = run("transcode", second, run_stage("fetch", first, rows("a"), clock=StageClock(None, "fetch")))
    assert [row["status"] for row in chained] == [None, None]
    assert not file.exists()
    assert "path" not in to_table(chained).column_names
