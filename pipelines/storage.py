"""Where files lie: local paths and URLs, and folders of immutable files with all-or-nothing writes.

Everything goes through pyarrow's file systems, so a bucket is a folder. Local writes are a partial file, fsync and
rename; an object store publishes on close.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import os
import re
import shutil
import socket
import time
import urllib.parse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import pyarrow.fs as pafs

PIECE_BYTES = 4 << 20  # of a file that passes through memory


@dataclass(frozen=True, slots=True)
class Folder:
    """A place for immutable files: a local folder or an object-store prefix, with all-or-nothing writes."""

    fs: pafs.FileSystem
    root: str

    @classmethod
    def at(cls, url: str) -> Folder:
        fs, root = filesystem_of(url)
        return cls(fs, root)

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def exists(self, name: str) -> bool:
        return bool(self.fs.get_file_info(self.path(name)).type == pafs.FileType.File)

    def names(self, prefix: str, *, suffix: str = "") -> list[str]:
        """Sorted names of the files under a sub-folder; empty where there is none."""
        selector = pafs.FileSelector(self.path(prefix), allow_not_found=True, recursive=True)
        found = self.fs.get_file_info(selector)
        return sorted(
            info.path[len(self.root) + 1 :]
            for info in found
            if info.type == pafs.FileType.File and info.path.endswith(suffix) and ".tmp-" not in info.base_name
        )

    def read(self, name: str) -> bytes:
        with self.fs.open_input_file(self.path(name)) as stream:
            return bytes(stream.read())

    def write(self, name: str, data: bytes) -> None:
        """Write a file so that a reader sees all of it or nothing, whatever happens meanwhile.

        Raises OSError, in one sentence, if the storage refuses: nothing is published then, and nothing is left behind.
        An object store's client repeats a failed request for some seconds first.
        """
        with _naming_the_file(self.path(name)):
            if isinstance(self.fs, pafs.LocalFileSystem):
                self._publish(name, io.BytesIO(data))
            else:  # object stores publish on close, and a close after a failed write fails too
                with self.fs.open_output_stream(self.path(name)) as stream:
                    stream.write(data)

    def upload(self, name: str, path: str | os.PathLike[str]) -> None:
        """`write` for a file of this machine, in pieces of 4 MiB: a long preview does not pass through memory."""
        with open(path, "rb") as source, _naming_the_file(self.path(name)):
            if isinstance(self.fs, pafs.LocalFileSystem):
                self._publish(name, source)
                return
            stream = self.fs.open_output_stream(self.path(name))
            try:
                while piece := source.read(PIECE_BYTES):
                    stream.write(piece)
            except BaseException:
                # The stream publishes what it has, on close and on garbage collection alike: a cut object has to go.
                with contextlib.suppress(OSError):
                    stream.close()
                    self.fs.delete_file(self.path(name))
                raise
            stream.close()

    def delete(self, name: str) -> None:
        """Remove a file; nothing happens where there is none."""
        with contextlib.suppress(FileNotFoundError), _naming_the_file(self.path(name), verb="delete"):
            self.fs.delete_file(self.path(name))

    def delete_empty(self, prefix: str) -> None:
        """Remove a sub-folder if nothing is in it; an object store has no empty ones."""
        if isinstance(self.fs, pafs.LocalFileSystem):
            with contextlib.suppress(OSError):
                os.rmdir(self.path(prefix))

    def _publish(self, name: str, source: BinaryIO) -> None:
        final = self.path(name)
        os.makedirs(os.path.dirname(final), exist_ok=True)
        partial = f"{final}.tmp-{socket.gethostname()}-{os.getpid()}"
        try:
            with open(partial, "wb") as file:
                shutil.copyfileobj(source, file, PIECE_BYTES)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, final)
            _sync_folder(os.path.dirname(final))
        except BaseException:
            with contextlib.suppress(OSError):
                os.remove(partial)
            raise


def _sync_folder(path: str) -> None:
    """Make a rename survive a power cut: ledger files are deleted on the word of those that replace them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _naming_the_file(path: str, *, verb: str = "write") -> Iterator[None]:
    """An error of the storage as one sentence that names the file; its class and errno stay."""
    try:
        yield
    except OSError as error:
        why = " ".join(str(error.strerror or error).split())[:300]
        remedy = "make room and run again" if error.errno == errno.ENOSPC else "mend that and run again"
        message = f"cannot {verb} {path} ({why}): {remedy}."
        raise (OSError(error.errno, message) if error.errno else OSError(message)) from error


_PARTIAL = re.compile(r"\.tmp-(?P<host>.+)-(?P<pid>\d+)$")
_PARTIAL_MAX_AGE_S = 24 * 3600.0  # nothing is written for a day


def sweep_partials(folder: Folder) -> int:
    """Remove what killed writers left in a local folder; returns how many files.

    That is: partial files of dead processes of this host, and any partial older than a day. On an object store killed
    writers leave unfinished multipart uploads, which no listing shows: let the bucket's lifecycle rule
    AbortIncompleteMultipartUpload remove them.
    """
    if not isinstance(folder.fs, pafs.LocalFileSystem):
        return 0
    removed = 0
    for base, _, files in os.walk(folder.root):
        for name in files:
            found = _PARTIAL.search(name)
            if found and _is_abandoned(os.path.join(base, name), host=found["host"], pid=int(found["pid"])):
                with contextlib.suppress(FileNotFoundError):
                    os.remove(os.path.join(base, name))
                    removed += 1
    return removed


def _is_abandoned(path: str, *, host: str, pid: int) -> bool:
    if host == socket.gethostname():
        try:
            os.kill(pid, 0)
        except (ProcessLookupError, OverflowError):
            return True
        except PermissionError:  # another user's, and alive
            pass
    try:
        return time.time() - os.stat(path).st_mtime > _PARTIAL_MAX_AGE_S
    except FileNotFoundError:
        return False


def filesystem_of(url: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a local path or URL, and the path on it without a trailing slash.

    s3://BUCKET/KEY takes `endpoint_override=HOST:PORT`, `scheme=http` and `region=NAME` in its query, else the
    environment says them (AWS_ENDPOINT_URL, AWS_DEFAULT_REGION). gs:// goes through pyarrow too and is not tested here:
    pyarrow has no way to a server on loopback that speaks it without TLS. A bucket's client is made once per process,
    which takes tens of milliseconds; a path on it costs nothing. Raises ValueError for a scheme nobody knows and for a
    password in the URL, which would end up in the ledger.
    """
    if "://" not in url:
        return pafs.LocalFileSystem(), absolute_url(url).rstrip("/")
    split = urllib.parse.urlsplit(url)
    if split.scheme == "file":
        return pafs.LocalFileSystem(), os.fsdecode(urllib.parse.unquote_to_bytes(split.path)).rstrip("/")
    if split.password:
        raise ValueError(
            f"{split.scheme}://{split.hostname} holds a password: give credentials by the environment "
            "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY), for URLs end up in the ledger."
        )
    if split.scheme not in ("s3", "gs", "gcs"):
        fs, path = pafs.FileSystem.from_uri(url)
        return fs, path.rstrip("/")
    fs, bucket = _bucket(split.scheme, split.netloc, split.query)
    return fs, f"{bucket}{urllib.parse.unquote(split.path)}".rstrip("/")


@functools.lru_cache(maxsize=64)
def _bucket(scheme: str, netloc: str, query: str) -> tuple[pafs.FileSystem, str]:
    fs, path = pafs.FileSystem.from_uri(f"{scheme}://{netloc}{'?' if query else ''}{query}")
    options = dict(urllib.parse.parse_qsl(query))
    if scheme == "s3" and options.keys() <= {"endpoint_override", "scheme", "region"}:
        # A file of up to 5 MiB is then one request instead of three, and a failing one is repeated as a whole.
        options["region"] = fs.region
        for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
            if os.environ.get(name):
                options.setdefault("endpoint_override", os.environ[name])
        retries = pafs.AwsStandardS3RetryStrategy(max_attempts=5)  # over some seconds
        fs = pafs.S3FileSystem(**options, allow_delayed_open=True, connect_timeout=10, retry_strategy=retries)
    return fs, path


def local_path(uri: str) -> str | None:
    """The path of a source on this machine as the operating system takes it, or None for what lies elsewhere or in a
    tar (PATH.tar#MEMBER). Undoes `local_uri`; bytes that are no UTF-8 come as `os.fsdecode` gives them.
    """
    if "://" not in uri:
        return None if ".tar#" in uri else absolute_url(uri)
    if not uri.startswith("file://"):
        return None
    split = urllib.parse.urlsplit(uri)
    if split.fragment:
        return None
    return os.fsdecode(urllib.parse.unquote_to_bytes(split.path))


def is_plain(path: str) -> bool:
    """Whether a path can stand for itself as a URI: printable UTF-8 that looks neither like a URL nor a tar member."""
    return path.isprintable() and "://" not in path and ".tar#" not in path


def local_uri(path: str) -> str:
    """The URI of an absolute path of this machine: the path itself, or file:// with percent escapes where the name is
    not UTF-8, holds control characters, or could be taken for something else."""
    return path if is_plain(path) else f"file://{urllib.parse.quote(os.fsencode(path))}"


def content_id(uri: str) -> str:
    """The video id of a file wherever it lies: SHA-256 of its bytes, first 16 hexadecimal digits. Raises OSError."""
    fs, path = filesystem_of(uri)
    with open(path, "rb") if isinstance(fs, pafs.LocalFileSystem) else fs.open_input_stream(path) as stream:
        return digest_of(iter(lambda: stream.read(PIECE_BYTES), b""))


def digest_of(pieces: Iterable[bytes]) -> str:
    """The video id of bytes that come in pieces."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()[:16]


def absolute_url(url: str) -> str:
    """The same place for processes in any working directory."""
    return url if "://" in url else os.path.abspath(os.path.expanduser(url))
