"""Measures as pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """A share with its denominator."""

    right: int
    of: int

    @property
    def value(self) -> float:
        """In [0, 1]; NaN where nothing was asked."""
        return self.right / self.of if self.of else float("nan")


def top_k(scores_NC: np.ndarray, truths: Sequence[int], *, k: int) -> Share:
    """How many rows have their true column among the k best. A truth of -1 is never among them.

    Columns of equal score count against the row: a truth is among the k best if fewer than k others score as much.
    """
    right = 0
    for scores, truth in zip(scores_NC, truths, strict=True):
        if truth >= 0 and np.isfinite(scores[truth]):
            right += int((scores >= scores[truth]).sum() - 1 < k)
    return Share(right=right, of=len(truths))
