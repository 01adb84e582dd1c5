"""Writes to a dataset folder on this machine are all or nothing, whatever the disk does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.storage import Folder, filesystem_of, local_path, local_uri, sweep_partials

BODY = bytes(range(256)) * 1000


def files_under(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "path", ["/a/b.mp4", "/a b/50%.mp4", "/q?/h#1.mp4", "/x.tar#y.mp4", "/a:/\\/b.mp4", "/é\n.mp4"]
)
def test_the_uri_of_a_path_leads_back_to_it(path: str) -> None:
    assert local_path(local_uri(path)) == path


def test_a_name_that_is_no_utf8_has_a_printable_uri() -> None:
    path = os.fsdecode(b"/a/\xff.mp4")
    assert local_uri(path) == "file:///a/%FF.mp4"
    assert local_path(local_uri(path)) == path


def test_what_lies_elsewhere_or_in_a_tar_has_no_local_path() -> None:
    for uri in ("s3://bucket/a.mp4", "http://host/a.mp4", "http://[bad", "/a.tar#b.mp4", "file:///a.tar#b.mp4"):
        assert local_path(uri) is None


def test_a_password_in_a_url_is_refused() -> None:
    with pytest.raises(ValueError, match="AWS_SECRET_ACCESS_KEY"):
        filesystem_of("s3://key:secret@bucket/a")


def test_a_file_is_uploaded_whole_and_deleted_once(tmp_path: Path) -> None:
    source = tmp_path / "preview.mp4"
    source.write_bytes(BODY)
    folder = Folder.at(str(tmp_path / "dataset"))
    folder.upload("media/a.mp4", source)
    assert folder.read("media/a.mp4") == BODY
    folder.delete("media/a.mp4")
    folder.delete("media/a.mp4")
    assert not folder.exists("media/a.mp4")
    folder.delete_empty("media")
    assert os.listdir(tmp_path / "dataset") == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    try:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True)
    except FileNotFoundError:
        pytest.skip("no mount here")
    if mounted.returncode:
        pytest.skip("mount -t tmpfs is not allowed here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_is_a_clear_error_and_leaves_nothing(small_disk: Path, tmp_path: Path) -> None:
    folder = Folder.at(str(small_disk))
    folder.write("ledger/small.parquet", b"fits")
    large = tmp_path / "large"
    large.write_bytes(bytes(4 << 20))
    with pytest.raises(OSError, match=r"cannot write .*No space left on device.*make room and run again"):
        folder.write("shards/a.tar", bytes(4 << 20))
    with pytest.raises(OSError, match="make room and run again"):
        folder.upload("media/a.mp4", large)
    assert files_under(small_disk) == ["ledger/small.parquet"]
    folder.write("shards/b.tar", b"room again")


def test_what_a_failed_write_would_have_replaced_is_still_there(small_disk: Path) -> None:
    folder = Folder.at(str(small_disk))
    folder.write("shards/a.tar", b"the first")
    with pytest.raises(OSError, match="make room"):
        folder.write("shards/a.tar", bytes(4 << 20))
    assert folder.read("shards/a.tar") == b"the first"


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "shards").write_text("a file where a folder should be")
    with pytest.raises(OSError, match=r"cannot write .*shards/a\.tar .*run again"):
        Folder.at(str(tmp_path)).write("shards/a.tar", BODY)
    assert files_under(tmp_path) == ["shards"]


def test_partial_files_of_killed_writers_are_swept(tmp_path: Path) -> None:
    """A writer is stopped in the middle of a write, then killed."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    code = f"from pipelines.dataset import Folder; Folder.at({str(tmp_path)!r}).upload('media/a.mp4', {str(pipe)!r})"
    writer = subprocess.Popen([sys.executable, "-c", code])
    with open(pipe, "wb") as feed:
        feed.write(BODY)
        feed.flush()
        while not files_under(tmp_path):
            time.sleep(0.01)
        (partial,) = files_under(tmp_path)
        assert partial == f"media/a.mp4.tmp-{socket.gethostname()}-{writer.pid}"
        folder = Folder.at(str(tmp_path))
        assert sweep_partials(folder) == 0  # its writer lives
        writer.kill()
        writer.wait()
        assert folder.names("media") == []
        assert sweep_partials(folder) == 1
    assert files_under(tmp_path) == []


def test_partial_files_of_other_hosts_are_swept_after_a_day(tmp_path: Path) -> None:
    for name in ("old.tar.tmp-other.host-1", "new.tar.tmp-other.host-1", "a.tar"):
        (tmp_path / name).write_bytes(b"x")
    day_ago_s = time.time() - 25 * 3600
    for name in ("old.tar.tmp-other.host-1", "a.tar"):
        os.utime(tmp_path / name, (day_ago_s, day_ago_s))
    assert sweep_partials(Folder.at(str(tmp_path))) == 1
    assert files_under(tmp_path) == ["a.tar", "new.tar.tmp-other.host-1"]
