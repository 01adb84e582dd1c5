"""The training loop, on one screen. It knows neither Ray nor MLflow; what a step leads to is its caller's business.

A step runs this rank's packs, adds all gradients and loss sums in one all-reduce, and updates. There is no DDP
wrapper: with losses divided by the step's own denominators the sum over ranks is the gradient of one rank (to the
last bits), a rank without a pack contributes zeros, and exactly one collective per step cannot hang. The price is
that communication does not overlap with the last backward pass.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from training.counter import Stream, words
from training.model import VideoBERT
from training.objectives import ObjectiveConfig, loss_sums, mean_losses, total_loss
from training.optimizer import OptimConfig, gradient_norm, learning_rate, scale_gradients
from training.plan import Cursor, Denominators, EpochPlan, Planner, StepPacks
from training.reader import PackReader


class StepReport(NamedTuple):
    """What a step did; equal on all ranks but for the seconds."""

    cursor: Cursor
    metrics: dict[str, float]
    num_tokens: int  # of all ranks
    step_s: float


@dataclass(frozen=True, kw_only=True)
class Rank:
    """Which worker this is."""

    rank: int = 0
    world_size: int = 1


def train(
    model: VideoBERT,
    optimizer: torch.optim.Optimizer,
    *,
    planner: Planner,
    reader: PackReader,
    optim: OptimConfig,
    objectives: ObjectiveConfig,
    cursor: Cursor,
    rank: Rank,
) -> Iterator[StepReport]:
    """Train from a cursor to `optim.steps`, one report a step. The caller decides what a report leads to."""
    model.train()
    for step in planner.steps(cursor, packs_per_step=optim.packs_per_step):
        if step.after.step > optim.steps:
            return
        started_s = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step.after.step, optim)
        sums = accumulate(model, reader, step, objectives=objectives, rank=rank)
        norm = gradient_norm(model)
        losses = mean_losses(sums, step.denominators, objectives)
        check_finite(losses, norm, step=step.after.step)
        scale_gradients(model, norm, limit=optim.clip_norm)
        optimizer.step()
        yield StepReport(
            cursor=step.after,
            metrics={**losses, "learning_rate": learning_rate(step.after.step, optim), "gradient_norm": norm},
            num_tokens=sum(int(plan.examples.lengths[plan.pack(index)].sum()) for plan, index in step.packs),
            step_s=time.perf_counter() - started_s,
        )


def accumulate(
    model: VideoBERT, reader: PackReader, step: StepPacks, *, objectives: ObjectiveConfig, rank: Rank
) -> Tensor:
    """Leave the gradient of the whole step in the parameters of every rank; [4] loss sums of the whole step."""
    model.zero_grad(set_to_none=True)
    denominators, sums = step.denominators, torch.zeros(4, dtype=torch.float64)
    for plan, index in step.of_rank(rank.rank, world_size=rank.world_size):
        # Dropout as a function of the pack: neither restarts nor the number of ranks change it.
        torch.manual_seed(int(words(1, seed=reader.seed, epoch=plan.epoch, stream=Stream.DROPOUT, item=index)[0]))
        pack_sums = loss_sums(model, reader.pack(plan, index))
        total_loss(pack_sums, denominators, objectives).backward()  # type: ignore[no-untyped-call]
        sums += pack_sums.stacked().double()
    return sums if rank.world_size == 1 else all_reduce(model, sums)


def all_reduce(model: VideoBERT, sums: Tensor) -> Tensor:
    """Add gradients and sums of all ranks in one collective; returns the sums."""
    trained = [p for p in model.parameters() if p.requires_grad]
    parts = [(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in trained]
    flat = torch.cat([*parts, sums.to(parts[0].dtype)])
    dist.all_reduce(flat)
    for parameter, gradient in zip(
        trained, flat[: -len(sums)].split_with_sizes([p.numel() for p in trained]), strict=True
    ):
        parameter.grad = gradient.view_as(parameter)
    return flat[-len(sums) :].double()


@torch.no_grad()
def evaluate(
    model: VideoBERT, reader: PackReader, plan: EpochPlan, *, objectives: ObjectiveConfig, rank: Rank
) -> dict[str, float]:
    """Mean losses over a whole plan, each pack once; the same number on every rank."""
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64)
    for index in range(rank.rank, plan.num_packs, rank.world_size):
        sums += loss_sums(model, reader.pack(plan, index)).stacked().double()
    if rank.world_size > 1:
        dist.all_reduce(sums)
    model.train()
    totals = zip(*(plan.denominators(index) for index in range(plan.num_packs)), strict=True)
    return mean_losses(sums, Denominators(*map(sum, totals)), objectives)


def check_finite(losses: dict[str, float], norm: float, *, step: int) -> None:
    """Raises ValueError that names what is no longer a number."""
    bad = [name for name, value in {**losses, "gradient_norm": norm}.items() if not math.isfinite(value)]
    if bad:
        names = " and ".join(bad)
        raise ValueError(f"{names} not finite at step {step}; lower optim.learning_rate or optim.clip_norm.")
