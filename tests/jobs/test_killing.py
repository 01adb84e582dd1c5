"""SIGKILL at any moment, then the same command again: the dataset is that of a run that nobody disturbed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.jobs import killing


@pytest.mark.slow
def test_fifty_kills_at_random_moments_change_nothing(tmp_path: Path) -> None:
    """Half an hour; `python -m tests.jobs.killing` prints the table."""
    rounds = killing.run(rounds=range(50), seed=0, work=tmp_path)
    assert [(r.number, r.faults) for r in rounds if r.faults] == []


@pytest.mark.slow
def test_a_killed_driver_and_a_killed_worker_change_nothing(tmp_path: Path) -> None:
    rounds = killing.run(rounds=range(2), seed=7, work=tmp_path)
    assert [r.target for r in rounds] == ["driver", "worker"]
    assert [(r.number, r.faults) for r in rounds if r.faults] == []
