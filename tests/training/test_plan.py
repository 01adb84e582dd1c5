from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.masking import MaskConfig
from training.plan import EpochPlan, Lengths, PlanConfig, Planner, Regime, best_fit, plan_epoch

CONFIG = PlanConfig(token_budget=128, max_text=40, max_visual=20)
MASKING = MaskConfig()


def make_lengths(segments: list[tuple[int, int]], *, per_video: int = 4) -> Lengths:
    """Segments of (words, visual tokens); every `per_video` of them are one video."""
    text, visual = (np.array(column, np.int64) for column in zip(*segments, strict=True))
    index = np.arange(len(segments))
    last = (index % per_video == per_video - 1) | (index == len(segments) - 1)
    return Lengths(text=text, visual=visual, video=index // per_video, next=np.where(last, -1, index + 1))


def plan(lengths: Lengths, *, config: PlanConfig = CONFIG, seed: int = 0, epoch: int = 0) -> EpochPlan:
    return plan_epoch(lengths, config=config, masking=MASKING, mask_misaligned=False, seed=seed, epoch=epoch)


def planner(lengths: Lengths, *, seed: int = 0) -> Planner:
    return Planner(lengths=lengths, config=CONFIG, masking=MASKING, mask_misaligned=False, seed=seed)


segments = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 40)), min_size=1, max_size=60).filter(
    lambda rows: any(text or visual for text, visual in rows)
)


@settings(max_examples=60, deadline=None)
@given(rows=segments, seed=st.integers(0, 5), epoch=st.integers(0, 3))
def test_epoch_covers_every_usable_segment_once_and_no_pack_overflows(
    rows: list[tuple[int, int]], seed: int, epoch: int
) -> None:
    lengths = make_lengths(rows)
    made = plan(lengths, seed=seed, epoch=epoch)
    usable = np.flatnonzero((lengths.text > 0) | (lengths.visual > 0))
    assert sorted(made.examples.segment[made.order]) == usable.tolist()
    for pack in range(made.num_packs):
        assert 0 < made.examples.lengths[made.pack(pack)].sum() <= CONFIG.token_budget


@settings(max_examples=60, deadline=None)
@given(rows=segments, seed=st.integers(0, 5))
def test_examples_keep_their_promises(rows: list[tuple[int, int]], seed: int) -> None:
    lengths = make_lengths(rows)
    made = plan(lengths, seed=seed).examples
    text_only, video_only, joint = (made.regime == regime for regime in Regime)
    assert not made.num_visual[text_only].any()
    assert not made.num_text[video_only].any()
    assert (made.num_text[joint] > 0).all()
    assert (made.num_visual[~text_only] > 0).all()
    assert (made.aligned[~joint] == -1).all()
    negative = made.aligned == 0
    assert (lengths.video[made.visual_segment[negative]] != lengths.video[made.segment[negative]]).all()
    assert (made.visual_segment[~negative] == made.segment[~negative]).all()
    assert not made.text_targets[negative].any()
    assert (made.rate <= CONFIG.max_subsampling).all()
    assert (made.phase < made.rate).all()
    assert (made.num_text <= CONFIG.max_text).all()
    assert (made.num_visual <= CONFIG.max_visual).all()


@settings(max_examples=30, deadline=None)
@given(rows=segments, count=st.integers(1, 5), world_size=st.integers(1, 8))
def test_step_is_the_same_for_any_world_size(rows: list[tuple[int, int]], count: int, world_size: int) -> None:
    steps = planner(make_lengths(rows)).steps(planner(make_lengths(rows)).start(), packs_per_step=count)
    for _ in range(4):
        step = next(steps)
        shares = [step.of_rank(rank, world_size=world_size) for rank in range(world_size)]
        assert sorted(map(_name, step.packs)) == sorted(_name(pack) for share in shares for pack in share)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_resume_at_every_step_is_exact() -> None:
    """Over two epoch borders: the steps after a cursor are those of the run that was not stopped."""
    source = planner(make_lengths([(10 + i % 7, 1 + i % 5) for i in range(30)]))
    whole = source.steps(source.start(), packs_per_step=2)
    steps = [next(whole) for _ in range(12)]
    assert steps[-1].after.epoch >= 2
    for stopped, step in enumerate(steps[:-1]):
        again = next(source.steps(step.after, packs_per_step=2))
        assert [*map(_name, again.packs)] == [*map(_name, steps[stopped + 1].packs)]
        assert again.after == steps[stopped + 1].after
        assert again.denominators == steps[stopped + 1].denominators


def test_steps_run_over_the_end_of_an_epoch_without_losing_a_pack() -> None:
    source = planner(make_lengths([(30, 10)] * 10))
    num_packs = source.epoch(0).num_packs
    steps = source.steps(source.start(), packs_per_step=3)
    seen = [_name(pack) for _ in range(num_packs) for pack in next(steps).packs]
    assert seen[: num_packs + 1] == [(0, index) for index in range(num_packs)] + [(1, 0)]


def test_epochs_differ_and_seeds_differ_and_equal_arguments_do_not() -> None:
    lengths = make_lengths([(5 + i, i % 4) for i in range(20)])
    assert plan(lengths).digest == plan(lengths).digest
    assert len({plan(lengths).digest, plan(lengths, epoch=1).digest, plan(lengths, seed=1).digest}) == 3


def test_order_of_an_epoch_is_a_promise() -> None:
    """A change of this digest makes every checkpoint resume into another order: raise PLAN_VERSION with it."""
    assert plan(make_lengths([(3 + i % 11, i % 6) for i in range(50)]), seed=7, epoch=3).digest.startswith(
        "955fa41465a0"
    )


def test_one_video_has_no_negatives_and_no_alignment_target() -> None:
    made = plan(make_lengths([(8, 4)] * 6, per_video=6))
    assert (made.examples.aligned == -1).all()
    assert made.denominators(0).alignment == 0


def test_corpus_without_speech_is_video_only() -> None:
    assert (plan(make_lengths([(0, 16)] * 6)).examples.regime == Regime.VIDEO).all()


def test_nothing_to_train_on_is_said() -> None:
    with pytest.raises(ValueError, match="ingest more videos"):
        plan(make_lengths([(0, 0)] * 3))


def test_cursor_of_another_plan_is_refused_with_both_digests() -> None:
    ours, other = planner(make_lengths([(5, 5)] * 8)), planner(make_lengths([(5, 6)] * 8))
    with pytest.raises(ValueError, match=f"{ours.digest[:12]}.*{other.digest[:12]}.*--name"):
        next(other.steps(ours.start(), packs_per_step=1))
    with pytest.raises(ValueError, match="version"):
        ours.check(dataclasses.replace(ours.start(), version=99))


def test_packs_are_nearly_full() -> None:
    draw = np.random.default_rng(0)
    lengths = np.minimum(draw.lognormal(4, 0.7, 20_000).astype(int) + 3, 512)
    packs = best_fit(lengths, budget=2048)
    assert lengths.sum() / (len(packs) * 2048) > 0.99
    assert sorted(row for pack in packs for row in pack) == list(range(len(lengths)))


def test_budget_below_the_longest_example_is_refused() -> None:
    with pytest.raises(ValueError, match=r"plan\.token_budget 50"):
        PlanConfig(token_budget=50)


def _name(pack: tuple[EpochPlan, int]) -> tuple[int, int]:
    return pack[0].epoch, pack[1]
