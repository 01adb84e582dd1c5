"""`videobert pretrain`: shards to a trained model, registered as `videobert` with the alias `candidate`.

A recipe gives every default, `field=value` overrides any. The same command goes on from its last checkpoint; when the
run is done it says so and does nothing.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import typing
from dataclasses import dataclass
from typing import Any

from jobs.command import UsageError, door, parse
from training import recipes
from training.recipes import PretrainConfig


@dataclass(frozen=True, kw_only=True)
class PretrainJob(PretrainConfig):
    """What to train on, and how."""

    dataset: str
    """The dataset folder or URL."""
    storage: str | None = None
    """Folder of runs that all workers can reach; `runs` in the dataset if not given."""
    name: str | None = None
    """Name of the run; recipe and a digest of settings and dataset if not given."""
    json: bool = False
    """Print the result as one JSON object on the last line."""


@door
def main(argv: list[str]) -> int:
    job = parse_job(argv)
    config = PretrainConfig(**{f.name: getattr(job, f.name) for f in dataclasses.fields(PretrainConfig)})
    from jobs.cluster import connected
    from training.ray_worker import pretrain

    result = pretrain(config, job.dataset, storage=job.storage, name=job.name, connect=connected)
    print(result.summary())
    if job.json:
        print(json.dumps({**dataclasses.asdict(result), "model_uri": result.model_uri}))
    return 0


def parse_job(argv: list[str]) -> PretrainJob:
    """The job with the defaults of its recipe, wherever the recipe is named, on the command line or in a file."""
    name = PretrainJob.recipe
    while True:
        if name not in recipes.RECIPES:
            raise UsageError(f"there is no recipe {name!r}; choose one of {', '.join(recipes.RECIPES)}.")
        job = parse(
            with_defaults(recipes.recipe(name)),
            argv,
            prog="videobert pretrain",
            description="Pretrain on a dataset: masked words, masked visual tokens, alignment. Resumes by itself.",
        )
        if job.recipe == name:
            return job
        name = job.recipe


def with_defaults(config: PretrainConfig) -> type[PretrainJob]:
    """The job's class with a config's values as defaults, so that help shows those of the recipe."""

    def default(value: Any) -> Any:
        return dataclasses.field(default_factory=lambda: value)

    hints = typing.get_type_hints(PretrainConfig)
    return dataclasses.make_dataclass(
        "PretrainJob",
        [(name, hint, default(getattr(config, name))) for name, hint in hints.items()],
        bases=(PretrainJob,),
        frozen=True,
        kw_only=True,
    )


if __name__ == "__main__":
    sys.exit(main())
