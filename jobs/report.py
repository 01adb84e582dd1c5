"""`videobert report`: what became of every source of a dataset, as text, JSON or a page with pictures.

Exit code 1 when the books do not balance, so that a schedule notices. Text and JSON read the ledger and the names and
sizes of the shards; the page also reads samples and previews.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

from jobs.command import door, parse


@dataclass(frozen=True, kw_only=True)
class ReportJob:
    """What to report on, and how."""

    dataset: str
    """The dataset folder or URL."""
    json: bool = False
    """Print one JSON object instead of text."""
    html: str | None = None
    """Also write a self-contained page with pictures to this file."""
    failures: int = 20
    """How many quarantined sources, and how many with missing seconds, the text lists."""


@door
def main(argv: list[str]) -> int:
    config = parse(
        ReportJob,
        argv,
        prog="videobert report",
        description="The ledger of a dataset: sources = kept + filtered + quarantined + pending, in time too.",
    )
    from pipelines.report import render_text, report_of

    report = report_of(config.dataset)
    if config.json:
        print(json.dumps(report.to_dict(), indent=1, ensure_ascii=False))
    else:
        print(render_text(report, num_failures=config.failures))
    if config.html is not None:
        from pipelines.page import render_page

        page = render_page(config.dataset, config.html)
        print(f"page: {page}", file=sys.stderr if config.json else sys.stdout)
    return 0 if report.balanced else 1


if __name__ == "__main__":
    sys.exit(main())
