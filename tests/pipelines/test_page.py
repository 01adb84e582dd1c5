"""The page, rendered from a dataset folder with real videos, and read back."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
import shutil
import subprocess
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipelines import vocabulary
from pipelines.dataset import LEDGER_SCHEMA, ClipGrid, Dataset, DatasetInfo, Sample, Sentence
from pipelines.media import ffmpeg_path
from pipelines.page import (
    Previews,
    Section,
    associated_words,
    balance_bars,
    curves_figure,
    duration_columns,
    gather,
    render_page,
    story,
)
from pipelines.report import summarise
from pipelines.sink import build_shard, write_ledger
from pipelines.storage import Folder
from tests.pipelines.ledgers import dropped, ledger, listing, part, verdict

GRID = ClipGrid()
CLIPS = 8
PICTURES = {  # video -> what ffmpeg draws, and what is said over it
    "testcard": ("testsrc=size=224x224:rate=20", ["now watch the counter", "the counter goes on", "a counter again"]),
    "bars": (
        "smptebars=size=224x224:rate=20",
        ["these are colour bars", "the bars stand still", "bars and nothing else"],
    ),
    "colours": ("gradients=size=224x224:rate=20:seed=3:speed=0.02", ["look at the colours", "colours drift and drift"]),
    "life": ("life=size=56x56:rate=20:seed=1,scale=224:224:flags=neighbor", []),
}


def encode(picture: str, path: Path, *, seconds: float = CLIPS * 1.5) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [ffmpeg_path(), "-v", "error", "-f", "lavfi", "-i", picture, "-t", str(seconds)]
    subprocess.run([*command, "-c:v", "libx264", "-pix_fmt", "yuv420p", "-g", "40", "-y", str(path)], check=True)


def pooled_pixels(path: Path) -> np.ndarray:
    """[num_clips, 192] float16: each clip's mean picture, 8x8."""
    with av.open(str(path)) as container:
        frames = [frame.reformat(8, 8, "rgb24").to_ndarray().reshape(-1) for frame in container.decode(video=0)]
    whole = len(frames) // GRID.num_frames * GRID.num_frames
    clips = np.reshape(frames[:whole], (-1, GRID.num_frames, 192)).mean(axis=1) / 64
    jitter = np.random.default_rng(0).normal(0, 0.01, clips.shape)
    return (clips + jitter).astype(np.float16)


def make_dataset(root: Path, *, start_s: float = 10.0) -> Dataset:
    """Four videos whose clock starts at `start_s`, two sources that failed and one that is pending."""
    for name, (picture, _) in PICTURES.items():
        encode(picture, root / "media" / f"{name}.mp4")
    features = {name: pooled_pixels(root / "media" / f"{name}.mp4") for name in PICTURES}
    config = vocabulary.VocabularyConfig(k=3, depth=2)
    tree = vocabulary.fit(np.concatenate(list(features.values())), config=config, extractor="s3d:random:0 00")
    folder = Folder.at(str(root))
    vocabulary.save(tree, folder)
    samples = []
    for name, (_, texts) in PICTURES.items():
        samples.append(
            Sample(
                key=f"{name}-0000",
                video_id=name,
                source=f"/videos/{name}.mp4",
                title=f"The {name} <title>",
                part_index=0,
                part_start_s=start_s,
                part_end_s=start_s + CLIPS * 1.5,
                clip_grid=GRID,
                sentences=tuple(
                    Sentence(start_s=start_s + 1 + 3 * i, end_s=start_s + 3.8 + 3 * i, text=text, origin="captions")
                    for i, text in enumerate(texts)
                ),
                language="en",
                asr={"name": "captions" if texts else "none", "version": "1"},
                extractor={"name": "s3d:random:0", "digest": "00"},
                vocabulary=tree.id,
                lineage={"run_id": "r"},
                visual_tokens=tree.assign(features[name]),
                features=features[name],
            )
        )
    shard, places = build_shard(samples)
    folder.write("shards/a.tar", shard)
    write_ledger(_ledger(samples, places), folder=folder)
    info = DatasetInfo(
        clip_grid=GRID, extractor="s3d:random:0", extractor_digest="00", feature_dim=192, vocabulary=tree.id,
        num_visual_tokens=tree.num_tokens,
    )  # fmt: skip
    folder.write("dataset.json", info.to_json())
    return Dataset(str(root))


def _ledger(samples: list[Sample], places: dict[str, tuple[int, int]]) -> pa.Table:
    failed = {"notes": ("unreadable", "quarantined"), "photo": ("no_video", "filtered")}
    rows = [
        {"source_id": name, "uri": f"/videos/{name}.mp4", "attempt": 0, "status": "pending"}
        for name in [*PICTURES, *failed, "later"]
    ]
    for name, (reason, status) in failed.items():
        rows.append(rows[0] | {"source_id": name, "uri": f"/videos/{name}.mp4", "attempt": 1, "status": status})
        rows[-1] |= {"stage": "media", "reason": reason, "detail": "moov atom <not found>", "transcode_s": 0.4}
    for sample in samples:
        offset, num_bytes = places[sample.key]
        rows.append(
            {
                "source_id": sample.video_id, "uri": sample.source, "video_id": sample.video_id, "attempt": 1,
                "status": "kept", "num_parts": 1, "part_index": 0, "key": sample.key, "shard": "a.tar",
                "offset": offset, "num_bytes": num_bytes, "num_clips": CLIPS, "source_s": 12.1,
                "part_start_s": sample.part_start_s, "part_end_s": sample.part_end_s, "vocabulary": sample.vocabulary,
                "num_sentences": len(sample.sentences), "transcript": sample.asr["name"], "transcode_s": 1.1,
                "num_words": sum(len(s.text.split()) for s in sample.sentences), "transcribe_s": 0.6, "features_s": 4.2,
            }
        )  # fmt: skip
    return pa.Table.from_pylist(rows, schema=LEDGER_SCHEMA)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("page") / "dataset")


@pytest.fixture(scope="module")
def page(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> str:
    curves = curves_figure({"masked text": [(step, 5 / (step + 1)) for step in range(60)], "pairs": [(1, 0.7)]})
    extra = [Section("Loss", curves), Section("Evaluation", "<table><tr><td>0.5</td></tr></table>")]
    out = tmp_path_factory.mktemp("out") / "deep" / "report.html"
    return render_page(dataset, out, extra=extra).read_text()


def pictures(page: str) -> list[Image.Image]:
    found = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


def test_the_page_needs_nothing_beside_itself(page: str) -> None:
    assert "<script" not in page
    links = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert links
    assert all(link.startswith(("#", "data:")) for link in links)


def test_the_page_shows_the_ledger_and_its_warnings(page: str) -> None:
    assert "RANDOM WEIGHTS" in page
    assert ">balanced<" in page
    assert "moov atom &lt;not found&gt;" in page  # strangers' text is escaped
    assert "The testcard &lt;title&gt;" in page


def test_the_page_shows_strips_of_four_frames_and_a_filmstrip_of_clips(page: str) -> None:
    sizes = {picture.size for picture in pictures(page)}
    assert sizes == {(4 * 96 + 3 * 2, 96), (132, 132)}
    assert "now watch the counter" in page


def test_the_callers_sections_are_on_the_page_with_their_curves(page: str) -> None:
    assert '<h2 id="extra-1">Loss</h2>' in page
    assert "<td>0.5</td>" in page
    assert page.count("<svg") == 3  # durations, the curves and the histogram
    assert "#010203" not in page  # the placeholder of the page's ink


def test_a_video_without_preview_is_left_out_and_said(dataset: Dataset, tmp_path: Path) -> None:
    shutil.copytree(dataset.url, tmp_path / "copy")
    (tmp_path / "copy" / "media" / "colours.mp4").unlink()
    page = render_page(Dataset(str(tmp_path / "copy")), tmp_path / "page.html").read_text()
    assert "1 video has no preview" in page
    assert "look at the colours" not in page
    assert pictures(page)


def test_a_dataset_without_samples_has_a_page(tmp_path: Path, dataset: Dataset) -> None:
    (tmp_path / "dataset.json").write_bytes(dataset.info.to_json())
    page = render_page(Dataset(str(tmp_path)), tmp_path / "page.html").read_text()
    assert ">balanced<" in page
    assert "No sample has a preview" in page


def test_a_folder_whose_sources_all_failed_has_a_page_of_its_ledger(tmp_path: Path) -> None:
    folder = Folder.at(str(tmp_path / "failed"))
    write_ledger(ledger(listing("a"), verdict("a", declared_s=30.0), listing("b")), folder=folder)
    page = render_page(folder.root, tmp_path / "page.html").read_text()
    assert "unreadable" in page
    assert "/v/a.mp4" in page
    assert "no samples yet" in page
    assert 'id="tokens"' not in page
    with pytest.raises(FileNotFoundError, match="videobert ingest"):
        render_page(str(tmp_path / "nowhere"), tmp_path / "page.html")


def test_a_dataset_whose_shard_is_gone_has_a_page_that_says_so(tmp_path: Path, dataset: Dataset) -> None:
    shutil.copytree(dataset.url, tmp_path / "copy")
    (tmp_path / "copy" / "shards" / "a.tar").unlink()
    page = render_page(str(tmp_path / "copy"), tmp_path / "page.html").read_text()
    assert "The samples cannot be read" in page
    assert "1 shards of the ledger are missing" in page
    assert "moov atom" in page
    assert 'id="tokens"' not in page


def test_the_bars_of_the_balance_are_the_report() -> None:
    rows = [listing(name) for name in "abcd"]
    rows += [part("a", 0, None), dropped("a", 1, 2, declared_s=20.0), verdict("b", declared_s=5.0)]
    rows += [verdict("c", "filtered", declared_s=1.0)]
    report = summarise(ledger(*rows))
    bars = {bar["name"]: (bar["outcome"], bar["videos"], bar["seconds"]) for bar in balance_bars(report)}
    assert bars == {
        "kept": ("kept", 1, 6.0),
        "too_short": ("filtered", 1, 1.0),
        "static": ("filtered", 0, 6.0),
        "unreadable": ("quarantined", 1, 5.0),
        "pending": ("pending", 1, 0.0),
        "missing": ("missing", 1, 8.0),
    }
    assert sum(seconds for _, _, seconds in bars.values()) == report.seconds["total"]
    columns = duration_columns(report)
    assert [column["label"] for column in columns] == [
        "0–10 s", "10–30 s", "30–60 s", "1–2 min", "2–5 min", "5–10 min", "10–30 min", "30–60 min", "1–2 h", "over 2 h",
    ]  # fmt: skip
    assert [column["count"] for column in columns[:3]] == [2, 1, 0]
    assert max(column["top"] for column in columns) == 1.0


def test_a_video_whose_first_part_was_filtered_is_still_on_the_clock(tmp_path: Path, dataset: Dataset) -> None:
    folder = Folder.at(str(tmp_path))
    folder.write("dataset.json", dataset.info.to_json())
    folder.write("media/va.mp4", dataset.folder.read("media/testcard.mp4"))
    write_ledger(ledger(listing("a"), dropped("a", 0, None), part("a", 1, 2)), folder=folder)
    previews = Previews(Dataset(str(tmp_path)))
    (frame,) = previews.frames("va", [6.01])
    (same,) = Previews(dataset).frames("testcard", [16.01])
    assert np.array_equal(np.asarray(frame), np.asarray(same))


def test_frames_are_those_shown_at_the_clock_time(dataset: Dataset) -> None:
    with av.open(f"{dataset.url}/media/testcard.mp4") as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    previews = Previews(dataset)
    times_s = [10.0, 10.76, 12.51, 17.02]  # the clock starts at 10 s
    for frame, number in zip(previews.frames("testcard", times_s), [0, 15, 50, 140], strict=True):
        assert np.array_equal(np.asarray(frame), decoded[number])
    assert previews.frames("testcard", [99.0]) == []
    assert previews.frames("nowhere", [1.0]) == []
    assert previews.missing == {"nowhere"}


def test_the_nearest_clips_are_those_nearest_to_the_centroid(dataset: Dataset) -> None:
    gathered = gather(dataset)
    assert sum(gathered.counts.values()) == CLIPS * len(PICTURES)
    tree = vocabulary.load(dataset.info.vocabulary, dataset.folder)
    for sample in dataset.samples():
        assert sample.features is not None
        for token in set(sample.visual_tokens.tolist()):
            mine = np.flatnonzero(sample.visual_tokens == token)
            gaps = (sample.features[mine].astype(np.float32) - tree.centroids()[token]) / tree.scale
            best = int(mine[np.linalg.norm(gaps, axis=1).argmin()])
            assert gathered.nearest[token][0, sample.video_id].start_s == sample.clip_span_s(best)[0]


def test_no_more_samples_are_read_than_allowed(dataset: Dataset) -> None:
    assert gather(dataset, max_samples=2).num_samples == 2


def test_a_storys_sentences_lie_under_their_seconds(dataset: Dataset) -> None:
    sample = next(sample for sample in dataset.samples() if sample.video_id == "testcard")
    drawn = story(sample, Previews(dataset))
    assert drawn["seconds"][0] == "10.0"
    # 11.0 s to 13.8 s, in cells of an eighth of a second after 10.0 s, counted from 1
    assert (drawn["sentences"][0]["start"], drawn["sentences"][0]["end"]) == (9, 31)
    assert len(drawn["frames"]) == len(drawn["tokens"]) == CLIPS


def test_a_story_of_key_frames_has_a_column_for_each_shot(dataset: Dataset) -> None:
    sample = next(sample for sample in dataset.samples() if sample.video_id == "testcard")
    starts_s = (10.0, 11.5, 15.5, 17.0, 18.5, 19.0, 19.1, 20.0)
    drawn = story(dataclasses.replace(sample, clip_starts_s=starts_s), Previews(dataset))
    assert drawn["seconds"] == ["10.0", "11.5", "15.5", "17.0", "18.5", "19.0", "19.1", "20.0"]
    # 11.0 s is two thirds into the first column, 13.8 s lies 2.3 of 4 s into the second; twelve cells each
    assert (drawn["sentences"][0]["start"], drawn["sentences"][0]["end"]) == (9, 20)


def test_words_that_go_with_a_token_come_before_words_that_go_with_everything() -> None:
    segments = [(frozenset({1}), frozenset({"egg", "pan"})), (frozenset({2}), frozenset({"fish", "pan"}))] * 3
    words = associated_words(segments, [1, 2])
    assert [word for word, _ in words[1]] == ["egg"]
    assert words[1][0][1] == pytest.approx(0.8, abs=0.06)  # one bit, times 3 / 4
    assert associated_words(segments[:2], [1]) == {1: []}  # once is chance


def test_curves_leave_out_what_is_not_a_number() -> None:
    assert "nan" not in curves_figure({"loss": [(0, float("nan")), (1, 2.0), (2, 1.0)]}).lower()
    assert "No curves" in curves_figure({})
