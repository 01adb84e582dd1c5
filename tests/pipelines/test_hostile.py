"""Whatever strangers send, each file ends with an outcome of its own, and nothing runs, leaks or grows."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipelines import media
from pipelines.dataset import ClipGrid
from pipelines.errors import StageError
from pipelines.media import MediaConfig, Part
from tests.pipelines.hostile import SECRET, HostileFile, write_hostile

GRID = ClipGrid()
LIMITS = MediaConfig(
    timeout_s=120, cpu_s=60, max_seconds=120, max_pixels=2048 * 2048, memory_bytes=4 << 30, output_bytes=1 << 30
)


@dataclass(frozen=True)
class Outcome:
    file: HostileFile
    name: str  # "kept" or a reason
    detail: str
    num_frames: int
    decodable_s: float | None  # None unless kept
    leaked: bool


@pytest.fixture(scope="module")
def home() -> Iterator[tuple[str, list[object]]]:
    """A server that malicious files call: its address, and who called."""
    calls: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def listen() -> None:
            while True:
                try:
                    connection, caller = server.accept()
                except OSError:
                    return
                calls.append(caller)
                connection.close()

        threading.Thread(target=listen, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", calls
        server.shutdown(socket.SHUT_RDWR)


def ingest(file: HostileFile, folder: Path) -> Outcome:
    place = folder / file.path.name[-40:].replace("\n", "-")
    place.mkdir()
    parts: list[Part] = []
    captions, name, detail, decodable = "", "kept", "", None
    try:
        found = media.probe(str(file.path), config=LIMITS)
        for track in found["subtitles"]:
            captions += media.read_captions(str(file.path), index=track["index"], config=LIMITS)
        parts += media.transcode(str(file.path), found=found, grid=GRID, config=LIMITS, folder=place)
        decodable = decodable_seconds(file.path, found=found)
    except StageError as error:
        name, detail = error.reason, error.detail
    assert list(place.iterdir()) == []  # no scratch file left
    out = b"".join(part.preview + part.sound.tobytes() for part in parts) + captions.encode()
    leaked = SECRET in out or b"root:x:0:0" in out
    return Outcome(file, name, detail, sum(part.num_frames for part in parts), decodable, leaked)


def decodable_seconds(path: Path, *, found: dict[str, Any]) -> float:
    """Where the last picture ends by its own time stamp, from the container's start, in a second, bare decode.

    The sound is read too: where time stamps jump, ffmpeg sets them right by all the streams that it reads.
    """
    command = [media.ffmpeg_path(), "-hide_banner", "-loglevel", "error", "-nostdin", "-threads", "1"]
    command += ["-i", f"file:{path}", "-map", f"0:{found['video']['index']}", "-vf", "scale=16:16"]
    end = ["-fps_mode", "passthrough", "-t", f"{LIMITS.max_seconds + GRID.clip_s}", "-f", "framecrc", "-"]
    heard = ["-map", f"0:{found['audio']['index']}"] if found["audio"] else []
    for sound in (heard, []):  # without it where nothing of it decodes, as in the pipeline
        done = subprocess.run([*command, *sound, *end], capture_output=True, text=True, timeout=300)
        listed = done.stdout.splitlines()
        frames = [[int(field) for field in line.split(",")[1:4]] for line in listed if line.startswith("0,")]
        if frames:
            break
    base = next(line.split(": ")[1] for line in listed if line.startswith("#tb 0"))
    tick = int(base.split("/")[0]) / int(base.split("/")[1])
    return max(pts + length for _, pts, length in frames) * tick


def children() -> set[int]:
    """The processes that this one has started and that still run (a Ray of other tests may be among them)."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == os.getpid() and state != "Z":
            found.add(int(stat.parent.name))
    return found


NUM_FIXED_KINDS = 84


def check(files: list[HostileFile], folder: Path, calls: list[object]) -> list[Outcome]:
    folder.mkdir()
    calls.clear()
    others = children()
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(lambda file: ingest(file, folder), files))
    wrong = [(o.file.kind, o.file.path.name, o.name, o.detail[-200:]) for o in outcomes if o.name not in o.file.allowed]
    assert wrong == []
    longer = [
        (o.file.kind, o.num_frames / GRID.fps, o.decodable_s)
        for o in outcomes
        if o.decodable_s is not None and o.num_frames / GRID.fps > o.decodable_s + 1 / GRID.fps
    ]
    assert longer == []
    assert [o.file.kind for o in outcomes if o.leaked] == []
    assert calls == []
    assert children() - others == set()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 256 << 10
    return outcomes


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, home: tuple[str, list[object]]) -> list[HostileFile]:
    """All fixed kinds, and some damaged files after them."""
    return write_hostile(tmp_path_factory.mktemp("hostile") / "in", count=100, seed=0, url=home[0])


@pytest.mark.integration
def test_every_kind_of_hostile_file_ends_with_an_acceptable_outcome(
    files: list[HostileFile], tmp_path: Path, home: tuple[str, list[object]]
) -> None:
    outcomes = check(files[:NUM_FIXED_KINDS], tmp_path / "scratch", home[1])
    assert len({o.file.kind for o in outcomes}) >= 80
    assert {"kept", "no_video", "too_short", "unreadable", "forbidden_format", "too_large"} <= {
        o.name for o in outcomes
    }


@pytest.mark.integration
def test_an_unguarded_ffmpeg_would_have_called_and_followed(
    files: list[HostileFile], home: tuple[str, list[object]]
) -> None:
    """The same files are dangerous: a test that nobody could fail would prove nothing."""
    calls, kinds = home[1], {file.kind: file for file in files}
    for kind, options in (("hls url", ()), ("ffconcat url", ("-safe", "0")), ("dash url as mp4", ())):
        calls.clear()
        unguarded(kinds[kind].path, *options)
        until = time.monotonic() + 10
        while not calls and time.monotonic() < until:  # the listener is a thread
            time.sleep(0.01)
        assert calls, kind
    followed = unguarded(kinds["external reference to video"].path, "-enable_drefs", "1", "-use_absolute_path", "1")
    assert followed > 70


def unguarded(path: Path, *options: str) -> int:
    """Pictures that ffmpeg decodes where nothing holds it back."""
    command = [media.ffmpeg_path(), "-loglevel", "quiet", "-nostdin", "-protocol_whitelist", "file,http,tcp,crypto"]
    command += [*options, "-i", f"file:{path}", "-f", "framecrc", "-"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return sum(1 for line in done.stdout.splitlines() if not line.startswith("#"))


@pytest.mark.slow
def test_five_hundred_hostile_files(tmp_path: Path, home: tuple[str, list[object]]) -> None:
    url, calls = home
    outcomes = check(write_hostile(tmp_path / "in", count=500, seed=1, url=url), tmp_path / "scratch", calls)
    table: dict[str, int] = {}
    for outcome in outcomes:
        table[outcome.name] = table.get(outcome.name, 0) + 1
    print(sorted(table.items()))
    assert sum(table.values()) == 500


@pytest.mark.integration
def test_the_same_seed_writes_the_same_damage(files: list[HostileFile], tmp_path: Path) -> None:
    again = write_hostile(tmp_path / "in", count=len(files), seed=0)
    damaged = [(a.path.read_bytes(), b.path.read_bytes()) for a, b in zip(files, again, strict=True)][NUM_FIXED_KINDS:]
    assert damaged
    assert all(a == b for a, b in damaged)
