"""Ledger rows for the tests: what runs write, in short words, and histories of any shape."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
from hypothesis import strategies as st

from pipelines.ledger import LEDGER_SCHEMA

PART_S = 6.0

LedgerRow = dict[str, Any]


def listing(source: str, **columns: Any) -> LedgerRow:
    return {"source_id": source, "uri": f"/v/{source}.mp4", "attempt": 0, "status": "pending", **columns}


def verdict(source: str, status: str = "quarantined", *, attempt: int = 1, **columns: Any) -> LedgerRow:
    """Over a whole source, unless a part_index is given."""
    reason = "unreadable" if status == "quarantined" else "too_short"
    row = listing(source, attempt=attempt, status=status, stage="transcode", reason=reason, detail="no moov")
    return {**row, **columns}


def part(source: str, index: int = 0, of: int | None = 1, *, attempt: int = 1, **columns: Any) -> LedgerRow:
    """A kept part of six seconds."""
    kept = {"status": "kept", "attempt": attempt, "part_index": index, "num_parts": of, "video_id": f"v{source}"}
    place = {"key": f"v{source}-{index}", "shard": "a.tar", "offset": 100 * index, "num_bytes": 100}
    span = {"part_start_s": index * PART_S, "part_end_s": (index + 1) * PART_S}
    content = {"num_clips": 4, "num_sentences": 2, "num_words": 9, "transcript": "captions", "features_s": 0.5}
    return {**listing(source), **kept, **place, **span, **content, **columns}


def dropped(source: str, index: int = 0, of: int | None = 1, *, reason: str = "static", **columns: Any) -> LedgerRow:
    """A filtered part of six seconds."""
    nothing = {"key": None, "shard": None, "offset": None, "num_bytes": None, "num_clips": None, "num_words": None}
    told = {"status": "filtered", "stage": "transcode", "reason": reason, "transcript": None, "num_sentences": None}
    return part(source, index, of, **{**nothing, **told, **columns})


def ledger(*rows: LedgerRow) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=LEDGER_SCHEMA)


@st.composite
def histories(draw: st.DrawFn) -> list[LedgerRow]:
    """What any number of runs may write about any number of sources, in the order of writing; all were listed.

    Sources share contents (video ids) now and then, fail, lose parts to a crash, and are cut differently by each
    attempt; some say how long they are.
    """
    rows = []
    seconds = st.one_of(st.none(), st.floats(0, 1e5))
    for number in range(draw(st.integers(0, 8))):
        source = f"s{number}"
        video = {"video_id": f"v{draw(st.integers(0, 2))}" if draw(st.booleans()) else f"v{source}"}
        rows.append(listing(source))
        for attempt in range(1, draw(st.integers(0, 3)) + 1):
            common = {"attempt": attempt, "declared_s": draw(seconds), **video}
            num_parts = draw(st.integers(1, 3))
            for index in range(num_parts):
                fate = draw(st.sampled_from(["kept", "kept", "kept", "dropped", "filtered", "quarantined", "lost"]))
                last = {"num_parts": num_parts, "source_s": draw(seconds)} if index == num_parts - 1 else {}
                key = f"{video['video_id']}-{index}"
                if fate == "kept":
                    shard = f"{draw(st.integers(0, 2))}.tar"
                    rows.append(part(source, index, None, key=key, shard=shard, **{**common, **last}))
                elif fate == "dropped":
                    rows.append(dropped(source, index, None, **{**common, **last}))
                elif fate != "lost":
                    detail = draw(st.one_of(st.none(), st.text(max_size=3)))
                    rows.append(verdict(source, fate, detail=detail, **common))
    return rows
