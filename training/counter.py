"""Random numbers as a function of what they are for, not of when they are drawn.

A word is `Philox(key=(seed, epoch), counter=(position, 0, item, stream))`. So the draws of an example depend on
neither the rank, the pack, the neighbours nor the number of restarts, and nothing random has to be saved in a
checkpoint. Only raw words are used: numpy promises their stability across versions, and not that of `Generator`
methods (NEP 19). Building a counter costs about 15 us, so plans draw a whole column at once and masks once an
example.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """What a draw is for. The numbers are part of the order that a seed promises: append, never renumber."""

    REGIME = 0
    NEGATIVE = 1
    PARTNER = 2
    CONCATENATE = 3
    RATE = 4
    PHASE = 5
    ORDER = 6
    PACK_ORDER = 7
    TEXT_MASK = 8
    VISUAL_MASK = 9
    DROPOUT = 10


def words(num: int, *, seed: int, epoch: int, stream: Stream, item: int = 0) -> np.ndarray:
    """[num] uint64, each a function of its index and the arguments."""
    key = np.array([seed, epoch], np.uint64)
    counter = np.array([0, 0, item, stream], np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(num)


def uniforms(num: int, *, seed: int, epoch: int, stream: Stream, item: int = 0) -> np.ndarray:
    """[num] float64 in [0, 1)."""
    return (words(num, seed=seed, epoch=epoch, stream=stream, item=item) >> np.uint64(11)) * 2.0**-53


def permutation(num: int, *, seed: int, epoch: int, stream: Stream, item: int = 0) -> np.ndarray:
    """[num] int64: a permutation of range(num)."""
    return np.argsort(words(num, seed=seed, epoch=epoch, stream=stream, item=item), kind="stable")
