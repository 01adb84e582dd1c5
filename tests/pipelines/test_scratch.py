"""Temporary files end with the process that made them, or with the next one that looks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines import scratch

HOLD = "from pipelines.scratch import scratch_folder\nwith scratch_folder() as f: print(f, flush=True); input()"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's folder for temporary files, for this process and its children."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path


def test_a_folder_is_gone_after_its_block(place: Path) -> None:
    with scratch.scratch_folder() as folder:
        (folder / "source.mp4").write_bytes(b"x")
        assert folder.parent == place
        assert scratch.sweep() == 0  # in use
        assert (folder / "source.mp4").exists()
    assert list(place.iterdir()) == []


def test_what_a_killed_process_leaves_is_swept_and_what_a_living_one_holds_is_not(place: Path) -> None:
    children = [
        subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    folders = [Path(child.stdout.readline().strip()) for child in children if child.stdout]
    dead, living = children
    dead.kill()
    dead.wait()
    assert scratch.sweep() == 1
    assert [folder.exists() for folder in folders] == [False, True]
    living.communicate("\n")
    assert list(place.iterdir()) == []


def test_a_folder_whose_owner_died_before_the_lock_is_swept_after_a_grace(place: Path) -> None:
    folder = place / f"{scratch.PREFIX}young"
    folder.mkdir()
    assert scratch.sweep() == 0
    os.utime(folder, (0, 0))
    assert scratch.sweep() == 1
