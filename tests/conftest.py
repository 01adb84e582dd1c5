"""Media made by ffmpeg for the tests: real files, a fraction of a second each."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

# Before torch and numpy are imported: two threads on small tensors spin more than they work.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray lets its workers yield to other processes; beside another process of tests they would starve.
os.environ.setdefault("RAY_worker_niceness", "0")

import numpy as np
import pytest

from pipelines.media import ffmpeg_path

SHARED = Path(__file__).resolve().parents[2] / "shared"

MakeVideo = Callable[..., Path]

# First, so that no process is left with a long one at the end.
LONGEST_FILES = (
    "test_ray_worker.py",
    "test_ingest.py",
    "test_demo.py",
    "test_hostile.py",
    "test_ray_job.py",
    "test_media.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, then the others with integration tests, then those of milliseconds."""
    slow_files = {item.path for item in items if item.get_closest_marker("integration")}

    def rank(item: pytest.Item) -> int:
        if item.path.name in LONGEST_FILES and item.path in slow_files:
            return LONGEST_FILES.index(item.path.name)
        return len(LONGEST_FILES) + (item.path not in slow_files)

    items.sort(key=rank)


def ffmpeg(*args: str) -> None:
    """Run the ffmpeg under test; fails the test with ffmpeg's own words."""
    command = [ffmpeg_path(), "-hide_banner", "-loglevel", "error", "-y", *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def make_tar(path: Path, members: dict[str, bytes]) -> Path:
    """A tar of some files, in their order."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def make_video(tmp_path: Path) -> MakeVideo:
    """make_video(NAME, seconds=, fps=, size=, sound=, captions=, extra=) -> path of a new video of moving test bars."""

    def make(
        name: str,
        *,
        seconds: float = 4.0,
        fps: float = 25.0,
        size: str = "160x120",
        sound: bool = False,
        captions: str | None = None,
        hue: int = 0,
        extra: tuple[str, ...] = (),
    ) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        inputs = ["-f", "lavfi", "-i", f"testsrc2=size={size}:rate={fps}:duration={seconds},hue=h={hue}"]
        maps = ["-map", "0:v"]
        if sound:
            inputs += ["-f", "lavfi", "-i", f"sine=frequency=440:duration={seconds}"]
            maps += ["-map", "1:a", "-c:a", "aac"]
        if captions is not None:
            track = tmp_path / f"{path.stem}.captions.srt"
            track.write_text(captions)
            inputs += ["-i", str(track)]
            maps += ["-map", f"{2 if sound else 1}:s", "-c:s", "mov_text" if path.suffix == ".mp4" else "srt"]
        encoding = ["-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p"]
        ffmpeg(*inputs, *maps, *encoding, *extra, str(path))
        return path

    return make


@pytest.fixture(scope="session")
def shared_media() -> Path:
    """Real clips beside the project; tests that need them are skipped where they are absent."""
    folder = SHARED / "media"
    if not folder.is_dir():
        pytest.skip("no ../shared/media beside the project")
    return folder


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One local Ray for all tests that need it; of one CPU, because two processes run tests."""
    from jobs.cluster import connected

    with connected(num_cpus=1):
        yield


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
