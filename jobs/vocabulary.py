"""`videobert vocabulary show --dataset DIR`: the shape of a dataset's visual vocabulary and how the corpus uses it."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from typing import ClassVar, Literal

from jobs.command import door, parse


@dataclass(frozen=True, kw_only=True)
class VocabularyJob:
    """What to do with the vocabulary of which dataset."""

    POSITIONAL: ClassVar[tuple[str, ...]] = ("action",)

    action: Literal["show"]
    """show: shape, use and origin. (The first `videobert ingest` of a dataset fits it.)"""
    dataset: str
    """Dataset folder or URL."""
    json: bool = False
    """Print one JSON object instead of text."""


@door
def main(argv: list[str]) -> int:
    job = parse(VocabularyJob, argv, prog="videobert vocabulary", description="The visual vocabulary of a dataset.")
    from pipelines import vocabulary
    from pipelines.dataset import Dataset

    dataset = Dataset(job.dataset)
    tree = vocabulary.load(dataset.info.vocabulary, dataset.folder)
    tokens = [sample.visual_tokens for sample in dataset.samples() if sample.vocabulary == tree.id]
    figures = asdict(vocabulary.usage(tokens, num_tokens=tree.num_tokens))
    about = {"id": tree.id, "k": tree.k, "depth": tree.depth, "dim": tree.dim, "extractor": tree.extractor}
    about |= {"fitted_leaves": tree.used_leaves(), **figures}
    if job.json:
        print(json.dumps(about))
    else:
        print(
            "\n".join(
                f"{name:<15}{value:.3f}" if isinstance(value, float) else f"{name:<15}{value}"
                for name, value in about.items()
            )
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
