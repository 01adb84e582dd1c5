"""A source's bytes as a file of this machine: local files as they are, all else streamed to a scratch folder.

    /videos/a.mp4  file:///videos/a.mp4   the file itself
    s3://bucket/a.mp4  gs://bucket/a.mp4  streamed by pyarrow, in pieces of 4 MiB
    PATH.tar#MEMBER                       the member's bytes, wherever the tar lies
    http://host/a.mp4  https://...        streamed, with caps on bytes, seconds and redirects

A download is whole or it is not there: nothing is resumed from the middle of a file, so a connection that breaks after
7 of 8 GB costs 7 GB. Redirects that lead from a public address into the private network are refused.
"""

from __future__ import annotations

import email.utils
import functools
import http.cookiejar
import io
import ipaddress
import os
import re
import socket
import stat
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

import pyarrow.fs as pafs
import requests
import urllib3

from pipelines import tars
from pipelines.errors import StageError
from pipelines.storage import PIECE_BYTES, filesystem_of, is_plain, local_path, local_uri

_MAX_REDIRECTS = 5
_RETRIED_STATUSES = frozenset({408, 425, 429})  # and 5xx
_MEDIA_TYPES = re.compile(
    r"(video|audio)/(?!.*(mpegurl|dash))|image/gif$|binary/octet-stream$"
    r"|application/(octet-stream|mp4|mxf|ogg|x-matroska|(x-)?(force-)?download|vnd\.rn-realmedia|vnd\.ms-asf)$"
)
Result = TypeVar("Result")
_WEB_PAGE = re.compile(rb"\s*<(!doctype html|html|\?xml)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """How sources come to this machine, and how much is borne of a slow or broken server."""

    max_bytes: int = 8 << 30
    """Largest source accepted, in bytes; what a server sends beyond is not read."""
    timeout_s: float = 3600.0
    """Longest time for one source, in seconds, over all attempts and waits."""
    stall_s: float = 30.0
    """Longest silence of a web server, in seconds, before an attempt counts as failed."""
    retries: int = 4
    """Attempts after the first, where another may help: 408, 425, 429, 5xx, timeouts, broken connections."""
    backoff_s: float = 1.0
    """Wait before the second attempt, in seconds; it doubles with each, and Retry-After is honoured if it is longer."""
    max_backoff_s: float = 60.0
    """Longest wait between two attempts, in seconds, whatever Retry-After says."""
    requests_per_s: float = 10.0
    """Most requests per second to one web host from one worker process; 0 for no limit."""

    def __post_init__(self) -> None:
        positive = (self.max_bytes, self.timeout_s, self.stall_s, self.max_backoff_s)
        if min(positive) <= 0 or min(self.retries, self.backoff_s, self.requests_per_s) < 0:
            raise ValueError(
                "fetch needs max_bytes, timeout_s, stall_s and max_backoff_s above 0, and retries, backoff_s and "
                "requests_per_s at least 0."
            )


DEFAULTS = FetchConfig()


class _Retry(Exception):
    """An attempt failed in a way that the next may not; `wait_s` is what the server asks for."""

    def __init__(self, why: str, *, wait_s: float = 0.0) -> None:
        super().__init__(why)
        self.wait_s = wait_s


@contextmanager
def local_file(uri: str, *, size_bytes: int, folder: Path, config: FetchConfig) -> Iterator[Path]:
    """The source as a file of this machine, of an ordinary name, for as long as the block lasts.

    `size_bytes` is the size as listed, 0 where it is unknown (http). A local file is itself, or a link to itself in
    `folder` where its name is none that every tool takes; anything else becomes a file in `folder`.

    Raises StageError: fetch_failed, too_large, wrong_content. Raises OSError if `folder` cannot be written to, which is
    no fault of the source.
    """
    path = local_path(uri)
    if path is not None:
        size_bytes = _local_size(path)
    if size_bytes > config.max_bytes:
        raise StageError("too_large", f"{size_bytes} bytes, fetch.max_bytes is {config.max_bytes}")
    if path is not None and is_plain(path):
        yield Path(path)
        return
    handle, name = tempfile.mkstemp(prefix="fetch-", suffix=_suffix(uri), dir=folder)
    os.close(handle)
    copy = Path(name)
    try:
        if path is not None:
            copy.unlink()
            copy.symlink_to(path)
        else:
            _download(uri, copy, size_bytes=size_bytes, config=config)
        yield copy
    finally:
        copy.unlink(missing_ok=True)


def read_bytes(uri: str, *, max_bytes: int, config: FetchConfig = DEFAULTS) -> bytes:
    """A small file, captions for example, from wherever sources come from; of any content type.

    Raises StageError: fetch_failed, too_large (above `max_bytes`).
    """
    path = local_path(uri)
    if path is not None:
        _local_size(path)

    def attempt(deadline_s: float) -> bytes:
        found = io.BytesIO()
        incoming = _incoming(uri, config=config, max_bytes=max_bytes, deadline_s=deadline_s, media_only=False)
        _copied(incoming, found, max_bytes=max_bytes)
        return found.getvalue()

    return _attempts(uri, attempt, config=config)


def pieces(uri: str) -> Generator[bytes]:
    """The bytes of a source that is not on the web, in pieces of 4 MiB at most. Raises OSError."""
    if tars.split_member(uri):
        tar, first, num_bytes = tars.find(uri)
        with tars.opened(tar) as file:
            file.seek(first)
            while num_bytes:
                piece = file.read(min(PIECE_BYTES, num_bytes))
                if not piece:
                    raise OSError(f"{tar} ends in the middle of the member")
                num_bytes -= len(piece)
                yield piece
        return
    fs, path = filesystem_of(uri)
    with open(path, "rb") if isinstance(fs, pafs.LocalFileSystem) else fs.open_input_stream(path) as stream:
        while piece := stream.read(PIECE_BYTES):
            yield piece


def _local_size(path: str) -> int:
    """Raises StageError for what is no regular file: a pipe would be waited for, a device has no end."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise StageError("fetch_failed", f"{local_uri(path)}: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        raise StageError("fetch_failed", f"{local_uri(path)} is no regular file")
    return found.st_size


def _download(uri: str, copy: Path, *, size_bytes: int, config: FetchConfig) -> None:
    def attempt(deadline_s: float) -> None:
        incoming = _incoming(uri, config=config, max_bytes=config.max_bytes, deadline_s=deadline_s, media_only=True)
        with open(copy, "wb") as file:
            num_bytes = _copied(incoming, file, max_bytes=config.max_bytes)
        if size_bytes and num_bytes != size_bytes:
            raise _Retry(f"{num_bytes} bytes came, {size_bytes} were listed: cut, or changed since")

    _attempts(uri, attempt, config=config)


def _copied(incoming: Generator[bytes], file: IO[bytes], *, max_bytes: int) -> int:
    num_bytes = 0
    with closing(incoming):
        for piece in incoming:
            num_bytes += len(piece)
            if num_bytes > max_bytes:
                raise StageError("too_large", f"more than {max_bytes} bytes came, which is the limit")
            file.write(piece)
    return num_bytes


def _attempts(uri: str, attempt: Callable[[float], Result], *, config: FetchConfig) -> Result:
    """What `attempt(deadline_s)` returns, tried again where that may help. Raises StageError that says how often."""
    deadline_s = time.monotonic() + config.timeout_s
    backoff_s = config.backoff_s
    for number in range(1, config.retries + 2):
        try:
            return attempt(deadline_s)
        except _Retry as error:
            why, wait_s = str(error), min(max(backoff_s, error.wait_s), config.max_backoff_s)
        backoff_s *= 2
        if number > config.retries:
            break
        if time.monotonic() + wait_s > deadline_s:
            why += f", no time for more within fetch.timeout_s {config.timeout_s:g}"
            break
        time.sleep(wait_s)
    raise StageError("fetch_failed", f"{why}; {number} attempts: {uri}")


def _incoming(
    uri: str, *, config: FetchConfig, max_bytes: int, deadline_s: float, media_only: bool
) -> Generator[bytes]:
    """The bytes of any source. Raises _Retry for what another attempt may mend, StageError for the rest."""
    source = (
        _web_pieces(uri, config=config, max_bytes=max_bytes, deadline_s=deadline_s, media_only=media_only)
        if is_web(uri)
        else pieces(uri)
    )
    try:
        with closing(source):
            for piece in source:
                yield piece
                if time.monotonic() > deadline_s:
                    raise StageError(
                        "fetch_failed", f"not here after fetch.timeout_s {config.timeout_s:g}, too slow: {uri}"
                    )
    except FileNotFoundError as error:
        raise StageError("fetch_failed", f"gone: {uri} is not there") from error
    except PermissionError as error:
        raise StageError("fetch_failed", f"blocked: no right to read {uri}") from error
    except ValueError as error:  # no URL, or of a scheme that nobody reads
        raise StageError("fetch_failed", f"{uri} cannot be read: {error}") from error
    except (OSError, urllib3.exceptions.HTTPError) as error:  # requests' errors are OSErrors
        raise _Retry(_first_line(error)) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:300] or type(error).__name__


def is_web(uri: str) -> bool:
    return uri[:8].lower().startswith(("http://", "https://"))


def _web_pieces(
    url: str, *, config: FetchConfig, max_bytes: int, deadline_s: float, media_only: bool
) -> Generator[bytes]:
    answer = _followed(url, config=config, deadline_s=deadline_s)
    with answer:
        _judge_status(answer)
        if answer.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise StageError("wrong_content", f"{url} comes compressed, which was not asked for")
        kind = answer.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if media_only and kind and not _MEDIA_TYPES.match(kind):
            raise StageError("wrong_content", f"{url} is {kind}, which is no video or sound")
        length = answer.headers.get("Content-Length", "")
        if length.isdecimal() and int(length) > max_bytes:
            raise StageError("too_large", f"{url} has {length} bytes, fetch.max_bytes is {max_bytes}")
        is_first = True
        # read1 hands over what has come: read would sit on a dribble until a whole piece is full.
        while piece := answer.raw.read1(PIECE_BYTES, decode_content=False):
            if is_first and media_only and _WEB_PAGE.match(piece):
                raise StageError("wrong_content", f"{url} is a web page that calls itself {kind or 'nothing'}")
            is_first = False
            yield piece


def _judge_status(answer: requests.Response) -> None:
    status, url = answer.status_code, answer.url
    if status in _RETRIED_STATUSES or status >= 500:
        raise _Retry(f"HTTP {status}", wait_s=_retry_after_s(answer.headers.get("Retry-After", "")))
    if status in (404, 410):
        raise StageError("fetch_failed", f"gone: HTTP {status} for {url}")
    if status in (401, 403, 407, 451):
        raise StageError("fetch_failed", f"blocked: HTTP {status} for {url}")
    if status not in (200, 203):
        raise StageError("fetch_failed", f"HTTP {status} for {url}")


def _retry_after_s(value: str) -> float:
    """Seconds that a server asks for, as a number or as a date; 0 for what is neither."""
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def _followed(url: str, *, config: FetchConfig, deadline_s: float) -> requests.Response:
    """The answer at the end of the redirects, its body unread."""
    target = url
    for _ in range(_MAX_REDIRECTS + 1):
        _wait_for_turn(urllib.parse.urlsplit(target).netloc, requests_per_s=config.requests_per_s)
        answer = _asked(target, config=config, deadline_s=deadline_s)
        if answer.status_code not in (301, 302, 303, 307, 308) or "Location" not in answer.headers:
            return answer
        answer.close()
        target = urllib.parse.urljoin(target, answer.headers["Location"])
        if urllib.parse.urlsplit(target).scheme not in ("http", "https"):
            raise StageError("fetch_failed", f"{url} redirects to {target}: only http and https are followed")
        if leads_inside(url, target):
            raise StageError("fetch_failed", f"{url} redirects into the private network ({target})")
    raise StageError("fetch_failed", f"{url} redirects more than {_MAX_REDIRECTS} times")


def leads_inside(url: str, target: str) -> bool:
    """Whether a redirect leads from a public address to a private one, a cloud's metadata service for example."""
    return _is_public(url) and not _is_public(target)


def _is_public(url: str) -> bool:
    host = urllib.parse.urlsplit(url).hostname or ""
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):  # a name that only a proxy knows, or nobody: the request says so itself
        return True
    return all(ipaddress.ip_address(address).is_global for address in found)


def _asked(url: str, *, config: FetchConfig, deadline_s: float) -> requests.Response:
    """One request. It waits in a thread of its own: a socket's timeout begins anew with each byte of a header, and name
    lookups have none."""
    answer: Future[requests.Response] = Future()

    def ask() -> None:
        try:
            answer.set_result(
                _session().get(
                    url,
                    stream=True,
                    allow_redirects=False,
                    timeout=config.stall_s,
                    headers={"Accept-Encoding": "identity"},
                )
            )
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        return answer.result(timeout=max(0.0, min(3 * config.stall_s, deadline_s - time.monotonic())))
    except TimeoutError as error:
        answer.add_done_callback(_close_late)
        raise _Retry("no answer in time") from error


def _close_late(answer: Future[requests.Response]) -> None:
    if answer.exception() is None:
        answer.result().close()


@functools.cache
def _session() -> requests.Session:
    """Connections are used again; cookies are not kept, so that no source depends on another."""
    session = requests.Session()
    session.cookies.set_policy(http.cookiejar.DefaultCookiePolicy(allowed_domains=[]))
    return session


_turns: dict[str, float] = {}  # host -> when its next request may go out
_turns_lock = threading.Lock()


def _wait_for_turn(host: str, *, requests_per_s: float) -> None:
    if not requests_per_s:
        return
    with _turns_lock:
        now = time.monotonic()
        if len(_turns) > 10_000:
            for known in [known for known, turn in _turns.items() if turn < now]:
                del _turns[known]
        turn = max(now, _turns.get(host, now))
        _turns[host] = turn + 1 / requests_per_s
    time.sleep(turn - now)


def _suffix(uri: str) -> str:
    """The ending of a source's name, if it is a plain one: some tools guess by it."""
    found = re.search(r"\.[A-Za-z0-9]{1,5}$", uri.partition("#")[2] or uri.partition("?")[0])
    return found[0] if found else ""
