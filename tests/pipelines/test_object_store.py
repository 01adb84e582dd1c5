"""Datasets and sources on S3, against moto's server on loopback; and what becomes of writes when it answers 500."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import pickle
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.dataset import LEDGER_SCHEMA
from pipelines.errors import StageError
from pipelines.fetch import FetchConfig, local_file, read_bytes
from pipelines.sources import MISSING, Source, discover, duplicates
from pipelines.storage import Folder, content_id
from tests.pipelines.servers import ObjectStore, never, object_store

pytestmark = pytest.mark.integration

BODY = bytes(range(256)) * 1000
QUICK = FetchConfig(backoff_s=0.01, retries=2)
NAMES = ["a b.mp4", "50%.mp4", "h#1.mp4", "q?.mp4", "plus+.mp4", "it's é.mp4"]


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectStore]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        for name in ("AWS_ENDPOINT_URL", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
            patch.delenv(name, raising=False)
        with object_store() as found:
            yield found


@pytest.fixture
def store(server: ObjectStore) -> Iterator[ObjectStore]:
    server.num_failures = 0
    yield server
    server.fails = never
    Folder.at(server.url()).fs.delete_dir_contents(server.bucket)


def put(store: ObjectStore, files: dict[str, bytes]) -> None:
    folder = Folder.at(store.url())
    for name, data in files.items():
        folder.write(name, data)


def uris(sources: list[Source]) -> list[str]:
    return [source.uri.partition("?")[0] for source in sources]


def test_a_dataset_folder_works_as_on_a_disk(store: ObjectStore, tmp_path: Path) -> None:
    folder = Folder.at(store.url("/pre fix/ds/"))
    folder.write("dataset.json", b"{}")
    folder.write("shards/b.tar", BODY)
    folder.write("shards/a.tar", b"one")
    (tmp_path / "large").write_bytes(BODY * 50)  # several parts of an upload
    folder.upload("media/a.mp4", tmp_path / "large")
    assert folder.names("shards", suffix=".tar") == ["shards/a.tar", "shards/b.tar"]
    assert folder.names("ledger") == []
    assert folder.read("shards/b.tar") == BODY
    assert hashlib.sha256(folder.read("media/a.mp4")).digest() == hashlib.sha256(BODY * 50).digest()
    assert folder.exists("dataset.json")
    assert not folder.exists("shards")
    folder.delete("shards/a.tar")
    folder.delete("shards/a.tar")
    assert folder.names("shards") == ["shards/b.tar"]


def test_the_endpoint_may_come_from_the_environment(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{store.port}")
    put(store, {"videos/a.mp4": BODY})
    (source,) = discover([f"s3://{store.bucket}/videos"]).sources
    assert source.uri == f"s3://{store.bucket}/videos/a.mp4"
    assert content_id(source.uri) == hashlib.sha256(BODY).hexdigest()[:16]


def test_a_write_outlives_a_store_that_fails_now_and_then(store: ObjectStore) -> None:
    count = itertools.count()
    store.fails = lambda request: request["REQUEST_METHOD"] in ("PUT", "POST") and next(count) % 2 == 0
    folder = Folder.at(store.url("/ds"))
    folder.write("shards/a.tar", BODY)
    assert store.num_failures == 1
    assert folder.read("shards/a.tar") == BODY


@pytest.mark.parametrize("step", ["uploads", "partNumber", "uploadId"])
def test_a_store_that_keeps_failing_ends_the_write_with_a_clear_error_and_nothing_published(
    store: ObjectStore, tmp_path: Path, step: str
) -> None:
    """At the start of an upload, in the middle, at its end."""
    folder = Folder.at(store.url("/ds"))
    folder.write("shards/a.tar", b"the first")
    (tmp_path / "large").write_bytes(BODY * 50)

    def fails(request: dict[str, Any]) -> bool:
        is_small = "upload" not in request["QUERY_STRING"]  # one request then is the whole upload
        return request["REQUEST_METHOD"] in ("PUT", "POST") and (is_small or step in request["QUERY_STRING"])

    store.fails = fails
    with pytest.raises(OSError, match=r"cannot write bucket/ds/shards/a\.tar \(.*\): mend that and run again\.$"):
        folder.upload("shards/a.tar", tmp_path / "large")
    if step == "uploads":
        with pytest.raises(OSError, match=r"cannot write bucket/ds/shards/b\.tar"):
            folder.write("shards/b.tar", BODY)
    store.fails = never
    assert folder.names("shards") == ["shards/a.tar"]
    assert folder.read("shards/a.tar") == b"the first"
    folder.upload("shards/a.tar", tmp_path / "large")
    assert folder.read("shards/a.tar") == BODY * 50


def test_an_upload_whose_file_cannot_be_read_publishes_no_cut_object(store: ObjectStore, tmp_path: Path) -> None:
    folder = Folder.at(store.url("/ds"))
    with pytest.raises(OSError, match="cannot write"):
        folder.upload("media/a.mp4", "/proc/self/mem")  # opens, and cannot be read at 0
    assert folder.names("media") == []


def test_a_folder_and_a_glob_list_their_media(store: ObjectStore) -> None:
    put(
        store,
        {
            "v/one/a.mp4": b"1",
            "v/one/a.en.vtt": b"WEBVTT",
            "v/two/b.mkv": b"22",
            "v/notes.txt": b"",
            "v/.cache/c.mp4": b"3",
        },
    )
    listing = discover([store.url("/v")])
    assert uris(listing.sources) == ["s3://bucket/v/one/a.mp4", "s3://bucket/v/two/b.mkv"]
    assert [source.size_bytes for source in listing.sources] == [1, 2]
    assert listing.num_ignored == 1
    assert read_bytes(listing.sources[0].captions_uri or "", max_bytes=10) == b"WEBVTT"
    assert listing.covers(listing.sources[0].uri.replace("a.mp4", "gone.mp4"))
    assert not listing.covers(listing.sources[0].uri.replace("/v/", "/w/"))
    assert uris(discover([store.url("/v/*/*.mp4")]).sources) == ["s3://bucket/v/one/a.mp4"]
    with pytest.raises(FileNotFoundError, match="check the spelling"):
        discover([store.url("/nowhere")])


@pytest.mark.parametrize("name", NAMES)
def test_any_name_leads_back_to_its_object(store: ObjectStore, tmp_path: Path, name: str) -> None:
    put(store, {f"v/{name}": name.encode()})
    (source,) = discover([store.url("/v")]).sources
    assert source.title == Path(name).stem
    assert content_id(source.uri) == hashlib.sha256(name.encode()).hexdigest()[:16]
    with local_file(source.uri, size_bytes=source.size_bytes, folder=tmp_path, config=QUICK) as path:
        assert path.read_bytes() == name.encode()


def test_a_list_beside_the_objects_names_them_and_a_missing_one_does_not_stop_it(store: ObjectStore) -> None:
    rows = [{"uri": "clips/a b.mp4", "title": "Onions", "licence": "CC0"}, {"uri": "clips/gone.mp4"}]
    put(store, {"clips/a b.mp4": BODY, "list.jsonl": "\n".join(map(json.dumps, rows)).encode()})
    first, second = discover([store.url("/list.jsonl")]).sources
    assert (first.title, first.size_bytes, json.loads(first.metadata)) == ("Onions", len(BODY), {"licence": "CC0"})
    assert (second.version, second.size_bytes) == (MISSING, 0)


def test_a_missing_object_is_fetch_failed_at_once(store: ObjectStore, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="fetch_failed: gone"):
        next(iter_file(store.url("/nowhere.mp4"), tmp_path))


def iter_file(uri: str, folder: Path, *, size_bytes: int = 0) -> Iterator[bytes]:
    with local_file(uri, size_bytes=size_bytes, folder=folder, config=QUICK) as path:
        yield path.read_bytes()


def test_a_read_outlives_a_store_that_fails_for_a_while(store: ObjectStore, tmp_path: Path) -> None:
    put(store, {"v/a.mp4": BODY})
    store.fails = lambda request: request["REQUEST_METHOD"] == "GET" and store.num_failures < 3
    assert next(iter_file(store.url("/v/a.mp4"), tmp_path, size_bytes=len(BODY))) == BODY
    assert store.num_failures == 3


def test_an_object_that_changed_since_it_was_listed_is_not_taken(store: ObjectStore, tmp_path: Path) -> None:
    put(store, {"v/a.mp4": BODY})
    with pytest.raises(StageError, match="changed since"):
        next(iter_file(store.url("/v/a.mp4"), tmp_path, size_bytes=17))


def test_copies_in_the_store_are_duplicates(store: ObjectStore) -> None:
    put(store, {"v/b.mp4": b"same", "v/a.mp4": b"same", "v/c.mp4": b"diff"})
    listed = discover([store.url("/v")]).sources
    found = duplicates(listed, LEDGER_SCHEMA.empty_table())
    assert [uris([s]) for s in listed if s.source_id in found] == [["s3://bucket/v/b.mp4"]]


def test_members_of_a_tar_in_the_store_are_sources_and_only_their_bytes_are_read(
    store: ObjectStore, tmp_path: Path
) -> None:
    packed = io.BytesIO()
    members = {"0.mp4": BODY * 40, "0.json": b'{"title": "Onions"}', "1.mp4": b"one", "1.srt": b"captions"}
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    put(store, {"v/x y.tar": packed.getvalue()})
    read_bytes_of = []
    store.fails = lambda request: read_bytes_of.append(request.get("HTTP_RANGE", "")) is not None
    first, second = discover([store.url("/v")]).sources
    assert (first.title, first.size_bytes) == ("Onions", len(BODY) * 40)
    assert next(iter_file(second.uri, tmp_path, size_bytes=3)) == b"one"
    assert read_bytes(second.captions_uri or "", max_bytes=100) == b"captions"
    ranges = [text.removeprefix("bytes=").split("-") for text in read_bytes_of if text]
    assert sum(int(last) - int(start) + 1 for start, last in ranges) < len(BODY) * 20
    store.fails = never
    assert next(iter_file(first.uri, tmp_path, size_bytes=len(BODY) * 40)) == BODY * 40


def test_a_folder_in_the_store_travels_to_other_processes(store: ObjectStore) -> None:
    folder = Folder.at(store.url("/ds"))
    folder.write("a", b"one")
    assert pickle.loads(pickle.dumps(folder)).read("a") == b"one"
