"""WebDataset tars as places of sources: a member is read where it lies, as a range of bytes of its tar.

A member's URI is PATH.tar#MEMBER. Nothing is unpacked, so names with `..`, links and devices in a stranger's tar lead
nowhere. The price is one pass over the headers of a tar per process that reads from it (one small read per member; on
an object store one request of 64 KiB each, unless members are smaller than that).
"""

from __future__ import annotations

import functools
import io
import os
import tarfile
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import pyarrow.fs as pafs

from pipelines.storage import filesystem_of, is_plain

_HEADER_BYTES = 64 << 10  # one read holds a header and a small member behind it


def member_uri(tar: str, name: str) -> str:
    """The URI of a member; `tar` is the tar's own URI."""
    if "://" in tar:
        return f"{tar}#{urllib.parse.quote(os.fsencode(name))}"
    if is_plain(name):
        return f"{tar}#{name}"
    return f"file://{urllib.parse.quote(os.fsencode(tar))}#{urllib.parse.quote(os.fsencode(name))}"


def member_prefixes(tar: str) -> tuple[str, ...]:
    """What the URIs of all members of a tar begin with; of a plain path's odd members with the second."""
    odd = f"file://{urllib.parse.quote(os.fsencode(tar))}#"
    return (f"{tar}#",) if "://" in tar else (f"{tar}#", odd)


def split_member(uri: str) -> tuple[str, str] | None:
    """The tar's URI and the member's name; None for what is no member of a tar."""
    if "://" not in uri:
        tar, found, name = uri.partition(".tar#")
        return (f"{tar}.tar", name) if found else None
    tar, _, name = uri.partition("#")
    if not name or not tar.partition("?")[0].endswith(".tar") or uri.lower().startswith(("http://", "https://")):
        return None
    return tar, os.fsdecode(urllib.parse.unquote_to_bytes(name))


@contextmanager
def opened(tar: str) -> Iterator[IO[bytes]]:
    """A tar as a seekable file that reads ahead a little. Raises OSError."""
    fs, path = filesystem_of(tar)
    if isinstance(fs, pafs.LocalFileSystem):
        with open(path, "rb", buffering=_HEADER_BYTES) as file:
            yield file
    else:
        with fs.open_input_file(path) as stream:
            yield io.BufferedReader(stream, _HEADER_BYTES)


def scan(file: IO[bytes]) -> Iterator[tuple[str, int, int]]:
    """Name, first byte and size of each regular file in a tar, as they come.

    Raises tarfile.TarError where the tar is cut or is none; what came before is sound. Sparse members and all kinds of
    links are left out: they have no bytes of their own in one piece.
    """
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            last = -1
            for member in tar:
                if member.size < 0 or member.offset <= last:  # would be read for ever
                    raise tarfile.ReadError("a header points backwards")
                last = member.offset
                if member.isreg() and not member.issparse():
                    yield member.name, member.offset_data, member.size
                # It remembers every member, which a tar of a million does not bear.
                tar.members = []  # type: ignore[attr-defined]
    except (ValueError, OverflowError) as error:  # of numbers in a broken header
        raise tarfile.ReadError(str(error)) from error


def find(uri: str) -> tuple[str, int, int]:
    """The tar's URI, and first byte and size of a member in it. Raises OSError; FileNotFoundError if it has none so
    called, any more."""
    tar, name = split_member(uri) or ("", "")
    fs, path = filesystem_of(tar)
    info = fs.get_file_info(path) if not isinstance(fs, pafs.LocalFileSystem) else None
    stat = os.stat(path) if info is None else None
    version = (stat.st_size, stat.st_mtime_ns) if stat else (info.size or 0, info.mtime_ns or 0) if info else (0, 0)
    try:
        return (tar, *_index(tar, *version)[name])
    except KeyError:
        raise FileNotFoundError(f"no member {name} in {tar}.") from None


@functools.lru_cache(maxsize=16)
def _index(tar: str, size_bytes: int, mtime_ns: int) -> dict[str, tuple[int, int]]:
    """Member name -> (first byte, size); of two members of one name the last stands, as for tar itself."""
    del size_bytes, mtime_ns  # they only tell one content of the tar from the next
    found: dict[str, tuple[int, int]] = {}
    with opened(tar) as file:
        try:
            for name, first, size in scan(file):
                found[name] = (first, size)
        except tarfile.TarError:  # cut: the members before the cut are sound
            pass
    return found
