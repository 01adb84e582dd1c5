"""A long video does not wait for its own end: its first part is through the graph while ffmpeg decodes the rest."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.graph import stream_of

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
