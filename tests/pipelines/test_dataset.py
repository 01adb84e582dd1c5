"""The shard contract: what ingestion writes, everyone reads, stock tools included."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.dataset import ClipGrid, Dataset, DatasetInfo, Sample, Sentence, read_members
from pipelines.rows import ROW_SCHEMA, Row
from pipelines.sink import build_shard, publish
from pipelines.storage import Folder

INFO = DatasetInfo(
    clip_grid=ClipGrid(),
    extractor="test",
    extractor_digest="0" * 64,
    feature_dim=4,
    vocabulary="v",
    num_visual_tokens=64,
)


def sample(video_id: str = "a" * 16, *, tokens: int = 5, sentences: tuple[Sentence, ...] = ()) -> Sample:
    return Sample(
        key=f"{video_id}-0000",
        video_id=video_id,
        source=f"/videos/{video_id}.mp4",
        title="Zwiebeln schälen",
        part_index=0,
        part_start_s=2.0,
        part_end_s=2.0 + tokens * 1.5,
        clip_grid=ClipGrid(),
        sentences=sentences,
        language="en",
        asr={"name": "captions", "version": ""},
        extractor={"name": "test", "digest": "0"},
        vocabulary="v",
        lineage={"code_version": "t"},
        visual_tokens=np.arange(tokens, dtype=np.uint16),
        features=np.ones((tokens, 4), np.float16),
    )


def spoken(start_s: float, end_s: float, text: str = "chop") -> Sentence:
    return Sentence(start_s=start_s, end_s=end_s, text=text, origin="captions")


def write_dataset(root: Path, batches: list[list[Sample]]) -> Dataset:
    folder = Folder.at(str(root))
    folder.write("dataset.json", INFO.to_json())
    for batch in batches:
        rows: list[Row] = [
            dict.fromkeys(ROW_SCHEMA.names)
            | {"source_id": s.video_id, "uri": s.source, "video_id": s.video_id, "part_index": 0, "num_parts": 1}
            | {"num_clips": len(s.visual_tokens), "attempt": 1}
            for s in batch
        ]
        publish(rows, {s.key: s for s in batch}, folder=folder, common={"run_id": "r"})
    return Dataset(str(root))


def same(a: Sample, b: Sample) -> bool:
    plain = [f.name for f in dataclasses.fields(Sample) if f.name not in ("visual_tokens", "features")]
    arrays = np.array_equal(a.visual_tokens, b.visual_tokens) and np.array_equal(a.features, b.features)  # type: ignore[arg-type]
    return arrays and all(getattr(a, name) == getattr(b, name) for name in plain)


def test_a_sample_survives_its_members() -> None:
    before = sample(sentences=(spoken(2.0, 3.5, "schäle & wasche"),))
    assert same(Sample.from_members(before.members()), before)


def test_a_sample_without_its_tokens_is_refused() -> None:
    members = sample().members()
    del members["a" * 16 + "-0000.tokens.npy"]
    with pytest.raises(ValueError, match=r"lacks its members \['tokens.npy'\]"):
        Sample.from_members(members)


def test_shards_are_byte_reproducible_and_independent_of_arrival() -> None:
    samples = [sample(letter * 16) for letter in "abc"]
    assert build_shard(samples)[0] == build_shard(samples[::-1])[0]


def test_offsets_point_at_each_samples_members() -> None:
    samples = [sample(letter * 16, tokens=3 + ord(letter) % 3) for letter in "abc"]
    data, places = build_shard(samples)
    for one in samples:
        offset, num_bytes = places[one.key]
        assert same(Sample.from_members(read_members(data[offset : offset + num_bytes])), one)


def test_stock_webdataset_reads_the_shards_in_six_lines(tmp_path: Path) -> None:
    write_dataset(tmp_path, [[sample("a" * 16), sample("b" * 16)]])
    import webdataset as wds

    (shard,) = (tmp_path / "shards").glob("*.tar")
    entries = list(wds.WebDataset(str(shard), shardshuffle=False))
    assert [entry["__key__"] for entry in entries] == ["a" * 16 + "-0000", "b" * 16 + "-0000"]
    for entry in entries:
        assert json.loads(entry["json"])["key"] == entry["__key__"]
        assert np.load(io.BytesIO(entry["tokens.npy"])).shape == (5,)


def test_readers_see_each_sample_once_even_if_two_writers_committed_it(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, [[sample("a" * 16), sample("b" * 16)], [sample("b" * 16), sample("c" * 16)]])
    assert sorted(s.video_id[0] for s in dataset.samples()) == ["a", "b", "c"]


def test_an_open_dataset_stays_as_it_is_while_others_write(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, [[sample("a" * 16)]])
    digest = dataset.digest()
    again = write_dataset(tmp_path, [[sample("b" * 16)]])
    assert [s.video_id[0] for s in dataset.samples()] == ["a"]
    assert dataset.digest() == digest != again.digest()
    assert sorted(s.video_id[0] for s in again.samples()) == ["a", "b"]


def test_a_shard_without_its_ledger_file_does_not_exist(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, [[sample("a" * 16)]])
    data, _ = build_shard([sample("z" * 16)])
    dataset.folder.write("shards/orphan.tar", data)
    assert [s.video_id[0] for s in dataset.samples()] == ["a"]


def test_writing_the_same_batch_again_changes_nothing(tmp_path: Path) -> None:
    first = write_dataset(tmp_path, [[sample("a" * 16)]])
    digest, files = first.digest(), sorted(p.name for p in tmp_path.rglob("*"))
    assert write_dataset(tmp_path, [[sample("a" * 16)]]).digest() == digest
    assert sorted(p.name for p in tmp_path.rglob("*")) == files


def test_a_missing_dataset_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="videobert ingest"):
        Dataset(str(tmp_path))


def test_a_failed_write_leaves_no_file(tmp_path: Path) -> None:
    folder = Folder.at(str(tmp_path))
    with pytest.raises(TypeError):
        folder.write("x/file", "not bytes")  # type: ignore[arg-type]
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_segments_take_the_tokens_whose_clip_overlaps_the_sentence() -> None:
    (first, second) = sample(sentences=(spoken(2.1, 3.4), spoken(3.4, 6.6))).segments()
    assert first.visual_tokens.tolist() == [0]
    assert second.visual_tokens.tolist() == [0, 1, 2, 3]  # clips begin at 2.0, 3.5, 5.0, 6.5, 8.0 s
    assert second.first_clip == 0


def test_a_sentence_behind_the_last_clip_keeps_its_text_without_tokens() -> None:
    (segment,) = sample(sentences=(spoken(20.0, 21.0, "bye"),)).segments()
    assert (segment.text, len(segment.visual_tokens)) == ("bye", 0)


def test_without_speech_sixteen_tokens_make_a_segment() -> None:
    lengths = [len(segment.visual_tokens) for segment in sample(tokens=35).segments()]
    assert lengths == [16, 16, 3]


@given(frames=st.integers(0, 500), num=st.integers(1, 40), stride=st.integers(1, 40))
def test_every_whole_clip_is_counted_and_no_other(frames: int, num: int, stride: int) -> None:
    grid = ClipGrid(num_frames=num, stride_frames=stride)
    starts = [s for s in range(0, frames, stride) if s + num <= frames]
    assert grid.num_clips(frames) == len(starts)


@given(
    frames=st.integers(0, 500), num=st.integers(1, 40), stride=st.integers(1, 40), shots=st.lists(st.integers(0, 600))
)
def test_first_frames_are_whole_clips_on_the_grid_or_at_the_shots(
    frames: int, num: int, stride: int, shots: list[int]
) -> None:
    uniform = ClipGrid(num_frames=num, stride_frames=stride)
    assert uniform.first_frames(frames, shots) == [s for s in range(0, frames, stride) if s + num <= frames]
    chosen = ClipGrid(num_frames=num, stride_frames=stride, choice="keyframes").first_frames(frames, shots)
    assert set(chosen) <= {0, *shots}
    assert all(first + num <= frames for first in chosen)
    assert all(second - first >= num for first, second in itertools.pairwise(chosen))
    assert chosen[:1] == ([0] if frames >= num else [])
    for shot in shots:  # one that is left out is no whole clip, or runs into one that is there
        assert shot in chosen or shot + num > frames or any(first < shot < first + num for first in chosen)


def test_clips_at_key_frames_lie_where_they_say() -> None:
    spoken_late = (spoken(9.0, 11.0),)
    before = dataclasses.replace(
        sample(tokens=3, sentences=spoken_late),
        clip_grid=ClipGrid(choice="keyframes"),
        clip_starts_s=(2.0, 9.5, 30.25),
        metadata={"licence": "CC-BY", "url": "https://example.org/ä"},
    )
    after = Sample.from_members(before.members())
    assert same(after, before)
    assert after.clip_span_s(1) == (9.5, 11.0)
    assert after.starts_s.tolist() == [2.0, 9.5, 30.25]
    (segment,) = after.segments()
    assert (segment.first_clip, segment.visual_tokens.tolist()) == (1, [1])
    (silent,) = dataclasses.replace(after, sentences=()).segments()
    assert (silent.start_s, silent.end_s) == (2.0, 31.75)


def test_shards_of_an_earlier_release_have_no_metadata_and_lie_on_the_uniform_grid() -> None:
    members = sample().members()
    record = json.loads(members["a" * 16 + "-0000.json"])
    del record["metadata"], record["clip_starts_s"], record["clip_grid"]["choice"]
    found = Sample.from_members({**members, "a" * 16 + "-0000.json": json.dumps(record).encode()})
    assert same(found, sample())
    assert found.starts_s.tolist() == [2.0, 3.5, 5.0, 6.5, 8.0]


def test_an_impossible_clip_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="fps > 0"):
        ClipGrid(fps=0)
    with pytest.raises(ValueError, match="uniform or keyframes"):
        ClipGrid(choice="iframes")  # type: ignore[arg-type]
