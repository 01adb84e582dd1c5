from __future__ import annotations

import math

import numpy as np

from training.metrics import Share, top_k


def test_top_k_counts_rows_whose_truth_is_among_the_best() -> None:
    scores = np.array([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    assert top_k(scores, [0, 1, 0], k=1) == Share(right=1, of=3)
    assert top_k(scores, [0, 1, 0], k=2) == Share(right=2, of=3)
    assert top_k(scores, [0, 1, 0], k=3) == Share(right=3, of=3)


def test_ties_and_unknown_truths_count_against_the_model() -> None:
    assert top_k(np.zeros((2, 4)), [0, 3], k=3).right == 0
    assert top_k(np.array([[1.0, 0.0]]), [-1], k=2).right == 0
    assert top_k(np.array([[-np.inf, -np.inf]]), [0], k=2).right == 0


def test_share_of_nothing_is_not_a_number() -> None:
    assert math.isnan(Share(right=0, of=0).value)
