"""What the stages of a running graph have done, and what their workers wait for.

Workers tell one small actor when they take a row, when a row leaves them and when they are done with it; everything
else is arithmetic on those three. So the actor also knows what is in hand now, a long row can be told from a dead
stage, and a row that kills every worker is known by it. The price is three messages a row and stage, of which a worker
waits for the first one's answer: 0.4 ms of CPU each on a busy machine, and the actor takes 1,000 a second, enough for
60 parts a second through the whole graph.

A worker's time is *busy* (a row in hand) or it stands still. Standing still is told apart by a rule, not by insight:

- *back-pressured*: a row waits for this worker, or some later stage has more rows waiting than workers. It has not got
  more to do because what it makes is not wanted yet (Ray's budgets for memory and CPU hold it back). Also counted here,
  and measured exactly: a row in hand whose finished part nobody takes (`RowClock.handed`).
- *data-starved*: else. Nothing waits here and nothing piles up behind: the stages before are too slow.
- neither: before a worker's stage has begun, and once no row can come any more.

So the bottleneck is the stage where the words change: back-pressured before it, starved after it. It is an estimate: a
row counts as waiting from the message that it left the stage before, thus the milliseconds in which Ray moves it look
like back-pressure; workers are counted and not followed, so one that dies keeps its row until a successor needs the
place; a row that Ray computes again after a lost node is counted again. Figures of the ledger are exact, these are not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

STAGES = ("fetch", "transcode", "transcribe", "features", "tokens", "commit")
_SOURCES_ONLY = ("fetch", "transcode")  # their rows are sources; those of later stages are parts
RECENT_S = 60.0
ANSWER_S = 5.0  # the counting actor answers in milliseconds; a machine that swaps takes longer
FEW_ROWS = 5  # fewer in the last minute say nothing about a rate


@dataclass(frozen=True, kw_only=True)
class Crew:
    """Workers that share places: of a chain of fused stages, a worker is in one at a time."""

    stages: tuple[str, ...]
    num_workers: int  # places; 0 where Ray starts tasks as rows come, so that nobody stands still
    batch_rows: int = 1  # rows that the first stage collects before it begins


@dataclass(frozen=True, kw_only=True)
class StageTime:
    """One line of the stage-timing table. The seconds are of workers: two that work for a minute make 120."""

    stage: str
    num_workers: int
    rows: int = 0  # done: sources in fetch and transcode, parts after that
    rows_out: int = 0  # that went on well
    failures: int = 0  # that became filtered or quarantined here
    video_s: float = 0.0  # video seconds in the rows that went on
    busy_s: float = 0.0
    starved_s: float = 0.0
    backpressured_s: float = 0.0
    span_s: float = 0.0  # wall seconds in which the stage was open: begun, and more to come

    @property
    def busy_share(self) -> float | None:
        """Of the workers' time while the stage was open; None where nothing was measured."""
        total_s = self.busy_s + self.starved_s + self.backpressured_s
        return self.busy_s / total_s if total_s else None

    @property
    def video_s_per_s(self) -> float | None:
        return self.video_s / self.span_s if self.span_s else None

    def plus(self, other: StageTime) -> StageTime:
        """The same stage's figures before and after a restart of the counts."""
        numbers = {f.name for f in dataclasses.fields(self)} - {"stage", "num_workers"}
        return dataclasses.replace(self, **{name: getattr(self, name) + getattr(other, name) for name in numbers})


@dataclass(frozen=True)
class StageTimes:
    """The stage-timing table of a run."""

    stages: tuple[StageTime, ...]

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Stage -> its figures; the JSON shape of the report and the names of the MLflow metrics."""
        return {
            one.stage: {
                **{name: _rounded(value) for name, value in dataclasses.asdict(one).items() if name != "stage"},
                "busy_share": _rounded(one.busy_share),
                "video_s_per_s": _rounded(one.video_s_per_s),
            }
            for one in self.stages
        }

    def lines(self) -> list[str]:
        """The table as text, one line a stage, a head above."""
        head = ("stage", "workers", "rows", "failed", "video s", "video s/s", "busy s", "busy", "starved", "held back")
        return table([head, *(self._cells(one) for one in self.stages)])

    @staticmethod
    def _cells(one: StageTime) -> tuple[str, ...]:
        rate = one.video_s_per_s
        return (
            one.stage,
            str(one.num_workers or "-"),
            f"{one.rows:,}",
            f"{one.failures:,}",
            f"{one.video_s:,.0f}",
            "-" if rate is None else f"{rate:,.1f}",
            f"{one.busy_s:,.1f}",
            *shares(one),
        )


def shares(one: StageTime) -> tuple[str, str, str]:
    """Busy, starved and back-pressured time in percent, `-` where nothing was measured or nobody can stand still."""
    total_s = one.busy_s + one.starved_s + one.backpressured_s
    if not total_s or not one.num_workers:
        return "-", "-", "-"
    busy, starved, held = (f"{100 * part / total_s:.0f}%" for part in (one.busy_s, one.starved_s, one.backpressured_s))
    return busy, starved, held


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Cells as aligned lines, the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


@dataclass(frozen=True, kw_only=True)
class StageNow:
    """A stage at this moment."""

    time: StageTime
    num_waiting: int  # rows that have left the stage before and were not taken yet
    num_in_hand: int
    longest_s: float  # the row that has been in hand for longest
    recent_rows_per_s: float  # over the last minute
    recent_video_s_per_s: float
    expected_rows: int  # in the whole run, failures before this stage left out
    is_certain: bool  # of `expected_rows`: every source has been cut into parts
    left_s: float  # video seconds still to come, estimated from the bytes of the sources not yet probed


@dataclass(frozen=True, kw_only=True)
class Progress:
    """All stages at this moment."""

    boot: str  # changes when the counting actor was started again and its counts are lost
    elapsed_s: float
    num_moves: int  # messages so far: stands still if and only if nothing moves
    stages: tuple[StageNow, ...]

    def __getitem__(self, stage: str) -> StageNow:
        return next(now for now in self.stages if now.time.stage == stage)


@dataclass
class _Tally:
    """What the counter knows of a stage."""

    rows: int = 0
    rows_out: int = 0
    failures: int = 0
    video_s: float = 0.0
    lost_s: float = 0.0  # video seconds in the rows that failed
    busy_s: float = 0.0
    starved_s: float = 0.0
    backpressured_s: float = 0.0
    span_s: float = 0.0
    waiting: int = 0
    has_begun: bool = False
    in_hand: dict[str, float] = field(default_factory=dict)  # worker -> since when, in the order of taking
    recent: deque[tuple[float, int, float]] = field(default_factory=deque)  # second, rows, video seconds

    @property
    def is_open(self) -> bool:
        return self.waiting > 0 or bool(self.in_hand)


class Counter:
    """The counts of one run; runs as a Ray actor (see `pipelines.live.start_counter`), knows nothing of Ray."""

    def __init__(
        self,
        *,
        crews: Sequence[Crew],
        num_sources: int,
        num_bytes: int = 0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`num_sources` and their bytes (0: not known) are those of the whole run, for what is expected in total."""
        self._crews = tuple(crews)
        self._num_sources, self._num_bytes = num_sources, num_bytes
        self._now = now
        self._boot = uuid.uuid4().hex
        self._began_s = self._last_s = now()
        self._num_moves = 0
        self._bytes_seen = 0
        self._unfinished: dict[tuple[str, str], int] = {}  # (stage, key) -> times begun since it last ended
        self._tallies: dict[str, _Tally] = {stage: _Tally() for crew in crews for stage in crew.stages}

    def feed(self, stage: str, rows: int) -> None:
        """An execution of the graph begins: so many rows wait at a stage, and none at the others."""
        self._advance()
        for name, tally in self._tallies.items():
            tally.waiting = rows if name == stage else 0
            tally.in_hand.clear()
            tally.has_begun = False

    def ready(self, stage: str) -> None:
        """A worker of the stage has loaded what it needs."""
        self._advance()
        self._tallies[stage].has_begun = True

    def begin(self, stage: str, worker: str, rows: int, *, key: str = "") -> int:
        """Returns how many workers have begun the row of that key before and never ended it: they are dead."""
        self._advance()
        tally = self._tallies[stage]
        tally.has_begun = True
        tally.waiting = max(0, tally.waiting - rows)
        tally.in_hand.pop(worker, None)
        tally.in_hand[worker] = self._last_s
        self._let_go_of_the_dead(stage)
        num_lost = self._unfinished.get((stage, key), 0)
        if key:
            self._unfinished[stage, key] = num_lost + 1
        return num_lost

    def out(self, stage: str, *, rows: int, failures: int, video_s: float, num_bytes: int, blocked_s: float) -> None:
        """Rows leave a worker, which keeps at it. `blocked_s`: since the last message, how long nobody took them."""
        self._advance()
        tally = self._tallies[stage]
        tally.rows_out += rows
        tally.failures += failures
        if failures:
            tally.lost_s += video_s
        else:
            tally.video_s += video_s
        self._bytes_seen += num_bytes
        self._book_blocked(tally, blocked_s)
        self._pass_on(stage, rows=rows, failures=failures)
        self._remember(tally, 0, 0.0 if failures else video_s)

    def end(self, stage: str, worker: str, *, rows: int, blocked_s: float, key: str = "") -> None:
        self._advance()
        self._unfinished.pop((stage, key), None)
        tally = self._tallies[stage]
        tally.in_hand.pop(worker, None)
        tally.rows += rows
        self._book_blocked(tally, blocked_s)
        self._remember(tally, rows, 0.0)

    def progress(self) -> Progress:
        self._advance(moved=False)
        return Progress(
            boot=self._boot,
            elapsed_s=self._last_s - self._began_s,
            num_moves=self._num_moves,
            stages=tuple(self._stage_now(stage, crew) for crew in self._crews for stage in crew.stages),
        )

    def _advance(self, *, moved: bool = True) -> None:
        """Book the time since the last message."""
        now_s = self._now()
        passed_s, self._last_s = now_s - self._last_s, now_s
        self._num_moves += moved
        open_before = False
        for index, crew in enumerate(self._crews):
            tallies = [self._tallies[stage] for stage in crew.stages]
            first = tallies[0]
            input_waits = first.waiting >= (crew.batch_rows if open_before else 1)
            is_open = open_before or any(tally.is_open for tally in tallies)
            busy = {worker: tally for tally in tallies for worker in tally.in_hand}  # the innermost of fused stages
            for tally in busy.values():
                tally.busy_s += passed_s
            if is_open and any(tally.has_begun for tally in tallies):
                for tally in tallies:
                    tally.span_s += passed_s
                still_s = max(0, crew.num_workers - len(busy)) * passed_s
                if input_waits or self._is_backlog_after(index):
                    first.backpressured_s += still_s
                else:
                    first.starved_s += still_s
            open_before = is_open

    def _is_backlog_after(self, index: int) -> bool:
        """Whether rows pile up later on. A stage that has not begun is loading, or is not part of this execution."""
        later = [(crew, self._tallies[crew.stages[0]]) for crew in self._crews[index + 1 :]]
        return any(t.has_begun and t.waiting > max(crew.num_workers, crew.batch_rows) for crew, t in later)

    def _let_go_of_the_dead(self, stage: str) -> None:
        """More rows in hand than places: the oldest row is one whose worker died."""
        crew = next(crew for crew in self._crews if stage in crew.stages)
        tally = self._tallies[stage]
        while crew.num_workers and len(tally.in_hand) > crew.num_workers:
            tally.in_hand.pop(next(iter(tally.in_hand)))

    def _pass_on(self, stage: str, *, rows: int, failures: int) -> None:
        """Rows that are well wait for the next stage; failed ones pass through all, and the last writes them down."""
        names = list(self._tallies)
        following = names[names.index(stage) + 1 :]
        if following:
            self._tallies[following[0]].waiting += rows
            self._tallies[following[-1]].waiting += failures

    @staticmethod
    def _book_blocked(tally: _Tally, blocked_s: float) -> None:
        blocked_s = min(blocked_s, tally.busy_s)
        tally.busy_s -= blocked_s
        tally.backpressured_s += blocked_s

    def _remember(self, tally: _Tally, rows: int, video_s: float) -> None:
        second = float(int(self._last_s))
        if tally.recent and tally.recent[-1][0] == second:
            _, old_rows, old_video_s = tally.recent.pop()
            rows, video_s = rows + old_rows, video_s + old_video_s
        tally.recent.append((second, rows, video_s))
        self._forget(tally)

    def _forget(self, tally: _Tally) -> None:
        while tally.recent and tally.recent[0][0] < self._last_s - RECENT_S:
            tally.recent.popleft()

    def _stage_now(self, stage: str, crew: Crew) -> StageNow:
        tally = self._tallies[stage]
        self._forget(tally)
        window_s = max(1.0, min(RECENT_S, self._last_s - self._began_s))
        expected_rows, is_certain = self._expected_rows(stage)
        known = {f.name for f in dataclasses.fields(StageTime)} - {"stage", "num_workers"}
        return StageNow(
            time=StageTime(stage=stage, num_workers=crew.num_workers, **{name: getattr(tally, name) for name in known}),
            num_waiting=tally.waiting,
            num_in_hand=len(tally.in_hand),
            longest_s=self._last_s - min(tally.in_hand.values(), default=self._last_s),
            recent_rows_per_s=sum(rows for _, rows, _ in tally.recent) / window_s,
            recent_video_s_per_s=sum(video_s for _, _, video_s in tally.recent) / window_s,
            expected_rows=max(tally.rows, expected_rows),
            is_certain=is_certain,
            left_s=self._left_s(stage),
        )

    def _expected_rows(self, stage: str) -> tuple[int, bool]:
        """Rows of the stage in the whole run, and whether that is more than an estimate."""
        names = list(self._tallies)
        before = {name: self._tallies[name].failures for name in names[: names.index(stage)]}
        transcode = self._tallies.get("transcode")
        if stage in _SOURCES_ONLY or transcode is None:
            return self._num_sources - sum(before.values()), True
        sources_left = max(0, self._num_sources - before["fetch"] - transcode.rows)
        per_source = transcode.rows_out / max(1, transcode.rows)
        rows = transcode.rows_out + sources_left * max(1.0, per_source)
        if stage == names[-1]:  # writes the failed ones down too
            return round(rows) + sum(before.values()), sources_left == 0
        return round(rows) - sum(n for name, n in before.items() if name not in _SOURCES_ONLY), sources_left == 0

    def _left_s(self, stage: str) -> float:
        """Video seconds that the stage still has before it."""
        names = list(self._tallies)
        if "fetch" not in names:
            return 0.0
        probed = self._tallies["fetch"]
        share = probed.rows / max(1, self._num_sources)
        if self._num_bytes and self._bytes_seen:
            share = self._bytes_seen / self._num_bytes
        if not share:
            return 0.0
        expected_s = probed.video_s / min(1.0, share)
        gone_s = sum(self._tallies[name].lost_s for name in names[1 : names.index(stage) + 1])
        return max(0.0, expected_s - gone_s - self._tallies[stage].video_s)


class StageClock:
    """A worker's end of the counter: cheap, picklable, and nothing at all where there is no counter.

    `feeds` names the stage that takes this one's rows in the same process, if there is one: what happens between two
    rows is then that stage's work. Else the time that a row stays with `RowClock.out` untaken is back-pressure.
    """

    def __init__(self, counter: Any, stage: str, *, feeds: str | None = None) -> None:
        self._counter, self._stage, self._feeds = counter, stage, feeds

    def ready(self) -> None:
        """The worker can begin; its time counts from here, and not from its first row."""
        self._send("ready")

    @contextlib.contextmanager
    def row(self, *, rows: int = 1, key: str = "") -> Iterator[RowClock]:
        """A row (or a batch of rows) is in hand inside the block. With a key that names it, `num_lost` of what the
        block gets says how many workers died over it."""
        worker = f"{platform.node()}:{os.getpid()}"
        num_lost = self._begin(worker, rows, key)
        told = RowClock(self._send, measures_blocking=self._feeds is None, num_lost=num_lost)
        try:
            yield told
        finally:
            self._send("end", worker, rows=rows, blocked_s=told.blocked_s(), key=key)

    def _begin(self, worker: str, rows: int, key: str) -> int:
        if self._counter is None:
            return 0
        with contextlib.suppress(Exception):  # without an answer the row is taken as if for the first time
            answer = self._counter.begin.remote(self._stage, worker, rows, key=key)
            return int(ray.get(answer, timeout=ANSWER_S)) if key else 0
        return 0

    def _send(self, message: str, *args: Any, **kwargs: Any) -> None:
        if self._counter is None:
            return
        with contextlib.suppress(Exception):  # a figure on a screen is not worth a row
            getattr(self._counter, message).remote(self._stage, *args, **kwargs)


class RowClock:
    """Tells of what leaves the worker while a row is in hand."""

    def __init__(self, send: Callable[..., None], *, measures_blocking: bool, num_lost: int) -> None:
        self.num_lost = num_lost
        self._send = send
        self._measures_blocking = measures_blocking
        self._blocked_s = 0.0

    def out(self, *, rows: int = 1, failures: int = 0, video_s: float = 0.0, num_bytes: int = 0) -> None:
        """Rows are about to leave, so many of them well and so many failed, with so many seconds of video.

        `num_bytes`: of the source, from the stage that fetches it.
        """
        blocked_s = self.blocked_s()
        self._send("out", rows=rows, failures=failures, video_s=video_s, num_bytes=num_bytes, blocked_s=blocked_s)

    @contextlib.contextmanager
    def handed(self) -> Iterator[None]:
        """Around a `yield`: how long nobody takes what was made."""
        began_s = time.perf_counter()
        try:
            yield
        finally:
            if self._measures_blocking:
                self._blocked_s += time.perf_counter() - began_s

    def blocked_s(self) -> float:
        """Seconds of `handed` since the last call."""
        blocked_s, self._blocked_s = self._blocked_s, 0.0
        return blocked_s


def row_video_s(row: Mapping[str, Any]) -> float:
    """Video seconds that a row of the graph stands for: of its part, else of the whole source as it states it."""
    if row.get("part_end_s") is not None and row.get("part_start_s") is not None:
        return float(row["part_end_s"] - row["part_start_s"])
    return float(row.get("declared_s") or 0.0)


def _rounded(value: Any) -> Any:
    return round(value, 3) if isinstance(value, float) else value
