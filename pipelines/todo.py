"""A listing minus the ledger: what a run has to do, and what it can write down before any work.

Tables in, tables out; nothing is written here. Only sources of equal size are opened, to find copies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from pipelines import ledger, sources
from pipelines.errors import REASONS
from pipelines.ledger import LEDGER_SCHEMA
from pipelines.rows import ROW_SCHEMA

Removed = Literal["keep", "drop"]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run has to do: ROW_SCHEMA rows for the graph, the largest first, and LEDGER_SCHEMA rows that are known
    before any work: each new source as pending, and verdicts over copies and over older versions."""

    rows: pa.Table
    ledger_rows: pa.Table


def plan(
    listing: sources.Listing,
    known: pa.Table,
    *,
    retry: Sequence[str],
    removed: Removed,
    max_attempts: int,
    say: Callable[[str], None],
) -> Plan:
    """What is left to do of a listing, given the ledger's rows (`known`)."""
    listed = source_table(listing.sources)
    outcomes = ledger.source_outcomes(known)
    new = listed.filter(pc.invert(isin(listed["source_id"], outcomes["source_id"])))
    found = [with_columns(new, attempt=pa.scalar(0, pa.int32()), status="pending")]
    left = ledger.remaining(listed, outcomes, retry=retry, max_attempts=max_attempts)
    leaving = _leaving(listing, left, known, outcomes, removed=removed, say=say)
    if leaving.num_rows:  # what leaves may have been the original of other sources: ask again
        found.append(leaving)
        known = pa.concat_tables([known, leaving])
        outcomes = ledger.source_outcomes(known)
        left = ledger.remaining(listed, outcomes, retry=retry, max_attempts=max_attempts)
    if left.num_exhausted:
        say(
            f"{left.num_exhausted} sources have failed {max_attempts} times and are left alone; "
            "raise max_attempts to try them again."
        )
    copies = _copies(listing, left.todo, ledger.unique_samples(known, outcomes=outcomes))
    found.append(copies)
    rows = left.todo.filter(pc.invert(isin(left.todo["source_id"], copies["source_id"])))
    # A long video that starts last is waited for alone.
    rows = rows.sort_by([("size_bytes", "descending"), ("uri", "ascending")])
    return Plan(
        rows=as_schema(rows, ROW_SCHEMA),
        ledger_rows=pa.concat_tables([as_schema(table, LEDGER_SCHEMA) for table in found]),
    )


def _leaving(
    listing: sources.Listing,
    left: ledger.Remaining,
    known: pa.Table,
    outcomes: pa.Table,
    *,
    removed: Removed,
    say: Callable[[str], None],
) -> pa.Table:
    """Ledger rows for known sources whose file was changed or is gone."""
    gone = left.unlisted.filter(pa.array([listing.covers(uri) for uri in left.unlisted["uri"].to_pylist()], pa.bool_()))
    if gone.num_rows and removed == "keep":
        say(f"{gone.num_rows} sources are gone from their place and stay in the dataset (--removed drop drops them).")
        gone = gone.slice(0, 0)
    tables = [_verdicts(left.superseded, "superseded"), _verdicts(gone, "removed")]
    if left.superseded.num_rows:
        tables += _taken_over(listing, left, ledger.judged_parts(known, outcomes=outcomes))
    return pa.concat_tables([as_schema(table, LEDGER_SCHEMA) for table in tables])


def _taken_over(listing: sources.Listing, left: ledger.Remaining, parts: pa.Table) -> list[pa.Table]:
    """Parts of older versions, as those of the new version of a file whose content is the same: it was touched, or
    copied back."""
    older = parts.filter(isin(parts["source_id"], left.superseded["source_id"]))
    todo = left.todo.filter(isin(left.todo["uri"], older["uri"]))
    attempts = dict(zip(todo["source_id"].to_pylist(), todo["attempt"].to_pylist(), strict=True))
    tables = []
    for source in (source for source in listing.sources if source.source_id in attempts):
        _, original = sources.duplicates([source], older).get(source.source_id, ("", ""))
        if original == source.uri:
            attempt = pa.scalar(attempts[source.source_id], pa.int32())
            own = older.filter(pc.equal(older["uri"], source.uri))
            tables.append(with_columns(own, source_id=source.source_id, version=source.version, attempt=attempt))
    return tables


def _copies(listing: sources.Listing, todo: pa.Table, samples: pa.Table) -> pa.Table:
    """Ledger rows for the sources whose bytes are those of a kept one, or of one before them in this run."""
    wanted = set(todo["source_id"].to_pylist())
    found = sources.duplicates([source for source in listing.sources if source.source_id in wanted], samples)
    verdicts = []
    for row in todo.filter(pc.is_in(todo["source_id"], pa.array(list(found), pa.string()))).to_pylist():
        video_id, original = found[row["source_id"]]
        verdict = {"status": "filtered", "stage": "discover", "reason": "duplicate", "video_id": video_id}
        verdicts.append(row | verdict | {"detail": f"the same bytes as {original}"})
    return pa.Table.from_pylist(verdicts, schema=LEDGER_SCHEMA)


def source_table(listed: Sequence[sources.Source]) -> pa.Table:
    """Sources as rows of ROW_SCHEMA's first columns."""
    names = ("source_id", "uri", "version", "size_bytes", "title", "captions_uri", "language", "metadata")
    return pa.table({name: pa.array([getattr(s, name) for s in listed], ROW_SCHEMA.field(name).type) for name in names})


def _verdicts(outcomes: pa.Table, reason: str) -> pa.Table:
    """Ledger rows that filter known sources, as an attempt of their own: it outranks what they were."""
    attempt = pc.add(outcomes["attempt"], pa.scalar(1, pa.int32()))
    known = outcomes.select([name for name in LEDGER_SCHEMA.names if name in {"source_id", "uri", "video_id"}])
    return with_columns(known, attempt=attempt, status=REASONS[reason].status, stage="discover", reason=reason)


def with_columns(table: pa.Table, **columns: object) -> pa.Table:
    """The table with some columns set, each to one value or to an array."""
    for name, value in columns.items():
        array = value if isinstance(value, pa.Array | pa.ChunkedArray) else pa.repeat(value, table.num_rows)
        at = table.schema.get_field_index(name)
        table = table.append_column(name, array) if at < 0 else table.set_column(at, name, array)
    return table


def as_schema(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table's columns that a schema names, and nulls for those that the table lacks."""
    columns = [
        table[field.name].cast(field.type) if field.name in table.schema.names else pa.nulls(table.num_rows, field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)


def isin(column: pa.ChunkedArray, values: pa.ChunkedArray) -> pa.ChunkedArray:
    """[num_rows] bool: whether each entry is among the values of another column."""
    return pc.is_in(column, values.combine_chunks())
