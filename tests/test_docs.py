"""Pages that repeat what the code decides say the same."""

from __future__ import annotations

from pathlib import Path

from pipelines.errors import REASONS

DOCS = Path(__file__).resolve().parents[1] / "docs"


def test_operations_explains_every_reason_as_the_code_does() -> None:
    page = (DOCS / "operations.md").read_text()
    listed = [line.split(" | ")[0].removeprefix("| ") for line in page.splitlines() if " | filtered | " in line]
    listed += [line.split(" | ")[0].removeprefix("| ") for line in page.splitlines() if " | quarantined | " in line]
    assert sorted(listed) == sorted(REASONS)
    for name, reason in REASONS.items():
        assert f"| {name} | {reason.status} | {reason.meaning} |" in page
