"""How far a running graph is: stages count rows into one small actor, the driver prints what changed and notices a
standstill.

Ray Data waits for ever, in silence, when its stages together ask for more than there is; a run that has moved nothing
for `STALL_S` seconds says which stage waits for what.
"""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import ray

STAGES = ("transcode", "transcribe", "features", "commit")
STALL_S = 120.0


class Counter:
    """Actor: the number of rows that have left each stage."""

    def __init__(self) -> None:
        self._done: dict[str, int] = {}

    def add(self, stage: str, num_rows: int) -> None:
        self._done[stage] = self._done.get(stage, 0) + num_rows

    def counts(self) -> dict[str, int]:
        return dict(self._done)


class Reporter:
    """Prints a line whenever the counts have changed, every few seconds, from a thread of the driver."""

    def __init__(
        self, counter: Any, *, num_sources: int, say: Callable[[str], None], every_s: float | None = None
    ) -> None:
        self._counter = counter
        self._num_sources = num_sources
        self._say = say
        self._every_s = every_s or (2.0 if sys.stderr.isatty() else 10.0)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._began_s = time.monotonic()

    def __enter__(self) -> Reporter:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        self._thread.join(timeout=5)

    def _watch(self) -> None:
        last: dict[str, int] = {}
        moved_s = time.monotonic()
        while not self._stopped.wait(self._every_s):
            try:
                counts = ray.get(self._counter.counts.remote(), timeout=5)
            except Exception:  # the cluster goes down before the thread does; the run itself reports its error
                continue
            now_s = time.monotonic()
            if counts != last:
                last, moved_s = counts, now_s
                self._say(self._line(counts, now_s - self._began_s))
            elif now_s - moved_s > STALL_S:
                moved_s = now_s
                self._say(f"no stage has finished a row for {STALL_S:.0f} s: {self._standstill(counts)}")

    def _line(self, counts: dict[str, int], elapsed_s: float) -> str:
        done = "  ".join(f"{stage} {counts.get(stage, 0)}" for stage in STAGES)
        return f"[{elapsed_s:5.0f} s] {self._num_sources} sources: {done}"

    @staticmethod
    def _standstill(counts: dict[str, int]) -> str:
        before = itertools.pairwise(STAGES)
        waiting = [f"{b} waits with {counts.get(a, 0) - counts.get(b, 0)} rows" for a, b in before]
        free = ray.available_resources()
        return (
            f"{', '.join(waiting)}; free are {free.get('CPU', 0):g} of {ray.cluster_resources().get('CPU', 0):g} CPUs."
        )
