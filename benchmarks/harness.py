"""What every benchmark shares: a bar and its goal, CPU seconds of children, memory of a process tree, the last line.

CPU seconds come from the kernel (`wait4`, /proc), not from wall clocks: on a machine that others use too, a process
that waits for a core gets older but does not work more. Linux only, like /proc.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PACKAGES = ("ray", "torch", "pyarrow", "webdataset", "av", "numpy", "pocketsphinx", "imageio-ffmpeg", "videobert")
RAY_PREFIX = "ray::"
IDLE_WORKER = "other Ray workers"
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A measured value beside its goal."""

    value: float
    goal: float
    unit: str
    at_least: bool = True

    @property
    def holds(self) -> bool:
        return self.value >= self.goal if self.at_least else self.value <= self.goal

    def to_dict(self) -> dict[str, Any]:
        return {"value": round(self.value, 4), "goal": self.goal, "unit": self.unit, "holds": self.holds}


@dataclass(kw_only=True)
class Outcome:
    """What a benchmark prints: DESIGN's one JSON object."""

    bars: dict[str, Bar] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=lambda: versions(PACKAGES))

    def to_dict(self) -> dict[str, Any]:
        return {
            "bars": {name: bar.to_dict() for name, bar in self.bars.items()},
            "details": self.details,
            "versions": self.versions,
            "machine": machine(),
        }


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What some work took."""

    wall_s: float
    cpu_s: float


def versions(packages: Sequence[str]) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def machine() -> dict[str, Any]:
    """Cores, memory and load of this machine; the load says whether others were measuring too."""
    model = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "cpu": model[0] if model else platform.processor(),
        "cores": num_cores(),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * _PAGE_BYTES / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "load_1m": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d"),
    }


def num_cores() -> int:
    return len(os.sched_getaffinity(0))


def say(line: str) -> None:
    """Progress for people, on standard error: standard output ends with the JSON line."""
    print(line, file=sys.stderr, flush=True)


def run_children(
    commands: Sequence[Sequence[str]],
    *,
    at_once: int,
    env: Mapping[str, str] | None = None,
    folders: Sequence[Path] | None = None,
) -> Spent:
    """Run commands as plain processes, at most `at_once` together, each in its folder if there are any.

    Wall seconds of all; CPU seconds of them and what they started, as the kernel counts them when it reaps a child.
    Raises RuntimeError with the end of its standard error if one fails.
    """
    began_s, cpu_s = time.perf_counter(), 0.0
    waiting = list(reversed([(c, folders[i] if folders else None) for i, c in enumerate(commands)]))
    running: dict[int, tuple[subprocess.Popen[bytes], Any]] = {}
    while waiting or running:
        while waiting and len(running) < at_once:
            command, folder = waiting.pop()
            errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed when the child is reaped
            nothing = subprocess.DEVNULL
            child = subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=errors, env=env, cwd=folder)
            running[child.pid] = (child, errors)
        pid, status, used = _wait_for(running)
        cpu_s += used.ru_utime + used.ru_stime
        child, errors = running.pop(pid)
        child.returncode = os.waitstatus_to_exitcode(status)  # reaped here, so Popen must not wait again
        with errors:
            if child.returncode != 0:
                errors.seek(0)
                told = errors.read().decode(errors="replace")[-2000:]
                for other, _ in running.values():
                    other.kill()
                raise RuntimeError(f"{child.args!r} ended with status {child.returncode}: {told}")
    return Spent(wall_s=time.perf_counter() - began_s, cpu_s=cpu_s)


def _wait_for(running: Mapping[int, Any]) -> tuple[int, int, Any]:
    """The next of these children to end; others of this process (Ray's) are left to their owners."""
    while True:
        for pid in running:
            done, status, used = os.wait4(pid, os.WNOHANG)
            if done:
                return done, status, used
        time.sleep(0.005)


@dataclass(frozen=True, kw_only=True)
class Moment:
    """CPU seconds so far, at a moment."""

    at_s: float  # epoch
    machine_s: float  # all processes of the machine
    steal_s: float  # what the hypervisor gave to others
    own_s: float  # this process and all below it


class TreeSampler:
    """Memory and CPU seconds of this process and all below it, by name of process, from a thread."""

    def __init__(self, *, every_s: float = 0.5, store_bytes: Callable[[], int] = lambda: 0) -> None:
        """`store_bytes` says how much the object store holds now."""
        self._every_s, self._store_bytes = every_s, store_bytes
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._cpu_s: dict[int, float] = {}
        self._names: dict[int, str] = {}
        self._driver_began_s = sum(os.times()[:4])
        self.moments: list[Moment] = []
        self.peak_mb: dict[str, float] = {}  # of the largest single process of a name
        self.peak_count: dict[str, int] = {}
        self.peak_tree_mb = 0.0
        self.peak_store_mb = 0.0

    def __enter__(self) -> TreeSampler:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        self._thread.join(timeout=5)

    def _watch(self) -> None:
        while not self._stopped.is_set():
            self._sample()
            self._stopped.wait(self._every_s)
        self._sample()

    def _sample(self) -> None:
        by_name: dict[str, list[float]] = {}
        processes = list(tree(os.getpid()))
        workers = {process.pid for process in processes if process.is_ray_worker}
        for process in processes:
            by_name.setdefault(process.name, []).append(process.own_mb)
            if process.parent not in workers:  # a worker's children are counted with it once it has reaped them
                self._cpu_s[process.pid] = process.cpu_s
                if process.name != IDLE_WORKER or process.pid not in self._names:
                    self._names[process.pid] = process.name
        for name, sizes in by_name.items():
            self.peak_mb[name] = max(self.peak_mb.get(name, 0.0), *sizes)
            self.peak_count[name] = max(self.peak_count.get(name, 0), len(sizes))
        self.peak_tree_mb = max(self.peak_tree_mb, sum(sum(sizes) for sizes in by_name.values()))
        with contextlib.suppress(Exception):  # a cluster that goes up or down has no answer
            self.peak_store_mb = max(self.peak_store_mb, self._store_bytes() / 1e6)
        user, nice, system, _, _, irq, softirq, steal = (int(t) for t in _lines("/proc/stat")[0].split()[1:9])
        self.moments.append(
            Moment(
                at_s=time.time(),
                machine_s=(user + nice + system + irq + softirq) / _TICKS_PER_S,
                steal_s=steal / _TICKS_PER_S,
                own_s=sum(self._cpu_s.values()),
            )
        )

    def between(self, begin_s: float, end_s: float) -> dict[str, float]:
        """Where the cores' seconds went between two epoch seconds: here, to others, to nobody."""
        inside = [moment for moment in self.moments if begin_s <= moment.at_s <= end_s]
        if len(inside) < 2:
            return {"own": 0.0, "others": 0.0, "idle": 0.0}
        first, last = inside[0], inside[-1]
        own_s, steal_s = last.own_s - first.own_s, last.steal_s - first.steal_s
        others_s = max(0.0, last.machine_s - first.machine_s - own_s) + steal_s
        idle_s = (last.at_s - first.at_s) * num_cores() - own_s - others_s
        return {"own": round(own_s, 1), "others": round(others_s, 1), "idle": round(max(0.0, idle_s), 1)}

    def cpu_s(self) -> dict[str, float]:
        """CPU seconds by name of process, its ended children with it; a Ray worker has the name that it had last."""
        by_name: dict[str, float] = {}
        for pid, spent_s in self._cpu_s.items():
            own_s = spent_s - (self._driver_began_s if pid == os.getpid() else 0.0)
            by_name[self._names[pid]] = by_name.get(self._names[pid], 0.0) + own_s
        return {name: round(spent_s, 1) for name, spent_s in sorted(by_name.items()) if spent_s >= 0.05}

    def to_dict(self) -> dict[str, Any]:
        """Megabytes that are a process's own: the object store and other shared files count once, elsewhere."""
        return {
            "whole_tree_mb": round(self.peak_tree_mb),
            "object_store_mb": round(self.peak_store_mb, 1),
            "largest_process_mb": {name: round(size) for name, size in sorted(self.peak_mb.items())},
            "processes_at_once": dict(sorted(self.peak_count.items())),
        }


@dataclass(frozen=True, kw_only=True)
class Process:
    pid: int
    parent: int
    name: str
    is_ray_worker: bool
    own_mb: float  # resident, without shared pages
    cpu_s: float  # its own and that of reaped children


def tree(root: int) -> Iterator[Process]:
    """A process and all below it, as /proc shows them now."""
    parents: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            stat = _stat(int(entry))
            if stat:
                parents[int(entry)] = int(stat[1])
    below = {root}
    while grown := {pid for pid, parent in parents.items() if parent in below and pid not in below}:
        below |= grown
    for pid in below:
        stat, memory = _stat(pid), _lines(f"/proc/{pid}/statm")
        if stat and memory:
            resident, shared = (int(pages) for pages in memory[0].split()[1:3])
            own_mb = (resident - shared) * _PAGE_BYTES / 1e6
            cpu_s = sum(int(ticks) for ticks in stat[11:15]) / _TICKS_PER_S
            line = _command_line(pid)
            yield Process(
                pid=pid,
                parent=int(stat[1]),
                name="driver" if pid == root else _name(line),
                is_ray_worker=line.startswith(RAY_PREFIX),
                own_mb=own_mb,
                cpu_s=cpu_s,
            )


def _name(line: str) -> str:
    """How people call a process: Ray's workers write the stage that they run into their command line."""
    if line.startswith(RAY_PREFIX):
        return " + ".join(re.findall(r"MapBatches\((\w+)\)", line)) or IDLE_WORKER
    first = os.path.basename(line.split(" ")[0])
    return next((name for name in ("raylet", "gcs_server", "ffmpeg", "python") if first.startswith(name)), "other")


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the state on: [0] state, [1] parent, [11:15] user, system and children's ticks."""
    lines = _lines(f"/proc/{pid}/stat")
    return lines[0].rsplit(")", 1)[1].split() if lines else None


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def finish(outcome: Outcome, *, as_json: bool) -> int:
    """Print the outcome; 0 if every bar holds."""
    found = outcome.to_dict()
    if not as_json:
        for name, bar in found["bars"].items():
            mark = "holds" if bar["holds"] else "FAILS"
            print(f"{mark}  {name}: {bar['value']:g} {bar['unit']}, goal {bar['goal']:g}")
        print(json.dumps(found["details"], indent=1))
    print(json.dumps(found))
    return 0 if all(bar.holds for bar in outcome.bars.values()) else 1
