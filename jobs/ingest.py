"""`videobert ingest SOURCE... --dataset DIR`: bring a dataset up to date with some videos."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import ClassVar

from jobs.command import UsageError, door, parse
from pipelines.errors import REASONS
from pipelines.stages import IngestConfig


@dataclass(frozen=True, kw_only=True)
class IngestJob(IngestConfig):
    """What `videobert ingest` takes."""

    POSITIONAL: ClassVar[tuple[str, ...]] = ("sources",)

    sources: tuple[str, ...]
    """Folders, globs, media files, .csv/.jsonl/.parquet lists; local or s3:// gs://."""
    dataset: str
    """Dataset folder or URL; made if it is not there."""
    retry: tuple[str, ...] = ()
    """Quarantine reasons to try again."""
    dry_run: bool = False
    """List the sources that would be handled, and stop."""


@door
def main(argv: list[str]) -> int:
    job = parse(IngestJob, argv, prog="videobert ingest", description=__doc__ or "")
    for reason in job.retry:
        if reason not in REASONS:
            raise UsageError(f"no reason is called {reason!r}: retry takes some of {', '.join(REASONS)}.")
    from jobs.cluster import connected
    from pipelines.ingest import ingest
    from pipelines.report import render_text, report_of

    ingest(
        job.sources,
        dataset=job.dataset,
        config=job,
        retry=job.retry,
        dry_run=job.dry_run,
        connect=connected,
        say=lambda line: print(line, flush=True),
    )
    if job.dry_run:
        return 0
    found = report_of(job.dataset)
    print(render_text(found))
    return 0 if found.balanced and not found.to_dict()["sources"]["pending"] else 1


if __name__ == "__main__":
    sys.exit(main())
