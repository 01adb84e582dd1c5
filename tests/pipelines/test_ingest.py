"""Whole runs on real Ray: everything listed ends somewhere, and running again is safe."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.dataset import ClipGrid, Dataset
from pipelines.features import FeaturesConfig
from pipelines.ingest import IngestResult, ingest
from pipelines.media import MediaConfig
from pipelines.report import report_of
from pipelines.stages import IngestConfig
from pipelines.todo import Removed
from pipelines.vocabulary import VocabularyConfig
from tests.conftest import ffmpeg

MakeVideo = Callable[..., Path]
CONFIG = IngestConfig(
    features=FeaturesConfig(weights="random:0", pixels=32),
    vocabulary=VocabularyConfig(k=3, depth=2),
    samples_per_shard=2,
)
CUE = "1\n00:00:00,500 --> 00:00:02,000\nchop the onion\n"


def run(
    *places: Path,
    dataset: Path,
    config: IngestConfig = CONFIG,
    retry: tuple[str, ...] = (),
    removed: Removed = "keep",
) -> tuple[IngestResult, list[str]]:
    said: list[str] = []
    result = ingest(
        [str(place) for place in places],
        dataset=str(dataset),
        config=config,
        retry=retry,
        removed=removed,
        say=said.append,
    )
    return result, said


def books(dataset: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Sources by outcome and by reason; the books balance."""
    found = report_of(str(dataset)).to_dict()
    assert found["balanced"], found["problems"]
    return {name: count for name, count in found["sources"].items() if count and name != "total"}, found["reasons"]


def titles(dataset: Path) -> list[str]:
    return sorted(sample.title for sample in Dataset(str(dataset)).samples())


@pytest.fixture
def corpus(make_video: MakeVideo, tmp_path: Path) -> Path:
    """Four good videos, one copy, one fake, one short, one silent recording of sound only."""
    for index in range(4):
        make_video(f"corpus/v{index}.mp4", seconds=3.2 + index, hue=index * 60, captions=CUE if index == 0 else None)
    folder = tmp_path / "corpus"
    shutil.copy(folder / "v1.mp4", folder / "v1b.mp4")
    (folder / "fake.mp4").write_text("not a video")
    make_video("corpus/short.mp4", seconds=0.5)
    return folder


@pytest.fixture(scope="module")
def ingested(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A place, and what it is to look like: corpus/a, b and copy (of a), elsewhere/c, all of it in dataset."""
    place, original = (tmp_path_factory.mktemp(name) / "library" for name in ("place", "original"))
    for name, hue in (("corpus/a.mp4", 0), ("corpus/b.mp4", 90), ("elsewhere/c.mp4", 180)):
        bars(place / name, hue=hue)
    shutil.copy(place / "corpus" / "a.mp4", place / "corpus" / "copy.mp4")
    run(place / "corpus", place / "elsewhere", dataset=place / "dataset")
    shutil.copytree(place, original)  # with times, which are part of a source's version
    return place, original


@pytest.fixture
def library(ingested: tuple[Path, Path]) -> Path:
    """The place of `ingested` as it was."""
    place, original = ingested
    shutil.rmtree(place)
    shutil.copytree(original, place)
    return place


def bars(path: Path, *, seconds: float = 3.2, hue: int = 0) -> Path:
    """A video of moving test bars."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = f"testsrc2=size=160x120:rate=25:duration={seconds},hue=h={hue}"
    ffmpeg("-f", "lavfi", "-i", picture, "-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p", str(path))
    return path


@pytest.mark.integration
def test_a_run_balances_and_a_second_one_does_nothing(ray_session: None, corpus: Path, tmp_path: Path) -> None:
    dataset = corpus / "dataset"  # its previews are no sources of the second run
    result, _ = run(corpus, dataset=dataset)
    assert (result.num_sources, result.num_new) == (7, 6)
    report = report_of(str(dataset)).to_dict()
    expected = {"total": 7, "kept": 4, "filtered": 2, "quarantined": 1, "pending": 0}
    assert report["sources"] == expected
    assert report["reasons"] == {"duplicate": 1, "too_short": 1, "unreadable": 1}
    assert report["balanced"] is True
    samples = {s.title: s for s in Dataset(str(dataset)).samples()}
    assert {title: len(s.visual_tokens) for title, s in samples.items()} == {"v0": 2, "v1": 2, "v2": 3, "v3": 4}
    (sentence,) = samples["v0"].sentences
    assert (sentence.text, sentence.start_s, sentence.end_s) == ("chop the onion", 0.5, 2.0)
    assert samples["v1"].asr["name"] == "none"
    files = sorted(p.name for p in dataset.rglob("*"))
    again, said = run(corpus, dataset=dataset)
    assert (again.num_sources, again.num_new) == (7, 0)
    assert any("nothing new" in line for line in said)
    assert sorted(p.name for p in dataset.rglob("*")) == files


@pytest.mark.integration
def test_new_videos_are_added_with_the_same_vocabulary_and_others_left_alone(library: Path) -> None:
    dataset = library / "dataset"
    before = Dataset(str(dataset))
    shards = sorted((dataset / "shards").iterdir())
    bars(library / "corpus" / "d.mp4", hue=270)
    result, _ = run(library / "corpus", dataset=dataset)
    assert result.num_new == 1
    after = Dataset(str(dataset))
    assert after.info == before.info
    assert titles(dataset) == ["a", "b", "c", "d"]
    assert set(shards) < set((dataset / "shards").iterdir())


@pytest.mark.integration
def test_a_copy_takes_over_from_a_failed_original_which_a_retry_then_finds_to_be_the_copy(
    ray_session: None, make_video: MakeVideo, tmp_path: Path
) -> None:
    """Filtered as a duplicate of a source that then fails, the copy would otherwise be lost for good."""
    dataset = tmp_path / "dataset"
    shutil.copy(make_video("corpus/a.mp4", seconds=3.2), tmp_path / "corpus" / "b.mp4")
    strict = dataclasses.replace(CONFIG, media=MediaConfig(max_pixels=100))
    run(tmp_path / "corpus", dataset=dataset, config=strict)
    assert report_of(str(dataset)).to_dict()["reasons"] == {"duplicate": 1, "too_large": 1}
    assert run(tmp_path / "corpus", dataset=dataset)[0].num_new == 1
    assert report_of(str(dataset)).to_dict()["reasons"] == {"too_large": 1}
    assert [s.title for s in Dataset(str(dataset)).samples()] == ["b"]
    run(tmp_path / "corpus", dataset=dataset, retry=("too_large",))
    report = report_of(str(dataset)).to_dict()
    assert report["reasons"] == {"duplicate": 1}
    assert report["sources"] == {"total": 2, "kept": 1, "filtered": 1, "quarantined": 0, "pending": 0}
    assert report["balanced"] is True


@pytest.mark.integration
def test_long_videos_become_several_samples_on_one_clock(
    ray_session: None, make_video: MakeVideo, tmp_path: Path
) -> None:
    late = "1\n00:00:04,000 --> 00:00:05,000\nstir\n"
    make_video("corpus/a.mp4", seconds=8, captions=late)
    config = dataclasses.replace(CONFIG, media=MediaConfig(part_seconds=3.0))
    run(tmp_path / "corpus", dataset=tmp_path / "dataset", config=config)
    first, second, third = sorted(Dataset(str(tmp_path / "dataset")).samples(), key=lambda s: s.part_index)
    assert (first.part_end_s, second.part_start_s, third.part_start_s) == (3.0, 3.0, 6.0)
    assert [len(s.visual_tokens) for s in (first, second, third)] == [2, 2, 1]
    assert [s.start_s for s in second.sentences] == [4.0]
    assert not first.sentences
    assert not third.sentences


@pytest.mark.integration
def test_a_dataset_refuses_features_of_another_extractor(library: Path) -> None:
    bars(library / "corpus" / "d.mp4", hue=270)
    other = dataclasses.replace(CONFIG, features=FeaturesConfig(weights="random:1", pixels=32))
    with pytest.raises(ValueError, match="use those weights and pixels, or another --dataset"):
        run(library / "corpus", dataset=library / "dataset", config=other)


@pytest.mark.integration
def test_a_changed_file_takes_the_place_of_its_older_version_and_a_touched_one_costs_nothing(library: Path) -> None:
    corpus, dataset = library / "corpus", library / "dataset"
    before = {sample.key for sample in Dataset(str(dataset)).samples()}
    os.utime(corpus / "b.mp4", (1, 1))
    assert run(corpus, dataset=dataset)[0].num_new == 0
    assert books(dataset) == ({"kept": 3, "filtered": 2}, {"duplicate": 1, "superseded": 1})
    assert {sample.key for sample in Dataset(str(dataset)).samples()} == before
    bars(corpus / "b.mp4", seconds=4.7, hue=210)
    assert run(corpus, dataset=dataset)[0].num_new == 1
    assert books(dataset) == ({"kept": 3, "filtered": 3}, {"duplicate": 1, "superseded": 2})
    assert {s.title: len(s.visual_tokens) for s in Dataset(str(dataset)).samples()} == {"a": 2, "b": 3, "c": 2}
    assert run(corpus, dataset=dataset)[0].num_new == 0


@pytest.mark.integration
def test_a_copy_takes_over_at_once_when_its_original_is_changed(library: Path) -> None:
    corpus, dataset = library / "corpus", library / "dataset"
    assert titles(dataset) == ["a", "b", "c"]
    bars(corpus / "a.mp4", hue=270)
    run(corpus, dataset=dataset)
    assert titles(dataset) == ["a", "b", "c", "copy"]
    assert books(dataset) == ({"kept": 4, "filtered": 1}, {"superseded": 1})


@pytest.mark.integration
def test_removed_files_stay_unless_asked_and_come_back_when_they_do(library: Path) -> None:
    corpus, dataset = library / "corpus", library / "dataset"
    (corpus / "b.mp4").rename(library / "aside.mp4")
    _, said = run(corpus, dataset=dataset)
    assert any("1 sources are gone from their place" in line for line in said)
    assert titles(dataset) == ["a", "b", "c"]
    run(corpus, dataset=dataset, removed="drop")
    assert titles(dataset) == ["a", "c"]  # c lies in a place that was not listed
    assert books(dataset) == ({"kept": 2, "filtered": 2}, {"duplicate": 1, "removed": 1})
    (library / "aside.mp4").rename(corpus / "b.mp4")
    run(corpus, dataset=dataset)
    assert titles(dataset) == ["a", "b", "c"]
    assert books(dataset) == ({"kept": 3, "filtered": 1}, {"duplicate": 1})


@pytest.mark.integration
def test_a_source_may_fail_so_many_times_and_is_left_alone_then(
    ray_session: None, make_video: MakeVideo, tmp_path: Path
) -> None:
    corpus, dataset = tmp_path / "corpus", tmp_path / "dataset"
    make_video("corpus/good.mp4", seconds=3.2)
    (corpus / "fake.mp4").write_text("no video")
    config = dataclasses.replace(CONFIG, max_attempts=2)
    assert run(corpus, dataset=dataset, config=config)[0].num_new == 2
    assert run(corpus, dataset=dataset, config=config)[0].num_new == 0  # nobody asked
    assert run(corpus, dataset=dataset, config=config, retry=("timeout",))[0].num_new == 0
    assert run(corpus, dataset=dataset, config=config, retry=("unreadable",))[0].num_new == 1
    result, said = run(corpus, dataset=dataset, config=config, retry=("unreadable",))
    assert result.num_new == 0
    assert any("have failed 2 times" in line for line in said)
    (failure,) = report_of(str(dataset)).to_dict()["failures"]
    assert (failure["reason"], failure["failures"]) == ("unreadable", 2)
    assert "moov" in failure["detail"] or "Invalid data" in failure["detail"]


@pytest.mark.integration
def test_a_first_run_that_dies_before_its_vocabulary_goes_on_with_what_it_had(
    library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object) -> None:
        raise OSError("no space left")

    places, dataset, reference = (library / "corpus", library / "elsewhere"), library / "again", library / "dataset"
    (library / "corpus" / "fake.mp4").write_text("not a video")
    with monkeypatch.context() as patched:
        patched.setattr("pipelines.vocabulary.save", full_disk)
        with pytest.raises(OSError, match="no space left"):
            run(*places, dataset=dataset)
    assert books(dataset)[0] == {"pending": 4, "filtered": 1}
    assert not (dataset / "shards").exists()
    result, said = run(*places, dataset=dataset)
    assert any("4 sources are there already" in line for line in said)
    assert result.stage_times is not None
    assert result.stage_times.to_dict()["transcode"]["rows"] == 0
    assert not (dataset / "extracted").exists()
    members = [{s.key: s.members() for s in Dataset(str(place)).samples()} for place in (dataset, reference)]
    assert members[0] == members[1]
    assert books(dataset) == ({"kept": 3, "filtered": 1, "quarantined": 1}, {"duplicate": 1, "unreadable": 1})


@pytest.mark.integration
def test_a_list_carries_its_columns_into_the_samples_and_a_row_without_a_file_costs_itself(
    ray_session: None, make_video: MakeVideo, tmp_path: Path
) -> None:
    make_video("corpus/a.mp4", seconds=3.2, captions=CUE)
    listing = tmp_path / "corpus" / "list.csv"
    listing.write_text("uri,title,licence,language\na.mp4,Onions,CC-BY,en\ngone.mp4,Lost,CC0,en\n")
    run(listing, dataset=tmp_path / "dataset")
    (sample,) = Dataset(str(tmp_path / "dataset")).samples()
    assert (sample.title, sample.metadata, sample.language) == ("Onions", {"licence": "CC-BY"}, "en")
    assert books(tmp_path / "dataset") == ({"kept": 1, "quarantined": 1}, {"fetch_failed": 1})


@pytest.mark.integration
def test_a_dataset_can_be_made_again_from_the_previews_of_another(library: Path) -> None:
    shutil.rmtree(library / "corpus")
    shutil.rmtree(library / "elsewhere")
    run(library / "dataset", dataset=library / "new")
    found = {s.title: (s.metadata["source"], len(s.visual_tokens)) for s in Dataset(str(library / "new")).samples()}
    originals = {"a": "corpus/a.mp4", "b": "corpus/b.mp4", "c": "elsewhere/c.mp4"}
    assert found == {title: (str(library / name), 2) for title, name in originals.items()}


@pytest.mark.integration
def test_key_frame_clips_say_where_they_lie(ray_session: None, make_video: MakeVideo, tmp_path: Path) -> None:
    """Four seconds of bars, then four of blue."""
    bars, path = make_video("bars.mp4", seconds=4), tmp_path / "corpus" / "v.mp4"
    path.parent.mkdir()
    blue = ["-f", "lavfi", "-i", "color=blue:size=160x120:rate=25:duration=4"]
    ffmpeg("-i", str(bars), *blue, "-filter_complex", "[0:v][1:v]concat=n=2,format=yuv420p", str(path))
    config = dataclasses.replace(CONFIG, clip_grid=ClipGrid(choice="keyframes"))
    run(path, dataset=tmp_path / "dataset", config=config)
    (sample,) = Dataset(str(tmp_path / "dataset")).samples()
    assert sample.clip_starts_s == (0.0, 4.0)
    assert sample.clip_span_s(1) == (4.0, 5.5)
    assert len(sample.visual_tokens) == 2


@pytest.mark.integration
def test_a_full_disk_ends_in_one_sentence_and_the_next_run_goes_on(
    ray_session: None, make_video: MakeVideo, tmp_path: Path
) -> None:
    place = tmp_path / "small"
    place.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(place)]).returncode:
        pytest.skip("only root can make a disk that is full")
    try:
        make_video("corpus/a.mp4", seconds=8)
        with pytest.raises(OSError, match=r"cannot write .*No space left on device") as caught:
            run(tmp_path / "corpus", dataset=place / "dataset")
        assert "Traceback" not in str(caught.value)
        assert [p for p in place.rglob("*") if ".tmp-" in p.name] == []
        assert books(place / "dataset")[0] == {"pending": 1}
        subprocess.run(["mount", "-o", "remount,size=20m", str(place)], check=True)
        run(tmp_path / "corpus", dataset=place / "dataset")
        assert books(place / "dataset")[0] == {"kept": 1}
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_dataset_folder_that_cannot_be_written_is_an_error_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("x")
    (tmp_path / "dataset").write_text("a file")
    with pytest.raises(PermissionError, match=r"cannot write to the dataset folder [^(]*\([\w ]+\): name another"):
        run(tmp_path / "a.mp4", dataset=tmp_path / "dataset")


def test_weights_must_be_named(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("x")
    config = dataclasses.replace(CONFIG, features=FeaturesConfig())
    with pytest.raises(ValueError, match="no S3D weights named"):
        run(tmp_path, dataset=tmp_path / "dataset", config=config)
