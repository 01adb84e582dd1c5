"""`videobert promote`: point an alias of the registry at a version of a model."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from jobs.command import UsageError, door, parse


@dataclass(frozen=True, kw_only=True)
class PromoteJob:
    """Which version gets which alias."""

    model: str = "videobert"
    """The registered model."""
    version: int
    """The version to promote."""
    alias: str = "champion"
    """The alias it gets; whoever had it loses it."""
    dataset: str | None = None
    """The dataset whose sqlite registry is meant, where MLFLOW_TRACKING_URI is not set."""


@door
def main(argv: list[str]) -> int:
    job = parse(PromoteJob, argv, prog="videobert promote", description="Point an alias at a version of a model.")
    from training import registry

    before = registry.promote(name=job.model, version=str(job.version), alias=job.alias, uri=registry_uri(job.dataset))
    had = f", was version {before}" if before else ""
    print(f"models:/{job.model}@{job.alias} is version {job.version}{had}")
    return 0


def registry_uri(dataset: str | None) -> str:
    """MLFLOW_TRACKING_URI or the sqlite registry of a dataset. Raises UsageError where neither is given."""
    from training.tracking import tracking_uri

    if dataset is None and "MLFLOW_TRACKING_URI" not in os.environ:
        raise UsageError("set MLFLOW_TRACKING_URI or give --dataset DIR: its registry holds the model.")
    return tracking_uri(dataset or "")


if __name__ == "__main__":
    sys.exit(main())
