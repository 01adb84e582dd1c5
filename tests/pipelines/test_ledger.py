"""What became of every source, whatever was written, in whatever order and however often."""

from __future__ import annotations

import io
import multiprocessing
import random
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.ledger import (
    LEDGER_SCHEMA,
    OUTCOMES,
    compact,
    judged_parts,
    read_ledger,
    remaining,
    source_outcomes,
    unique_samples,
)
from pipelines.storage import Folder
from tests.pipelines.ledgers import PART_S, LedgerRow, dropped, histories, ledger, listing, part, verdict


def outcomes(*rows: LedgerRow) -> dict[str, str]:
    table = source_outcomes(ledger(*rows))
    return dict(zip(table["source_id"].to_pylist(), table["outcome"].to_pylist(), strict=True))


def outcome(*rows: LedgerRow) -> dict[str, Any]:
    (found,) = source_outcomes(ledger(*rows)).to_pylist()
    return found


def keys(*rows: LedgerRow) -> list[str]:
    return unique_samples(ledger(*rows))["key"].to_pylist()


def shuffled_with_copies(rows: list[LedgerRow], seed: int) -> pa.Table:
    """The same set of rows, as many small files in another order would give it."""
    draw = random.Random(seed)
    mixed = [*rows, *draw.choices(rows, k=len(rows))] if rows else []
    draw.shuffle(mixed)
    return pa.concat_tables([ledger(), *(ledger(*mixed[start : start + 3]) for start in range(0, len(mixed), 3))])


def test_a_source_that_was_only_listed_is_pending() -> None:
    assert outcomes(listing("a")) == {"a": "pending"}


def test_a_source_is_kept_only_when_all_its_parts_are() -> None:
    assert outcomes(listing("a"), part("a", 0, 2)) == {"a": "pending"}
    assert outcomes(part("a", 0, 2), part("a", 0, 2)) == {"a": "pending"}
    assert outcomes(part("a", 1, 2), part("a", 0, 2)) == {"a": "kept"}


def test_only_the_last_part_needs_to_know_how_many_there_are() -> None:
    assert outcomes(part("a", 0, None), part("a", 1, None)) == {"a": "pending"}
    assert outcomes(part("a", 0, None), part("a", 1, 2)) == {"a": "kept"}
    assert outcomes(part("a", 1, 2)) == {"a": "pending"}


def test_a_source_whose_parts_are_partly_filtered_is_kept() -> None:
    found = outcome(part("a", 0, None), dropped("a", 1, None), part("a", 2, 3, declared_s=20.0))
    assert (found["outcome"], found["reason"]) == ("kept", None)
    assert (found["kept_s"], found["filtered_s"], found["missing_s"]) == (12.0, 6.0, 2.0)


def test_a_source_whose_parts_are_all_filtered_has_the_reason_of_the_first() -> None:
    found = outcome(dropped("a", 1, 2, reason="blank"), dropped("a", 0, None, reason="static"))
    assert (found["outcome"], found["reason"], found["filtered_s"]) == ("filtered", "static", 12.0)


def test_one_quarantined_row_quarantines_its_source() -> None:
    whole = [part("a", 0, 2), part("a", 1, 2)]
    assert outcomes(*whole, verdict("a")) == {"a": "quarantined"}
    assert outcomes(*whole, verdict("a", part_index=1)) == {"a": "quarantined"}
    assert outcomes(*whole, verdict("a", "filtered"), verdict("a")) == {"a": "quarantined"}
    assert outcomes(*whole, verdict("a", "filtered")) == {"a": "filtered"}


def test_only_the_latest_attempt_counts() -> None:
    assert outcomes(verdict("a"), part("a", attempt=2)) == {"a": "kept"}
    assert outcomes(part("a"), verdict("a", attempt=2)) == {"a": "quarantined"}
    assert outcomes(part("a", 0, 2), part("a", 1, 2, attempt=2)) == {"a": "pending"}


def test_failures_are_counted_in_attempts_and_not_in_rows() -> None:
    rows = [verdict("a"), verdict("a", detail="again"), part("a", attempt=2), verdict("a", attempt=3)]
    assert (outcome(*rows)["failures"], outcome(*rows)["attempt"]) == (2, 3)


def test_a_part_that_one_writer_kept_is_kept() -> None:
    assert keys(dropped("a"), part("a")) == ["va-0"]
    assert outcome(dropped("a"), part("a"))["kept_s"] == PART_S


def test_parts_behind_the_last_one_do_not_count() -> None:
    assert keys(part("a", 0, 1), part("a", 1, None)) == ["va-0"]


def test_a_key_that_stands_for_two_parts_gives_one_sample() -> None:
    assert keys(part("a"), part("b", key="va-0")) == ["va-0"]


def test_parts_of_sources_that_are_not_kept_are_no_samples() -> None:
    assert keys(part("a", 0, 2)) == []
    assert keys(part("a", 0, 2), part("a", 1, 2), verdict("a")) == []
    assert keys(part("a", 0, 2), part("a", 1, 2), verdict("a", "filtered", attempt=2, reason="superseded")) == []


def test_samples_of_an_earlier_attempt_do_not_count() -> None:
    """A retry may cut a video into fewer parts; those of the first cut must not come back."""
    first = [part("a", index, 3, shard="1.tar") for index in range(3)]
    second = [part("a", index, 2, shard="2.tar", attempt=2) for index in range(2)]
    found = unique_samples(ledger(*first, *second)).select(["key", "shard"]).to_pylist()
    assert found == [{"key": "va-0", "shard": "2.tar"}, {"key": "va-1", "shard": "2.tar"}]


def test_of_two_writers_of_one_part_the_first_shard_by_name_stands() -> None:
    rows = [part("a", shard="b.tar"), part("a", shard="a.tar", run_id="2"), part("a", shard="a.tar", run_id="1")]
    (sample,) = unique_samples(ledger(*rows)).to_pylist()
    assert (sample["shard"], sample["run_id"]) == ("a.tar", "1")


@pytest.mark.parametrize("order", [1, -1])
def test_equal_contents_are_settled_by_uri_and_not_by_arrival(order: int) -> None:
    rows = [part(name, video_id="same", key="same-0") for name in ("b", "a", "c")][::order]
    table = source_outcomes(ledger(*rows)).to_pylist()
    assert [(row["outcome"], row["stage"], row["reason"]) for row in table] == [
        ("kept", None, None),
        ("filtered", "ledger", "duplicate"),
        ("filtered", "ledger", "duplicate"),
    ]
    assert {row["detail"] for row in table[1:]} == {"the same bytes as /v/a.mp4"}
    assert unique_samples(ledger(*rows))["source_id"].to_pylist() == ["a"]
    moved = [{**row, "uri": {"a": "/3.mp4", "b": "/1.mp4", "c": "/2.mp4"}[row["source_id"]]} for row in rows]
    assert unique_samples(ledger(*moved))["source_id"].to_pylist() == ["b"]


def test_a_copy_takes_over_when_its_original_goes() -> None:
    rows = [part(name, video_id="same", key="same-0") for name in "ab"]
    gone = verdict("a", "filtered", attempt=2, reason="removed")
    assert outcomes(*rows, gone) == {"a": "filtered", "b": "kept"}
    assert unique_samples(ledger(*rows, gone))["source_id"].to_pylist() == ["b"]


def test_what_had_to_be_given_up_in_a_kept_source_is_told() -> None:
    found = outcome(part("a", 0, 1, detail="the last 34 s do not decode", declared_s=40.0))
    assert (found["detail"], found["missing_s"], found["reason"]) == ("the last 34 s do not decode", 34.0, None)


def test_a_duration_that_any_attempt_learned_is_kept() -> None:
    found = outcome(verdict("a", declared_s=60.0), verdict("a", attempt=2))
    assert (found["quarantined_s"], found["declared_s"], found["decoded_s"]) == (60.0, 60.0, None)


@settings(max_examples=60, deadline=None)
@given(rows=histories())
def test_every_source_and_every_second_ends_in_one_place(rows: list[LedgerRow]) -> None:
    table = source_outcomes(ledger(*rows)).to_pylist()
    assert [row["source_id"] for row in table] == sorted({row["source_id"] for row in rows})
    for row in table:
        assert row["outcome"] in OUTCOMES
        spent = [row[f"{name}_s"] for name in (*OUTCOMES, "missing")]
        assert min(spent) >= 0
        assert sum(spent) == pytest.approx(row["source_s"] or 0.0, abs=1e-6)
        assert (row["source_s"] is None) == (row["declared_s"] is None and row["decoded_s"] is None)
        assert (row["reason"] is not None) == (row["outcome"] in ("filtered", "quarantined"))
        if row["outcome"] != "kept":
            assert row["kept_s"] == row["missing_s"] == 0


@settings(max_examples=50, deadline=None)
@given(rows=histories(), seed=st.integers(0, 1000))
def test_neither_order_nor_copies_of_rows_matter(rows: list[LedgerRow], seed: int) -> None:
    once, again = ledger(*rows), shuffled_with_copies(rows, seed)
    for judge in (source_outcomes, unique_samples):
        assert judge(again).equals(judge(once))


@settings(max_examples=50, deadline=None)
@given(rows=histories())
def test_samples_are_the_kept_parts_of_kept_sources(rows: list[LedgerRow]) -> None:
    table = ledger(*rows)
    verdicts, samples = source_outcomes(table), unique_samples(table)
    kept = verdicts.filter(pc.equal(verdicts["outcome"], "kept"))
    assert set(samples["source_id"].to_pylist()) == set(kept["source_id"].to_pylist())
    assert samples["key"].to_pylist() == sorted(set(samples["key"].to_pylist()))
    assert samples.num_rows * PART_S == pytest.approx(sum(kept["kept_s"].to_pylist()))
    assert kept["video_id"].to_pylist() == list(dict.fromkeys(kept["video_id"].to_pylist()))  # each content once
    latest = dict(zip(kept["source_id"].to_pylist(), kept["attempt"].to_pylist(), strict=True))
    assert all(latest[row["source_id"]] == row["attempt"] for row in samples.to_pylist())
    parts = judged_parts(table).to_pylist()
    for source in latest:
        indices = [row["part_index"] for row in parts if row["source_id"] == source]
        assert indices == list(range(len(indices)))


@settings(max_examples=50, deadline=None)
@given(rows=histories(), source=st.integers(0, 7))
def test_a_later_attempt_replaces_what_was(rows: list[LedgerRow], source: int) -> None:
    name = f"s{source}"
    assert outcomes(*rows, part(name, attempt=9, video_id="own", key="own-0"))[name] == "kept"
    assert outcomes(*rows, verdict(name, attempt=9))[name] == "quarantined"
    assert outcomes(*rows, listing(name), part(name, 0, 2, attempt=9))[name] == "pending"


def listed(*names: str) -> pa.Table:
    uris = [f"/v/{name.rpartition('@')[0] or name}.mp4" for name in names]  # a@2 is another version of a
    return pa.table({"source_id": pa.array(names, pa.string()), "uri": pa.array(uris, pa.string()), "title": names})


def todo(places: pa.Table, *rows: LedgerRow, retry: tuple[str, ...] = (), max_attempts: int = 3) -> dict[str, int]:
    left = remaining(places, source_outcomes(ledger(*rows)), retry=retry, max_attempts=max_attempts).todo
    assert left.column_names == ["source_id", "uri", "title", "attempt"]
    return dict(zip(left["source_id"].to_pylist(), left["attempt"].to_pylist(), strict=True))


def test_new_and_pending_sources_are_left_to_do() -> None:
    rows = [listing("a"), part("b"), part("c", 0, 2), verdict("d"), verdict("e", "filtered")]
    assert todo(listed("a", "b", "c", "d", "e", "f"), *rows) == {"a": 1, "c": 2, "f": 1}
    assert todo(listed("a", "b")) == {"a": 1, "b": 1}
    assert todo(listed(), *rows) == {}


def test_retries_are_for_the_reasons_that_are_named_and_end_after_so_many() -> None:
    rows = [verdict("a", reason="timeout"), verdict("b"), verdict("c", reason="timeout")]
    rows += [verdict("c", attempt=2, reason="timeout")]
    assert todo(listed("a", "b", "c"), *rows, retry=("timeout",)) == {"a": 2, "c": 3}
    left = remaining(listed("a", "b", "c"), source_outcomes(ledger(*rows)), retry=("timeout",), max_attempts=2)
    assert (left.todo["source_id"].to_pylist(), left.num_exhausted) == (["a"], 1)


def test_a_filtered_source_can_be_asked_for_once_its_filter_is_loosened() -> None:
    rows = [verdict("a", "filtered", reason="too_long"), part("b", video_id="v"), part("c", video_id="v")]
    assert todo(listed("a", "b", "c"), *rows, retry=("too_long", "duplicate")) == {"a": 2}


def test_a_copy_is_left_to_do_when_its_original_is_no_longer_kept() -> None:
    copy = verdict("b", "filtered", reason="duplicate", video_id="va")
    assert todo(listed("a", "b"), part("a"), copy) == {}
    assert todo(listed("b"), part("a"), verdict("a", attempt=2), copy) == {"b": 2}


def test_a_changed_file_is_new_and_its_older_version_superseded() -> None:
    rows = [part("a"), part("b")]
    left = remaining(listed("a@2", "b"), source_outcomes(ledger(*rows)), retry=(), max_attempts=3)
    assert left.todo["source_id"].to_pylist() == ["a@2"]
    assert left.superseded["source_id"].to_pylist() == ["a"]
    done = [*rows, verdict("a", "filtered", attempt=2, reason="superseded"), part("a@2", uri="/v/a.mp4")]
    left = remaining(listed("a@2", "b"), source_outcomes(ledger(*done)), retry=(), max_attempts=3)
    assert left.todo.num_rows == left.superseded.num_rows == left.unlisted.num_rows == 0


def test_a_file_that_is_gone_is_unlisted_until_it_is_marked_and_new_again_when_it_returns() -> None:
    left = remaining(listed("b"), source_outcomes(ledger(part("a"), part("b"))), retry=(), max_attempts=3)
    assert (left.todo.num_rows, left.unlisted["source_id"].to_pylist()) == (0, ["a"])
    rows = [part("a"), part("b"), verdict("a", "filtered", attempt=2, reason="removed")]
    assert remaining(listed("b"), source_outcomes(ledger(*rows)), retry=(), max_attempts=3).unlisted.num_rows == 0
    assert todo(listed("a", "b"), *rows) == {"a": 3}


@settings(max_examples=60, deadline=None)
@given(rows=histories(), new=st.integers(0, 3), max_attempts=st.integers(1, 4))
def test_once_everything_left_is_done_nothing_is_left(rows: list[LedgerRow], new: int, max_attempts: int) -> None:
    names = sorted({row["source_id"] for row in rows}) + [f"n{index}" for index in range(new)]
    given = {"retry": ["unreadable"], "max_attempts": max_attempts}
    first = remaining(listed(*names), source_outcomes(ledger(*rows)), **given)
    made = [
        part(row["source_id"], attempt=row["attempt"], video_id=f"w{row['source_id']}", key=f"w{row['source_id']}-0")
        for row in first.todo.to_pylist()
    ]
    assert {f"n{index}" for index in range(new)} <= {row["source_id"] for row in made}
    again = remaining(listed(*names), source_outcomes(ledger(*rows, *made)), **given)
    assert again.todo.num_rows == again.superseded.num_rows == again.unlisted.num_rows == 0


@settings(max_examples=50, deadline=None)
@given(rows=histories(), max_attempts=st.integers(1, 4))
def test_retrying_what_always_fails_comes_to_an_end(rows: list[LedgerRow], max_attempts: int) -> None:
    names = sorted({row["source_id"] for row in rows})
    given = {"retry": ["unreadable"], "max_attempts": max_attempts}
    for _ in range(max_attempts + 1):
        left = remaining(listed(*names), source_outcomes(ledger(*rows)), **given).todo.to_pylist()
        rows = [*rows, *(verdict(row["source_id"], attempt=row["attempt"], detail="again") for row in left)]
    assert not left


def write_files(root: Path, tables: list[pa.Table]) -> Folder:
    (root / "ledger").mkdir(exist_ok=True)
    for number, table in enumerate(tables):
        pq.write_table(table, root / "ledger" / f"{number:04d}.parquet")
    return Folder.at(str(root))


def a_ledger_of_many_files(root: Path) -> Folder:
    names = [f"s{number}" for number in range(8)]
    files = [ledger(*map(listing, names)), ledger(*map(listing, names[:5])), ledger()]
    files += [ledger(part(name, 0, None), part(name, 1, 2), verdict(f"{name}x")) for name in names]
    return write_files(root, [*files, files[-1]])


def as_set(table: pa.Table) -> set[tuple[Any, ...]]:
    return {tuple(row.values()) for row in table.to_pylist()}


def test_no_ledger_is_an_empty_one(tmp_path: Path) -> None:
    assert read_ledger(Folder.at(str(tmp_path))).equals(ledger())


def test_files_of_an_earlier_release_lack_columns_and_still_count(tmp_path: Path) -> None:
    table = ledger(part("a")).drop_columns(["declared_s", "fetch_s", "detail"])
    found = read_ledger(write_files(tmp_path, [table]))
    assert found.schema.equals(LEDGER_SCHEMA)
    assert found.equals(ledger(part("a")))


@pytest.mark.parametrize("content", ["torn", "damaged", "foreign", "text", "empty", "types"])
def test_a_torn_or_foreign_file_is_named(tmp_path: Path, content: str) -> None:
    folder = a_ledger_of_many_files(tmp_path)
    bad = tmp_path / "ledger" / "bad.parquet"
    whole = (tmp_path / "ledger" / "0003.parquet").read_bytes()
    if content == "foreign":
        pq.write_table(pa.table({"x": [1]}), bad)
    elif content == "types":
        pq.write_table(pa.table({"source_id": ["a"], "attempt": ["first"], "status": ["kept"]}), bad)
    else:
        damaged = whole[:4] + bytes(200) + whole[204:]
        bad.write_bytes({"torn": whole[:-100], "damaged": damaged, "text": b"hello", "empty": b""}[content])
    with pytest.raises(ValueError, match=r"ledger/bad.parquet is torn or is no ledger file .*move it away"):
        read_ledger(folder)


def test_compaction_leaves_one_file_with_the_same_rows(tmp_path: Path) -> None:
    folder = a_ledger_of_many_files(tmp_path)
    before = read_ledger(folder)
    assert compact(folder) == 12
    (union,) = folder.names("ledger")
    after = read_ledger(folder)
    assert as_set(after) == as_set(before)
    assert after.num_rows == len(as_set(before))  # copies are gone
    assert source_outcomes(after).equals(source_outcomes(before))
    assert compact(folder) == 0
    assert folder.names("ledger") == [union]


def test_the_union_is_named_by_its_rows_and_not_by_how_they_came(tmp_path: Path) -> None:
    first, second = a_ledger_of_many_files(tmp_path), tmp_path / "second"
    second.mkdir()
    everything = read_ledger(first)
    other = write_files(second, [everything.slice(number, 1) for number in reversed(range(everything.num_rows))])
    compact(first)
    compact(other)
    assert first.names("ledger") == other.names("ledger")


@pytest.mark.parametrize("num_deleted", [0, 1, 7])
def test_a_crash_in_the_middle_of_compaction_leaves_copies_only(tmp_path: Path, num_deleted: int) -> None:
    """The union is there, and some of what it was made of."""
    folder = a_ledger_of_many_files(tmp_path)
    parts = {name: folder.read(name) for name in folder.names("ledger")}
    before = read_ledger(folder)
    compact(folder)
    (union,) = folder.names("ledger")
    for name in sorted(parts)[num_deleted:]:
        folder.write(name, parts[name])
    assert as_set(read_ledger(folder)) == as_set(before)
    assert source_outcomes(read_ledger(folder)).equals(source_outcomes(before))
    assert compact(folder) == 1 + len(parts) - num_deleted
    assert folder.names("ledger") == [union]


@pytest.mark.integration
def test_readers_and_writers_at_the_same_time_as_compaction_lose_nothing(tmp_path: Path) -> None:
    folder = Folder.at(str(tmp_path))
    write_files(tmp_path, [ledger(listing(f"first{number}")) for number in range(50)])
    stop = threading.Event()
    errors: list[Exception] = []
    sizes = []

    def read() -> None:
        try:
            while not stop.is_set():
                sizes.append(source_outcomes(read_ledger(folder)).num_rows)
        except Exception as error:
            errors.append(error)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as compactors:
        for number in range(15):
            for name in range(6):
                buffer = io.BytesIO()
                pq.write_table(ledger(listing(f"s{number}-{name}")), buffer)
                folder.write(f"ledger/s{number}-{name}.parquet", buffer.getvalue())
            assert min(compactors.map(compact, [folder, folder])) >= 0
    stop.set()
    for reader in readers:
        reader.join()
    assert not errors
    assert min(sizes) >= 50
    assert source_outcomes(read_ledger(folder)).num_rows == 50 + 15 * 6
