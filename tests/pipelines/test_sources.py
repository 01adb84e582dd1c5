"""Places become sources, each once, and exact duplicates are known before any work."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import fetch
from pipelines.dataset import LEDGER_SCHEMA, ClipGrid, DatasetInfo, Sample
from pipelines.sources import MISSING, Source, discover, duplicates
from pipelines.storage import Folder, content_id
from tests.conftest import make_tar

EMPTY = LEDGER_SCHEMA.empty_table()


def put(folder: Path, name: str, data: bytes = b"x") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def listed_in(places: list[str]) -> list[Source]:
    return discover(places).sources


def names(sources: list[Source]) -> list[str]:
    return [Path(source.uri).name for source in sources]


def test_a_folder_gives_its_media_files_at_any_depth_and_nothing_else(tmp_path: Path) -> None:
    for name in ("b.mp4", "deep/a.MKV", "notes.txt", ".hidden.mp4", "c.flac"):
        put(tmp_path, name)
    assert sorted(names(listed_in([str(tmp_path)]))) == ["a.MKV", "b.mp4", "c.flac"]


def test_the_same_file_by_two_ways_is_one_source(tmp_path: Path) -> None:
    path = put(tmp_path, "a.mp4")
    assert len(listed_in([str(tmp_path), str(path), str(tmp_path / "*.mp4")])) == 1


def test_a_glob_takes_what_matches(tmp_path: Path) -> None:
    for name in ("one/a.mp4", "one/b.mkv", "two/c.mp4"):
        put(tmp_path, name)
    put(tmp_path, "one/deep/d.mp4")
    assert names(listed_in([str(tmp_path / "*" / "*.mp4")])) == ["a.mp4", "c.mp4"]
    assert names(listed_in([str(tmp_path / "**" / "*.mp4")])) == ["a.mp4", "d.mp4", "c.mp4"]


def test_a_named_file_is_taken_whatever_its_ending(tmp_path: Path) -> None:
    assert names(listed_in([str(put(tmp_path, "video.bin"))])) == ["video.bin"]


def test_captions_beside_a_video_belong_to_it(tmp_path: Path) -> None:
    put(tmp_path, "a.mp4")
    subtitles = put(tmp_path, "a.srt")
    put(tmp_path, "b.mp4")
    first, second = listed_in([str(tmp_path)])
    assert first.captions_uri == str(subtitles)
    assert second.captions_uri is None


def test_a_changed_file_is_a_new_source(tmp_path: Path) -> None:
    path = put(tmp_path, "a.mp4", b"one")
    (before,) = listed_in([str(path)])
    put(tmp_path, "a.mp4", b"longer")
    (after,) = listed_in([str(path)])
    assert before.source_id != after.source_id


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_list_names_sources_from_its_own_folder_with_titles(tmp_path: Path, kind: str) -> None:
    put(tmp_path, "clips/a.mp4")
    rows = [{"uri": "clips/a.mp4", "title": "Onions"}]
    listing = tmp_path / f"list.{kind}"
    if kind == "csv":
        listing.write_text("uri,title\nclips/a.mp4,Onions\n")
    elif kind == "jsonl":
        listing.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), listing)
    (source,) = listed_in([str(listing)])
    assert (Path(source.uri), source.title) == (tmp_path / "clips/a.mp4", "Onions")


@pytest.mark.parametrize("name", ["a b.mp4", "50%.mp4", "h#1.mp4", "q?.mp4", "it's é.mp4"])
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_any_name_leads_back_to_its_file(tmp_path: Path, name: str, scheme: str) -> None:
    put(tmp_path, name, name.encode())
    (source,) = listed_in([f"{scheme}{tmp_path}"])
    assert source.title == Path(name).stem
    assert content_id(source.uri) == hashlib.sha256(name.encode()).hexdigest()[:16]


def test_captions_in_a_language_belong_to_their_video_too(tmp_path: Path) -> None:
    for name in ("a.mp4", "a.en.VTT", "ab.srt"):
        put(tmp_path, name)
    (source,) = listed_in([str(tmp_path)])
    assert source.captions_uri == str(tmp_path / "a.en.VTT")


def test_a_list_that_cannot_be_read_names_itself(tmp_path: Path) -> None:
    broken = put(tmp_path, "list.jsonl", b'{"uri": ')
    with pytest.raises(ValueError, match=r"list\.jsonl cannot be read.*write it as UTF-8 jsonl"):
        listed_in([str(broken)])


def test_a_missing_place_and_an_empty_one_are_errors_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="check the spelling"):
        listed_in([str(tmp_path / "nowhere")])
    put(tmp_path, "a.txt")
    with pytest.raises(ValueError, match="no media files in"):
        listed_in([str(tmp_path)])


def test_of_equal_files_the_first_by_name_stays(tmp_path: Path) -> None:
    for name, data in {"b.mp4": b"same", "a.mp4": b"same", "c.mp4": b"diff"}.items():
        put(tmp_path, name, data)
    listed = listed_in([str(tmp_path)])
    found = duplicates(listed, EMPTY)
    assert found == duplicates(list(reversed(listed)), EMPTY)
    ((source_id, (_, original)),) = found.items()
    assert next(s for s in listed if s.source_id == source_id).uri.endswith("b.mp4")
    assert original.endswith("a.mp4")


def test_a_copy_of_a_kept_video_is_a_duplicate_in_a_later_run(tmp_path: Path) -> None:
    first = listed_in([str(put(tmp_path, "a.mp4", b"same"))])
    kept = {"uri": first[0].uri, "size_bytes": 4, "video_id": content_id(first[0].uri), "status": "kept"}
    ledger = pa.Table.from_pylist([kept], schema=LEDGER_SCHEMA)
    later = listed_in([str(put(tmp_path, "0.mp4", b"same"))])
    assert list(duplicates(later, ledger)) == [later[0].source_id]


def test_a_loop_of_links_ends_and_each_file_has_its_real_name(tmp_path: Path) -> None:
    put(tmp_path, "z/a.mp4")
    (tmp_path / "a").symlink_to(tmp_path / "z")
    (tmp_path / "z" / "up").symlink_to(tmp_path)
    (tmp_path / "self.mp4").symlink_to(tmp_path / "self.mp4")
    elsewhere = put(tmp_path.parent / f"{tmp_path.name}-elsewhere", "b.mp4").parent
    (tmp_path / "linked").symlink_to(elsewhere)
    found = {source.uri: source.version for source in listed_in([str(tmp_path)])}
    assert list(found) == [str(tmp_path / name) for name in ("linked/b.mp4", "self.mp4", "z/a.mp4")]
    assert [uri for uri, version in found.items() if version == MISSING] == [str(tmp_path / "self.mp4")]


def test_a_link_to_nowhere_is_a_source_that_is_missing(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").symlink_to(tmp_path / "annexed.mp4")
    ((version, size_bytes),) = [(s.version, s.size_bytes) for s in listed_in([str(tmp_path)])]
    assert (version, size_bytes) == (MISSING, 0)


def test_hidden_files_and_folders_are_left_out_and_others_are_counted(tmp_path: Path) -> None:
    for name in (".a.mp4", ".git/b.mp4", "c.mp4", "c.srt", "notes.txt", "list.csv"):
        put(tmp_path, name)
    os.mkfifo(tmp_path / "pipe.mp4")
    listing = discover([str(tmp_path)])
    assert (names(listing.sources), listing.num_ignored) == (["c.mp4"], 3)


def test_a_name_that_is_no_utf8_leads_back_to_its_file(tmp_path: Path) -> None:
    for name, data in {b"\xff.mp4": b"odd", b"\xff.srt": b"captions", b"new\nline.mp4": b"line"}.items():
        (tmp_path / os.fsdecode(name)).write_bytes(data)
    odd, line = listed_in([str(tmp_path)])
    assert (odd.uri, odd.title) == (f"file://{tmp_path}/%FF.mp4", "\ufffd")
    assert content_id(odd.uri) == hashlib.sha256(b"odd").hexdigest()[:16]
    assert content_id(line.uri) == hashlib.sha256(b"line").hexdigest()[:16]
    assert fetch.read_bytes(odd.captions_uri or "", max_bytes=100) == b"captions"
    pa.array([odd.uri, odd.title, odd.source_id])  # text that Arrow takes


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to become another user")
def test_a_folder_that_cannot_be_read_is_said_and_not_covered(tmp_path: Path) -> None:
    put(tmp_path, "a.mp4")
    put(tmp_path, "closed/b.mp4")
    (tmp_path / "closed").chmod(0)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.is_relative_to(tempfile.gettempdir()) and folder != Path(tempfile.gettempdir()):
            folder.chmod(0o755)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # root reads everything
        try:
            os.setuid(65534)
            listing = discover([str(tmp_path)])
            covered = [listing.covers(f"{tmp_path}/{name}") for name in ("gone.mp4", "closed/b.mp4")]
            os.write(writer, json.dumps([names(listing.sources), listing.notes, covered]).encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    found = json.loads(os.read(reader, 10_000))
    assert found == [
        ["a.mp4"],
        [f"cannot look into {tmp_path}/closed: what lies there is not listed."],
        [True, False],
    ]


def test_the_dataset_itself_is_no_source(tmp_path: Path) -> None:
    for name in ("a.mp4", "dataset/media/b.mp4"):
        put(tmp_path, name)
    (tmp_path / "again").symlink_to(tmp_path / "dataset")
    assert names(discover([str(tmp_path)], outside=str(tmp_path / "dataset")).sources) == ["a.mp4"]
    with pytest.raises(ValueError, match="no media files in"):
        discover([str(tmp_path / "dataset")], outside=str(tmp_path / "dataset"))


def test_a_listing_covers_what_it_would_have_listed(tmp_path: Path) -> None:
    for name in ("one/a.mp4", "two/b.mp4", "list.csv"):
        put(tmp_path, name, b"uri\none/a.mp4\n")
    for places, covered in {
        (str(tmp_path),): {"one/gone.mp4", "two/deep/gone.mp4", "gone.mp4"},
        (str(tmp_path / "one"),): {"one/gone.mp4"},
        (str(tmp_path / "*" / "*.mp4"),): {"one/gone.mp4"},
        (str(tmp_path / "**" / "*.mp4"),): {"one/gone.mp4", "two/deep/gone.mp4", "gone.mp4"},
        (str(tmp_path / "one/a.mp4"), str(tmp_path / "list.csv")): set(),
    }.items():
        listing = discover(places)
        asked = ("one/gone.mp4", "two/deep/gone.mp4", "gone.mp4", "one/.gone.mp4", "one/named.bin")
        assert {name for name in asked if listing.covers(f"{tmp_path}/{name}")} == covered, places
        assert not listing.covers(f"{tmp_path}-other/gone.mp4")
        assert not listing.covers("s3://bucket/gone.mp4")
    assert discover([str(tmp_path)]).covers(f"file://{tmp_path}/one/%FF.mp4")


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_what_else_a_list_says_is_metadata(tmp_path: Path, kind: str) -> None:
    put(tmp_path, "a.mp4")
    put(tmp_path, "subtitles.vtt")
    row = {
        "path": "a.mp4",
        "title": "A, b",
        "captions": "subtitles.vtt",
        "language": "en",
        "url": "https://host/1",
        "licence": "CC BY",
        "empty": "",
    }
    listing = tmp_path / f"list.{kind}"
    if kind == "csv":
        with listing.open("w", newline="") as file:
            writer = csv.DictWriter(file, row)
            writer.writeheader()
            writer.writerow(row)
    elif kind == "jsonl":
        listing.write_text(json.dumps(row))
    else:
        pq.write_table(pa.Table.from_pylist([row]), listing)
    (source,) = listed_in([str(listing)])
    assert (source.title, source.language, source.captions_uri) == ("A, b", "en", str(tmp_path / "subtitles.vtt"))
    assert source.metadata == '{"licence": "CC BY", "url": "https://host/1"}'


def test_a_lists_row_stands_over_what_a_folder_says(tmp_path: Path) -> None:
    put(tmp_path, "a.mp4")
    listing = put(tmp_path, "list.csv", b"uri,licence\na.mp4,CC0\n")
    for places in ([str(tmp_path), str(listing)], [str(listing), str(tmp_path)]):
        (source,) = listed_in(places)
        assert source.metadata == '{"licence": "CC0"}'


def test_rows_whose_file_is_missing_do_not_stop_a_list(tmp_path: Path) -> None:
    put(tmp_path, "a.mp4")
    rows = ["uri", "a.mp4", "gone.mp4", str(tmp_path), "nonsense://x/y.mp4", "s3://[bad/z.mp4", "/a.tar#b.mp4"]
    found = listed_in([str(put(tmp_path, "list.csv", "\n".join(rows).encode()))])
    assert len(found) == 6
    assert [(s.size_bytes, s.version) for s in found if s.uri != str(tmp_path / "a.mp4")] == [(0, MISSING)] * 5


def test_rows_on_the_web_have_the_version_that_the_list_gives_them(tmp_path: Path) -> None:
    rows = [{"url": "https://host/a%20b.mp4?key=1", "version": 2, "licence": "CC0"}, {"url": "http://host/c.mp4"}]
    listing = put(tmp_path, "list.jsonl", "\n".join(map(json.dumps, rows)).encode())
    plain, versioned = listed_in([str(listing)])
    assert (versioned.version, versioned.size_bytes, versioned.title) == ("2", 0, "a b")
    assert versioned.metadata == '{"licence": "CC0"}'
    assert (plain.version, plain.uri) == ("", "http://host/c.mp4")
    assert not duplicates([plain, versioned], EMPTY)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("list.csv", b"title\nOnions\n", "row 1 of .* has no uri"),
        ("list.csv", b"uri,title\na.mp4,On,ions\n", "row 1 of .* has more fields than the header"),
        ("list.csv", b'uri,title\n"a.mp4,Onions\n', r"list\.csv cannot be read"),
        ("list.csv", b"uri\n\xff.mp4\n", r"list\.csv cannot be read"),
        ("list.jsonl", b'{"uri": "a.mp4"}\n["b.mp4"]\n', "row 2 of .* write an object"),
        ("list.jsonl", b'{"uri": 7}\n', "row 1 of .* has no uri"),
        ("list.parquet", b"PAR0", r"list\.parquet cannot be read"),
    ],
)
def test_a_malformed_list_is_one_sentence(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        discover([str(put(tmp_path, name, data))])


def test_media_in_a_tar_are_sources_with_what_lies_beside_them(tmp_path: Path) -> None:
    about = {"title": "Onions", "language": "en", "licence": "CC0", "views": 3, "nested": {"a": 1}}
    tar = make_tar(
        tmp_path / "0000.tar",
        {
            "d/1.json": json.dumps(about).encode(),
            "d/1.mp4": b"one",
            "d/1.en.vtt": b"captions",
            "2.mp4": b"two",
            "2.txt": b"",
            "./.hidden.mp4": b"",
            "../3.mp4": b"three",
            "x\n.mp4": b"four",
        },
    )
    listing = discover([str(tmp_path)])
    by_title = {source.title: source for source in listing.sources}
    assert sorted(by_title) == sorted(["Onions", "2", "3", "x\n"])
    one = by_title["Onions"]
    assert (one.uri, one.size_bytes, one.language) == (f"{tar}#d/1.mp4", 3, "en")
    assert json.loads(one.metadata) == {"licence": "CC0", "views": 3}
    assert one.captions_uri == f"{tar}#d/1.en.vtt"
    for title, data in {"Onions": b"one", "2": b"two", "3": b"three", "x\n": b"four"}.items():
        assert b"".join(fetch.pieces(by_title[title].uri)) == data
    assert discover([str(tar)]).sources == listing.sources
    assert listing.covers(f"{tar}#gone.mp4")
    assert discover([str(tar)]).covers(f"{tar}#gone.mp4")
    assert names(listed_in([str(put(tmp_path, "list.csv", b"uri\n0000.tar#2.mp4\n"))])) == ["0000.tar#2.mp4"]


def test_a_tar_that_is_cut_gives_what_is_whole_and_stays_on_the_books(tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "a.tar", {"1.mp4": bytes(5000), "2.mp4": bytes(5000)})
    os.truncate(tar, 9000)
    put(tmp_path, "b.tar", b"<html>" * 1000)
    make_tar(tmp_path / "c.tar", {"1.txt": b"no media"})
    listing = discover([str(tmp_path)])
    assert names(listing.sources) == ["a.tar", "a.tar#1.mp4", "a.tar#2.mp4", "b.tar"]
    assert [note.partition(" cannot be read")[0] for note in sorted(listing.notes)] == [str(tar), f"{tmp_path}/b.tar"]
    assert listing.num_ignored == 1


def test_copies_in_a_tar_and_beside_it_are_duplicates(tmp_path: Path) -> None:
    make_tar(tmp_path / "b.tar", {"1.mp4": b"same", "2.mp4": b"diff"})
    put(tmp_path, "a.mp4", b"same")
    found = listed_in([str(tmp_path)])
    assert [s.uri for s in found if s.source_id in duplicates(found, EMPTY)] == [f"{tmp_path}/b.tar#1.mp4"]


def test_empty_files_are_no_copies_of_each_other(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        put(tmp_path, name, b"")
    assert not duplicates(listed_in([str(tmp_path)]), EMPTY)


def make_dataset(root: Path, videos: dict[str, Path]) -> None:
    """A dataset with one sample of each video, in one shard, and the video itself as preview."""
    folder = Folder.at(str(root))
    info = DatasetInfo(
        clip_grid=ClipGrid(),
        extractor="s3d",
        extractor_digest="d",
        feature_dim=4,
        vocabulary="v",
        num_visual_tokens=16,
    )
    folder.write("dataset.json", info.to_json())
    rows, shard = [], io.BytesIO()
    with tarfile.open(fileobj=shard, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for title, path in videos.items():
            video_id = content_id(str(path))
            sample = Sample(
                key=f"{video_id}-0000",
                video_id=video_id,
                source=str(path),
                title=title,
                part_index=0,
                part_start_s=0.0,
                part_end_s=3.0,
                clip_grid=ClipGrid(),
                sentences=(),
                language=None,
                asr={"name": "none", "version": ""},
                extractor={"name": "s3d", "digest": "d"},
                vocabulary="v",
                lineage={},
                visual_tokens=np.zeros(2, np.uint16),
            )
            offset = shard.tell()
            for name, data in sample.members().items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            (source,) = listed_in([str(path)])
            rows.append(
                {"source_id": source.source_id, "uri": source.uri, "video_id": video_id, "key": sample.key}
                | {"attempt": 1, "status": "kept", "num_parts": 1, "part_index": 0, "shard": "a.tar"}
                | {"offset": offset, "num_bytes": shard.tell() - offset, "size_bytes": source.size_bytes}
            )
            folder.upload(f"media/{video_id}.mp4", path)
    folder.write("shards/a.tar", shard.getvalue())
    packed = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=LEDGER_SCHEMA), packed)
    folder.write("ledger/a.parquet", packed.getvalue())


def test_a_dataset_can_be_ingested_again_after_its_sources_are_gone(tmp_path: Path) -> None:
    videos = {title: put(tmp_path, f"{title}.mp4", title.encode()) for title in ("Onions", "Leeks")}
    make_dataset(tmp_path / "dataset", videos)
    for path in videos.values():
        path.unlink()
    listing = discover([str(tmp_path / "dataset")], outside=str(tmp_path / "other"))
    found = {source.title: source for source in listing.sources}
    assert set(found) == {"Onions", "Leeks"}
    for title, source in found.items():
        assert Path(source.uri).read_bytes() == title.encode()
        assert json.loads(source.metadata) == {"source": str(videos[title])}
    assert listing.covers(str(tmp_path / "dataset/media/gone.mp4"))
    Path(found["Leeks"].uri).unlink()
    assert [s.title for s in listed_in([str(tmp_path / "dataset")]) if s.version == MISSING] == ["Leeks"]


def test_a_dataset_without_previews_says_what_to_do(tmp_path: Path) -> None:
    make_dataset(tmp_path / "dataset", {"Onions": put(tmp_path, "a.mp4")})
    shutil.rmtree(tmp_path / "dataset/media")
    with pytest.raises(ValueError, match=r"no previews .* ingest its sources instead"):
        discover([str(tmp_path / "dataset")])
