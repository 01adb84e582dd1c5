"""`videobert evaluate`: a model against the known truth of a dataset's videos."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jobs.command import UsageError, door, parse


@dataclass(frozen=True, kw_only=True)
class EvaluateJob:
    """What to evaluate, on what."""

    task: Literal["zero-shot"] = "zero-shot"
    """zero-shot: verb and object of each step by the paper's masked template."""
    model: str = "models:/videobert@candidate"
    """A registered model or a folder with model.safetensors, config.json and vocab.txt."""
    dataset: str
    """The dataset folder or URL; truth files lie beside its source videos."""
    split: Literal["held_out", "train", "all"] = "held_out"
    """Which videos, by the share that the model's training held out."""
    verbs: str | None = None
    """File with a verb a line, instead of those of the truth files."""
    nouns: str | None = None
    """File with an object a line, instead of those of the truth files."""
    json: bool = False
    """Print one JSON object instead of a table."""


@door
def main(argv: list[str]) -> int:
    job = parse(
        EvaluateJob,
        argv,
        prog="videobert evaluate",
        description="Scores of a model on a task, beside its baselines and with all denominators.",
    )
    from pipelines.dataset import Dataset
    from training import registry
    from training.tasks import zero_shot
    from training.tracking import tracking_uri

    dataset = Dataset(job.dataset)
    result = zero_shot.evaluate(
        registry.load(job.model, uri=tracking_uri(job.dataset)),
        dataset,
        model_name=job.model,
        split=job.split,
        verbs=read_labels(job.verbs),
        objects=read_labels(job.nouns),
    )
    print(result.to_json() if job.json else result.table())
    return 0


def read_labels(path: str | None) -> list[str]:
    """The lines of a file without the empty ones; nothing where no file is given."""
    if path is None:
        return []
    labels = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not labels:
        raise UsageError(f"{path} holds no label; put one on each line.")
    return list(dict.fromkeys(labels))


if __name__ == "__main__":
    sys.exit(main())
