"""`videobert ingest SOURCE... --dataset DIR`: bring a dataset up to date with some videos."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import ClassVar

from jobs.command import UsageError, door, parse
from pipelines.errors import REASONS
from pipelines.stages import IngestConfig
from pipelines.todo import Removed


@dataclass(frozen=True, kw_only=True)
class IngestJob(IngestConfig):
    """What `videobert ingest` takes."""

    POSITIONAL: ClassVar[tuple[str, ...]] = ("sources",)

    sources: tuple[str, ...]
    """Folders, globs, media files, WebDataset .tar files, .csv/.jsonl/.parquet lists, other datasets; local, s3:// or
    gs://; lists may name http(s):// too."""
    dataset: str
    """Dataset folder or URL; made if it is not there."""
    retry: tuple[str, ...] = ()
    """Reasons for which a source failed or was filtered, to try those again."""
    removed: Removed = "keep"
    """What to do with sources that are gone from the places given: keep their samples, or drop them."""
    dry_run: bool = False
    """Take a sample through all stages, print what the whole would cost, write nothing."""
    json: bool = False
    """Print the bill or the final report as one JSON object, and progress on standard error."""


@door
def main(argv: list[str]) -> int:
    job = parse(IngestJob, argv, prog="videobert ingest", description=__doc__ or "")
    for reason in job.retry:
        if reason not in REASONS:
            raise UsageError(f"no reason is called {reason!r}: retry takes some of {', '.join(REASONS)}.")
    from jobs.cluster import connected
    from jobs.ingest_tracking import record_ingest
    from pipelines.ingest import code_version, dry_run, ingest
    from pipelines.report import render_text, report_of

    def say(line: str) -> None:
        print(line, flush=True, file=sys.stderr if job.json else sys.stdout)

    if job.dry_run:
        bill = dry_run(job.sources, dataset=job.dataset, config=job, retry=job.retry, say=say)
        if job.json:
            print(json.dumps(bill.to_dict() if bill else {}, indent=1))
        elif bill:
            print(bill.text())
        return 0
    result = ingest(
        job.sources,
        dataset=job.dataset,
        config=job,
        retry=job.retry,
        removed=job.removed,
        connect=connected,
        say=say,
    )
    found = report_of(job.dataset)
    if result.stage_times is not None:
        say("\n" + "\n".join(result.stage_times.lines()) + "\n")
        record_ingest(
            job.dataset,
            places=job.sources,
            config=job,
            run_id=result.run_id,
            code_version=code_version(),
            numbers={"num_sources": result.num_sources, "num_new": result.num_new, **result.phases_s},
            report=found,
            stage_times=result.stage_times,
            say=say,
        )
    print(json.dumps(found.to_dict(), indent=1, ensure_ascii=False) if job.json else render_text(found))
    return 0 if found.balanced and not found.to_dict()["sources"]["pending"] else 1


if __name__ == "__main__":
    sys.exit(main())
