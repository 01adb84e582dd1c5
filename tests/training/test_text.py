from __future__ import annotations

from pathlib import Path

import pytest

from training.text import SPECIAL_TOKENS, TextVocabulary, TokenLayout, build_vocabulary

SENTENCES = ["Chop the onion.", "chop the carrot", "Stir it"]


def test_token_ids_are_text_then_joint_then_visual() -> None:
    """A change here makes every trained model read other tokens than it was trained on."""
    layout = TokenLayout(num_text=10, num_visual=3)
    assert (layout.joint, layout.first_visual, layout.size) == (10, 11, 14)


def test_vocabulary_has_special_tokens_first_and_then_words_by_frequency() -> None:
    vocabulary = build_vocabulary(SENTENCES, max_size=1000)
    assert vocabulary.tokens[:5] == SPECIAL_TOKENS
    words = [token for token in vocabulary.tokens if len(token) > 1 and token[0] not in "#["]
    assert words == ["chop", "the", "carrot", "it", "onion", "stir"]


def test_word_outside_a_full_vocabulary_is_spelled() -> None:
    vocabulary = build_vocabulary(SENTENCES, max_size=0)
    assert vocabulary.decode(vocabulary.encode("chop").tolist()) == "chop"
    assert len(vocabulary.encode("chop")) == 4


def test_masks_of_a_template_become_mask_tokens() -> None:
    vocabulary = build_vocabulary(SENTENCES, max_size=1000)
    mask = vocabulary.ids["[MASK]"]
    assert vocabulary.encode("[MASK] the [MASK]").tolist() == [mask, vocabulary.ids["the"], mask]


def test_vocabulary_survives_its_file(tmp_path: Path) -> None:
    vocabulary = build_vocabulary([*SENTENCES, "caf\u00e9 \u2028 line"], max_size=1000)
    vocabulary.save(tmp_path / "vocab.txt")
    assert TextVocabulary.load(tmp_path / "vocab.txt").tokens == vocabulary.tokens


def test_random_replacements_are_never_special() -> None:
    vocabulary = build_vocabulary(SENTENCES, max_size=1000)
    assert not {vocabulary.ids[token] for token in SPECIAL_TOKENS} & set(vocabulary.ordinary_ids.tolist())


def test_vocabulary_without_special_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lacks .*vocab\.txt"):
        TextVocabulary(["a", "b"])
