"""The benchmark's own arithmetic, and the JSON that it promises."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import ingest
from benchmarks.harness import Bar, run_children, tree
from benchmarks.ours import GraphRun

BURN = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass"


def test_cpu_seconds_of_children_are_counted_and_waiting_is_not() -> None:
    spent = run_children(
        [[sys.executable, "-S", "-c", BURN], [sys.executable, "-S", "-c", "import time; time.sleep(1)"]], at_once=2
    )
    assert 0.3 <= spent.cpu_s < 0.9
    assert spent.wall_s >= 1.0


def test_a_grandchild_is_counted_too() -> None:
    starts_one = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {BURN!r}])"
    assert run_children([[sys.executable, "-S", "-c", starts_one]], at_once=1).cpu_s >= 0.3


def test_a_child_that_fails_ends_the_measurement_with_its_words() -> None:
    with pytest.raises(RuntimeError, match="no such oven"):
        run_children([[sys.executable, "-S", "-c", "raise SystemExit('no such oven')"]], at_once=1)


def test_children_run_in_the_folders_given(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
    writes = "open('here', 'w').close()"
    run_children([[sys.executable, "-S", "-c", writes]] * 2, at_once=1, folders=folders)
    assert all((folder / "here").exists() for folder in folders)


def test_this_process_is_in_its_own_tree_and_uses_memory() -> None:
    import os

    own = next(process for process in tree(os.getpid()) if process.pid == os.getpid())
    assert own.own_mb > 10
    assert own.cpu_s > 0


@pytest.fixture
def run() -> GraphRun:
    """Two workers: both busy from 2 to 7 and from 8 to 9; transcoding from 0 to 4."""
    return GraphRun(
        wall_s=12.0,
        began_s=0.0,
        intervals={"features": [(1.0, 5.0), (2.0, 7.0), (5.0, 9.0), (8.0, 11.0)], "transcode": [(0.0, 4.0)]},
        num_features_workers=2,
        num_kept=4,
        num_clips=40,
    )


def test_steady_state_is_from_the_first_features_until_a_worker_runs_dry(run: GraphRun) -> None:
    assert run.steady() == (1.0, 9.0)


def test_work_outside_of_the_steady_state_does_not_count_for_it(run: GraphRun) -> None:
    assert run.share_within("transcode", 2.0, 9.0) == pytest.approx(0.5)
    assert run.share_within("features", 2.0, 9.0) == pytest.approx(13 / 16)
    assert run.share_within("transcribe", 2.0, 9.0) == 0.0


def test_a_run_too_short_for_its_workers_is_refused() -> None:
    short = GraphRun(
        wall_s=1.0, began_s=0.0, intervals={"features": [(0.0, 1.0)]}, num_features_workers=2, num_kept=1, num_clips=1
    )
    with pytest.raises(RuntimeError, match="more video"):
        short.steady()


def test_a_bar_of_seconds_holds_below_its_goal() -> None:
    assert Bar(value=12.0, goal=60.0, unit="s", at_least=False).holds
    assert not Bar(value=0.8, goal=0.9, unit="ratio").holds


@pytest.mark.integration
def test_the_last_line_is_the_promised_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = ingest.main(["--json", "--quick", "--only", "ledger", "--work", str(tmp_path)])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(found) == {"bars", "details", "versions", "machine"}
    assert set(found["bars"]["ledger_million_rows"]) == {"value", "goal", "unit", "holds"}
    assert status == (0 if found["bars"]["ledger_million_rows"]["holds"] else 1)
