"""Complete pretraining configurations by name. Every field can be overridden on the command line.

| recipe | for | size |
|---|---|---|
| tiny | a laptop: a corpus of minutes to hours, two cores, a minute or two | 2 layers, 128 wide, 0.4 M + embeddings |
| base | one GPU or a patient machine | BERT-base, 86 M + embeddings |
| large-faithful | the paper | BERT-large, 302 M + embeddings |
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from training.masking import MaskConfig
from training.model import ModelConfig
from training.objectives import ObjectiveConfig
from training.optimizer import OptimConfig
from training.packing import sequence_length
from training.plan import PlanConfig

# What may change between a start and its resumption; everything else makes another run.
OPERATIONAL_FIELDS = ("workers", "checkpoint_every_steps", "keep_checkpoints", "eval_every_steps", "log_every_steps")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Everything a pretraining run depends on but the dataset."""

    recipe: str = "tiny"
    """Where the other defaults come from: tiny, base or large-faithful."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    plan: PlanConfig = dataclasses.field(default_factory=PlanConfig)
    masking: MaskConfig = dataclasses.field(default_factory=MaskConfig)
    objectives: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    seed: int = 0
    """Of weights, order, masks and dropout."""
    held_out_fraction: float = 0.1
    """Share of the videos that are kept from training, by a hash of their id."""
    max_words: int = 30_000
    """Size of the text vocabulary where it is made from the corpus."""
    bert: str = ""
    """Local folder of a Hugging Face BERT to start from; decides shape and text vocabulary."""
    workers: int = 2
    """Training processes; any number gives the same run."""
    checkpoint_every_steps: int = 1000
    """Steps between checkpoints: what a crash can cost."""
    keep_checkpoints: int = 2
    """Checkpoints kept."""
    eval_every_steps: int = 1000
    """Steps between evaluations of the losses on held-out videos."""
    log_every_steps: int = 10
    """Steps between points of the loss curves."""

    def __post_init__(self) -> None:
        longest = sequence_length(self.plan.max_text, self.plan.max_visual)
        if longest > self.model.max_positions and not self.bert:
            raise ValueError(
                f"the longest example has {longest} tokens and model.max_positions is {self.model.max_positions}; "
                "lower plan.max_text or plan.max_visual, or raise model.max_positions."
            )
        if not 0 <= self.held_out_fraction < 1:
            raise ValueError(f"held_out_fraction {self.held_out_fraction} must lie in [0, 1); 0.1 is the default.")
        for name in OPERATIONAL_FIELDS:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1.")

    def flat(self) -> dict[str, Any]:
        """Every value by its dotted name."""
        return dict(_flatten(dataclasses.asdict(self)))

    def identity(self) -> dict[str, Any]:
        """What makes this run this run."""
        return {name: value for name, value in self.flat().items() if name not in OPERATIONAL_FIELDS}


def tiny() -> PretrainConfig:
    """Learns a corpus of some hundred sentences on two cores.

    It departs from the paper where so little data asks for it: more of an example is masked than in BERT (of eight
    words and two visual tokens, 15 % would be one of each); sentences are not joined with neighbours; one pair in five
    is misaligned and not one in two, so that more words are predicted from their own pictures, at the price that
    "aligned" is right four times in five without looking; many small steps without dropout; and initial weights wider
    than BERT's 0.02, which suits a width of 768. Chosen on the held-out videos of the kitchen of seed 0.
    """
    return PretrainConfig(
        recipe="tiny",
        model=ModelConfig(
            num_layers=2,
            hidden=128,
            num_heads=4,
            intermediate=512,
            max_positions=128,
            dropout=0.0,
            layer_norm_eps=1e-6,
            init_std=0.06,
        ),
        plan=PlanConfig(
            token_budget=256,
            max_text=64,
            max_visual=32,
            joint_share=6.0,
            negative_probability=0.2,
            neighbour_probability=0.0,
        ),
        masking=MaskConfig(text_rate=0.3, visual_rate=0.4),
        optim=OptimConfig(steps=1500, packs_per_step=2, learning_rate=1e-3, warmup_steps=40, beta2=0.98),
        held_out_fraction=0.2,
        max_words=8192,
        checkpoint_every_steps=250,
        eval_every_steps=250,
        log_every_steps=10,
    )


def base() -> PretrainConfig:
    """BERT-base's shape with a batch of about 32k tokens."""
    return PretrainConfig(
        recipe="base",
        plan=PlanConfig(token_budget=4096, max_text=128, max_visual=128),
        optim=OptimConfig(steps=100_000, packs_per_step=8, learning_rate=1e-4, warmup_steps=2_000),
    )


def large_faithful() -> PretrainConfig:
    """The paper: BERT-large, Adam at 1e-5 with linear decay, 0.5 M steps, input embeddings frozen, masks 15 % 80/10/10.

    The paper's batch is 128 sequences; at its unstated length, about 64 tokens, that is two packs of 4,096. Give
    `bert=FOLDER` of a BERT-large, as the paper starts from one.
    """
    return PretrainConfig(
        recipe="large-faithful",
        model=ModelConfig(num_layers=24, hidden=1024, num_heads=16, intermediate=4096, freeze_input_embeddings=True),
        plan=PlanConfig(token_budget=4096, max_text=128, max_visual=128, joint_share=1.0),
        optim=OptimConfig(
            steps=500_000, packs_per_step=2, learning_rate=1e-5, warmup_steps=0, weight_decay=0.0, clip_norm=0.0
        ),
    )


RECIPES: dict[str, Callable[[], PretrainConfig]] = {"tiny": tiny, "base": base, "large-faithful": large_faithful}


def recipe(name: str) -> PretrainConfig:
    """Raises ValueError for a name that is none."""
    if name not in RECIPES:
        raise ValueError(f"there is no recipe {name!r}; choose one of {', '.join(RECIPES)}.")
    return RECIPES[name]()


def digest(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _flatten(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for name, value in values.items():
        flat += _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", value)]
    return flat
