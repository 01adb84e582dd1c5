"""The dry run's bill: what it extrapolates, what it admits, and that it leaves nothing behind."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines import estimate
from pipelines.estimate import Bill, SampleConfig
from pipelines.features import FeaturesConfig
from pipelines.filters import FiltersConfig
from pipelines.sources import Source
from pipelines.stages import IngestConfig
from pipelines.transcribe import TranscribeConfig
from tests.conftest import MakeVideo

CONFIG = IngestConfig(
    features=FeaturesConfig(weights="random:0", pixels=32, batch_clips=1),
    transcribe=TranscribeConfig(transcripts=("captions",)),
)


def source(path: Path, *, size_bytes: int | None = None) -> Source:
    size = path.stat().st_size if size_bytes is None else size_bytes
    return Source(uri=str(path), version="1", size_bytes=size, title=path.stem)


def copies(path: Path, num: int) -> list[Path]:
    made = [path.with_name(f"copy-{index}{path.suffix}") for index in range(num)]
    for copy in made:
        copy.write_bytes(path.read_bytes())
    return made


@pytest.mark.parametrize(("num_sources", "expected"), [(1, 1), (4, 4), (100, 4), (1000, 10), (10**6, 24)])
def test_a_hundredth_is_sampled_but_four_at_least_and_24_at_most(num_sources: int, expected: int) -> None:
    assert SampleConfig().num_of(num_sources) == expected


def test_a_reason_that_was_never_seen_may_still_come() -> None:
    # The rule of three for Wilson's interval: z^2 / (n + z^2).
    assert estimate._at_most(0, 24) == pytest.approx(0.138, abs=0.001)
    assert estimate._at_most(24, 24) == 1.0


@pytest.mark.integration
def test_hours_are_extrapolated_by_bytes_from_a_sample(make_video: MakeVideo) -> None:
    files = copies(make_video("one.mp4", seconds=6.0, sound=True), 9)
    bill = estimate.estimate([source(path) for path in files], config=CONFIG, cores=2)
    assert (bill.num_sources, bill.num_sampled, bill.num_run) == (9, 4, 4)
    assert bill.sampled_video_s == pytest.approx(4 * 6.0, abs=0.5)
    assert bill.video_hours * 3600 == pytest.approx(9 * 6.0, rel=0.02)
    assert bill.bytes_read == sum(path.stat().st_size for path in files)
    work_s = sum(stage.cpu_s_per_video_s for stage in bill.stages) * 54.0
    assert bill.wall_hours * 3600 == pytest.approx(work_s / 2 / estimate.EFFICIENCY, rel=0.05)
    assert bill.bottleneck in {stage.stage for stage in bill.stages}
    assert bill.drops == ()
    assert "4 of 9 sources" in bill.text()
    assert "extrapolated" in bill.text()


@pytest.mark.integration
def test_a_source_of_unknown_size_counts_like_the_mean_of_the_sample(make_video: MakeVideo) -> None:
    files = copies(make_video("one.mp4", seconds=3.0), 6)
    bill = estimate.estimate([source(path, size_bytes=0) for path in files], config=CONFIG)
    assert bill.video_hours * 3600 == pytest.approx(6 * 3.0, rel=0.02)
    assert bill.num_unknown_sizes == 6
    assert "6 of unknown size" in bill.text()


@pytest.mark.integration
def test_what_would_be_dropped_is_predicted_with_its_reason_and_its_doubt(make_video: MakeVideo) -> None:
    good, short = make_video("good.mp4", seconds=3.0), make_video("short.mp4", seconds=0.5)
    page = good.with_name("page.mp4")
    page.write_text("<html>not found</html>")
    bill = estimate.estimate([source(path) for path in (good, short, page)], config=CONFIG)
    drops = {drop.reason: drop for drop in bill.drops}
    assert {reason: drop.seen for reason, drop in drops.items()} == {"too_short": 1, "unreadable": 1}
    assert all(drop.at_least <= drop.expected <= drop.at_most for drop in bill.drops)
    assert "too_short: 1 of 3" in bill.text()


@pytest.mark.integration
def test_filters_are_foreseen(make_video: MakeVideo) -> None:
    config = replace(CONFIG, filters=FiltersConfig(require_speech=True))
    bill = estimate.estimate([source(make_video("mute.mp4", seconds=3.0))], config=config)
    assert [(drop.reason, drop.seen) for drop in bill.drops] == [("no_speech", 1)]


@pytest.mark.integration
def test_a_long_video_is_left_after_its_beginning(make_video: MakeVideo) -> None:
    path = make_video("long.mp4", seconds=90.0, fps=10.0)
    sample = SampleConfig(seconds_each=10.0, clips_each=2)
    bill = estimate.estimate([source(path)], config=CONFIG, sample=sample)
    assert 10.0 <= bill.sampled_video_s < 20.0
    assert bill.video_hours * 3600 == pytest.approx(90.0, rel=0.02)


@pytest.mark.integration
def test_without_time_left_the_rest_of_the_sample_is_only_probed(make_video: MakeVideo) -> None:
    files = copies(make_video("one.mp4", seconds=3.0), 3)
    bill = estimate.estimate([source(path) for path in files], config=CONFIG, sample=SampleConfig(budget_s=0.0))
    assert (bill.num_sampled, bill.num_run) == (3, 1)
    assert bill.video_hours * 3600 == pytest.approx(3 * 3.0, rel=0.02)


@pytest.mark.integration
def test_the_order_of_the_listing_does_not_matter(make_video: MakeVideo) -> None:
    files = [make_video(f"{index}.mp4", seconds=2.0 + index / 2) for index in range(6)]
    listed = [source(path) for path in files]
    bills = [estimate.estimate(order, config=CONFIG) for order in (listed, listed[::-1])]
    assert bills[0].sampled_video_s == bills[1].sampled_video_s


@pytest.mark.integration
def test_nothing_is_left_behind(
    make_video: MakeVideo, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_video("one.mp4", seconds=3.0, sound=True)
    place = tmp_path_factory.mktemp("scratch")
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    before = sorted(tmp_path.rglob("*"))
    bill = estimate.estimate([source(path)], config=CONFIG)
    assert sorted(tmp_path.rglob("*")) == before
    assert list(place.iterdir()) == []
    assert bill.preview_bytes > 0
    assert bill.shard_bytes > 0


@pytest.mark.integration
def test_the_bill_is_json(make_video: MakeVideo) -> None:
    bill = estimate.estimate([source(make_video("one.mp4", seconds=2.0))], config=CONFIG)
    told = json.loads(json.dumps(bill.to_dict()))
    assert told["num_sampled"] == 1
    assert [stage["stage"] for stage in told["stages"]] == ["fetch", "transcode", "transcribe", "features"]


@pytest.mark.integration
def test_the_bill_of_no_sources_is_empty() -> None:
    bill: Bill = estimate.estimate([], config=CONFIG)
    assert (bill.num_sampled, bill.video_hours, bill.wall_hours, bill.drops) == (0, 0.0, 0.0, ())
