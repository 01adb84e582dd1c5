"""What waits for the first vocabulary survives the run that extracted it, whole sources only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.rows import ROW_SCHEMA, to_table
from pipelines.spool import Spool
from pipelines.storage import Folder


def row(source: str, part: int | None, **known: Any) -> dict[str, Any]:
    features = np.full((2, 4), part or 0, np.float16).tobytes()
    empty = dict.fromkeys(ROW_SCHEMA.names) | {"source_id": source, "attempt": 1, "part_index": part}
    return empty | {"num_clips": 2, "features": features} | known


def todo(*sources: str, attempt: int = 1) -> pa.Table:
    return pa.table({"source_id": list(sources), "attempt": pa.array([attempt] * len(sources), pa.int32())})


def spool(tmp_path: Path, digest: str = "a") -> Spool:
    return Spool(folder=Folder.at(str(tmp_path)), digest=digest)


def put(into: Spool, *rows: dict[str, Any]) -> None:
    for one in rows:
        into.put(to_table([one]))


def complete(of: Spool, *sources: str, attempt: int = 1) -> set[str]:
    return set(of.complete(todo(*sources, attempt=attempt))["source_id"].to_pylist())


def test_a_source_counts_when_its_last_part_and_all_before_are_there(tmp_path: Path) -> None:
    here = spool(tmp_path)
    put(here, row("whole", 0), row("whole", 1, num_parts=2))
    put(here, row("lacks its last", 0), row("lacks its first", 1, num_parts=2))
    put(here, row("nobody asks", 0, num_parts=1))
    assert complete(here, "whole", "lacks its last", "lacks its first", "never seen") == {"whole"}


def test_a_verdict_over_a_source_or_a_failed_part_settles_it(tmp_path: Path) -> None:
    here = spool(tmp_path)
    put(here, row("no video", None, status="filtered", reason="no_video", features=None, num_clips=None))
    put(here, row("failed", 0, status="quarantined", reason="features_failed", features=None, num_clips=None))
    assert complete(here, "no video", "failed") == {"no video", "failed"}


def test_rows_come_back_as_they_were_and_a_repeated_write_lands_on_itself(tmp_path: Path) -> None:
    here, one = spool(tmp_path), to_table([row("a", 0, num_parts=1, title="A", sentences=[])])
    names = here.put(one)
    assert here.put(one) == names
    assert here.get(names) == one
    assert len(list((tmp_path / "extracted").iterdir())) == 1
    assert here.features(names["name"].to_pylist()).shape == (2, 4)


def test_rows_of_other_settings_or_of_another_attempt_do_not_count(tmp_path: Path) -> None:
    put(spool(tmp_path, "a"), row("s", 0, num_parts=1))
    assert complete(spool(tmp_path, "b"), "s") == set()
    assert complete(spool(tmp_path, "a"), "s", attempt=2) == set()
    assert complete(spool(tmp_path, "a"), "s") == {"s"}


def test_an_empty_spool_is_complete_for_nobody_and_a_cleared_one_leaves_no_folder(tmp_path: Path) -> None:
    here = spool(tmp_path)
    assert complete(here, "s") == set()
    put(here, row("s", 0, num_parts=1))
    here.clear()
    assert list(tmp_path.iterdir()) == []
