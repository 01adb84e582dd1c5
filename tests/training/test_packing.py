from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.packing import Document, Targets, collate, sequence, sequence_length, visual_offset
from training.text import TokenLayout, build_vocabulary

VOCABULARY = build_vocabulary(["chop the onion"], max_size=100)
LAYOUT = TokenLayout(num_text=len(VOCABULARY), num_visual=10)


def words(*ids: int) -> np.ndarray:
    return np.array(ids, np.int64)


def test_joint_sequence_is_cls_text_joint_visual_sep() -> None:
    tokens, types = sequence(words(7, 8), words(0, 9), layout=LAYOUT, vocabulary=VOCABULARY)
    cls, sep = VOCABULARY.ids["[CLS]"], VOCABULARY.ids["[SEP]"]
    first = LAYOUT.first_visual
    assert tokens.tolist() == [cls, 7, 8, LAYOUT.joint, first, first + 9, sep]
    assert types.tolist() == [0, 0, 0, 0, 1, 1, 1]


@given(num_text=st.integers(0, 20), num_visual=st.integers(0, 20))
def test_planned_length_and_offset_are_those_of_the_sequence(num_text: int, num_visual: int) -> None:
    tokens, _ = sequence(np.full(num_text, 7), np.arange(num_visual) % 10, layout=LAYOUT, vocabulary=VOCABULARY)
    assert len(tokens) == sequence_length(num_text, num_visual)
    if num_visual:
        assert tokens[visual_offset(num_text)] == LAYOUT.first_visual


def test_pack_concatenates_documents_and_moves_their_targets() -> None:
    one = Document(tokens=words(2, 7, 3), types=words(0, 0, 0), text=Targets(words(1), words(8)))
    two = Document(
        tokens=words(2, 4, LAYOUT.joint, 30, 3),
        types=words(0, 0, 0, 1, 1),
        visual=Targets(words(3), words(5)),
        aligned=1,
    )
    pack = collate([one, two])
    assert pack.token_T.tolist() == [2, 7, 3, 2, 4, LAYOUT.joint, 30, 3]
    assert pack.position_T.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert pack.text_index_K.tolist() == [1]
    assert pack.visual_index_M.tolist() == [6]
    assert pack.first_S.tolist() == [0, 3]
    assert (pack.alignment_index_A.tolist(), pack.aligned_A.tolist()) == ([3], [1.0])


def test_no_documents_make_no_pack() -> None:
    with pytest.raises(ValueError, match="at least one"):
        collate([])
