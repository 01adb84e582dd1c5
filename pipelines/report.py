"""The ledger's arithmetic: what became of every source, and whether the books balance.

Everything is a pure function of the set of ledger rows: their order and their number of copies do not matter, because
two writers may commit the same sample and a listing is repeated by every run. The work is columns and integer codes,
not rows (a million rows take three seconds); the price is that the whole ledger is in memory, about 300 bytes a row.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.dataset import DatasetInfo, Folder, read_ledger, unique_samples

OUTCOMES = ("kept", "filtered", "quarantined", "pending")
STAGES = ("transcode", "transcribe", "features")
RANDOM_EXTRACTOR = "random"  # as in "s3d:random:0"

OUTCOME_SCHEMA = pa.schema(
    [
        ("source_id", pa.string()),
        ("uri", pa.string()),
        ("outcome", pa.string()),  # one of OUTCOMES
        ("attempt", pa.int32()),
        ("source_s", pa.float64()),  # null while unknown
        ("stage", pa.string()),  # where it failed; null unless filtered or quarantined, like the next two
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Report:
    """The ledger in numbers. `to_dict` is the stable JSON shape of `videobert report --json`."""

    sources: Mapping[str, int]  # total and each of OUTCOMES
    reasons: Mapping[str, int]  # sources by reason, of the filtered and quarantined ones
    seconds: Mapping[str, float]  # source seconds, keys as `sources`
    seconds_by_reason: Mapping[str, float]
    sources_without_duration: int  # they count as 0 seconds above: nothing could be probed
    samples: int
    sample_seconds: float
    visual_tokens: int
    sentences: int
    words: int
    transcripts: Mapping[str, int]  # samples by origin of their sentences
    stage_seconds: Mapping[str, float]  # wall seconds of workers, keys STAGES
    vocabularies: Mapping[str, int]  # samples by vocabulary
    extractor: str | None
    failures: tuple[Mapping[str, Any], ...] = field(
        repr=False
    )  # uri, outcome, stage, reason, detail; by reason and uri
    problems: tuple[str, ...]  # why the books do not balance, each one sentence
    notes: tuple[str, ...]  # what a reader must know before trusting the numbers

    @property
    def balanced(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        record = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return {**record, "balanced": self.balanced}


def report_of(url: str) -> Report:
    """The report of a dataset folder, also of one in which nothing was kept yet.

    Raises FileNotFoundError where there is neither a ledger nor a dataset.
    """
    folder = Folder.at(url)
    ledger, has_info = read_ledger(folder), folder.exists("dataset.json")
    if not has_info and ledger.num_rows == 0:
        raise FileNotFoundError(f"no dataset at {url}: make one with `videobert ingest SOURCE --dataset {url}`.")
    info = DatasetInfo.from_json(folder.read("dataset.json")) if has_info else None
    shards = {name.removeprefix("shards/") for name in folder.names("shards", suffix=".tar")}
    return summarise(ledger, shards=shards, info=info)


def summarise(ledger: pa.Table, *, shards: Collection[str] | None = None, info: DatasetInfo | None = None) -> Report:
    """Ledger rows (LEDGER_SCHEMA) in numbers. Given the names of the shards that exist, checks that none is missing."""
    outcomes, samples = source_outcomes(ledger), unique_samples(ledger)
    counts = {name: _count(outcomes, "outcome", name) for name in OUTCOMES}
    failed = outcomes.filter(pc.is_in(outcomes["outcome"], pa.array(["filtered", "quarantined"])))
    seconds = {name: _sum(_where(outcomes, "outcome", name), "source_s") for name in OUTCOMES}
    listed = _num_listed(ledger)
    return Report(
        sources={"total": listed, **counts},
        reasons=_counts(failed["reason"]),
        seconds={"total": _sum(outcomes, "source_s"), **seconds},
        seconds_by_reason={
            name: _sum(_where(failed, "reason", name), "source_s") for name in _counts(failed["reason"])
        },
        sources_without_duration=outcomes["source_s"].null_count,
        samples=samples.num_rows,
        sample_seconds=_round(_sum(samples, "part_end_s") - _sum(samples, "part_start_s")),
        visual_tokens=int(_sum(samples, "num_clips")),
        sentences=int(_sum(samples, "num_sentences")),
        words=int(_sum(samples, "num_words")),
        transcripts=_counts(samples["transcript"]),
        stage_seconds=_stage_seconds(ledger),
        vocabularies=_counts(samples["vocabulary"]),
        extractor=info.extractor if info else None,
        failures=tuple(failed.sort_by([(name, "ascending") for name in ("reason", "uri", "source_id")]).to_pylist()),
        problems=tuple(_problems(ledger, listed=listed, counts=counts, shards=shards)),
        notes=tuple(_notes(info, samples)),
    )


def source_outcomes(ledger: pa.Table) -> pa.Table:
    """One row per source, sorted by source id (OUTCOME_SCHEMA).

    Only the rows of a source's highest attempt count. A quarantined row among them makes the source quarantined, else a
    filtered one makes it filtered; else it is kept if the distinct parts of its kept rows are as many as `num_parts`
    says, and pending if not. Where several rows fail, the first in the order of (stage, reason, detail) is shown. Rows
    that name no source are left out.
    """
    ledger = ledger.filter(pc.is_valid(ledger["source_id"]))
    if ledger.num_rows == 0:
        return OUTCOME_SCHEMA.empty_table()
    encoded = ledger["source_id"].combine_chunks().dictionary_encode()
    names, codes = encoded.dictionary, encoded.indices.to_numpy()
    attempts = _integers(ledger["attempt"])
    latest = np.full(len(names), -1)
    np.maximum.at(latest, codes, attempts)
    counts_now = attempts == latest[codes]
    status = ledger["status"]
    failing = {name: counts_now & _equals(status, name) for name in ("quarantined", "filtered")}
    whole = _kept_whole(ledger, codes, counts_now & _equals(status, "kept"), len(names))
    outcome = np.where(whole, OUTCOMES.index("kept"), OUTCOMES.index("pending"))
    for name in ("filtered", "quarantined"):  # the worse one last, it wins
        outcome[codes[failing[name]]] = OUTCOMES.index(name)
    words = pa.array(OUTCOMES).take(pa.array(outcome))
    table = pa.table({"source_id": names, "outcome": words, "attempt": pa.array(latest, pa.int32())})
    facts = ledger.group_by("source_id").aggregate([("uri", "min"), ("source_s", "max")])
    facts = facts.rename_columns({"uri_min": "uri", "source_s_max": "source_s"})
    causes = _first_causes(ledger.filter(pa.array(failing["quarantined"] | failing["filtered"])))
    table = table.join(facts, "source_id").join(causes, ["source_id", "outcome"])
    return table.select(OUTCOME_SCHEMA.names).cast(OUTCOME_SCHEMA).sort_by("source_id")


def _kept_whole(ledger: pa.Table, codes: np.ndarray, kept: np.ndarray, num_sources: int) -> np.ndarray:
    """[num_sources] bool: all parts of the source are among its kept rows."""
    parts = _integers(ledger["part_index"])[kept]
    pairs = np.unique(codes[kept].astype(np.int64) << 32 | parts)  # distinct (source, part)
    num_found = np.bincount(pairs >> 32, minlength=num_sources)
    num_wanted = np.zeros(num_sources, np.int64)
    np.maximum.at(num_wanted, codes[kept], _integers(ledger["num_parts"])[kept])
    return (num_wanted > 0) & (num_found == num_wanted)


def _first_causes(failing: pa.Table) -> pa.Table:
    """Per (source, status) the first row in the order of stage, reason and detail, whatever the order of the rows."""
    columns = ("source_id", "status", "stage", "reason", "detail")
    ordered = failing.select(columns).sort_by([(name, "ascending") for name in columns])
    first = ordered.group_by(["source_id", "status"], use_threads=False).aggregate(
        [(name, "first", pc.ScalarAggregateOptions(skip_nulls=False)) for name in columns[2:]]
    )
    return first.rename_columns({"status": "outcome", **{f"{name}_first": name for name in columns[2:]}})


def _num_listed(ledger: pa.Table) -> int:
    """Distinct sources in the listing, counted without looking at what became of them."""
    listing = ledger.filter(pc.equal(ledger["attempt"], 0))
    return int(pc.count_distinct(listing["source_id"]).as_py())


def _problems(ledger: pa.Table, *, listed: int, counts: Mapping[str, int], shards: Collection[str] | None) -> list[str]:
    found = []
    if listed != sum(counts.values()):
        found.append(f"{listed} sources are listed, but the outcomes of {sum(counts.values())} add up.")
    if nameless := ledger["source_id"].null_count:
        found.append(f"{nameless} ledger rows name no source.")
    kept = ledger.filter(pc.equal(ledger["status"], "kept"))
    contents = kept.group_by(["key", "video_id", "part_index"]).aggregate([])
    if clashes := contents.num_rows - int(pc.count_distinct(kept["key"], mode="all").as_py()):
        found.append(f"{clashes} sample keys stand for more than one part of a video.")
    if shards is not None:
        named = pc.unique(kept["shard"]).to_pylist()
        missing = sorted(str(name) for name in named if name not in shards)
        if missing:
            found.append(f"{len(missing)} shards of the ledger are missing, the first is {missing[0]}; ingest again.")
    return found


def _notes(info: DatasetInfo | None, samples: pa.Table) -> list[str]:
    notes = []
    if info and RANDOM_EXTRACTOR in info.extractor.lower():
        notes.append(
            f"THE FEATURES COME FROM RANDOM WEIGHTS ({info.extractor}): visual tokens group what looks alike to an "
            "untrained network. Give trained S3D weights for anything beyond a trial."
        )
    if samples.num_rows and len(vocabularies := _counts(samples["vocabulary"])) > 1:
        notes.append(
            f"Samples speak {len(vocabularies)} vocabularies; ingest again into another folder to train on one."
        )
    return notes


def _stage_seconds(ledger: pa.Table) -> dict[str, float]:
    """Wall seconds by stage over all attempts; copies of a row count once."""
    identity = ["source_id", "attempt", "part_index", "status", "run_id"]
    spent = ledger.group_by(identity).aggregate([(f"{stage}_s", "max") for stage in STAGES])
    return {stage: _sum(spent, f"{stage}_s_max") for stage in STAGES}


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    """Value -> count, the most frequent first, then by name; nulls are left out."""
    pairs = [(item["values"], item["counts"]) for item in pc.value_counts(column.drop_null()).to_pylist()]
    return dict(sorted(pairs, key=lambda pair: (-pair[1], pair[0])))


def _where(table: pa.Table, column: str, value: str) -> pa.Table:
    return table.filter(pc.equal(table[column], value))


def _count(table: pa.Table, column: str, value: str) -> int:
    return _where(table, column, value).num_rows


def _sum(table: pa.Table, column: str) -> float:
    return _round(math.fsum(table[column].drop_null().to_numpy()))  # exact, so the order of rows cannot show


def _round(value: float | None) -> float:
    return round(float(value or 0.0), 3)


def _integers(column: pa.ChunkedArray) -> np.ndarray:
    """[num_rows] int64, nulls as 0."""
    return np.asarray(pc.fill_null(column, 0).to_numpy(), np.int64)


def _equals(column: pa.ChunkedArray, value: str) -> np.ndarray:
    return np.asarray(pc.fill_null(pc.equal(column, value), False).to_numpy(), bool)


def render_text(report: Report, *, num_failures: int = 20) -> str:
    """The report for a terminal: notes and problems first, then the books, then where the time went and what failed."""
    lines = [f"!! {note}" for note in report.notes] + [f"!! unbalanced: {problem}" for problem in report.problems]
    lines += [""] if lines else []
    lines += _table(
        ("sources", "videos", "duration"),
        [(name, f"{report.sources[name]:,}", duration(report.seconds[name])) for name in (*OUTCOMES, "total")],
        rule_before="total",
    )
    lines.append("balanced: the four add up" if report.balanced else "NOT BALANCED, see above")
    if report.reasons:
        rows = [
            (name, f"{count:,}", duration(report.seconds_by_reason[name]), _example(report, name))
            for name, count in report.reasons.items()
        ]
        lines += ["", *_table(("reason", "videos", "duration", "for example"), rows)]
    lines += ["", *_table(("dataset", "", ""), _contents(report))]
    busiest = max([*report.stage_seconds.values(), 1e-9])
    stages = [
        (name, f"{seconds:,.1f} s", "█" * round(24 * seconds / busiest))
        for name, seconds in report.stage_seconds.items()
    ]
    lines += ["", *_table(("worker time", "", ""), stages)]
    quarantined = [failure for failure in report.failures if failure["outcome"] == "quarantined"]
    if quarantined:
        lines += ["", *_failures(quarantined, num_failures)]
    return "\n".join(line.rstrip() for line in lines)


def duration(seconds: float) -> str:
    """Seconds for people: `12.5 s`, `3 min 05 s`, `41 h 07 min`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


def _contents(report: Report) -> list[tuple[str, str, str]]:
    origins = ", ".join(f"{count:,} {origin}" for origin, count in report.transcripts.items())
    return [
        ("samples", f"{report.samples:,}", duration(report.sample_seconds)),
        ("visual tokens", f"{report.visual_tokens:,}", report.extractor or ""),
        ("vocabulary", ", ".join(report.vocabularies) or "none yet", ""),
        ("sentences", f"{report.sentences:,}", f"transcripts: {origins}" if origins else ""),
        ("words", f"{report.words:,}", ""),
    ]


def _failures(quarantined: list[Mapping[str, Any]], limit: int) -> list[str]:
    lines = [f"quarantined ({min(limit, len(quarantined))} of {len(quarantined)}):"]
    for failure in quarantined[:limit]:
        lines.append(f"  {failure['uri']}")
        lines.append(f"      {failure['stage']}: {failure['reason']}: {_short(failure['detail'], 160)}")
    return lines


def _example(report: Report, reason: str) -> str:
    failure = next(failure for failure in report.failures if failure["reason"] == reason)
    name = str(failure["uri"]).rstrip("/").rpartition("/")[2]
    return f"{name}: {_short(failure['detail'], 60)}" if failure["detail"] else name


def _short(text: str | None, width: int) -> str:
    line = " ".join((text or "").split())
    return line if len(line) <= width else line[: width - 1] + "…"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]], *, rule_before: str | None = None) -> list[str]:
    """Aligned columns, the second to the right; a rule under the head."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    rule = "  ".join("─" * width for width in widths)

    def line(row: tuple[str, ...]) -> str:
        cells = [
            cell.rjust(width) if column == 1 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells)

    lines = [line(head), rule]
    for row in rows:
        lines += [rule] if row[0] == rule_before else []
        lines.append(line(row))
    return lines
