"""The epoch plan: which examples an epoch has, in which packs and order, as a pure function of lengths.

Every rank computes the same plan, so nothing is sent, no loader has state, and the denominators of a step's losses
are known before it runs. A step takes the next `packs_per_step` packs whatever the world size; rank r of W takes
every W-th of them. A cursor of six scalars says where a run stands. Planning costs about 3 us an example; packs of
2,048 tokens come out over 99 % full (best fit decreasing within a window of 65,536 examples, then the packs are
shuffled).

What the paper leaves open and we chose (docs/paper.md): each segment gives one example an epoch, its regime drawn by
`mix` among those it has the material for; half of the joint examples are paired with the visual tokens of another
video; a neighbour joins with probability `neighbour_probability`; the subsampling rate never leaves fewer than two
visual tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from training.counter import Stream, permutation, uniforms, words
from training.masking import MaskConfig, num_targets
from training.packing import sequence_length

PLAN_VERSION = 1
WINDOW_EXAMPLES = 65_536


class Regime(IntEnum):
    TEXT = 0
    VIDEO = 1
    JOINT = 2


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What an epoch is made of."""

    token_budget: int = 2048
    """Tokens of a pack; padding does not count because there is none."""
    max_text: int = 96
    """Wordpieces of an example; what is longer loses its end."""
    max_visual: int = 64
    """Visual tokens of an example, after subsampling."""
    text_share: float = 1.0
    """Weight of the text-only regime in the mix."""
    video_share: float = 1.0
    """Weight of the video-only regime in the mix."""
    joint_share: float = 2.0
    """Weight of the text-video regime in the mix."""
    negative_probability: float = 0.5
    """Share of joint examples whose visual tokens come from another video."""
    neighbour_probability: float = 0.3
    """Share of examples that are joined with the next sentence (paper section 3.2)."""
    max_subsampling: int = 5
    """Visual tokens are taken every 1 to so many (paper section 3.2)."""

    def __post_init__(self) -> None:
        longest = sequence_length(self.max_text, self.max_visual)
        if self.token_budget < longest:
            raise ValueError(
                f"plan.token_budget {self.token_budget} is below the longest example, {longest} tokens; "
                "raise it or lower plan.max_text or plan.max_visual."
            )
        if min(self.max_text, self.max_visual, self.max_subsampling) < 1:
            raise ValueError("plan.max_text, plan.max_visual and plan.max_subsampling must be at least 1.")
        if min(self.text_share, self.video_share, self.joint_share) < 0 or not self.shares.sum():
            raise ValueError("the shares of plan must not be negative, and one of them must be above 0.")

    @property
    def shares(self) -> np.ndarray:
        """[3] by Regime."""
        return np.array([self.text_share, self.video_share, self.joint_share])


class Lengths(NamedTuple):
    """What a plan knows of a corpus: one row a segment."""

    text: np.ndarray  # int64: wordpieces
    visual: np.ndarray  # int64: visual tokens
    video: np.ndarray  # int64: which video
    next: np.ndarray  # int64: the following segment of the same sample, or -1

    @property
    def digest(self) -> str:
        return _digest(self)


class Examples(NamedTuple):
    """The examples of an epoch, one row each; `segment` names them."""

    segment: np.ndarray  # the sentence, and in video-only examples its visual tokens
    regime: np.ndarray
    visual_segment: np.ndarray  # whose visual tokens: the segment's own, or a partner's
    joined: np.ndarray  # bool: the next segment follows, on both sides where both have one
    rate: np.ndarray  # subsampling of the visual tokens
    phase: np.ndarray  # first visual token taken
    aligned: np.ndarray  # 1, 0, or -1 where alignment is no target
    num_text: np.ndarray
    num_visual: np.ndarray
    text_targets: np.ndarray  # masked words that count in the loss
    visual_targets: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        both = (self.num_text > 0) & (self.num_visual > 0)
        return self.num_text + self.num_visual + 2 + both


class Denominators(NamedTuple):
    """How many targets each objective has; sums of these divide the losses of a step."""

    text: int
    visual: int
    alignment: int


@dataclass(frozen=True, kw_only=True)
class EpochPlan:
    """The packs of one epoch."""

    epoch: int
    examples: Examples
    order: np.ndarray  # int64: rows of `examples`, pack after pack
    pack_offsets: np.ndarray  # int64 [num_packs + 1] into `order`

    @property
    def num_packs(self) -> int:
        return len(self.pack_offsets) - 1

    def pack(self, index: int) -> np.ndarray:
        """Rows of the examples of a pack."""
        return self.order[self.pack_offsets[index] : self.pack_offsets[index + 1]]

    def denominators(self, index: int) -> Denominators:
        rows = self.pack(index)
        return Denominators(
            text=int(self.examples.text_targets[rows].sum()),
            visual=int(self.examples.visual_targets[rows].sum()),
            alignment=int((self.examples.aligned[rows] >= 0).sum()),
        )

    @property
    def fill(self) -> float:
        """Mean tokens of a pack over those of the fullest."""
        per_pack = np.add.reduceat(self.examples.lengths[self.order], self.pack_offsets[:-1])
        return float(per_pack.mean() / per_pack.max())

    @property
    def digest(self) -> str:
        """The order as a promise: two plans are equal if and only if their digests are."""
        return _digest([*self.examples, self.order, self.pack_offsets])


@dataclass(frozen=True, kw_only=True, slots=True)
class Cursor:
    """Everything a loader needs to go on: six scalars, no worker state."""

    version: int = PLAN_VERSION
    plan_digest: str
    seed: int
    epoch: int = 0
    pack: int = 0  # the next pack of this epoch
    step: int = 0  # optimizer steps done; drives the schedule only


class StepPacks(NamedTuple):
    """The packs of one step, over the end of an epoch where they must, and where the next step starts."""

    packs: list[tuple[EpochPlan, int]]
    after: Cursor

    @property
    def denominators(self) -> Denominators:
        parts = [plan.denominators(index) for plan, index in self.packs]
        return Denominators(*(sum(column) for column in zip(*parts, strict=True)))

    def of_rank(self, rank: int, *, world_size: int) -> list[tuple[EpochPlan, int]]:
        """This rank's share; shares differ by at most one, and may be empty."""
        return self.packs[rank::world_size]


@dataclass(frozen=True, kw_only=True)
class Planner:
    """The plans of all epochs of a run, made when asked for."""

    lengths: Lengths
    config: PlanConfig
    masking: MaskConfig
    mask_misaligned: bool
    seed: int

    @property
    def digest(self) -> str:
        """Names corpus and plan settings; a cursor of another digest is refused."""
        settings = f"{PLAN_VERSION} {astuple(self.config)} {astuple(self.masking)} {self.mask_misaligned} {self.seed}"
        return hashlib.sha256(f"{self.lengths.digest} {settings}".encode()).hexdigest()

    def start(self) -> Cursor:
        return Cursor(plan_digest=self.digest, seed=self.seed)

    def check(self, cursor: Cursor) -> None:
        """Raises ValueError if a cursor belongs to another plan."""
        expected, found = (PLAN_VERSION, self.digest, self.seed), (cursor.version, cursor.plan_digest, cursor.seed)
        if expected != found:
            raise ValueError(
                f"the checkpoint belongs to plan (version, digest, seed) {_short(found)} and this run has "
                f"{_short(expected)}; give the same dataset, plan, masking and seed, or start under another --name."
            )

    def epoch(self, epoch: int) -> EpochPlan:
        return plan_epoch(
            self.lengths,
            config=self.config,
            masking=self.masking,
            mask_misaligned=self.mask_misaligned,
            seed=self.seed,
            epoch=epoch,
        )

    def steps(self, cursor: Cursor, *, packs_per_step: int) -> Iterator[StepPacks]:
        """Steps without end, from a cursor on. Epochs follow each other without a seam."""
        self.check(cursor)
        plan, pack, step = self.epoch(cursor.epoch), cursor.pack, cursor.step
        while True:
            packs: list[tuple[EpochPlan, int]] = []
            while len(packs) < packs_per_step:
                if pack >= plan.num_packs:
                    plan, pack = self.epoch(plan.epoch + 1), 0
                packs.append((plan, pack))
                pack += 1
            step += 1
            after = Cursor(plan_digest=cursor.plan_digest, seed=cursor.seed, epoch=plan.epoch, pack=pack, step=step)
            yield StepPacks(packs, after)


def plan_epoch(
    lengths: Lengths, *, config: PlanConfig, masking: MaskConfig, mask_misaligned: bool, seed: int, epoch: int
) -> EpochPlan:
    """The examples of an epoch and their packs. Raises ValueError where there is nothing to train on."""
    examples = _draw_examples(
        lengths, config=config, masking=masking, mask_misaligned=mask_misaligned, seed=seed, epoch=epoch
    )
    num_examples = len(examples.segment)
    if not num_examples:
        raise ValueError("no segment suits the regimes asked for; ingest more videos or change the shares of plan.")
    shuffled = permutation(num_examples, seed=seed, epoch=epoch, stream=Stream.ORDER)
    packs: list[np.ndarray] = []
    for window, first in enumerate(range(0, num_examples, WINDOW_EXAMPLES)):
        rows = shuffled[first : first + WINDOW_EXAMPLES]
        fitted = [rows[members] for members in best_fit(examples.lengths[rows], budget=config.token_budget)]
        # Best fit goes by length: without this the long examples would come first.
        mixed = permutation(len(fitted), seed=seed, epoch=epoch, stream=Stream.PACK_ORDER, item=window)
        packs += [fitted[index] for index in mixed]
    return EpochPlan(
        epoch=epoch,
        examples=examples,
        order=np.concatenate(packs),
        pack_offsets=np.cumsum([0, *map(len, packs)]),
    )


def best_fit(lengths: np.ndarray, *, budget: int) -> list[list[int]]:
    """Best fit decreasing: the members of each pack. Nothing longer than the budget may come in."""
    packs: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(budget + 1)]
    open_rooms = 0  # bit r is set where a pack with r free tokens exists: the next fit is one bit operation away
    for row in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[row])
        fitting = open_rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            pack = by_room[room].pop()
            if not by_room[room]:
                open_rooms &= ~(1 << room)
            packs[pack].append(row)
        else:
            room, pack = budget, len(packs)
            packs.append([row])
        by_room[room - length].append(pack)
        open_rooms |= 1 << (room - length)
    return packs


def _draw_examples(
    lengths: Lengths, *, config: PlanConfig, masking: MaskConfig, mask_misaligned: bool, seed: int, epoch: int
) -> Examples:
    """One example a segment, for the segments that have material for a regime of the mix."""
    num = len(lengths.text)

    def draw(stream: Stream) -> np.ndarray:
        return uniforms(num, seed=seed, epoch=epoch, stream=stream)

    regime = _draw_regimes(lengths, shares=config.shares, draws=draw(Stream.REGIME))
    partner = _draw_partners(lengths, words(num, seed=seed, epoch=epoch, stream=Stream.PARTNER))
    joint = regime == Regime.JOINT
    negative = joint & (partner >= 0) & (draw(Stream.NEGATIVE) < config.negative_probability)
    aligned = np.where(joint & (partner >= 0), np.where(negative, 0, 1), -1)
    visual_segment = np.where(negative, partner, np.arange(num))
    joined = (draw(Stream.CONCATENATE) < config.neighbour_probability) & (lengths.next >= 0)
    num_text = np.minimum(_total(lengths.text, np.arange(num), joined, lengths.next), config.max_text)
    raw_visual = _total(lengths.visual, visual_segment, joined, lengths.next)
    highest = np.clip(raw_visual // 2, 1, config.max_subsampling)
    rate = 1 + (draw(Stream.RATE) * highest).astype(np.int64)
    phase = (draw(Stream.PHASE) * rate).astype(np.int64)
    num_visual = np.minimum(-(-(raw_visual - phase) // rate), config.max_visual)
    num_text = np.where(regime == Regime.VIDEO, 0, num_text)
    num_visual = np.where(regime == Regime.TEXT, 0, num_visual)
    # A misaligned pair keeps its masks, or their absence would tell the answer; its targets do not count.
    counts = (aligned != 0) | mask_misaligned
    examples = Examples(
        segment=np.arange(num),
        regime=regime,
        visual_segment=visual_segment,
        joined=joined,
        rate=rate,
        phase=phase,
        aligned=aligned,
        num_text=num_text,
        num_visual=num_visual,
        text_targets=np.where(counts, num_targets(num_text, rate=masking.text_rate), 0),
        visual_targets=np.where(counts, num_targets(num_visual, rate=masking.visual_rate), 0),
    )
    return Examples(*(column[regime >= 0] for column in examples))


def _draw_regimes(lengths: Lengths, *, shares: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """[N] a Regime drawn by share among those a segment has the material for; -1 where there is none."""
    has_text, has_visual = lengths.text > 0, lengths.visual > 0
    weights_N3 = np.stack([has_text, has_visual, has_text & has_visual], axis=1) * shares
    total = weights_N3.sum(axis=1)
    cumulative_N3 = np.cumsum(weights_N3, axis=1)
    drawn = (cumulative_N3 <= (draws * total)[:, None]).sum(axis=1)
    return np.where(total > 0, np.minimum(drawn, 2), -1)


def _draw_partners(lengths: Lengths, draws: np.ndarray) -> np.ndarray:
    """[N] a segment with visual tokens of another video, drawn uniformly; -1 where no other video has any."""
    with_visual = np.flatnonzero(lengths.visual > 0)
    candidates = with_visual[np.argsort(lengths.video[with_visual], kind="stable")]
    videos = lengths.video[candidates]
    first = np.searchsorted(videos, lengths.video, side="left")
    own = np.searchsorted(videos, lengths.video, side="right") - first
    others = len(candidates) - own
    pick = (draws % np.maximum(others, 1).astype(np.uint64)).astype(np.int64)
    pick = np.where(pick < first, pick, pick + own)
    if not len(candidates):
        return np.full(len(lengths.text), -1)
    return np.where(others > 0, candidates[np.minimum(pick, len(candidates) - 1)], -1)


def _total(column: np.ndarray, segment: np.ndarray, joined: np.ndarray, following: np.ndarray) -> np.ndarray:
    """[N] the length of each segment plus, where joined, of the one that follows it, if one does."""
    after = following[segment]
    return column[segment] + np.where(joined & (after >= 0), column[after], 0)


def _digest(columns: list[np.ndarray] | Lengths) -> str:
    sha = hashlib.sha256()
    for column in columns:
        sha.update(np.ascontiguousarray(column, "<i8").tobytes())
    return sha.hexdigest()


def _short(identity: tuple[int, str, int]) -> str:
    return f"({identity[0]}, {identity[1][:12]}, {identity[2]})"
