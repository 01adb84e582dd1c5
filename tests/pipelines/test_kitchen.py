"""The narrated kitchen: its truth against the files' own pictures, sound and captions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from pipelines.kitchen import DISHES, MARKER, OBJECTS, VERBS, KitchenConfig, make_kitchen, plan_recipe, read_truth
from pipelines.kitchen_pictures import Look, Scene
from pipelines.s3d import load_s3d

pytest.importorskip("espeakng_loader")

CONFIG = KitchenConfig(num_videos=2, steps_per_video=(2, 3), step_s=(2.0, 2.5), chatter_rate=0.5, seed=5)


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return make_kitchen(tmp_path_factory.mktemp("kitchen"), CONFIG)


def sentences(truth: dict[str, Any]) -> list[tuple[float, float, str]]:
    spoken = [(s["sentence_start_s"], s["sentence_end_s"], s["sentence"]) for s in truth["steps"] + truth["chatter"]]
    return sorted(spoken)


def pictures(video: Path) -> tuple[np.ndarray, np.ndarray]:
    """(times [T], frames [T, H, W, 3]) as a player would show them."""
    with av.open(str(video)) as container:
        shown = [(float(f.pts * f.time_base), f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
    return np.array([t for t, _ in shown]), np.stack([frame for _, frame in shown])


def sound(video: Path) -> tuple[np.ndarray, int]:
    with av.open(str(video)) as container:
        rate = container.streams.audio[0].rate
        blocks = [frame.to_ndarray().mean(0) for frame in container.decode(audio=0)]
    return np.concatenate(blocks), rate


# -- grammar ----------------------------------------------------------------------------------------------------------


def test_every_object_follows_the_order_of_its_dish() -> None:
    for index in range(40):
        dish, steps = plan_recipe(seed=1, index=index, num_steps=7)
        assert len(steps) == len(set(steps)) == 7
        for thing in {thing for _, thing in steps}:
            ranks = [DISHES[dish].index(verb) for verb, other in steps if other == thing]
            assert ranks == sorted(ranks)


def test_a_small_corpus_holds_every_verb_and_object_about_as_often() -> None:
    steps = [step for index in range(24) for step in plan_recipe(seed=0, index=index, num_steps=7)[1]]
    for items, column in ((VERBS, 0), (OBJECTS, 1)):
        counts = [sum(step[column] == item for step in steps) for item in items]
        assert min(counts) > 0.5 * len(steps) / len(items)


def test_dishes_keep_the_common_order_of_verbs_and_use_each_equally() -> None:
    for chain in DISHES.values():
        assert [verb for verb in VERBS if verb in chain] == list(chain)
    assert {sum(verb in chain for chain in DISHES.values()) for verb in VERBS} == {3}


# -- truth against the files ------------------------------------------------------------------------------------------


@pytest.mark.integration
def test_the_truth_is_the_same_for_the_same_seed(kitchen: list[Path], tmp_path: Path) -> None:
    again = make_kitchen(tmp_path, CONFIG, num_processes=1)
    assert [read_truth(v) for v in again] == [read_truth(v) for v in kitchen]
    times, frames = pictures(again[0])
    first_times, first_frames = pictures(kitchen[0])
    np.testing.assert_array_equal(times, first_times)
    np.testing.assert_array_equal(frames, first_frames)


def test_the_truth_names_what_a_reader_needs(kitchen: list[Path]) -> None:
    for video in kitchen:
        truth = read_truth(video)
        assert truth["video"] == video.name
        assert truth["seed"] == 5
        assert (tuple(truth["verbs"]), tuple(truth["objects"])) == (VERBS, OBJECTS)
        assert [step["index"] for step in truth["steps"]] == list(range(len(truth["steps"])))
        for step in truth["steps"]:
            assert step["verb"] in step["sentence"]
            assert step["object"] in step["sentence"]
            assert step["end_s"] - step["start_s"] >= 2.0
            assert step["start_s"] <= step["sentence_start_s"] + CONFIG.jitter_s
        for (_, end_s, _), (next_s, _, _) in zip(sentences(truth), sentences(truth)[1:], strict=False):
            assert end_s < next_s


def test_the_container_is_what_real_sources_are(kitchen: list[Path]) -> None:
    for video in kitchen:
        with av.open(str(video)) as container:
            picture, audio = container.streams.video[0], container.streams.audio[0]
            assert (picture.codec_context.name, audio.codec_context.name) == ("h264", "aac")
            assert (picture.width, picture.height, picture.average_rate) == (320, 240, 20)
            assert container.duration / 1e6 == pytest.approx(read_truth(video)["duration_s"], abs=0.15)
            assert container.metadata["title"].lower() == read_truth(video)["recipe"]


def test_pictures_change_at_the_times_of_the_truth(kitchen: list[Path]) -> None:
    for video in kitchen:
        times, frames = pictures(video)
        change = np.abs(np.diff(frames[:, ::4, ::4].astype(np.int16), axis=0)).mean((1, 2, 3))
        for step in read_truth(video)["steps"]:
            at = np.abs(times - step["start_s"]).argmin()
            near = change[at - 3 : at + 2].max()
            assert near > 1.5 * np.median(change[at + 2 : at + 20])


def test_captions_carry_the_sentences_at_their_times(kitchen: list[Path]) -> None:
    captioned = [video for video in kitchen if read_truth(video)["captions"]]
    assert len(captioned) == len(kitchen) - CONFIG.num_without_captions
    for video in kitchen:
        with av.open(str(video)) as container:
            assert len(container.streams.subtitles) == (video in captioned)
            if video not in captioned:
                continue
            assert container.streams.subtitles[0].codec_context.name == "mov_text"
            found = []
            for packet in container.demux(subtitles=0):
                size = int.from_bytes(bytes(packet)[:2], "big")
                if size:
                    text = bytes(packet)[2 : 2 + size].decode()
                    found.append(
                        (float(packet.pts * packet.time_base), float(packet.duration * packet.time_base), text)
                    )
        expected = [(start, end - start, text) for start, end, text in sentences(read_truth(video))]
        assert [text for *_, text in found] == [text for *_, text in expected]
        np.testing.assert_allclose([row[:2] for row in found], [row[:2] for row in expected], atol=0.005)


def test_speech_is_heard_inside_sentences_and_silence_outside(kitchen: list[Path]) -> None:
    for video in kitchen:
        samples, rate = sound(video)
        times = np.arange(len(samples)) / rate
        quiet = np.ones(len(samples), bool)
        for start_s, end_s, _ in sentences(read_truth(video)):
            assert samples[(times > start_s) & (times < end_s)].std() > 0.02
            quiet &= (times < start_s - 0.1) | (times > end_s + 0.1)
        assert quiet.any()
        assert samples[quiet].std() < 0.001


def test_different_sentences_sound_different(kitchen: list[Path]) -> None:
    samples, rate = sound(kitchen[0])
    spoken = [samples[round(a * rate) : round(b * rate)] for a, b, _ in sentences(read_truth(kitchen[0]))[:2]]
    shortest = min(map(len, spoken))
    assert abs(np.corrcoef(spoken[0][:shortest], spoken[1][:shortest])[0, 1]) < 0.3


# -- pictures ---------------------------------------------------------------------------------------------------------


def test_every_verb_moves_and_every_object_looks_different() -> None:
    scene = Scene(width=160, height=120, rng=np.random.default_rng(0))
    stills = {}
    for verb in VERBS:
        for thing in OBJECTS:
            frame = scene.step(verb=verb, thing=thing, look=Look())
            first, later = (np.asarray(frame(t), np.int16) for t in (0.0, 0.4))
            assert first.shape == (120, 160, 3)
            assert np.abs(first - later).mean() > 1, (verb, thing)
            stills[verb, thing] = first
    for verb in VERBS:
        for thing in OBJECTS[1:]:
            assert np.abs(stills[verb, thing] - stills[verb, OBJECTS[0]]).mean() > 3, (verb, thing)


@pytest.mark.integration
def test_an_untrained_s3d_tells_verbs_and_objects_apart() -> None:
    extractor = load_s3d(weights="random:0", device="cpu")
    rng = np.random.default_rng(0)
    truth = [(verb, thing) for _ in range(2) for verb in VERBS for thing in OBJECTS]
    features = []
    for verb, thing in truth:
        frame = Scene(width=80, height=80, rng=rng).step(verb=verb, thing=thing, look=Look.draw(rng))
        clip = np.stack([np.asarray(frame(i / 20).resize((64, 64))) for i in range(16)])
        features.append(extractor.extract(clip[None])[0])
    points = np.stack(features)
    points = (points - points.mean(0)) / points.std(0)
    first, second = np.split(points, 2)
    nearest = ((second[:, None] - first[None]) ** 2).sum(2).argmin(1)
    right = np.array([(truth[n][0] == v, truth[n][1] == t) for n, (v, t) in zip(nearest, truth, strict=False)])
    verbs, objects = right.mean(0)
    assert verbs >= 0.9
    assert objects >= 0.8


# -- running again ----------------------------------------------------------------------------------------------------


def test_a_complete_corpus_is_kept_and_an_unfinished_or_other_one_made_again(tmp_path: Path) -> None:
    tiny = {"num_videos": 1, "steps_per_video": (1, 1), "step_s": (1.0, 1.0), "width": 64, "height": 64}
    reports: list[tuple[int, int]] = []
    (video,) = make_kitchen(tmp_path, KitchenConfig(**tiny), progress=lambda *done: reports.append(done))
    made = video.stat().st_mtime_ns
    make_kitchen(tmp_path, KitchenConfig(**tiny), progress=lambda *done: reports.append(done))
    assert video.stat().st_mtime_ns == made
    assert reports == [(1, 1), (1, 1)]
    marker = json.loads((tmp_path / MARKER).read_text())
    (tmp_path / MARKER).write_text(
        json.dumps(marker | {"complete": False, "videos": ["kitchen-000.mp4", "kitchen-001.mp4"]})
    )
    (tmp_path / "kitchen-001.mp4").write_bytes(b"left over")
    (tmp_path / "mine.mp4").write_bytes(b"not ours")
    make_kitchen(tmp_path, KitchenConfig(**tiny))
    assert video.stat().st_mtime_ns > made
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "kitchen-000.mp4",
        "kitchen-000.truth.json",
        MARKER,
        "mine.mp4",
    ]


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_videos": 0},
        {"steps_per_video": (3, 2)},
        {"step_s": (2.0, 1.0)},
        {"width": 321},
        {"num_without_captions": 99},
    ],
)
def test_an_impossible_config_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        KitchenConfig(**wrong)
