"""Ray for a command: the cluster that RAY_ADDRESS names (`ray job submit` sets it), else one on this machine."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray


@contextmanager
def connected(*, num_cpus: int | None = None) -> Iterator[None]:
    """Ray is up inside the block. A cluster that the block started ends with it; one that was there stays.

    A local one listens on loopback only, starts no dashboard, and has `num_cpus`, else a CPU for every core.
    """
    if ray.is_initialized():
        yield
        return
    # The coming default; asking for it now silences a warning.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.WARNING)
    else:
        # It says at every start that its token authentication is on, which is what we want.
        logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            logging_level=logging.WARNING,
            log_to_driver=False,
            _node_ip_address="127.0.0.1",
        )
    _quiet_ray_data()
    try:
        yield
    finally:
        family = descendants(os.getpid()) if not os.environ.get("RAY_ADDRESS") else {}
        ray.shutdown()
        _end({pid: title for pid, title in family.items() if "ray::" in title or "/ray/" in title})


def descendants(pid: int) -> dict[int, str]:
    """The processes below one: pid -> command line; empty where there is no /proc."""
    parents, titles = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended meanwhile
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
            titles[int(stat.parent.name)] = (
                stat.with_name("cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            )
    found: set[int] = set()
    fresh = {pid}
    while fresh := {child for child, parent in parents.items() if parent in fresh} - found:
        found |= fresh
    return {pid: titles[pid] for pid in found if pid in titles}


def _end(family: dict[int, str], *, within_s: float = 5.0) -> None:
    """Give the processes of a local cluster time to end, then end them.

    A worker of Ray 2.60 now and then hangs in its own exit handlers, outlives its raylet and keeps its memory.
    """
    deadline_s = time.monotonic() + within_s
    while family and time.monotonic() < deadline_s:
        time.sleep(0.05)
        family = {pid: title for pid, title in family.items() if _is_running(pid)}
    for pid in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _is_running(pid: int) -> bool:
    """Not ended, and not a zombie. Seconds after a snapshot its number cannot have come round to another process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _quiet_ray_data() -> None:
    """Keep Ray Data's running commentary in its log files; commands print their own progress."""
    from ray.data._internal.logging import configure_logging

    configure_logging()
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            handler.setLevel(logging.ERROR)
