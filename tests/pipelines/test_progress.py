"""What the counter makes of the workers' messages: counts, and whose fault it is that a worker stands still."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.progress import Counter, Crew, Progress, StageClock, StageTime, StageTimes, row_video_s

CREWS = (
    Crew(stages=("fetch", "transcode"), num_workers=1),
    Crew(stages=("transcribe",), num_workers=1),
    Crew(stages=("features",), num_workers=2),
    Crew(stages=("tokens",), num_workers=0),
    Crew(stages=("commit",), num_workers=1, batch_rows=4),
)


class Clock:
    def __init__(self) -> None:
        self.s = 100.0

    def __call__(self) -> float:
        return self.s


class Graph:
    """Drives a counter by hand, with a clock that moves when told."""

    def __init__(self, *, num_sources: int = 4, num_bytes: int = 0) -> None:
        self.clock = Clock()
        self.counter = Counter(crews=CREWS, num_sources=num_sources, num_bytes=num_bytes, now=self.clock)
        self.counter.feed("fetch", num_sources)

    def wait(self, seconds: float) -> None:
        self.clock.s += seconds

    def begin(self, stage: str, worker: str = "w", rows: int = 1) -> None:
        self.counter.begin(stage, worker, rows)

    def out(self, stage: str, **told: Any) -> None:
        zero: dict[str, Any] = {"rows": 1, "failures": 0, "video_s": 0.0, "num_bytes": 0, "blocked_s": 0.0}
        self.counter.out(stage, **(zero | told))

    def end(self, stage: str, worker: str = "w", *, rows: int = 1, blocked_s: float = 0.0) -> None:
        self.counter.end(stage, worker, rows=rows, blocked_s=blocked_s)

    def work(self, stage: str, seconds: float, worker: str = "w", **told: Any) -> None:
        self.begin(stage, worker)
        self.wait(seconds)
        self.out(stage, **told)
        self.end(stage, worker)

    def now(self) -> Progress:
        return self.counter.progress()

    def time(self, stage: str) -> StageTime:
        return self.now()[stage].time


def test_a_stage_whose_input_does_not_come_is_starved() -> None:
    graph = Graph(num_sources=2)
    graph.work("fetch", 1.0)
    graph.work("transcode", 3.0)
    graph.work("transcribe", 1.0)
    graph.work("fetch", 1.0)
    graph.work("transcode", 6.0)  # transcribe has nothing to do for these seven seconds
    graph.begin("transcribe")
    found = graph.time("transcribe")
    assert (found.busy_s, found.starved_s, found.backpressured_s) == (1.0, 7.0, 0.0)


def test_a_stage_that_stands_still_before_waiting_rows_is_held_back() -> None:
    graph = Graph()
    graph.work("fetch", 1.0)
    graph.work("transcode", 2.0)
    graph.wait(5.0)  # three sources wait, and nobody takes one
    found = graph.time("fetch")
    assert (found.busy_s, found.starved_s, found.backpressured_s) == (1.0, 0.0, 5.0)
    assert graph.time("transcode").busy_s == 2.0


def test_a_stage_without_input_is_held_back_while_rows_pile_up_behind_it() -> None:
    """With features the bottleneck, more transcripts would help nobody."""
    graph = Graph(num_sources=9)
    graph.counter.ready("features")
    for _ in range(3):
        graph.work("fetch", 0.0)
        graph.work("transcode", 0.0)
        graph.work("transcribe", 0.0)
    assert graph.now()["features"].num_waiting == 3  # for two workers
    graph.wait(4.0)
    held = graph.time("transcribe")
    assert (held.starved_s, held.backpressured_s) == (0.0, 4.0)
    graph.begin("features", "a")
    graph.begin("features", "b")
    graph.wait(2.0)  # one row waits: no pile any more
    assert graph.time("transcribe").starved_s == 2.0


def test_rows_that_wait_for_another_execution_hold_nobody_back() -> None:
    """The first run ends at the features, and their rows pile up before a stage that is not there yet."""
    graph = Graph(num_sources=3)
    for _ in range(3):
        for stage in ("fetch", "transcode", "transcribe", "features"):
            graph.work(stage, 0.0)
        graph.begin("fetch", "other")  # one more is still to come
    graph.wait(4.0)
    assert graph.now()["tokens"].num_waiting == 3
    assert (graph.time("features").starved_s, graph.time("features").backpressured_s) == (8.0, 0.0)


def test_a_finished_part_that_nobody_takes_is_back_pressure_and_not_work() -> None:
    graph = Graph(num_sources=1)
    graph.work("fetch", 1.0)
    graph.begin("transcode")
    graph.wait(2.0)
    graph.out("transcode")
    graph.wait(5.0)
    graph.out("transcode", blocked_s=4.5)
    graph.end("transcode")
    found = graph.time("transcode")
    assert (found.busy_s, found.backpressured_s) == (2.5, 4.5)
    assert (found.rows, found.rows_out) == (1, 2)


def test_loading_and_the_tail_count_for_nothing() -> None:
    graph = Graph(num_sources=1)
    graph.wait(9.0)  # workers load
    graph.counter.ready("transcribe")
    graph.work("fetch", 2.0)
    graph.work("transcode", 3.0)
    graph.work("transcribe", 4.0)
    graph.wait(50.0)  # no source is left: decoding and recognition are over
    fetch, transcribe = graph.time("fetch"), graph.time("transcribe")
    assert (fetch.starved_s, fetch.backpressured_s) == (0.0, 0.0)
    assert (transcribe.starved_s, transcribe.busy_s, transcribe.span_s) == (5.0, 4.0, 9.0)


@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["fetch", "transcribe", "features", "commit"]),
            st.sampled_from(["begin", "out", "end", "ready"]),
            st.sampled_from("abc"),
            st.floats(0, 10),
        ),
        max_size=60,
    )
)
def test_a_stages_time_adds_up_whatever_is_told(steps: list[tuple[str, str, str, float]]) -> None:
    """Messages get lost and workers die; no second is counted twice or below zero."""
    graph = Graph(num_sources=3)
    for stage, kind, worker, seconds in steps:
        graph.wait(seconds)
        if kind == "begin":
            graph.begin(stage, worker)
        elif kind == "out":
            graph.out(stage, blocked_s=seconds / 2)
        elif kind == "end":
            graph.end(stage, worker)
        else:
            graph.counter.ready(stage)
    for now in graph.now().stages:
        one = now.time
        assert min(one.busy_s, one.starved_s, one.backpressured_s, now.num_waiting) >= 0
        if one.stage != "transcode" and one.num_workers:  # transcode shares fetch's places
            parts_s = one.busy_s + one.starved_s + one.backpressured_s
            assert parts_s <= one.num_workers * graph.now().elapsed_s + 1e-6
            assert now.num_in_hand <= one.num_workers


def test_the_row_of_a_dead_worker_is_let_go_when_its_place_is_taken() -> None:
    graph = Graph()
    graph.begin("transcribe", "killed")
    graph.wait(10.0)
    graph.begin("transcribe", "successor")
    now = graph.now()["transcribe"]
    assert (now.num_in_hand, now.longest_s) == (1, 0.0)


def test_a_row_is_known_by_the_workers_that_died_over_it() -> None:
    counter = Graph().counter
    assert [counter.begin("features", worker, 1, key="a 0") for worker in "xyz"] == [0, 1, 2]
    assert counter.begin("features", "x", 1, key="b 0") == 0
    assert counter.begin("transcribe", "x", 1, key="a 0") == 0
    counter.end("features", "z", rows=1, blocked_s=0.0, key="a 0")
    assert counter.begin("features", "x", 1, key="a 0") == 0


def test_failed_rows_leave_the_stages_and_are_written_down_at_the_end() -> None:
    graph = Graph(num_sources=4)
    graph.work("fetch", 1.0, rows=0, failures=1)
    for _ in range(3):
        graph.work("fetch", 1.0, video_s=10.0)
        graph.work("transcode", 1.0, video_s=10.0)
    now = graph.now()
    assert (now["fetch"].time.failures, now["fetch"].time.rows, now["fetch"].time.rows_out) == (1, 4, 3)
    assert (now["transcode"].expected_rows, now["transcribe"].expected_rows) == (3, 3)
    assert now["commit"].expected_rows == 4
    assert now["commit"].num_waiting == 1
    assert all(stage.is_certain for stage in now.stages)


def test_what_is_left_is_told_from_the_bytes_not_probed_yet() -> None:
    """Large sources go first: by their number half would be left, by their bytes it is a tenth."""
    graph = Graph(num_sources=2, num_bytes=1000)
    graph.work("fetch", 1.0, video_s=90.0, num_bytes=900)
    now = graph.now()
    assert now["fetch"].left_s == pytest.approx(10.0)
    assert now["features"].left_s == pytest.approx(100.0)
    graph.work("transcode", 1.0, rows=0, failures=1, video_s=90.0)
    assert graph.now()["features"].left_s == pytest.approx(10.0)


def test_parts_are_estimated_until_every_source_is_cut() -> None:
    graph = Graph(num_sources=2)
    graph.work("fetch", 1.0)
    graph.begin("transcode")
    for _ in range(3):
        graph.out("transcode")
    graph.end("transcode")
    assert (graph.now()["features"].expected_rows, graph.now()["features"].is_certain) == (6, False)


def test_rates_of_the_last_minute_forget_what_is_older() -> None:
    graph = Graph(num_sources=99)
    for _ in range(30):
        graph.work("transcribe", 1.0, video_s=10.0)
    graph.wait(30.0)
    assert graph.now()["transcribe"].recent_video_s_per_s == pytest.approx(5.0)
    graph.wait(31.5)
    assert graph.now()["transcribe"].recent_video_s_per_s < 5.0
    graph.wait(60.0)
    assert graph.now()["transcribe"].recent_rows_per_s == 0.0
    assert graph.time("transcribe").rows == 30


def test_feeding_the_spool_begins_at_the_tokens() -> None:
    """Rows that wait on disk for a vocabulary have passed the stages before."""
    graph = Graph(num_sources=1)
    for stage in ("fetch", "transcode", "transcribe", "features"):
        graph.work(stage, 1.0)
    graph.wait(30.0)  # the vocabulary is fitted: nobody works, nobody stands still
    graph.counter.feed("tokens", 1)
    graph.work("tokens", 1.0)
    found = graph.time("features")
    assert (found.busy_s, found.starved_s) == (1.0, 1.0)  # of two workers one had the only row
    assert (graph.time("tokens").rows, graph.now()["tokens"].num_waiting) == (1, 0)


def test_a_clock_without_a_counter_is_nothing_and_travels() -> None:
    clock = pickle.loads(pickle.dumps(StageClock(None, "fetch", feeds="transcode")))
    clock.ready()
    with clock.row() as told:
        told.out(video_s=1.0)
        with told.handed():
            pass


def test_a_table_has_a_line_for_each_stage_and_is_json() -> None:
    times = StageTimes(
        (
            StageTime(stage="fetch", num_workers=2, rows=3, busy_s=1.0, starved_s=1.0, backpressured_s=2.0),
            StageTime(stage="tokens", num_workers=0, rows=3, video_s=30.0, busy_s=1.0, span_s=10.0),
        )
    )
    head, fetch, tokens = times.lines()
    assert head.split()[:2] == ["stage", "workers"]
    assert fetch.split()[-3:] == ["25%", "25%", "50%"]
    assert tokens.split()[-3:] == ["-", "-", "-"]  # nobody can stand still there
    assert times.to_dict()["tokens"]["video_s_per_s"] == 3.0
    assert times.to_dict()["fetch"]["video_s_per_s"] is None
    assert json.loads(json.dumps(times.to_dict())) == times.to_dict()


def test_a_row_stands_for_its_part_and_before_that_for_its_source() -> None:
    assert row_video_s({"part_start_s": 2.0, "part_end_s": 5.0, "declared_s": 9.0}) == 3.0
    assert row_video_s({"part_start_s": None, "part_end_s": None, "declared_s": 9.0}) == 9.0
    assert row_video_s({"declared_s": None}) == 0.0
