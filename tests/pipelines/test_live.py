"""What a person sees of a run, and how a run that can never end is left."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import ray

from pipelines.live import Reporter, Screen, Stalled, plain_line, stage_bars, start_counter, summary, until_stalled
from pipelines.progress import Counter, Crew, Progress, StageClock

CREWS = (Crew(stages=("fetch", "transcode"), num_workers=1), Crew(stages=("features",), num_workers=1))


def some_progress() -> Progress:
    """Ten seconds of fetching and transcoding, forty of eighty video seconds through features."""
    now_s = [0.0]
    counter = Counter(crews=CREWS, num_sources=2, now=lambda: now_s[0])
    counter.feed("fetch", 2)
    for stage in ("fetch", "transcode", "features"):
        counter.begin(stage, "w", 1)
        now_s[0] += 5.0
        counter.out(stage, rows=1, failures=0, video_s=40.0, num_bytes=0, blocked_s=0.0)
        counter.end(stage, "w", rows=1, blocked_s=0.0)
    return counter.progress()


def test_a_line_says_what_is_done_and_when_it_ends() -> None:
    progress = some_progress()
    assert plain_line(progress, elapsed_s=15.0).startswith(
        "fetch 1/2  transcode 1/2  features 1/~2; 0:00:15 so far, 0 failed, 2.7 video s/s in "
    )
    (fetch, _, _) = progress.stages
    assert fetch.left_s == 40.0
    assert fetch.time.video_s_per_s == pytest.approx(40 / 15)
    assert "about 0:00:15 left" in summary(dataclasses.replace(progress, stages=(fetch,)), elapsed_s=15.0)


def test_a_bar_is_half_full_where_half_of_the_video_is_through() -> None:
    head, fetch, _, features = stage_bars(some_progress())
    assert "starved" in head
    assert fetch.count("█") == features.count("█") == fetch.count("·") == 8


def test_a_table_is_redrawn_over_itself_and_gives_way_to_lines() -> None:
    stream = io.StringIO()
    screen = Screen(stream)
    screen.draw(["one", "two"])
    screen.draw(["x" * 500, "four"])
    screen.clear()
    screen.clear()
    first, second, cleared = stream.getvalue().split("\x1b[2F\x1b[J")
    assert first == "one\ntwo\n"
    assert max(map(len, second.splitlines())) < 500  # a wrapped line could not be erased
    assert cleared == ""


@contextlib.contextmanager
def reporting(counter: object, **settings: float) -> Iterator[tuple[Reporter, list[str]]]:
    said: list[str] = []
    with Reporter(counter, say=said.append, stream=io.StringIO(), every_s=0.05, **settings) as reporter:
        yield reporter, said


def wait_for(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


@pytest.mark.integration
def test_killing_the_counter_costs_counts_and_nothing_else(ray_session: None) -> None:
    counter = start_counter(crews=CREWS, num_sources=3)
    pid = ray.get(counter.__ray_call__.remote(lambda _: os.getpid()))
    with reporting(counter) as (reporter, said):
        reporter.feed("fetch", 3)
        work(counter)
        wait_for(lambda: any("fetch 1/3" in line for line in said))
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: any("died and is back" in line for line in said))
        work(counter)
        wait_for(lambda: any("fetch 2/3" in line for line in said))
        assert not reporter.stalled.is_set()
    fetch = reporter.stage_times.stages[0]
    assert (fetch.stage, fetch.rows, fetch.video_s) == ("fetch", 2, 20.0)
    assert any("fetch 2/3" in line for line in said[-1:])


def work(counter: object) -> None:
    with StageClock(counter, "fetch", feeds="transcode").row() as told:
        told.out(video_s=10.0)


@pytest.mark.integration
def test_workers_in_other_processes_tell_of_their_rows(ray_session: None) -> None:
    counter = start_counter(crews=CREWS, num_sources=3)
    clock = StageClock(counter, "features")

    @ray.remote(num_cpus=0)
    def handle() -> None:
        with clock.row() as told:
            told.out(rows=0, failures=1, video_s=7.0)

    with reporting(counter) as (reporter, _):
        ray.get([handle.remote() for _ in range(3)])
        wait_for(lambda: bool(reporter.stage_times.stages) and reporter.stage_times.stages[-1].rows == 3)
    features = reporter.stage_times.stages[-1]
    assert (features.rows, features.failures, features.video_s) == (3, 3, 0.0)


@pytest.mark.integration
def test_a_standstill_is_told_and_a_hopeless_one_ended(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.live.STALL_S", 0.3)
    counter = start_counter(crews=CREWS, num_sources=3)
    never = threading.Event()

    def results() -> Iterator[int]:
        yield 1
        never.wait()

    with reporting(counter, stall_timeout_s=2.0) as (reporter, said), StageClock(counter, "fetch").row():
        taken = until_stalled(results(), reporter)
        assert next(taken) == 1
        with pytest.raises(Stalled, match=r"no stage has moved for \d+ s: fetch has 1 rows in hand.*run the same"):
            next(taken)
    assert any("no stage has moved" in line and "CPUs are free" in line for line in said)
    never.set()


@pytest.mark.integration
def test_a_cluster_that_does_not_answer_ends_the_run(ray_session: None) -> None:
    counter = start_counter(crews=CREWS, num_sources=3)
    ray.kill(counter)  # for good, as after the loss of the only node
    with reporting(counter, unreachable_s=1.0) as (reporter, _):
        with pytest.raises(Stalled, match="the cluster has not answered for"):
            list(until_stalled(iter(threading.Event().wait, None), reporter))
        assert reporter.stage_times.stages == ()


@pytest.mark.parametrize("num_taken", [1, 3])
def test_results_come_in_order_and_end_with_their_error_or_their_consumer(num_taken: int) -> None:
    reporter = Reporter(None, say=print, stream=io.StringIO())
    closed = threading.Event()

    def results() -> Iterator[int]:
        try:
            yield from range(3)
            raise KeyError("from the run")
        finally:
            closed.set()

    taken = until_stalled(results(), reporter)
    assert [next(taken) for _ in range(num_taken)] == list(range(num_taken))
    if num_taken == 3:
        with pytest.raises(KeyError, match="from the run"):
            next(taken)
    taken.close()  # what a loop does that is left by an error
    assert closed.wait(10)
