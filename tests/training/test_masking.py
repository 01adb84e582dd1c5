from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.counter import Stream
from training.masking import MaskConfig, Targets, mask, num_targets

MASK_ID, REPLACEMENTS = 4, np.arange(100, 200)


def masked(length: int, *, rate: float = 0.15, example: int = 0, epoch: int = 0) -> tuple[np.ndarray, Targets]:
    return mask(
        np.arange(10, 10 + length),
        rate=rate,
        config=MaskConfig(),
        mask_id=MASK_ID,
        replacements=REPLACEMENTS,
        seed=0,
        epoch=epoch,
        stream=Stream.TEXT_MASK,
        example=example,
    )


@given(length=st.integers(0, 80), rate=st.floats(0.01, 1.0), example=st.integers(0, 1000))
def test_mask_count_is_a_function_of_length(length: int, rate: float, example: int) -> None:
    hidden, targets = masked(length, rate=rate, example=example)
    assert len(targets.positions) == int(num_targets(np.array(length), rate=rate))
    assert len(set(targets.positions.tolist())) == len(targets.positions)
    assert (targets.ids == targets.positions + 10).all()
    untouched = np.setdiff1d(np.arange(length), targets.positions)
    assert (hidden[untouched] == untouched + 10).all()


def test_masks_depend_on_epoch_and_example_and_on_nothing_else() -> None:
    first, again = masked(40), masked(40)
    assert (first[0] == again[0]).all()
    assert not np.array_equal(first[1].positions, masked(40, example=1)[1].positions)
    assert not np.array_equal(first[1].positions, masked(40, epoch=1)[1].positions)


def test_eighty_percent_become_mask_ten_random_ten_stay() -> None:
    fates = {"mask": 0, "random": 0, "same": 0}
    for example in range(400):
        hidden, targets = masked(40, rate=0.5, example=example)
        at = hidden[targets.positions]
        fates["mask"] += int((at == MASK_ID).sum())
        fates["same"] += int((at == targets.ids).sum())
        fates["random"] += int(np.isin(at, REPLACEMENTS).sum())
    total = 400 * 20
    assert sum(fates.values()) == total
    assert fates["mask"] / total == pytest.approx(0.8, abs=0.02)
    assert fates["random"] / total == pytest.approx(0.1, abs=0.02)
