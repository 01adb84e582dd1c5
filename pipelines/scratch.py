"""Folders for temporary files that outlive nobody: a killed worker cannot tidy up, so the next one does.

Each folder holds a lock that the kernel releases with its process, however that ends. `sweep` removes the folders whose
lock is free; it costs one directory listing, and a process id that was reused cannot mislead it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PREFIX = "videobert-scratch-"
_LOCK = ".lock"
_GRACE_S = 60.0  # a folder is made a moment before its lock


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """An empty folder in the system's place for temporary files (TMPDIR), gone after the block."""
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    try:
        with open(folder / _LOCK, "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep() -> int:
    """Remove the scratch folders of processes that are no more; returns how many."""
    removed = 0
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        if folder.is_dir() and _is_abandoned(folder):
            shutil.rmtree(folder, ignore_errors=True)
            removed += 1
    return removed


def _is_abandoned(folder: Path) -> bool:
    try:
        with open(folder / _LOCK, "r+b") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except FileNotFoundError:
        with contextlib.suppress(OSError):
            return time.time() - os.stat(folder).st_mtime > _GRACE_S
        return False
    except OSError:  # locked, or another user's
        return False
