"""AdamW with the schedule of the paper: a peak and a linear way down to 0 (section 4.2: Adam, 1e-5, no warm-up)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from training.model import VideoBERT


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How long and how fast."""

    steps: int = 100_000
    """Optimizer steps of the whole run."""
    packs_per_step: int = 4
    """Packs of a step over all workers; does not depend on their number."""
    learning_rate: float = 1e-4
    """At its peak."""
    warmup_steps: int = 0
    """Linear warm-up, then linear decay to 0 (paper section 4.2: no warm-up)."""
    weight_decay: float = 0.01
    """Of matrices; not of embeddings, biases and norms."""
    beta2: float = 0.999
    """Adam's second."""
    clip_norm: float = 1.0
    """Largest norm of the gradient; 0 for no limit."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.packs_per_step < 1:
            raise ValueError("optim.steps and optim.packs_per_step must be at least 1.")
        if not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(f"optim.warmup_steps {self.warmup_steps} must lie between 0 and optim.steps {self.steps}.")


def learning_rate(step: int, optim: OptimConfig) -> float:
    """Linear warm-up to the peak, then linear decay that would reach 0 one step after the last; steps count from 1."""
    if step <= optim.warmup_steps:
        return optim.learning_rate * step / optim.warmup_steps
    return optim.learning_rate * (optim.steps + 1 - step) / (optim.steps + 1 - optim.warmup_steps)


def build_optimizer(model: VideoBERT, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW; matrices decay, embeddings, biases and norms do not."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decays = [p for name, p in named if p.dim() > 1 and not name.startswith("embeddings.")]
    stays = [p for name, p in named if p.dim() <= 1 or name.startswith("embeddings.")]
    groups = [{"params": decays, "weight_decay": optim.weight_decay}, {"params": stays, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=optim.learning_rate, betas=(0.9, optim.beta2), eps=1e-6)


def gradient_norm(model: VideoBERT) -> float:
    return float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))


def scale_gradients(model: VideoBERT, norm: float, *, limit: float) -> None:
    """Shorten a gradient that is longer than the limit."""
    if limit and norm > limit:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(limit / norm)
