"""The books: that they add up, that they say so when they do not, and what they tell people."""

from __future__ import annotations

import json
import random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.dataset import ClipGrid, DatasetInfo
from pipelines.ledger import OUTCOMES
from pipelines.report import duration, render_text, report_of, summarise
from tests.pipelines.ledgers import LedgerRow, dropped, histories, ledger, listing, part, verdict

INFO = DatasetInfo(
    clip_grid=ClipGrid(),
    extractor="s3d:random:0",
    extractor_digest="00",
    feature_dim=1024,
    vocabulary="v1",
    num_visual_tokens=144,
)


def test_an_empty_ledger_balances() -> None:
    report = summarise(ledger())
    assert report.balanced
    assert report.sources == {"total": 0, **dict.fromkeys(OUTCOMES, 0)}
    assert "total" in render_text(report)


def test_the_numbers_are_those_of_the_samples() -> None:
    rows = [listing(name) for name in "abcd"] + [part("a", 0, None), part("a", 1, 2, transcript="sphinx"), part("a")]
    rows += [verdict("b", declared_s=3.0), verdict("c", "filtered", reason="too_short", detail=None)]
    report = summarise(ledger(*rows), shards={"a.tar": 200}, info=INFO)
    assert report.sources == {"total": 4, "kept": 1, "filtered": 1, "quarantined": 1, "pending": 1}
    assert report.reasons == {"too_short": 1, "unreadable": 1}
    assert report.seconds == {
        "total": 15.0, "kept": 12.0, "filtered": 0.0, "quarantined": 3.0, "pending": 0.0, "missing": 0.0,
    }  # fmt: skip
    assert report.sources_without_duration == 2
    assert (report.samples, report.visual_tokens, report.sentences, report.words) == (2, 8, 4, 18)
    assert report.transcripts == {"captions": 1, "sphinx": 1}
    assert report.attempts == {"0": 1, "1": 3}
    assert report.balanced
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["balanced"] is True
    text = render_text(report)
    assert "RANDOM WEIGHTS" in text
    assert "/v/b.mp4" in text


def test_seconds_that_were_declared_but_not_decoded_are_named() -> None:
    rows = [listing(name) for name in "abc"]
    rows += [part("a", declared_s=49.58, detail="ends early"), part("b", declared_s=6.9), verdict("c", declared_s=9.0)]
    report = summarise(ledger(*rows))
    assert report.seconds["missing"] == pytest.approx(43.58 + 0.9)
    assert report.missing_seconds == (
        {"uri": "/v/a.mp4", "declared_s": 49.58, "decoded_s": 6.0, "missing_s": 43.58, "detail": "ends early"},
    )
    assert report.balanced
    assert "49.6 s declared, 6.0 s decoded, 43.6 s missing. ends early" in render_text(report)


def test_filtered_parts_count_with_their_reason_in_seconds_but_not_in_videos() -> None:
    report = summarise(ledger(listing("a"), part("a", 0, None), dropped("a", 1, 2, reason="blank")))
    assert (report.reasons, report.seconds_by_reason) == ({}, {"blank": 6.0})
    assert (report.seconds["kept"], report.seconds["filtered"]) == (6.0, 6.0)
    assert report.balanced
    assert "parts of kept sources" in render_text(report)


def test_time_is_counted_once_for_a_row_and_its_copies_and_once_for_the_fetch_of_all_parts() -> None:
    spent = {"fetch_s": 2.0, "transcode_s": 1.5, "declared_s": 12.0}
    rows = [listing("a"), part("a", 0, None, **spent), part("a", 1, 2, **spent), part("a", 1, 2, **spent)]
    rows += [listing("b"), verdict("b", fetch_s=1.0), part("b", attempt=2, fetch_s=1.0, declared_s=6.0)]
    stages = {stage["stage"]: stage for stage in summarise(ledger(*rows)).stages}
    assert (stages["fetch"]["rows"], stages["fetch"]["seconds"], stages["fetch"]["video_seconds"]) == (3, 4.0, 18.0)
    assert stages["transcode"] == {
        "stage": "transcode", "rows": 2, "seconds": 3.0, "video_seconds": 12.0, "seconds_per_video_second": 0.25,
    }  # fmt: skip
    assert stages["features"]["seconds"] == 1.5
    assert stages["transcribe"]["seconds_per_video_second"] is None


def test_the_text_shows_how_often_a_source_failed_and_the_end_of_what_was_said() -> None:
    said = "\n".join(f"line {number}" for number in range(9))
    text = render_text(summarise(ledger(listing("a"), verdict("a"), verdict("a", attempt=2, detail=said))))
    assert "unreadable in transcode, failed 2 times" in text
    assert "| line 8" in text
    assert "| line 4" not in text


def test_durations_fall_into_steps_by_outcome() -> None:
    rows = [verdict("a", declared_s=9.99), verdict("b", declared_s=10.0), part("c", declared_s=9000.0), listing("d")]
    steps = summarise(ledger(*rows)).durations
    assert [step["quarantined"] for step in steps[:3]] == [1, 1, 0]
    assert (steps[-1]["below_s"], steps[-1]["kept"]) == (None, 1)
    assert sum(step[name] for step in steps for name in OUTCOMES) == 3


@pytest.mark.parametrize(
    ("rows", "shards", "words"),
    [
        ([part("a")], {"a.tar": 100}, "0 sources are listed"),
        ([listing("a"), part("a"), part("b", source_id=None)], {"a.tar": 100}, "1 ledger rows name no source"),
        ([listing("a"), part("a")], {}, "1 shards of the ledger are missing"),
        ([listing("a"), part("a")], {"a.tar": 99}, "1 shards are shorter than their samples need"),
        ([listing("a"), part("a"), listing("b"), part("b", key="va-0")], {"a.tar": 100}, "1 sample keys"),
        ([listing("a"), part("a"), listing("b"), part("b", key="va-0")], {"a.tar": 100}, "12.000 s of the sources"),
        ([listing("a"), part("a", source_s=3.0)], {"a.tar": 100}, "the parts of 1 sources last longer"),
    ],
)
def test_books_that_do_not_balance_say_why(rows: list[LedgerRow], shards: dict[str, int], words: str) -> None:
    report = summarise(ledger(*rows), shards=shards)
    assert not report.balanced
    assert words in " ".join(report.problems)
    assert "NOT BALANCED" in render_text(report)


def test_a_missing_shard_of_an_attempt_that_does_not_count_is_no_problem() -> None:
    rows = [listing("a"), part("a", shard="old.tar"), part("a", attempt=2)]
    assert summarise(ledger(*rows), shards={"a.tar": 100}).balanced


@settings(max_examples=40, deadline=None)
@given(rows=histories(), seed=st.integers(0, 1000))
def test_the_report_adds_up_for_any_history_in_any_order_with_any_copies(rows: list[LedgerRow], seed: int) -> None:
    once = summarise(ledger(*rows))
    shuffled = [*rows, *random.Random(seed).choices(rows, k=len(rows))] if rows else []
    random.Random(seed).shuffle(shuffled)
    files = [ledger(*shuffled[start : start + 3]) for start in range(0, len(shuffled), 3)] or [ledger()]
    again = summarise(pa.concat_tables([*files, *files]))
    assert again == once
    assert once.sources["total"] == sum(once.sources[name] for name in OUTCOMES) == len({r["source_id"] for r in rows})
    assert once.seconds["total"] == pytest.approx(sum(once.seconds[name] for name in (*OUTCOMES, "missing")), abs=0.01)
    assert sum(once.reasons.values()) == once.sources["filtered"] + once.sources["quarantined"]
    assert sum(once.seconds_by_reason.values()) == pytest.approx(
        once.seconds["filtered"] + once.seconds["quarantined"], abs=0.02
    )
    assert once.sample_seconds == pytest.approx(once.seconds["kept"], abs=0.01)
    assert sum(once.attempts.values()) == once.sources["total"]
    assert not [problem for problem in once.problems if "last longer" not in problem and "sample keys" not in problem]


def test_a_folder_in_which_nothing_was_kept_has_a_report(tmp_path: Any) -> None:
    (tmp_path / "ledger").mkdir()
    for name in ("one", "two"):  # two writers, the same rows
        pq.write_table(ledger(listing("a"), verdict("a")), tmp_path / "ledger" / f"{name}.parquet")
    assert report_of(str(tmp_path)).sources["quarantined"] == 1
    with pytest.raises(FileNotFoundError, match="videobert ingest"):
        report_of(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (59.96, "1 min 00 s"), (185.4, "3 min 05 s"), (148_020, "41 h 07 min")]
)
def test_durations_are_written_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text
