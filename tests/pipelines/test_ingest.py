"""Whole runs on real Ray: everything listed ends somewhere, and running again is safe."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.dataset import Dataset
from pipelines.features import FeaturesConfig
from pipelines.ingest import IngestResult, ingest
from pipelines.media import MediaConfig
from pipelines.report import report_of
from pipelines.stages import IngestConfig
from pipelines.vocabulary import VocabularyConfig

MakeVideo = Callable[..., Path]
CONFIG = IngestConfig(
    features=FeaturesConfig(weights="random:0", pixels=32),
    vocabulary=VocabularyConfig(k=3, depth=2),
    samples_per_shard=2,
)
CUE = "1\n00:00:00,500 --> 00:00:02,000\nchop the onion\n"


def run(
    *places: Path, dataset: Path, config: IngestConfig = CONFIG, retry: tuple[str, ...] = ()
) -> tuple[IngestResult, list[str]]:
    said: list[str] = []
    result = ingest([str(place) for place in places], dataset=str(dataset), config=config, retry=retry, say=said.append)
    return result, said


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
def test_new_videos_are_added_with_the_same_vocabulary_and_others_left_alone(
    ray_session: None, make_video: MakeVideo, tmp_path: Path
) -> None:
    dataset = tmp_path / "dataset"
    make_video("corpus/a.mp4", seconds=3.2)
    run(tmp_path / "corpus", dataset=dataset)
    before = Dataset(str(dataset))
    shards = sorted((dataset / "shards").iterdir())
    make_video("corpus/b.mp4", seconds=3.2, hue=90)
    result, _ = run(tmp_path / "corpus", dataset=dataset)
    assert result.num_new == 1
    after = Dataset(str(dataset))
    assert after.info == before.info
    assert {s.title for s in after.samples()} == {"a", "b"}
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
def test_a_dataset_refuses_features_of_another_extractor(
    ray_session: None, make_video: MakeVideo, tmp_path: Path
) -> None:
    make_video("corpus/a.mp4", seconds=3.2)
    run(tmp_path / "corpus", dataset=tmp_path / "dataset")
    other = dataclasses.replace(CONFIG, features=FeaturesConfig(weights="random:1", pixels=32))
    with pytest.raises(ValueError, match="use those weights and pixels, or another --dataset"):
        run(tmp_path / "corpus", dataset=tmp_path / "dataset", config=other)


def test_a_dataset_folder_that_cannot_be_written_is_an_error_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("x")
    (tmp_path / "dataset").write_text("a file")
    with pytest.raises(PermissionError, match="cannot write to the dataset folder"):
        run(tmp_path / "a.mp4", dataset=tmp_path / "dataset")


def test_weights_must_be_named(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("x")
    config = dataclasses.replace(CONFIG, features=FeaturesConfig())
    with pytest.raises(ValueError, match="no S3D weights named"):
        run(tmp_path, dataset=tmp_path / "dataset", config=config)
