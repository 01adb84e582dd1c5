"""Which tokens of an example are hidden, and by what (BERT's 15 % and 80/10/10; the paper does not state its own).

The number of targets is a function of length alone, max(1, round(rate * length)), so the plan knows the denominator
of every step without communication. Which ones, is a function of (seed, epoch, example), so neither rank nor restart
changes them. Special tokens are no candidates, and a random replacement comes from the vocabulary of the token's own
modality.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from training.counter import Stream, uniforms
from training.packing import NO_TARGETS, Targets


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """How much is hidden. The rest of the targets, 1 - mask_share - random_share, stays as it is."""

    text_rate: float = 0.15
    """Share of the wordpieces of an example that are targets."""
    visual_rate: float = 0.15
    """Share of the visual tokens of an example that are targets."""
    mask_share: float = 0.8
    """Share of the targets that become [MASK]."""
    random_share: float = 0.1
    """Share of the targets that become another token of the same modality."""

    def __post_init__(self) -> None:
        if not (0 < self.text_rate <= 1 and 0 < self.visual_rate <= 1):
            raise ValueError(f"mask rates {self.text_rate} and {self.visual_rate} must lie in (0, 1]; BERT's is 0.15.")
        if self.mask_share < 0 or self.random_share < 0 or self.mask_share + self.random_share > 1:
            raise ValueError("masking.mask_share and masking.random_share must be shares of 1; BERT's are 0.8 and 0.1.")


def num_targets(length: np.ndarray, *, rate: float) -> np.ndarray:
    """Targets among so many tokens: at least one where there is a token, none where there is none."""
    return np.where(length > 0, np.maximum(1, np.rint(rate * length)), 0).astype(np.int64)


def mask(
    tokens: np.ndarray,
    *,
    rate: float,
    config: MaskConfig,
    mask_id: int,
    replacements: np.ndarray,
    seed: int,
    epoch: int,
    stream: Stream,
    example: int,
) -> tuple[np.ndarray, Targets]:
    """The tokens with their targets hidden, and the targets.

    Args:
        tokens: [length] ids of one modality, without special tokens.
        replacements: the ids that a random replacement is drawn from.
    """
    length = len(tokens)
    if length == 0:
        return tokens, NO_TARGETS
    draw_3n = uniforms(3 * length, seed=seed, epoch=epoch, stream=stream, item=example).reshape(length, 3)
    count = int(num_targets(np.array(length), rate=rate))
    positions = np.sort(np.argsort(draw_3n[:, 0], kind="stable")[:count])
    fate, pick = draw_3n[positions, 1], draw_3n[positions, 2]
    original = tokens[positions]
    random_ids = replacements[(pick * len(replacements)).astype(np.int64)] if len(replacements) else original
    hidden = tokens.copy()
    shown = np.where(fate < config.mask_share + config.random_share, random_ids, original)
    hidden[positions] = np.where(fate < config.mask_share, mask_id, shown)
    return hidden, Targets(positions.astype(np.int64), original.astype(np.int64))
