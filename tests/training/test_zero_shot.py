from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.dataset import Dataset
from tests.training.conftest import OBJECTS, VERBS, Kitchen, make_sample, small_config
from training import recipes
from training.loop import Rank
from training.model import VideoBERT
from training.packing import sequence_length
from training.run import build_model, prepare, read_material, work
from training.tasks.zero_shot import evaluate, label_scores, open_scores, read_truth, step_items, tokens_under
from training.text import TokenLayout, build_vocabulary
from training.trained import Query, TrainedModel

VOCABULARY = build_vocabulary(["now let me show you how to chop the onion"], max_size=1000)


@pytest.fixture(scope="module")
def untrained() -> TrainedModel:
    torch.manual_seed(0)
    layout = TokenLayout(num_text=len(VOCABULARY), num_visual=96)
    config = small_config()
    model = VideoBERT(config.model, layout).eval()
    return TrainedModel(model=model, vocabulary=VOCABULARY, training=config.flat())


def test_token_belongs_to_a_step_if_half_of_its_clip_does() -> None:
    sample = make_sample("a", [10, 11, 12, 13])  # clips of 1.5 s
    assert tokens_under(sample, start_s=0.75, end_s=3.75).tolist() == [10, 11, 12]
    assert tokens_under(sample, start_s=0.76, end_s=3.74).tolist() == [11]
    assert tokens_under(sample, start_s=5.9, end_s=6.0).tolist() == []


def test_step_over_two_parts_has_the_tokens_of_both() -> None:
    first = make_sample("a", [1, 2])
    second = dataclasses.replace(make_sample("a", [3, 4]), part_index=1, part_start_s=3.0, part_end_s=6.0)
    truth = {"steps": [{"index": 0, "verb": "chop", "object": "onion", "start_s": 1.5, "end_s": 4.5}]}
    items = step_items([second, first], {first.video_id: truth})
    assert [item.visual_tokens.tolist() for item in items] == [[2, 3]]


def test_video_without_truth_has_none(tmp_path: Path) -> None:
    assert read_truth(str(tmp_path / "video.mp4")) is None
    (tmp_path / "video.truth.json").write_text(json.dumps({"steps": []}))
    assert read_truth(str(tmp_path / "video.mp4")) == {"steps": []}


def test_label_of_one_wordpiece_scores_as_its_mask_does(untrained: TrainedModel) -> None:
    visual = [np.array([1, 2]), np.array([5])]
    both = open_scores(untrained, visual)
    for slot, label in enumerate(("chop", "onion")):
        expected = both[:, slot, VOCABULARY.ids[label]]
        np.testing.assert_allclose(label_scores(untrained, visual, [label], slot=slot)[:, 0], expected, rtol=1e-5)


def test_label_of_several_wordpieces_is_the_sum_over_its_masks(untrained: TrainedModel) -> None:
    pieces = VOCABULARY.encode("hen")  # spelled
    assert len(pieces) == 3
    query = Query("now let me show you how to [MASK] the [MASK] [MASK] [MASK]", np.array([1]))
    answer = next(untrained.ask([query])).log_probabilities
    scores = label_scores(untrained, [np.array([1])], ["onion", "hen", "zzz"], slot=1)
    assert scores[0, 1] == pytest.approx(answer[[1, 2, 3], pieces].sum(), rel=1e-5)
    assert scores[0, 2] == -np.inf


def test_all_denominators_are_there(untrained: TrainedModel, kitchen: Kitchen) -> None:
    result = evaluate(untrained, Dataset(kitchen.url), model_name="m", split="all", verbs=VERBS[:3])
    record = json.loads(result.to_json())
    assert record["num_videos"] == 25
    assert record["num_steps"] == 400
    assert record["num_eligible"] < 400
    assert {row["verb_top1"]["of"] for row in record["eligible"]} == {record["num_eligible"]}
    assert {row["verb_top1"]["of"] for row in record["all"]} == {400}
    assert [(row["method"], row["mode"]) for row in record["eligible"]] == [
        ("VideoBERT", "open"),
        ("VideoBERT", "restricted"),
        ("VideoBERT", "prior-corrected"),
        ("language prior", "open"),
        ("language prior", "restricted"),
        ("most frequent", "restricted"),
    ]
    assert "chance, restricted" in result.table()


def test_splits_share_no_step(untrained: TrainedModel, kitchen: Kitchen) -> None:
    steps = [
        evaluate(untrained, Dataset(kitchen.url), model_name="m", split=split).num_steps
        for split in ("held_out", "train", "all")
    ]
    assert steps[0] > 0
    assert steps[0] + steps[1] == steps[2]


def test_dataset_without_truth_is_said(untrained: TrainedModel, kitchen: Kitchen, tmp_path: Path) -> None:
    from tests.training.conftest import write_dataset

    url = write_dataset(tmp_path / "d", [make_sample("a", [1, 2])], np.ones((4, 8), np.float32))
    with pytest.raises(FileNotFoundError, match=r"v\.truth\.json"):
        evaluate(untrained, Dataset(url), model_name="m")


def test_query_outside_the_vocabulary_or_too_long_is_refused(untrained: TrainedModel) -> None:
    with pytest.raises(ValueError, match=r"\[0, 96\)"):
        next(untrained.ask([Query("chop", np.array([96]))]))
    with pytest.raises(ValueError, match=f"{sequence_length(1, 500)} tokens is longer"):
        next(untrained.ask([Query("chop", np.zeros(500, np.int64))]))


@pytest.mark.integration
def test_trained_model_reads_verbs_and_objects_from_unseen_videos(kitchen: Kitchen, tmp_path: Path) -> None:
    """The proof that text and vision meet: restricted top-1 far above language prior and most frequent label."""
    torch.set_num_threads(1)  # two threads collapse where another process wants a core
    tiny = recipes.tiny()
    config = dataclasses.replace(tiny, optim=dataclasses.replace(tiny.optim, steps=400), eval_every_steps=200)
    spec = prepare(config, kitchen.url, storage=str(tmp_path), name=None, tracking_uri="")
    work(spec, rank=Rank(), report=lambda _: None, say=print)
    material = read_material(spec)
    model, _ = build_model(spec, material.layout)
    spec.store.restore(400, model, None, identity=spec.identity)
    trained = TrainedModel(model=model.eval(), vocabulary=material.vocabulary, training=config.flat())
    result = evaluate(trained, Dataset(kitchen.url), model_name="tiny")
    print(result.table())
    ours = result.row("VideoBERT", "restricted")
    for baseline in ("language prior", "most frequent"):
        theirs = result.row(baseline, "restricted")
        assert ours.verb_top1.value > theirs.verb_top1.value + 0.4
        assert ours.object_top1.value > theirs.object_top1.value + 0.4
    assert len(OBJECTS) == result.num_objects
