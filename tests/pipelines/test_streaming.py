"""How rows move through Ray Data: a long video does not wait for its own end, and one that kills workers passes by."""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from ray.data import ActorPoolStrategy, TaskPoolStrategy

from pipelines.graph import stream_of
from pipelines.live import start_counter
from pipelines.progress import Crew
from pipelines.rows import ROW_SCHEMA, Row
from pipelines.stages import on_batches

GIVES_UP_AFTER_S = 60.0


def makes_two(table: pa.Table, *, taken: Path) -> Iterator[pa.Table]:
    """A second row only when somebody has taken the first."""
    yield table
    deadline_s = time.monotonic() + GIVES_UP_AFTER_S
    while not taken.exists():
        if time.monotonic() > deadline_s:
            raise TimeoutError("nobody takes the first row before the second is made")
        time.sleep(0.05)
    yield table


def takes(table: pa.Table, *, taken: Path) -> pa.Table:
    taken.touch()
    return table


@pytest.mark.integration
def test_a_row_moves_on_before_the_next_one_is_made(ray_session: None, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    one = {"batch_size": 1, "batch_format": "pyarrow"}
    rows = stream_of([pa.table({"uri": ["a"]})])
    rows = rows.map_batches(functools.partial(makes_two, taken=taken), num_cpus=0.1, **one)
    # Another share of a CPU, or Ray would fuse the two into one process.
    rows = rows.map_batches(functools.partial(takes, taken=taken), num_cpus=0.2, **one)
    assert rows.take_all() == [{"uri": "a"}] * 2


def survives_all_but_one(row: Row) -> Iterator[Row]:
    """As a recogniser does that a sound makes crash."""
    if row["source_id"] == "poison":
        os.kill(os.getpid(), signal.SIGKILL)
    yield row


class Recogniser:
    def __init__(self, *, counter: object) -> None:
        self._batch = on_batches("transcribe", [("transcribe", survives_all_but_one)], counter=counter)

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        yield from self._batch(table)


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["actor", "task"])
def test_a_row_that_kills_every_worker_costs_itself_only(ray_session: None, kind: str) -> None:
    counter = start_counter(crews=[Crew(stages=("transcribe",), num_workers=1)], num_sources=3)
    given = [dict.fromkeys(ROW_SCHEMA.names) | {"source_id": name} for name in ("a", "poison", "b")]
    rows = stream_of([pa.Table.from_pylist([row], schema=ROW_SCHEMA) for row in given])
    one = {"batch_size": 1, "batch_format": "pyarrow", "num_cpus": 0.1}
    if kind == "actor":
        constructor = {"fn_constructor_kwargs": {"counter": counter}}
        rows = rows.map_batches(Recogniser, compute=ActorPoolStrategy(size=1), **constructor, **one)
    else:
        stage = on_batches("transcribe", [("transcribe", survives_all_but_one)], counter=counter)
        rows = rows.map_batches(stage, compute=TaskPoolStrategy(size=1), **one)
    found = {row["source_id"]: (row["status"], row["reason"], row["detail"]) for row in rows.take_all()}
    assert found == {
        "a": (None, None, None),
        "b": (None, None, None),
        "poison": ("quarantined", "worker_lost", "3 workers died of it"),
    }
