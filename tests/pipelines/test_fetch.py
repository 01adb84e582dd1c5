"""What strangers' web servers and odd files do to a fetch, each with a real server or a real file."""

from __future__ import annotations

import email.utils
import os
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import StageError
from pipelines.fetch import FetchConfig, leads_inside, local_file, read_bytes
from tests.conftest import make_tar
from tests.pipelines.servers import Page, Web, web_server

BODY = bytes(range(256)) * 1000
QUICK = FetchConfig(backoff_s=0.01, retries=2, stall_s=5, requests_per_s=0)


@pytest.fixture
def web() -> Iterator[Web]:
    with web_server() as found:
        yield found


def fetched(uri: str, folder: Path, *, size_bytes: int = 0, config: FetchConfig = QUICK) -> bytes:
    """The bytes of a source; the folder is empty again afterwards, whatever happened."""
    folder = folder / "scratch"
    folder.mkdir(exist_ok=True)
    try:
        with local_file(uri, size_bytes=size_bytes, folder=folder, config=config) as path:
            return path.read_bytes()
    finally:
        assert os.listdir(folder) == []


def refusal(uri: str, folder: Path, **settings: Any) -> tuple[str, str]:
    with pytest.raises(StageError) as caught:
        fetched(uri, folder, config=FetchConfig(**{"backoff_s": 0.01, "retries": 2, "requests_per_s": 0} | settings))
    return caught.value.reason, caught.value.detail


def test_a_local_file_is_itself_and_stays(tmp_path: Path) -> None:
    video = tmp_path / "a.mp4"
    video.write_bytes(BODY)
    with local_file(str(video), size_bytes=len(BODY), folder=tmp_path, config=QUICK) as path:
        assert path == video
    assert video.read_bytes() == BODY


def test_a_file_with_a_name_no_tool_takes_has_an_ordinary_one_meanwhile(tmp_path: Path) -> None:
    video = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\n.mp4")
    Path(video).write_bytes(BODY)
    uri = f"file://{tmp_path}/%FF%0A.mp4"
    with local_file(uri, size_bytes=0, folder=tmp_path, config=QUICK) as path:
        assert str(path).isprintable()
        assert path.suffix == ".mp4"
        assert path.read_bytes() == BODY
    assert os.listdir(tmp_path) == [os.path.basename(video)]


@pytest.mark.parametrize("kind", ["nothing", "folder", "pipe", "device"])
def test_what_is_no_file_fails_and_is_not_waited_for(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "a.mp4"
    if kind == "folder":
        place.mkdir()
    elif kind == "pipe":
        os.mkfifo(place)
    assert refusal("/dev/zero" if kind == "device" else str(place), tmp_path)[0] == "fetch_failed"


def test_a_file_above_the_limit_is_too_large(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(BODY)
    assert refusal(str(tmp_path / "a.mp4"), tmp_path, max_bytes=100)[0] == "too_large"


def test_a_member_of_a_tar_is_read_where_it_lies(tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "a.tar", {"0.mp4": b"zero", "1.mp4": BODY, "2.mp4": b"two"})
    assert fetched(f"{tar}#1.mp4", tmp_path, size_bytes=len(BODY)) == BODY
    assert read_bytes(f"{tar}#2.mp4", max_bytes=10) == b"two"
    make_tar(tar, {"1.mp4": b"changed since"})
    assert fetched(f"{tar}#1.mp4", tmp_path) == b"changed since"
    assert "gone" in refusal(f"{tar}#2.mp4", tmp_path)[1]


def test_a_member_that_is_cut_is_not_taken_for_whole(tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "a.tar", {"0.mp4": BODY})
    os.truncate(tar, 50_000)
    reason, detail = refusal(f"{tar}#0.mp4", tmp_path)
    assert (reason, "ends in the middle" in detail) == ("fetch_failed", True)


def test_a_video_comes_over_http_whole(web: Web, tmp_path: Path) -> None:
    web.pages["/a.mp4?key=1"] = lambda page: page.send(BODY)
    assert fetched(web.url("/a.mp4?key=1"), tmp_path) == BODY


def test_a_body_in_chunks_without_a_length_comes_whole(web: Web, tmp_path: Path) -> None:
    def page(page: Page) -> None:
        page.protocol_version = "HTTP/1.1"
        page.answer(Transfer_Encoding="chunked")
        for piece in (BODY[:1000], BODY[1000:], b""):
            page.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))

    web.pages["/a.mp4"] = page
    assert fetched(web.url("/a.mp4"), tmp_path) == BODY


@pytest.mark.parametrize("kind", ["text/html; charset=utf-8", "text/plain", "application/json", "image/jpeg"])
def test_what_says_that_it_is_no_media_is_wrong_content(web: Web, tmp_path: Path, kind: str) -> None:
    web.pages["/a.mp4"] = lambda page: page.send(b"{}", kind=kind)
    assert refusal(web.url("/a.mp4"), tmp_path)[0] == "wrong_content"
    assert len(web.asked) == 1


@pytest.mark.parametrize("kind", ["audio/x-mpegurl", "application/vnd.apple.mpegurl", "application/dash+xml"])
def test_a_playlist_is_wrong_content(web: Web, tmp_path: Path, kind: str) -> None:
    web.pages["/a.m3u8"] = lambda page: page.send(b"#EXTM3U\nfile:///etc/passwd\n", kind=kind)
    assert refusal(web.url("/a.m3u8"), tmp_path)[0] == "wrong_content"


@pytest.mark.parametrize("kind", ["video/mp4", "application/octet-stream"])
def test_a_web_page_that_calls_itself_a_video_is_wrong_content(web: Web, tmp_path: Path, kind: str) -> None:
    web.pages["/a.mp4"] = lambda page: page.send(b"\n<!DOCTYPE html><html>not found</html>", kind=kind)
    assert refusal(web.url("/a.mp4"), tmp_path)[0] == "wrong_content"


@pytest.mark.parametrize("kind", ["application/octet-stream", "binary/octet-stream", "audio/mpeg", ""])
def test_types_that_media_are_sent_as_are_taken(web: Web, tmp_path: Path, kind: str) -> None:
    web.pages["/a.mp4"] = lambda page: page.send(BODY, kind=kind)
    assert fetched(web.url("/a.mp4"), tmp_path) == BODY


@pytest.mark.parametrize(("status", "word"), [(404, "gone"), (410, "gone"), (401, "blocked"), (403, "blocked")])
def test_gone_and_blocked_are_told_apart_and_not_asked_again(web: Web, tmp_path: Path, status: int, word: str) -> None:
    web.pages["/a.mp4"] = lambda page: page.answer(status)
    reason, detail = refusal(web.url("/a.mp4"), tmp_path)
    assert (reason, detail.split(":")[0], len(web.asked)) == ("fetch_failed", word, 1)


@pytest.mark.parametrize("status", [500, 503, 429, 408])
def test_a_server_that_recovers_is_asked_again(web: Web, tmp_path: Path, status: int) -> None:
    web.pages["/a.mp4"] = lambda page: page.send(BODY) if len(web.asked) == 3 else page.answer(status)
    assert fetched(web.url("/a.mp4"), tmp_path) == BODY


def test_a_server_that_does_not_recover_fails_with_the_number_of_attempts(web: Web, tmp_path: Path) -> None:
    web.pages["/a.mp4"] = lambda page: page.answer(503)
    assert refusal(web.url("/a.mp4"), tmp_path) == ("fetch_failed", f"HTTP 503; 3 attempts: {web.url('/a.mp4')}")
    assert len(web.asked) == 3


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_is_honoured(web: Web, tmp_path: Path, as_date: bool) -> None:
    times_s: list[float] = []

    def page(page: Page) -> None:
        times_s.append(time.time())
        later = email.utils.formatdate(times_s[0] + 2, usegmt=True) if as_date else 1
        page.send(BODY) if len(times_s) == 2 else page.answer(429, Retry_After=later)

    web.pages["/a.mp4"] = page
    assert fetched(web.url("/a.mp4"), tmp_path) == BODY
    assert times_s[1] - times_s[0] >= 1


def test_retry_after_is_capped(web: Web, tmp_path: Path) -> None:
    web.pages["/a.mp4"] = lambda page: page.send(BODY) if len(web.asked) == 2 else page.answer(503, Retry_After=86400)
    assert fetched(web.url("/a.mp4"), tmp_path, config=FetchConfig(max_backoff_s=0.01)) == BODY


def test_a_length_above_the_limit_is_not_even_read(web: Web, tmp_path: Path) -> None:
    web.pages["/a.mp4"] = lambda page: page.answer(Content_Length=10**15)
    assert refusal(web.url("/a.mp4"), tmp_path)[0] == "too_large"


def test_a_body_without_end_stops_at_the_limit(web: Web, tmp_path: Path) -> None:
    def page(page: Page) -> None:
        page.answer()
        while True:
            page.wfile.write(BODY)

    web.pages["/a.mp4"] = page
    assert refusal(web.url("/a.mp4"), tmp_path, max_bytes=5 << 20)[0] == "too_large"
    assert len(web.asked) == 1


def test_a_body_shorter_than_its_length_is_tried_again(web: Web, tmp_path: Path) -> None:
    def page(page: Page) -> None:
        page.answer(Content_Length=len(BODY))
        page.wfile.write(BODY if len(web.asked) == 2 else BODY[:100])

    web.pages["/a.mp4"] = page
    assert fetched(web.url("/a.mp4"), tmp_path) == BODY
    web.pages["/b.mp4"] = lambda page: (page.answer(Content_Length=99), page.wfile.write(b"few"))[0]
    reason, detail = refusal(web.url("/b.mp4"), tmp_path)
    assert (reason, "3 attempts" in detail) == ("fetch_failed", True)


def test_a_chunked_body_that_breaks_off_is_not_taken_for_whole(web: Web, tmp_path: Path) -> None:
    def page(page: Page) -> None:
        page.protocol_version = "HTTP/1.1"
        page.answer(Transfer_Encoding="chunked")
        page.wfile.write(b"%x\r\n%s" % (len(BODY), BODY[:1000]))
        page.close_connection = True

    web.pages["/a.mp4"] = page
    assert refusal(web.url("/a.mp4"), tmp_path)[0] == "fetch_failed"


def test_a_size_other_than_the_listed_one_is_a_failure(web: Web, tmp_path: Path) -> None:
    web.pages["/a.mp4"] = lambda page: page.send(BODY)
    with pytest.raises(StageError, match="were listed"):
        fetched(web.url("/a.mp4"), tmp_path, size_bytes=17)


def test_a_silent_server_is_given_up(web: Web, tmp_path: Path) -> None:
    web.pages["/a.mp4"] = lambda page: (page.answer(Content_Length=99), time.sleep(1))[0]
    reason, detail = refusal(web.url("/a.mp4"), tmp_path, stall_s=0.1, retries=1)
    assert (reason, "2 attempts" in detail) == ("fetch_failed", True)


@pytest.mark.parametrize("where", ["body", "head"])
def test_a_dribble_ends_with_the_time_for_a_source(web: Web, tmp_path: Path, where: str) -> None:
    """Each byte comes well within the time for silence."""

    def page(page: Page) -> None:
        if where == "body":
            page.answer(Content_Length=10**6)
        else:
            page.wfile.write(b"HTTP/1.0 200 OK\r\nX: ")
        for _ in range(400):
            page.wfile.write(b"x")
            page.wfile.flush()
            time.sleep(0.02)

    web.pages["/a.mp4"] = page
    reason, detail = refusal(web.url("/a.mp4"), tmp_path, stall_s=1, timeout_s=0.5)
    assert (reason, "timeout_s" in detail) == ("fetch_failed", True)


def test_redirects_are_followed_five_times(web: Web, tmp_path: Path) -> None:
    for step in range(6):
        web.pages[f"/{step}"] = lambda page, step=step: page.answer(302, Location=f"/{step + 1}")
    web.pages["/6"] = lambda page: page.send(BODY)
    assert fetched(web.url("/1"), tmp_path) == BODY
    assert "redirects more than 5 times" in refusal(web.url("/0"), tmp_path)[1]


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/a.mp4"])
def test_a_redirect_off_the_web_is_refused(web: Web, tmp_path: Path, target: str) -> None:
    web.pages["/a.mp4"] = lambda page: page.answer(301, Location=target)
    reason, detail = refusal(web.url("/a.mp4"), tmp_path)
    assert (reason, "only http and https are followed" in detail) == ("fetch_failed", True)


def test_a_redirect_from_outside_may_not_lead_into_the_private_network() -> None:
    assert leads_inside("http://8.8.8.8/a.mp4", "http://169.254.169.254/latest/meta-data")
    assert leads_inside("https://8.8.8.8/a.mp4", "http://127.0.0.1:8265/")
    assert not leads_inside("http://8.8.8.8/a.mp4", "https://9.9.9.9/a.mp4")
    assert not leads_inside("http://127.0.0.1/a.mp4", "http://127.0.0.1/b.mp4")


def test_requests_to_one_host_keep_their_distance(web: Web, tmp_path: Path) -> None:
    times_s: list[float] = []
    web.pages["/a.mp4"] = lambda page: (times_s.append(time.monotonic()), page.send(BODY))[1]
    config = FetchConfig(requests_per_s=10)
    for _ in range(4):
        fetched(web.url("/a.mp4"), tmp_path, config=config)
    assert times_s[3] - times_s[0] >= 0.25  # three tenths of a second, less what a request takes on its way


def test_nobody_there_is_a_failure_with_the_number_of_attempts(web: Web, tmp_path: Path) -> None:
    closed = web.url("/a.mp4").replace(str(web.port), "9")
    reason, detail = refusal(closed, tmp_path)
    assert (reason, "3 attempts" in detail) == ("fetch_failed", True)


@pytest.mark.parametrize("uri", ["ftp://127.0.0.1/a.mp4", "http://", "http://[bad/a.mp4", "nonsense://x/y.mp4"])
def test_an_address_that_nobody_reads_is_a_failure(tmp_path: Path, uri: str) -> None:
    assert refusal(uri, tmp_path, retries=0)[0] == "fetch_failed"


def test_captions_come_from_the_web_as_text_and_up_to_a_size(web: Web) -> None:
    web.pages["/a.vtt"] = lambda page: page.send(b"WEBVTT", kind="text/vtt")
    assert read_bytes(web.url("/a.vtt"), max_bytes=10, config=QUICK) == b"WEBVTT"
    with pytest.raises(StageError, match="too_large"):
        read_bytes(web.url("/a.vtt"), max_bytes=3, config=QUICK)


def test_a_scratch_folder_that_cannot_be_written_is_no_fault_of_the_source(web: Web, tmp_path: Path) -> None:
    web.pages["/a.mp4"] = lambda page: page.send(BODY)
    with pytest.raises(OSError), local_file(web.url("/a.mp4"), size_bytes=0, folder=tmp_path / "no", config=QUICK):  # noqa: PT011
        pass


def test_a_large_file_does_not_pass_through_memory(web: Web, tmp_path: Path) -> None:
    def page(page: Page) -> None:
        page.answer(Content_Length=len(BODY) * 200)
        for _ in range(200):
            page.wfile.write(BODY)

    web.pages["/a.mp4"] = page
    tracemalloc.start()
    try:
        with local_file(web.url("/a.mp4"), size_bytes=0, folder=tmp_path, config=QUICK) as path:
            size_bytes = path.stat().st_size
            peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size_bytes == len(BODY) * 200
    assert peak_bytes < 16 << 20 < size_bytes
