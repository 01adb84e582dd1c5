"""How far a running graph is, on the screen of whoever started it, and a way out of a run that can never end.

A thread of the driver asks the counting actor every second on a terminal, where it redraws a table in place, and every
ten seconds elsewhere, where it says one plain line if anything has moved. The actor may die: it is started again by
Ray, the counts go on from those seen last, and at most one interval of them is lost.

Ray Data waits for ever, in silence, when its stages together ask for more than there is, and a driver whose raylet has
died waits too. So a standstill is said after `STALL_S` with what each stage waits for, and `Reporter.stalled` is set
when the cluster does not answer for `unreachable_s` or nothing has moved for `stall_timeout_s`; `until_stalled` ends a
loop over results then, whatever the results' own thread is stuck in. Ending is safe at any moment: what is in the
ledger stays, the rest is pending.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import queue
import shutil
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, TextIO, TypeVar

import ray

from pipelines.progress import (
    ANSWER_S,
    FEW_ROWS,
    RECENT_S,
    Counter,
    Crew,
    Progress,
    StageNow,
    StageTimes,
    shares,
    table,
)

STALL_S = 120.0
SETTLE_S, QUIET_S = 2.0, 0.2  # last messages may arrive after the last result
BAR_CELLS = 16

T = TypeVar("T")


class Stalled(TimeoutError):
    """A run that can never end was ended."""


def start_counter(*, crews: Sequence[Crew], num_sources: int, num_bytes: int = 0) -> Any:
    """The counting actor of a run: needs no CPU, and comes back if it dies."""
    actor = ray.remote(Counter).options(num_cpus=0, max_restarts=-1)
    return actor.remote(crews=tuple(crews), num_sources=num_sources, num_bytes=num_bytes)


class Reporter:
    """Shows the progress of a counter while its block runs; afterwards `stage_times` is the final table."""

    def __init__(
        self,
        counter: Any,
        *,
        say: Callable[[str], None],
        stream: TextIO | None = None,
        every_s: float | None = None,
        stall_timeout_s: float | None = None,
        unreachable_s: float = 300.0,
    ) -> None:
        """`stream` may be a terminal (standard error). Without `stall_timeout_s` only a dead cluster ends a run."""
        self.stalled = threading.Event()
        self.stalled_because = ""
        self._counter, self._say = counter, say
        stream = stream or sys.stderr
        self._screen = Screen(stream) if stream.isatty() and os.environ.get("TERM") != "dumb" else None
        self._every_s = every_s or (1.0 if self._screen else 10.0)
        self._stall_timeout_s, self._unreachable_s = stall_timeout_s, unreachable_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)
        self._began_s = self._moved_s = self._answered_s = self._warned_s = time.monotonic()
        self._seen: Progress | None = None
        self._before: Progress | None = None  # the last counts of an actor that has died since

    def __enter__(self) -> Reporter:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join(timeout=2 * ANSWER_S)
        if error == (None, None, None):
            self._settle()
        self._show()

    @property
    def stage_times(self) -> StageTimes:
        """The table as last seen; empty before the first answer."""
        return StageTimes(tuple(now.time for now in self._merged().stages)) if self._seen else StageTimes(())

    def say(self, line: str) -> None:
        """A line between the redrawings of the table."""
        if self._screen:
            self._screen.clear()
        self._say(line)

    def feed(self, stage: str, rows: int) -> None:
        """An execution of the graph begins with so many rows at a stage."""
        with contextlib.suppress(Exception):  # the view must not cost the run
            self._counter.feed.remote(stage, rows)

    def _watch(self) -> None:
        while not self._ended.wait(self._every_s):
            moved = self._ask()
            if moved:
                self._show()
            self._judge()

    def _ask(self) -> bool:
        """Look at the counter; whether something has moved since the last look."""
        try:
            seen: Progress = ray.get(self._counter.progress.remote(), timeout=ANSWER_S)
        except Exception:  # dead and about to come back, or the whole cluster is gone: `_judge` tells by the time
            return False
        self._answered_s = time.monotonic()
        last, self._seen = self._seen, seen
        if last is not None and last.boot != seen.boot:
            self._before = self._join(self._before, last)
            self.say("the counting process has died and is back; up to a few seconds of counts are lost, no work is.")
        moved = last is None or (last.boot, last.num_moves) != (seen.boot, seen.num_moves)
        if moved:
            self._moved_s = self._warned_s = self._answered_s
        return moved or self._screen is not None

    def _settle(self) -> None:
        """Wait for the last messages: nothing in hand, and none for a moment."""
        deadline_s = time.monotonic() + SETTLE_S
        self._ask()
        while self._seen and time.monotonic() < deadline_s:
            before = self._seen
            time.sleep(QUIET_S)
            self._ask()
            in_hand = any(now.num_in_hand for now in self._seen.stages)
            if not in_hand and self._seen.num_moves == before.num_moves:
                return

    def _judge(self) -> None:
        """Say a standstill; set `stalled` where it is for good."""
        now_s = time.monotonic()
        silent_s, still_s = now_s - self._answered_s, now_s - self._moved_s
        if silent_s > self._unreachable_s:
            self._give_up(f"the cluster has not answered for {silent_s:.0f} s, a node or its raylet has probably died")
        elif self._stall_timeout_s is not None and still_s > self._stall_timeout_s:
            self._give_up(f"no stage has moved for {still_s:.0f} s: {self._standstill()}")
        elif now_s - self._warned_s > STALL_S:
            self._warned_s = now_s
            self.say(f"no stage has moved for {still_s:.0f} s: {self._standstill()}.")

    def _give_up(self, why: str) -> None:
        if not self.stalled.is_set():
            self.stalled_because = why
            self.stalled.set()

    def _standstill(self) -> str:
        if self._seen is None:
            return "nothing has begun"
        stages = [describe(now) for now in self._seen.stages if now.num_in_hand or now.num_waiting]
        try:
            free, all_cpus = ray.available_resources().get("CPU", 0), ray.cluster_resources().get("CPU", 0)
            stages.append(f"{free:g} of {all_cpus:g} CPUs are free")
        except Exception:
            stages.append("the cluster does not say what is free")
        return ", ".join(stages)

    def _show(self) -> None:
        if self._seen is None:
            return
        merged, elapsed_s = self._merged(), time.monotonic() - self._began_s
        if self._screen:
            self._screen.draw([*stage_bars(merged), summary(merged, elapsed_s=elapsed_s)])
        else:
            self._say(plain_line(merged, elapsed_s=elapsed_s))

    def _merged(self) -> Progress:
        assert self._seen is not None
        return self._join(self._before, self._seen)

    @staticmethod
    def _join(before: Progress | None, after: Progress) -> Progress:
        """The figures of a later actor on top of those of an earlier one."""
        if before is None:
            return after
        stages = (
            dataclasses.replace(now, time=old.time.plus(now.time), left_s=max(0.0, now.left_s - old.time.video_s))
            for old, now in zip(before.stages, after.stages, strict=True)
        )
        return dataclasses.replace(after, stages=tuple(stages))


def until_stalled(results: Iterator[T], reporter: Reporter) -> Generator[T]:
    """The results, pulled by a thread of its own, so that a wait which never ends can be left.

    Raises Stalled with the reason and the remedy, and whatever the results raise.
    """
    handed: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(maxsize=1)
    left = threading.Event()

    def put(item: tuple[T | None, BaseException | None]) -> None:
        while not left.is_set():
            with contextlib.suppress(queue.Full):
                handed.put(item, timeout=1.0)
                return

    def pull() -> None:
        try:
            for result in results:
                put((result, None))
                if left.is_set():
                    return
            put((None, StopIteration()))
        except BaseException as error:
            put((None, error))

    threading.Thread(target=pull, name="results", daemon=True).start()
    try:
        while True:
            try:
                result, error = handed.get(timeout=0.5)
            except queue.Empty:
                if reporter.stalled.is_set():
                    raise Stalled(
                        f"{reporter.stalled_because}; the run was ended. Nothing is lost: run the same command again."
                    ) from None
                continue
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield result  # type: ignore[misc]
    finally:
        left.set()


class Screen:
    """A block of lines at the bottom of a terminal, redrawn in place."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._num_lines = 0
        self._lock = threading.Lock()

    def draw(self, lines: Sequence[str]) -> None:
        width = shutil.get_terminal_size().columns - 1  # a wrapped line would be two to go up
        with self._lock:
            self._write(self._erased() + "".join(f"{line[:width]}\n" for line in lines))
            self._num_lines = len(lines)

    def clear(self) -> None:
        with self._lock:
            self._write(self._erased())
            self._num_lines = 0

    def _erased(self) -> str:
        return f"\x1b[{self._num_lines}F\x1b[J" if self._num_lines else ""

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def stage_bars(progress: Progress) -> list[str]:
    """The live table: a head, then a line a stage."""
    head = ("stage", "", "rows", "video s/s", "busy", "starved", "held back", "failed", "waiting")
    return table([head, *(_bar_cells(now) for now in progress.stages)])


def _bar_cells(now: StageNow) -> tuple[str, ...]:
    done_s, total_s = now.time.video_s, now.time.video_s + now.left_s
    share = done_s / total_s if total_s else now.time.rows / max(1, now.expected_rows)
    cells = round(BAR_CELLS * min(1.0, share))
    return (
        now.time.stage,
        "█" * cells + "·" * (BAR_CELLS - cells),
        _of_total(now),
        f"{now.recent_video_s_per_s:.1f}",
        *shares(now.time),
        f"{now.time.failures:,}",
        f"{now.num_waiting:,}",
    )


def plain_line(progress: Progress, *, elapsed_s: float) -> str:
    """The same in one line for a log."""
    rows = "  ".join(f"{now.time.stage} {_of_total(now)}" for now in progress.stages)
    return f"{rows}; {summary(progress, elapsed_s=elapsed_s)}"


def summary(progress: Progress, *, elapsed_s: float) -> str:
    """Time so far, failures, speed, and when it will be over by the stage that takes longest."""
    failures = sum(now.time.failures for now in progress.stages)
    parts = [f"{_clock(elapsed_s)} so far", f"{failures:,} failed"]
    estimates = [(left_s, now) for now in progress.stages if (left_s := _seconds_left(now)) is not None]
    if estimates:
        left_s, slowest = max(estimates, key=lambda pair: pair[0])
        parts.append(f"{slowest.recent_video_s_per_s:.1f} video s/s in {slowest.time.stage}")
        if left_s >= 1:
            parts.append(f"about {_clock(left_s)} left")
    return ", ".join(parts)


def _seconds_left(now: StageNow) -> float | None:
    """By the rate of the last minute if it holds a few rows, else by that since the stage began; None if unknown."""
    recent = now.recent_video_s_per_s if now.recent_rows_per_s * RECENT_S >= FEW_ROWS else None
    rate = recent or now.time.video_s_per_s
    return now.left_s / rate if rate else None


def describe(now: StageNow) -> str:
    """What a stage does at a standstill."""
    hand = f"has {now.num_in_hand} rows in hand, one for {now.longest_s:.0f} s" if now.num_in_hand else "has none"
    return f"{now.time.stage} {hand} and {now.num_waiting} waiting"


def _of_total(now: StageNow) -> str:
    return f"{now.time.rows:,}/{'' if now.is_certain else '~'}{now.expected_rows:,}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
