"""Places become sources, each once, and exact duplicates are known before any work."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.dataset import LEDGER_SCHEMA
from pipelines.sources import Source, content_id, discover, duplicates

EMPTY = LEDGER_SCHEMA.empty_table()


def put(folder: Path, name: str, data: bytes = b"x") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def names(sources: list[Source]) -> list[str]:
    return [Path(source.uri).name for source in sources]


def test_a_folder_gives_its_media_files_at_any_depth_and_nothing_else(tmp_path: Path) -> None:
    for name in ("b.mp4", "deep/a.MKV", "notes.txt", ".hidden.mp4", "c.flac"):
        put(tmp_path, name)
    assert sorted(names(discover([str(tmp_path)]))) == ["a.MKV", "b.mp4", "c.flac"]


def test_the_same_file_by_two_ways_is_one_source(tmp_path: Path) -> None:
    path = put(tmp_path, "a.mp4")
    assert len(discover([str(tmp_path), str(path), str(tmp_path / "*.mp4")])) == 1


def test_a_glob_takes_what_matches(tmp_path: Path) -> None:
    for name in ("one/a.mp4", "one/b.mkv", "two/c.mp4"):
        put(tmp_path, name)
    put(tmp_path, "one/deep/d.mp4")
    assert names(discover([str(tmp_path / "*" / "*.mp4")])) == ["a.mp4", "c.mp4"]
    assert names(discover([str(tmp_path / "**" / "*.mp4")])) == ["a.mp4", "d.mp4", "c.mp4"]


def test_a_named_file_is_taken_whatever_its_ending(tmp_path: Path) -> None:
    assert names(discover([str(put(tmp_path, "video.bin"))])) == ["video.bin"]


def test_captions_beside_a_video_belong_to_it(tmp_path: Path) -> None:
    put(tmp_path, "a.mp4")
    subtitles = put(tmp_path, "a.srt")
    put(tmp_path, "b.mp4")
    first, second = discover([str(tmp_path)])
    assert first.captions_uri == str(subtitles)
    assert second.captions_uri is None


def test_a_changed_file_is_a_new_source(tmp_path: Path) -> None:
    path = put(tmp_path, "a.mp4", b"one")
    (before,) = discover([str(path)])
    put(tmp_path, "a.mp4", b"longer")
    (after,) = discover([str(path)])
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
    (source,) = discover([str(listing)])
    assert (Path(source.uri), source.title) == (tmp_path / "clips/a.mp4", "Onions")


@pytest.mark.parametrize("name", ["a b.mp4", "50%.mp4", "h#1.mp4", "q?.mp4", "it's é.mp4"])
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_any_name_leads_back_to_its_file(tmp_path: Path, name: str, scheme: str) -> None:
    put(tmp_path, name, name.encode())
    (source,) = discover([f"{scheme}{tmp_path}"])
    assert source.title == Path(name).stem
    assert content_id(source.uri) == hashlib.sha256(name.encode()).hexdigest()[:16]


def test_captions_in_a_language_belong_to_their_video_too(tmp_path: Path) -> None:
    for name in ("a.mp4", "a.en.VTT", "ab.srt"):
        put(tmp_path, name)
    (source,) = discover([str(tmp_path)])
    assert source.captions_uri == str(tmp_path / "a.en.VTT")


def test_a_list_that_cannot_be_read_names_itself(tmp_path: Path) -> None:
    broken = put(tmp_path, "list.jsonl", b'{"uri": ')
    with pytest.raises(ValueError, match=r"list\.jsonl cannot be read.*write it as UTF-8 jsonl"):
        discover([str(broken)])


def test_a_missing_place_and_an_empty_one_are_errors_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="check the spelling"):
        discover([str(tmp_path / "nowhere")])
    put(tmp_path, "a.txt")
    with pytest.raises(ValueError, match="no media files in"):
        discover([str(tmp_path)])


def test_of_equal_files_the_first_by_name_stays(tmp_path: Path) -> None:
    for name, data in {"b.mp4": b"same", "a.mp4": b"same", "c.mp4": b"diff"}.items():
        put(tmp_path, name, data)
    listed = discover([str(tmp_path)])
    found = duplicates(listed, EMPTY)
    assert found == duplicates(list(reversed(listed)), EMPTY)
    ((source_id, (_, original)),) = found.items()
    assert next(s for s in listed if s.source_id == source_id).uri.endswith("b.mp4")
    assert original.endswith("a.mp4")


def test_a_copy_of_a_kept_video_is_a_duplicate_in_a_later_run(tmp_path: Path) -> None:
    first = discover([str(put(tmp_path, "a.mp4", b"same"))])
    kept = {"uri": first[0].uri, "size_bytes": 4, "video_id": content_id(first[0].uri), "status": "kept"}
    ledger = pa.Table.from_pylist([kept], schema=LEDGER_SCHEMA)
    later = discover([str(put(tmp_path, "0.mp4", b"same"))])
    assert list(duplicates(later, ledger)) == [later[0].source_id]
