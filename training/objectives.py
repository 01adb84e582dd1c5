"""The three objectives and their weighted sum (paper section 3.2; its weights are not stated, ours are 1 : 1 : 1).

A loss is a sum here; dividing by the targets of the whole step, which the plan knows, makes gradients of any number
of ranks add up to the same. In nats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from training.model import VideoBERT
from training.packing import Pack
from training.plan import Denominators


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Weights of the sum."""

    text_weight: float = 1.0
    """Of masked words."""
    visual_weight: float = 1.0
    """Of masked visual tokens."""
    alignment_weight: float = 1.0
    """Of linguistic-visual alignment."""
    mask_misaligned: bool = False
    """Whether masked tokens count in pairs that do not belong together; their masks are there either way."""

    def __post_init__(self) -> None:
        if min(self.text_weight, self.visual_weight, self.alignment_weight) < 0:
            raise ValueError("objectives: a weight must not be negative; 0 switches an objective off.")


class Sums(NamedTuple):
    """Sums over the targets of a pack; tensors of one value."""

    text: Tensor
    visual: Tensor
    alignment: Tensor
    aligned_right: Tensor  # how many alignment targets the model got right

    def stacked(self) -> Tensor:
        """[4], detached."""
        return torch.stack([part.detach() for part in self])


def loss_sums(model: VideoBERT, pack: Pack) -> Sums:
    """Each objective over a pack; 0 where a pack has no target of a kind."""
    predictions = model(pack)
    aligned_A = pack.aligned_A
    return Sums(
        text=F.cross_entropy(predictions.text_KW.float(), pack.text_target_K, reduction="sum"),
        visual=F.cross_entropy(predictions.visual_MV.float(), pack.visual_target_M, reduction="sum"),
        alignment=F.binary_cross_entropy_with_logits(predictions.alignment_A.float(), aligned_A, reduction="sum"),
        aligned_right=((predictions.alignment_A > 0) == (aligned_A > 0.5)).float().sum(),
    )


def total_loss(sums: Sums, denominators: Denominators, config: ObjectiveConfig) -> Tensor:
    """This pack's share of the loss of its step."""
    return (
        config.text_weight * sums.text / max(1, denominators.text)
        + config.visual_weight * sums.visual / max(1, denominators.visual)
        + config.alignment_weight * sums.alignment / max(1, denominators.alignment)
    )


def mean_losses(stacked: Tensor, denominators: Denominators, config: ObjectiveConfig) -> dict[str, float]:
    """Losses by name, for people; an objective without a target in the step is left out."""
    text, visual, alignment, right = stacked.tolist()
    losses: dict[str, float] = {}
    if denominators.text:
        losses["masked_text_nats"] = text / denominators.text
    if denominators.visual:
        losses["masked_visual_nats"] = visual / denominators.visual
    if denominators.alignment:
        losses["alignment_nats"] = alignment / denominators.alignment
        losses["alignment_accuracy"] = right / denominators.alignment
    losses["total_loss"] = (
        config.text_weight * losses.get("masked_text_nats", 0.0)
        + config.visual_weight * losses.get("masked_visual_nats", 0.0)
        + config.alignment_weight * losses.get("alignment_nats", 0.0)
    )
    return losses
