from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipelines.dataset import Dataset, Sentence
from tests.training.conftest import Kitchen, make_sample, small_config, write_dataset
from training.masking import MaskConfig
from training.plan import Planner
from training.reader import Corpus, PackReader, build_corpus, held_out, read_split, sentences, spoken
from training.text import SPECIAL_TOKENS, TokenLayout, build_vocabulary


def test_videos_keep_their_side_while_the_corpus_grows() -> None:
    ids = [f"video-{index}" for index in range(2000)]
    held = {video for video in ids if held_out(video, 0.2)}
    assert 0.17 < len(held) / len(ids) < 0.23
    assert {video for video in ids if held_out(video, 0.1)} < held
    assert not any(held_out(video, 0.0) for video in ids)


def test_split_by_video_leaves_nothing_out(kitchen: Kitchen) -> None:
    train, held = read_split(Dataset(kitchen.url), fraction=0.2)
    assert train
    assert held
    assert not {sample.video_id for sample in train} & {sample.video_id for sample in held}
    assert len(train) + len(held) == 25


def test_all_videos_held_out_is_said(kitchen: Kitchen) -> None:
    with pytest.raises(ValueError, match="held_out_fraction=0"):
        read_split(Dataset(kitchen.url), fraction=1.0)


def test_empty_dataset_is_said(tmp_path: Path) -> None:
    url = write_dataset(tmp_path / "dataset", [], np.ones((4, 8), np.float32))
    with pytest.raises(ValueError, match="holds no samples"):
        read_split(Dataset(url), fraction=0.1)


def test_closing_mark_is_not_trained_on() -> None:
    assert [spoken(text) for text in (" Chop it. ", "Really?!", "3.5 cups", "...")] == [
        "Chop it",
        "Really",
        "3.5 cups",
        "",
    ]


def test_segments_follow_each_other_within_a_sample_only() -> None:
    speech = (
        Sentence(start_s=0.0, end_s=1.4, text="chop", origin="captions"),
        Sentence(start_s=1.6, end_s=2.9, text="stir it", origin="captions"),
    )
    samples = [make_sample("a", [3, 4], speech), make_sample("b", list(range(20)))]
    corpus = build_corpus(samples, build_vocabulary(sentences(samples), max_size=100))
    assert corpus.next.tolist() == [1, -1, 3, -1]
    assert corpus.video.tolist() == [0, 0, 1, 1]
    assert corpus.lengths.text.tolist() == [1, 2, 0, 0]
    assert [corpus.visual_of(index).tolist() for index in range(4)] == [[3], [4], list(range(16)), [16, 17, 18, 19]]


@pytest.fixture
def reader_of_epoch(kitchen: Kitchen) -> tuple[PackReader, Planner, Corpus]:
    dataset = Dataset(kitchen.url)
    train, _ = read_split(dataset, fraction=0.2)
    vocabulary = build_vocabulary(sentences(train), max_size=1000)
    corpus, config = build_corpus(train, vocabulary), small_config()
    reader = PackReader(
        corpus=corpus,
        vocabulary=vocabulary,
        layout=TokenLayout(num_text=len(vocabulary), num_visual=kitchen.num_visual),
        masking=MaskConfig(text_rate=0.5, visual_rate=0.5),
        mask_misaligned=False,
        seed=0,
    )
    planner = Planner(lengths=corpus.lengths, config=config.plan, masking=reader.masking, mask_misaligned=False, seed=0)
    return reader, planner, corpus


def test_mask_counts_of_every_pack_are_those_of_the_plan(
    reader_of_epoch: tuple[PackReader, Planner, Corpus],
) -> None:
    reader, planner, _ = reader_of_epoch
    plan = planner.epoch(1)
    for index in range(plan.num_packs):
        pack, planned = reader.pack(plan, index), plan.denominators(index)
        assert (len(pack.text_index_K), len(pack.visual_index_M), len(pack.aligned_A)) == tuple(planned)
        assert len(pack.token_T) == plan.examples.lengths[plan.pack(index)].sum()


def test_special_tokens_are_never_masked(reader_of_epoch: tuple[PackReader, Planner, Corpus]) -> None:
    reader, planner, _ = reader_of_epoch
    plan = planner.epoch(0)
    special = [reader.vocabulary.ids[token] for token in SPECIAL_TOKENS]
    for index in range(plan.num_packs):
        pack = reader.pack(plan, index)
        assert not np.isin(pack.text_target_K.numpy(), special).any()
        assert (pack.type_T[pack.visual_index_M] == 1).all()
        assert (pack.type_T[pack.text_index_K] == 0).all()
        assert (pack.token_T[pack.first_S] == reader.vocabulary.ids["[CLS]"]).all()
        num_joint = int((pack.token_T == reader.layout.joint).sum())
        both = (plan.examples.num_text > 0) & (plan.examples.num_visual > 0)
        assert num_joint == both[plan.pack(index)].sum()


def test_unmasking_gives_back_the_corpus(reader_of_epoch: tuple[PackReader, Planner, Corpus]) -> None:
    """Targets put back where they were: the example is the segment's own words and tokens, as planned."""
    reader, planner, corpus = reader_of_epoch
    plan = planner.epoch(0)
    examples = plan.examples
    rows = [row for row in plan.order.tolist() if not examples.joined[row] and examples.aligned[row] == 1][:50]
    assert rows
    for row in rows:
        document, segment = reader.document(plan, row), int(examples.segment[row])
        tokens = document.tokens.copy()
        tokens[document.text.positions] = document.text.ids
        tokens[document.visual.positions] = document.visual.ids + reader.layout.first_visual
        num_text = int(examples.num_text[row])
        assert tokens[1 : 1 + num_text].tolist() == corpus.text_of(segment)[:num_text].tolist()
        visual = corpus.visual_of(segment)[examples.phase[row] :: examples.rate[row]]
        assert tokens[2 + num_text : -1].tolist() == (visual + reader.layout.first_visual).tolist()


def test_misaligned_pairs_are_masked_but_not_scored(reader_of_epoch: tuple[PackReader, Planner, Corpus]) -> None:
    """If only aligned pairs had masks, the alignment answer could be read off their presence."""
    reader, planner, _ = reader_of_epoch
    plan = planner.epoch(0)
    rows = [row for row in plan.order.tolist() if plan.examples.aligned[row] == 0]
    documents = [reader.document(plan, row) for row in rows]
    mask = reader.vocabulary.ids["[MASK]"]
    assert sum(mask in document.tokens for document in documents) > 0.7 * len(rows)
    assert not any(len(document.text.ids) or len(document.visual.ids) for document in documents)
