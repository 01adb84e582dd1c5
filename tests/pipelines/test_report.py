"""The ledger's arithmetic on ledgers of every shape."""

from __future__ import annotations

import json
import random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.dataset import LEDGER_SCHEMA, ClipGrid, DatasetInfo
from pipelines.report import OUTCOMES, duration, render_text, report_of, source_outcomes, summarise

INFO = DatasetInfo(
    clip_grid=ClipGrid(),
    extractor="s3d:random:0",
    extractor_digest="00",
    feature_dim=1024,
    vocabulary="v1",
    num_visual_tokens=144,
)


def listing(source: str, **columns: Any) -> dict[str, Any]:
    return {"source_id": source, "uri": f"/v/{source}.mp4", "attempt": 0, "status": "pending", **columns}


def failure(source: str, *, status: str = "quarantined", attempt: int = 1, **columns: Any) -> dict[str, Any]:
    row = listing(source, attempt=attempt, status=status, stage="media", reason="unreadable", detail="no moov")
    return {**row, **columns}


def part(source: str, index: int = 0, of: int = 1, *, attempt: int = 1, **columns: Any) -> dict[str, Any]:
    kept = {"status": "kept", "attempt": attempt, "part_index": index, "num_parts": of, "video_id": f"v{source}"}
    shape = {"key": f"v{source}-{index}", "shard": "a.tar", "part_start_s": 0.0, "part_end_s": 6.0, "source_s": 6.5}
    content = {"num_clips": 4, "num_sentences": 2, "num_words": 9, "transcript": "captions", "features_s": 0.5}
    return {**listing(source), **kept, **shape, **content, **columns}


def ledger(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=LEDGER_SCHEMA)


def outcomes(*rows: dict[str, Any]) -> dict[str, str]:
    table = source_outcomes(ledger(*rows))
    return dict(zip(table["source_id"].to_pylist(), table["outcome"].to_pylist(), strict=True))


def test_a_source_that_was_only_listed_is_pending() -> None:
    assert outcomes(listing("a")) == {"a": "pending"}


def test_a_source_is_kept_only_when_all_its_parts_are() -> None:
    assert outcomes(listing("a"), part("a", 0, 2)) == {"a": "pending"}
    assert outcomes(listing("a"), part("a", 1, 2), part("a", 0, 2)) == {"a": "kept"}
    assert outcomes(listing("a"), part("a", 0, 2), part("a", 0, 2)) == {"a": "pending"}


def test_one_quarantined_part_quarantines_its_source() -> None:
    assert outcomes(part("a", 0, 2), failure("a"), failure("a", status="filtered")) == {"a": "quarantined"}
    assert outcomes(part("a", 0, 2), failure("a", status="filtered")) == {"a": "filtered"}


def test_only_the_latest_attempt_counts() -> None:
    assert outcomes(failure("a"), part("a", attempt=2)) == {"a": "kept"}
    assert outcomes(part("a"), failure("a", attempt=2)) == {"a": "quarantined"}
    assert outcomes(part("a", 0, 2), part("a", 1, 2, attempt=2)) == {"a": "pending"}


def test_an_empty_ledger_balances() -> None:
    report = summarise(ledger())
    assert report.balanced
    assert report.sources == {"total": 0, **dict.fromkeys(OUTCOMES, 0)}
    assert "total" in render_text(report)


def test_the_numbers_are_those_of_the_samples() -> None:
    rows = [listing(name) for name in "abcd"] + [part("a", 0, 2), part("a", 1, 2, transcript="sphinx"), part("a", 0, 2)]
    rows += [failure("b", source_s=3.0), failure("c", status="filtered", reason="too_short", detail=None)]
    report = summarise(ledger(*rows), shards={"a.tar"}, info=INFO)
    assert report.sources == {"total": 4, "kept": 1, "filtered": 1, "quarantined": 1, "pending": 1}
    assert report.reasons == {"too_short": 1, "unreadable": 1}
    assert report.seconds == {"total": 9.5, "kept": 6.5, "filtered": 0.0, "quarantined": 3.0, "pending": 0.0}
    assert (report.samples, report.visual_tokens, report.sentences, report.words) == (2, 8, 4, 18)
    assert report.transcripts == {"captions": 1, "sphinx": 1}
    assert report.stage_seconds == {"transcode": 0.0, "transcribe": 0.0, "features": 1.0}
    assert report.balanced
    assert json.loads(json.dumps(report.to_dict()))["balanced"] is True
    text = render_text(report)
    assert "RANDOM WEIGHTS" in text
    assert "/v/b.mp4" in text


@pytest.mark.parametrize(
    ("rows", "shards", "words"),
    [
        ([part("a")], {"a.tar"}, "0 sources are listed"),
        ([listing("a"), part("a"), part("b", source_id=None)], {"a.tar"}, "1 ledger rows name no source"),
        ([listing("a"), part("a")], set(), "1 shards of the ledger are missing"),
        ([listing("a"), part("a"), listing("b"), part("b", key="va-0")], {"a.tar"}, "1 sample keys"),
    ],
)
def test_books_that_do_not_balance_say_why(rows: list[dict[str, Any]], shards: set[str], words: str) -> None:
    report = summarise(ledger(*rows), shards=shards)
    assert not report.balanced
    assert words in " ".join(report.problems)
    assert "NOT BALANCED" in render_text(report)


@st.composite
def histories(draw: st.DrawFn) -> list[dict[str, Any]]:
    """What any number of runs may write about any number of sources; every source was listed."""
    rows = []
    for number in range(draw(st.integers(0, 8))):
        source = f"s{number}"
        rows.append(listing(source, source_s=draw(st.one_of(st.none(), st.floats(0, 1e5)))))
        for attempt in range(1, draw(st.integers(0, 3)) + 1):
            num_parts = draw(st.integers(1, 3))
            fates = draw(st.lists(st.sampled_from(["kept", "filtered", "quarantined", "lost"]), min_size=num_parts))
            for index, fate in enumerate(fates[:num_parts]):
                if fate == "kept":
                    rows.append(part(source, index, num_parts, attempt=attempt, shard=f"{draw(st.integers(0, 2))}.tar"))
                elif fate != "lost":
                    detail = draw(st.one_of(st.none(), st.text(max_size=3)))
                    rows.append(failure(source, status=fate, attempt=attempt, detail=detail))
    return rows


@settings(max_examples=60, deadline=None)
@given(rows=histories(), seed=st.integers(0, 1000))
def test_the_report_balances_for_any_history_in_any_order_with_any_copies(rows: list[dict], seed: int) -> None:
    once = summarise(ledger(*rows))
    shuffled = [*rows, *random.Random(seed).choices(rows, k=len(rows))] if rows else []
    random.Random(seed).shuffle(shuffled)
    files = [ledger(*shuffled[start : start + 3]) for start in range(0, len(shuffled), 3)] or [ledger()]
    again = summarise(pa.concat_tables([*files, *files]))
    assert once.balanced
    assert once.sources["total"] == sum(once.sources[name] for name in OUTCOMES) == len({r["source_id"] for r in rows})
    assert sum(once.reasons.values()) == once.sources["filtered"] + once.sources["quarantined"]
    assert again == once


def test_a_folder_in_which_nothing_was_kept_has_a_report(tmp_path: Any) -> None:
    (tmp_path / "ledger").mkdir()
    for name in ("one", "two"):  # two writers, the same rows
        pq.write_table(ledger(listing("a"), failure("a")), tmp_path / "ledger" / f"{name}.parquet")
    assert report_of(str(tmp_path)).sources["quarantined"] == 1
    with pytest.raises(FileNotFoundError, match="videobert ingest"):
        report_of(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (59.96, "1 min 00 s"), (185.4, "3 min 05 s"), (148_020, "41 h 07 min")]
)
def test_durations_are_written_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text
