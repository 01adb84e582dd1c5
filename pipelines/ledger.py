"""The ledger: what became of every source, and what is left to do of a listing.

Rows are only ever added. Everything here is a pure function of the *set* of rows: neither their order nor their number
of copies matters, because two writers may commit the same sample and a crash repeats whatever it interrupted. The work
is columns and integer codes, not rows: a million sources (two million rows) are read from 16,000 files, judged and
subtracted from a listing in 35 CPU seconds, or in 14 once the files are united (`benchmarks/ledger.py`). The price is
that all rows are in memory: 0.3 kB each, and a few times that while they are judged.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

if TYPE_CHECKING:  # pipelines.dataset opens a ledger, so it imports this module
    from pipelines.storage import Folder

# One row for a listing (attempt 0, pending), for a verdict over a whole source (filtered or quarantined, part_index
# null) or for what became of one part of it (kept, filtered, quarantined).
LEDGER_SCHEMA = pa.schema(
    [
        ("source_id", pa.string()),  # hash of (uri, version)
        ("uri", pa.string()),
        ("version", pa.string()),  # size and modification time, as listed
        ("size_bytes", pa.int64()),
        ("video_id", pa.string()),  # hash of the bytes; null while unknown
        ("attempt", pa.int32()),  # 0 for a listing, then 1, 2, ...
        ("status", pa.string()),
        ("stage", pa.string()),  # where a failure happened
        ("reason", pa.string()),  # one of pipelines.errors.REASONS
        ("detail", pa.string()),
        ("declared_s", pa.float64()),  # duration of the whole source by its container
        ("source_s", pa.float64()),  # the same as decoded
        ("num_parts", pa.int32()),  # null while unknown; a source's last part knows
        ("part_index", pa.int32()),  # null: the row speaks of the whole source
        ("key", pa.string()),
        ("shard", pa.string()),
        ("offset", pa.int64()),  # first byte of the sample's members in the shard
        ("num_bytes", pa.int64()),
        ("part_start_s", pa.float64()),
        ("part_end_s", pa.float64()),
        ("num_clips", pa.int32()),  # = visual tokens
        ("num_sentences", pa.int32()),
        ("num_words", pa.int32()),
        ("transcript", pa.string()),  # origin of the sentences: captions, whisper, sphinx, none
        ("vocabulary", pa.string()),
        ("run_id", pa.string()),
        ("code_version", pa.string()),
        ("fetch_s", pa.float64()),  # wall seconds spent on the source, repeated on each of its rows
        ("transcode_s", pa.float64()),  # wall seconds spent on this row, like the next two
        ("transcribe_s", pa.float64()),
        ("features_s", pa.float64()),
    ]
)

OUTCOMES = ("kept", "filtered", "quarantined", "pending")
GONE = ("superseded", "removed")  # reasons of sources that a place no longer lists

OUTCOME_SCHEMA = pa.schema(
    [
        ("source_id", pa.string()),
        ("uri", pa.string()),
        ("video_id", pa.string()),  # null while unknown
        ("outcome", pa.string()),  # one of OUTCOMES
        ("attempt", pa.int32()),  # the latest, 0 while only listed
        ("failures", pa.int32()),  # attempts that ended in quarantine
        ("stage", pa.string()),  # where it failed; null unless filtered or quarantined, like the reason
        ("reason", pa.string()),
        ("detail", pa.string()),  # of a kept source: what had to be given up
        ("declared_s", pa.float64()),
        ("decoded_s", pa.float64()),
        ("source_s", pa.float64()),  # the longest of these and of its parts: what the books account for; or null
        ("kept_s", pa.float64()),  # these five add up to source_s (to 0 where it is null)
        ("filtered_s", pa.float64()),
        ("quarantined_s", pa.float64()),
        ("pending_s", pa.float64()),
        ("missing_s", pa.float64()),  # of a kept source, in none of its parts: declared and not decoded
    ]
)

LISTINGS = 20  # of a reader whose files are united under its hands, before it gives up


def read_ledger(folder: Folder) -> pa.Table:
    """The union of the ledger files of a dataset folder, in the order of their names; no rows where there are none.

    Copies of rows are left in. Raises ValueError for a file that is torn or not a ledger, OSError if storage fails.
    """
    tables = _read_files(folder)
    # One piece: grouping and sorting thousands of pieces takes three times as long.
    rows = pa.concat_tables([LEDGER_SCHEMA.empty_table(), *(tables[name] for name in sorted(tables))])
    return rows.combine_chunks()


def _read_files(folder: Folder) -> dict[str, pa.Table]:
    """Name -> rows (LEDGER_SCHEMA) of every ledger file.

    A file that vanishes meanwhile was united with others. What had been read of the old files stays, as a copy of what
    the union holds. A listing that overlaps with a compaction may show neither a file nor the union it went into, so
    the ledger is listed until a listing shows nothing new.
    """
    tables: dict[str, pa.Table] = {}
    # Small files cost a footer each, so threads pay up to the number of cores; in object storage it is the round trip.
    num_threads = max(2, pa.cpu_count()) if isinstance(folder.fs, pafs.LocalFileSystem) else 32
    with ThreadPoolExecutor(num_threads) as pool:
        for attempt in range(LISTINGS):
            wanted = [name for name in folder.names("ledger", suffix=".parquet") if name not in tables]
            if not wanted and attempt:
                return tables
            read = pool.map(lambda name: (name, _read_file(folder, name)), wanted)
            tables |= {name: table for name, table in read if table is not None}
    raise OSError(f"the ledger files of {folder.root} vanish while they are read: stop what deletes them, then repeat.")


def _read_file(folder: Folder, name: str) -> pa.Table | None:
    """One ledger file as LEDGER_SCHEMA; columns that it lacks are null. None if it is no longer there."""
    try:
        data = folder.read(name)
    except OSError:
        if folder.exists(name):
            raise
        return None
    try:
        table = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True).read(use_threads=False)
        if table.schema.equals(LEDGER_SCHEMA):
            return table
        if missing := {"source_id", "attempt", "status"} - set(table.column_names):
            raise pa.ArrowInvalid(f"it has no column {', '.join(sorted(missing))}")
        columns = [
            table[field.name].cast(field.type)
            if field.name in table.column_names
            else pa.nulls(table.num_rows, field.type)
            for field in LEDGER_SCHEMA
        ]
        return pa.table(columns, schema=LEDGER_SCHEMA)
    except (pa.ArrowException, OSError) as error:  # a damaged page is an OSError
        said = str(error).splitlines()[0].rstrip(".")
        raise ValueError(
            f"{folder.path(name)} is torn or is no ledger file ({said}): move it away, then ingest again."
        ) from error


def compact(folder: Folder) -> int:
    """Unite the ledger files into one, exact copies of rows dropped; returns how many files were united.

    The union is written first, under a name made of its content, and only what it holds is deleted after: a crash in
    between, or another writer at the same time, leaves copies. Two million rows in 16,000 files take 25 CPU seconds to
    read, in one file 5. Raises as `read_ledger`, and OSError if the union cannot be written: nothing is deleted then.
    """
    tables = _read_files(folder)
    if len(tables) < 2:
        return 0
    everything = pa.concat_tables(tables[name] for name in sorted(tables))
    rows = _distinct(everything)
    buffer = io.BytesIO()
    pq.write_table(rows, buffer, write_page_checksum=True)
    union = f"ledger/union-{hashlib.sha256(buffer.getbuffer()).hexdigest()[:20]}.parquet"
    folder.write(union, buffer.getvalue())
    for name in tables.keys() - {union}:
        folder.delete(name)  # nothing happens if another writer was faster
    return len(tables)


def _distinct(rows: pa.Table) -> pa.Table:
    """The rows sorted by all columns, each once."""
    rows = rows.sort_by([(name, "ascending") for name in rows.column_names]).combine_chunks()
    if rows.num_rows < 2:
        return rows
    differs = np.zeros(rows.num_rows - 1, bool)
    for column in (rows[name].combine_chunks() for name in rows.column_names):
        before, after = column[:-1], column[1:]
        unequal = pc.fill_null(pc.not_equal(before, after), False).to_numpy(zero_copy_only=False)
        differs |= unequal | (
            before.is_null().to_numpy(zero_copy_only=False) != after.is_null().to_numpy(zero_copy_only=False)
        )
    return rows.filter(pa.array(np.concatenate([[True], differs])))


class _Books:
    """Ledger rows by source: integer codes, which rows count, and what they add up to. All arrays are aligned with the
    rows or with the sources (`names`)."""

    def __init__(self, ledger: pa.Table) -> None:
        if ledger["source_id"].null_count:
            ledger = ledger.filter(pc.is_valid(ledger["source_id"]))
        self.ledger = ledger
        self.codes, self.names = _codes(ledger["source_id"])
        self.attempts = _integers(ledger["attempt"], null=0)
        self.latest = self.most(self.attempts, at_least=0)
        self.counts = self.attempts == self.latest[self.codes]  # rows of a source's latest attempt
        self.is_kept, self.is_filtered, self.is_quarantined = (
            _equals(ledger["status"], name) for name in ("kept", "filtered", "quarantined")
        )
        self.part = _integers(ledger["part_index"], null=-1)
        judged = self.counts & (self.is_kept | self.is_filtered)
        num_parts = np.where(judged, _integers(ledger["num_parts"], null=0), 0)
        self.num_parts = self.most(num_parts, at_least=0)
        in_range = (self.part >= 0) & (self.part < self.num_parts[self.codes])
        self.parts = self._one_each(np.flatnonzero(judged & in_range))  # rows: one for each judged part
        start_s, end_s = (ledger[name].to_numpy()[self.parts] for name in ("part_start_s", "part_end_s"))
        self.part_s = np.nan_to_num(end_s - start_s)  # aligned with `parts`

    def most(self, values: np.ndarray, *, at_least: float) -> np.ndarray:
        """[num_sources] the largest value of each source's rows; NaN does not count."""
        found = np.full(len(self.names), at_least, values.dtype)
        np.fmax.at(found, self.codes, values)
        return found

    def any(self, rows: np.ndarray) -> np.ndarray:
        """[num_sources] whether one of a source's rows is so."""
        found = np.zeros(len(self.names), bool)
        found[self.codes[rows]] = True
        return found

    def sum_s(self, chosen: np.ndarray) -> np.ndarray:
        """[num_sources] seconds of the chosen ones of `parts`."""
        # Parts are sorted by source and index, so the order of the ledger cannot show in the last digit.
        return np.bincount(self.codes[self.parts[chosen]], self.part_s[chosen], minlength=len(self.names))

    def _one_each(self, rows: np.ndarray) -> np.ndarray:
        """Of the rows of each (source, part) one: a kept one before a filtered one, then the first by all columns."""
        pairs = self.codes[rows] << 32 | self.part[rows]
        return rows[_first_of_each(pairs, self.ledger, rows, prefer=[("status", "descending")])]

    def outcomes(self) -> np.ndarray:
        """[num_sources] index into OUTCOMES, exact duplicates not settled yet."""
        num_found = np.bincount(self.codes[self.parts], minlength=len(self.names))
        complete = (self.num_parts > 0) & (num_found == self.num_parts)
        kept_some = np.zeros(len(self.names), bool)
        kept_some[self.codes[self.parts[self.is_kept[self.parts]]]] = True
        outcome = np.full(len(self.names), OUTCOMES.index("pending"))
        outcome[complete] = np.where(kept_some[complete], OUTCOMES.index("kept"), OUTCOMES.index("filtered"))
        outcome[self.any(self.counts & self.is_filtered & (self.part < 0))] = OUTCOMES.index("filtered")
        outcome[self.any(self.counts & self.is_quarantined)] = OUTCOMES.index("quarantined")
        return outcome


def source_outcomes(ledger: pa.Table) -> pa.Table:
    """One row per source, sorted by source id (OUTCOME_SCHEMA). Rows that name no source are left out.

    Only the rows of a source's highest attempt count. A quarantined one among them quarantines it; else a filtered one
    over the whole source filters it; else it is kept if each of its parts is kept or filtered and one is kept, filtered
    if all are, and pending while one is not there. Then, of the kept sources with the same bytes (video id), the first
    by (uri, source id) stays, the others are filtered as duplicates of it. Where several rows tell a reason, the first
    by (part, stage, reason, detail) is shown.
    """
    return _judge(_Books(ledger))


def _judge(books: _Books) -> pa.Table:
    if not len(books.names):
        return OUTCOME_SCHEMA.empty_table()
    outcome = books.outcomes()
    current = books.ledger.select(["source_id", "video_id"]).filter(pa.array(books.counts))
    columns: dict[str, Any] = {
        "source_id": books.names,
        "uri": _least_text(books, books.ledger, "uri"),
        "video_id": _least_text(books, current, "video_id"),
        "attempt": books.latest,
        "failures": _failures(books),
        **_causes(books, outcome),
    }
    _settle_duplicates(outcome, columns)
    columns |= _seconds(books, outcome)
    columns["outcome"] = pa.array(OUTCOMES).take(pa.array(outcome))
    table = pa.table({name: pa.array(columns[name]) for name in OUTCOME_SCHEMA.names}).cast(OUTCOME_SCHEMA)
    return table.sort_by("source_id")


def _least_text(books: _Books, rows: pa.Table, name: str) -> pa.Array:
    """[num_sources] the first text by order of a column among some rows."""
    least = rows.group_by("source_id").aggregate([(name, "min")])
    return least[f"{name}_min"].combine_chunks().take(pc.index_in(books.names, value_set=least["source_id"]))


def _failures(books: _Books) -> np.ndarray:
    """[num_sources] distinct attempts with a quarantined row."""
    pairs = np.unique(books.codes[books.is_quarantined] << 32 | books.attempts[books.is_quarantined])
    return np.bincount(pairs >> 32, minlength=len(books.names))


def _causes(books: _Books, outcome: np.ndarray) -> dict[str, pa.Array]:
    """[num_sources] stage, reason and detail of what failed; of a kept source the detail is what had to be given up."""
    has_note = books.is_kept & books.ledger["detail"].is_valid().to_numpy()
    is_cause = {"filtered": books.is_filtered, "quarantined": books.is_quarantined, "kept": has_note}
    telling = np.zeros(len(books.codes), bool)
    for name, rows in is_cause.items():
        telling |= books.counts & rows & (outcome[books.codes] == OUTCOMES.index(name))
    rows = np.flatnonzero(telling)
    failed = books.ledger.select(["stage", "reason", "detail"]).take(rows)
    failed = failed.append_column("part", pa.array(books.part[rows])).append_column("row", pa.array(books.codes[rows]))
    failed = failed.sort_by([(name, "ascending") for name in ("row", "part", "stage", "reason", "detail")])
    sources, first = np.unique(failed["row"].to_numpy(), return_index=True)
    place = np.full(len(books.names), -1)
    place[sources] = first
    indices = pa.array(place, mask=place < 0)
    return {name: failed[name].combine_chunks().take(indices) for name in ("stage", "reason", "detail")}


def _settle_duplicates(outcome: np.ndarray, columns: dict[str, Any]) -> None:
    """Of the kept sources with the same bytes one stays; changes `outcome` and the causes in `columns`."""
    kept = np.flatnonzero((outcome == OUTCOMES.index("kept")) & columns["video_id"].is_valid().to_numpy(False))
    found = pa.table({name: columns[name].take(pa.array(kept)) for name in ("video_id", "uri", "source_id")})
    order = pc.sort_indices(found, [(name, "ascending") for name in ("video_id", "uri", "source_id")]).to_numpy()
    found, kept = found.take(order), kept[order]
    codes, _ = _codes(found["video_id"])
    _, first, group = np.unique(codes, return_index=True, return_inverse=True)
    repeated = first[group] != np.arange(len(kept))
    if not repeated.any():
        return
    places = kept[repeated]
    outcome[places] = OUTCOMES.index("filtered")
    originals = found["uri"].take(first[group][repeated])
    words = pc.binary_join_element_wise("the same bytes as ", pc.fill_null(originals, "another source"), "")
    mask = np.zeros(len(outcome), bool)
    mask[places] = True
    text = words.combine_chunks().take(pa.array(np.argsort(places)))  # as the mask runs through the sources
    constant = {"stage": pa.scalar("ledger"), "reason": pa.scalar("duplicate"), "detail": text}
    for name, value in constant.items():
        columns[name] = pc.replace_with_mask(columns[name], pa.array(mask), value)


def _seconds(books: _Books, outcome: np.ndarray) -> dict[str, np.ndarray | pa.Array]:
    """[num_sources] the durations of each source, and where its seconds went; see OUTCOME_SCHEMA."""
    unknown = np.nan
    declared_s = books.most(books.ledger["declared_s"].to_numpy(), at_least=unknown)
    decoded_s = books.most(books.ledger["source_s"].to_numpy(), at_least=unknown)
    kept_parts = books.is_kept[books.parts]
    kept_s, filtered_s = books.sum_s(kept_parts), books.sum_s(~kept_parts)
    parts_s = kept_s + filtered_s
    decoded_s = np.where(np.isnan(decoded_s) & (parts_s > 0), parts_s, decoded_s)
    source_s = np.fmax(np.fmax(declared_s, decoded_s), np.where(parts_s > 0, parts_s, unknown))
    total_s = np.nan_to_num(source_s)
    is_kept = outcome == OUTCOMES.index("kept")
    spent = {f"{name}_s": np.where(outcome == index, total_s, 0.0) for index, name in enumerate(OUTCOMES)}
    spent["kept_s"] = np.where(is_kept, kept_s, 0.0)
    spent["filtered_s"] = np.where(is_kept, filtered_s, spent["filtered_s"])
    spent["missing_s"] = np.where(is_kept, np.maximum(total_s - parts_s, 0.0), 0.0)
    durations = {"declared_s": declared_s, "decoded_s": decoded_s, "source_s": source_s}
    return spent | {name: pa.array(values, from_pandas=True) for name, values in durations.items()}  # NaN is null


def judged_parts(ledger: pa.Table, *, outcomes: pa.Table | None = None) -> pa.Table:
    """One row for each kept or filtered part of the latest attempt of kept sources (LEDGER_SCHEMA).

    `outcomes` is `source_outcomes(ledger)` where the caller has it already.
    """
    books = _Books(ledger)
    outcomes = _judge(books) if outcomes is None else outcomes
    kept_sources = outcomes.filter(pc.equal(outcomes["outcome"], "kept"))["source_id"]
    counts = _contains(kept_sources, books.names)[books.codes[books.parts]]
    return books.ledger.take(books.parts[counts]).combine_chunks()


def unique_samples(ledger: pa.Table, *, outcomes: pa.Table | None = None) -> pa.Table:
    """The rows of the samples that count, one per key, sorted by key (LEDGER_SCHEMA).

    These are the kept parts of the latest attempt of kept sources: no part of a source that is quarantined, half done,
    or a duplicate. `outcomes` is `source_outcomes(ledger)` where the caller has it already.
    """
    return samples_among(judged_parts(ledger, outcomes=outcomes))


def samples_among(parts: pa.Table) -> pa.Table:
    """The kept ones of `judged_parts`, one per key, sorted by key."""
    samples = parts.filter(pc.equal(parts["status"], "kept")).combine_chunks()
    codes = _codes(samples["key"])[0]
    first = _first_of_each(codes, samples, np.arange(len(codes)), prefer=[("shard", "ascending")])
    return samples.take(first).sort_by("key").combine_chunks()


@dataclass(frozen=True, kw_only=True)
class Remaining:
    """What a run has to do about a listing."""

    todo: pa.Table
    """Rows of the listing, in its order, with a column `attempt` (int32): the number of the attempt to make."""
    num_exhausted: int
    """Listed sources that `retry` names but that failed `max_attempts` times."""
    superseded: pa.Table
    """Outcomes of older versions of listed files, not marked as such yet."""
    unlisted: pa.Table
    """Outcomes of sources whose file is not listed, not marked as gone yet: removed, or of another place."""


def remaining(listed: pa.Table, outcomes: pa.Table, *, retry: Sequence[str], max_attempts: int) -> Remaining:
    """A listing minus what the ledger holds.

    `listed` has the columns source_id and uri (each source once) and any others; `outcomes` is `source_outcomes`. Left
    to do are sources that are new or pending; quarantined ones whose reason is in `retry` and that failed fewer than
    `max_attempts` times; filtered ones whose reason is in `retry` (a filter may have been loosened); copies of a source
    that is not kept any more (one that was a near duplicate does not count as such: its copies are, too); and those
    that were gone and are listed again.
    """
    place = pc.index_in(listed["source_id"].combine_chunks(), value_set=outcomes["source_id"])
    now = outcomes.select(["outcome", "reason", "stage", "attempt", "failures", "video_id"]).take(place)
    is_known = place.is_valid().to_numpy(zero_copy_only=False)
    is_pending, is_filtered, is_quarantined = (
        _equals(now["outcome"], name) for name in ("pending", "filtered", "quarantined")
    )
    asked = _contains(pa.array(retry, pa.string()), now["reason"])
    exhausted = is_quarantined & asked & (_integers(now["failures"], null=0) >= max_attempts)
    is_copy = is_filtered & _equals(now["reason"], "duplicate")
    settled = pc.or_kleene(pc.equal(outcomes["outcome"], "kept"), pc.equal(outcomes["reason"], "near_duplicate"))
    kept_videos = outcomes.filter(settled)["video_id"].drop_null()
    again = is_quarantined & asked & ~exhausted
    again |= is_filtered & asked & ~is_copy
    again |= is_copy & ~_contains(kept_videos, now["video_id"])
    again |= is_filtered & _contains(pa.array(GONE), now["reason"])
    wanted = ~is_known | is_pending | again
    attempts = pa.array(_integers(now["attempt"], null=0)[wanted] + 1, pa.int32())
    present = outcomes.filter(pa.array(~_contains(pa.array(GONE), outcomes["reason"])))
    others = present.filter(pa.array(~_contains(listed["source_id"], present["source_id"])))
    is_listed = _contains(listed["uri"], others["uri"])
    return Remaining(
        todo=listed.filter(pa.array(wanted)).append_column("attempt", attempts),
        num_exhausted=int(exhausted.sum()),
        superseded=others.filter(pa.array(is_listed)),
        unlisted=others.filter(pa.array(~is_listed)),
    )


def _first_of_each(
    groups: np.ndarray, table: pa.Table, rows: np.ndarray, *, prefer: Sequence[tuple[str, str]]
) -> np.ndarray:
    """Positions in `rows` (indices into a table), one for each distinct value of `groups` [num_rows], sorted by it.

    Of several rows it is the first by the preferred columns and then by all others, so the order of rows cannot show.
    """
    _, first, inverse, counts = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
    contested = np.flatnonzero(counts[inverse] > 1)
    if len(contested):
        others = [(name, "ascending") for name in table.column_names if name not in dict(prefer)]
        keys = [("group", "ascending"), *prefer, *others]
        candidates = table.take(rows[contested]).append_column("group", pa.array(inverse[contested]))
        ranked = contested[pc.sort_indices(candidates, keys).to_numpy()]
        winners, best = np.unique(inverse[ranked], return_index=True)
        first[winners] = ranked[best]
    return first


def _codes(column: pa.ChunkedArray) -> tuple[np.ndarray, pa.Array]:
    """[num_rows] int64 number of each value, and the values by number."""
    encoded = pa.concat_arrays([pa.array([], column.type), *column.chunks]).dictionary_encode(null_encoding="encode")
    return np.asarray(encoded.indices.to_numpy(), np.int64), encoded.dictionary


def _contains(values: Any, column: Any) -> np.ndarray:
    """[num_rows] bool: whether each entry of a column is one of some values; null is none of them."""
    found = pc.is_in(column, value_set=values, skip_nulls=True)
    return np.asarray(found.to_numpy(zero_copy_only=False) if isinstance(found, pa.Array) else found.to_numpy(), bool)


def _integers(column: pa.ChunkedArray, *, null: int) -> np.ndarray:
    """[num_rows] int64."""
    return np.asarray(pc.fill_null(column, null).to_numpy(), np.int64)


def _equals(column: pa.ChunkedArray, value: str) -> np.ndarray:
    """[num_rows] bool, null as False."""
    return np.asarray(pc.fill_null(pc.equal(column, value), False).to_numpy(), bool)
