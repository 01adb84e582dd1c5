"""The books of a dataset: what became of every source, in videos and in seconds, and whether that adds up.

The judgement over each source is `pipelines.ledger`'s; here it is added up, checked against what can be counted another
way (the listing, the samples, the shards that exist), and written for people. It reads the ledger and lists
the shards, and no more than that, so it costs about as much as opening the dataset twice.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from pipelines.dataset import DatasetInfo
from pipelines.ledger import OUTCOMES, judged_parts, read_ledger, samples_among, source_outcomes
from pipelines.storage import Folder

STAGES = ("fetch", "transcode", "transcribe", "features")
RANDOM_EXTRACTOR = "random"  # as in "s3d:random:0"
MISSING_NAMED_S = 1.0  # a source that misses more is named; less is the tail of a container
TAIL_LINES = 4  # of a failure's detail, on the terminal
DURATION_STEPS = (10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 7200.0, math.inf)


@dataclass(frozen=True, kw_only=True)
class Report:
    """The ledger in numbers. `to_dict` is the stable JSON shape of `videobert report --json`."""

    sources: Mapping[str, int]  # total and each of OUTCOMES
    reasons: Mapping[str, int]  # sources by reason, of the filtered and quarantined ones
    seconds: Mapping[str, float]  # total, each of OUTCOMES, and missing: declared by kept sources, but not decoded
    seconds_by_reason: Mapping[str, float]  # of filtered and quarantined sources, and of filtered parts of kept ones
    sources_without_duration: int  # they count as 0 seconds above: nothing could be probed
    missing_seconds: tuple[Mapping[str, Any], ...]  # uri, declared_s, decoded_s, missing_s, detail; the worst first
    attempts: Mapping[str, int]  # sources by number of attempts; "0" were only listed
    durations: tuple[Mapping[str, Any], ...]  # below_s (null: no limit) and the number of sources by outcome
    samples: int
    sample_seconds: float
    visual_tokens: int
    sentences: int
    words: int
    transcripts: Mapping[str, int]  # samples by origin of their sentences
    stages: tuple[Mapping[str, Any], ...]  # stage, rows, seconds (of workers), video_seconds, seconds_per_video_second
    stage_seconds: Mapping[str, float]  # wall seconds of workers, keys STAGES
    vocabularies: Mapping[str, int]  # samples by vocabulary
    extractor: str | None
    failures: tuple[Mapping[str, Any], ...] = field(repr=False)  # OUTCOME_SCHEMA, by reason and uri
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
    return summarise(ledger, shards=_shard_sizes(folder), info=info)


def _shard_sizes(folder: Folder) -> dict[str, int]:
    """Name -> bytes of each shard, from one listing."""
    found = folder.fs.get_file_info(pafs.FileSelector(folder.path("shards"), allow_not_found=True))
    return {item.base_name: item.size or 0 for item in found if item.type == pafs.FileType.File}


def summarise(ledger: pa.Table, *, shards: Mapping[str, int] | None = None, info: DatasetInfo | None = None) -> Report:
    """Ledger rows (LEDGER_SCHEMA) in numbers. Given the bytes of each shard that exists, checks that every sample is
    there."""
    outcomes = source_outcomes(ledger)
    parts = judged_parts(ledger, outcomes=outcomes)
    samples, dropped = samples_among(parts), _where(parts, "status", "filtered")
    failed = outcomes.filter(pc.is_in(outcomes["outcome"], pa.array(["filtered", "quarantined"])))
    stages = tuple(_stages(ledger))
    return Report(
        sources={"total": _num_listed(ledger), **{name: _count(outcomes, "outcome", name) for name in OUTCOMES}},
        reasons=_counts(failed["reason"]),
        seconds={"total": _sum(outcomes["source_s"])}
        | {name: _sum(outcomes[f"{name}_s"]) for name in (*OUTCOMES, "missing")},
        seconds_by_reason=_seconds_by_reason(failed, dropped),
        sources_without_duration=outcomes["source_s"].null_count,
        missing_seconds=tuple(_missing(outcomes)),
        attempts={str(number): count for number, count in sorted(_counts(outcomes["attempt"]).items())},
        durations=tuple(_durations(outcomes)),
        samples=samples.num_rows,
        sample_seconds=_sum(_part_s(samples)),
        visual_tokens=int(_sum(samples["num_clips"])),
        sentences=int(_sum(samples["num_sentences"])),
        words=int(_sum(samples["num_words"])),
        transcripts=_counts(samples["transcript"]),
        stages=stages,
        stage_seconds={stage["stage"]: stage["seconds"] for stage in stages},
        vocabularies=_counts(samples["vocabulary"]),
        extractor=info.extractor if info else None,
        failures=tuple(failed.sort_by([(name, "ascending") for name in ("reason", "uri", "source_id")]).to_pylist()),
        problems=(
            *_count_problems(ledger, outcomes),
            *_second_problems(outcomes, samples),
            *(_shard_problems(samples, shards) if shards is not None else []),
        ),
        notes=tuple(_notes(info, samples)),
    )


def _seconds_by_reason(failed: pa.Table, dropped: pa.Table) -> dict[str, float]:
    """Of sources that failed and of parts that were dropped from kept sources; the most seconds first."""
    reasons = pa.chunked_array([*failed["reason"].chunks, *dropped["reason"].chunks], pa.string())
    seconds = pa.chunked_array([*failed["source_s"].chunks, _part_s(dropped)], pa.float64())
    table = pa.table({"reason": reasons, "seconds": seconds})
    sums = {name: _sum(_where(table, "reason", name)["seconds"]) for name in _counts(reasons)}
    return dict(sorted(sums.items(), key=lambda item: (-item[1], item[0])))


def _missing(outcomes: pa.Table) -> list[dict[str, Any]]:
    short = outcomes.filter(pc.greater(outcomes["missing_s"], MISSING_NAMED_S))
    short = short.sort_by([("missing_s", "descending"), ("uri", "ascending"), ("source_id", "ascending")])
    return [
        {
            "uri": row["uri"],
            "declared_s": _round(row["declared_s"]),
            "decoded_s": _round(row["source_s"] - row["missing_s"]),
            "missing_s": _round(row["missing_s"]),
            "detail": row["detail"],
        }
        for row in short.to_pylist()
    ]


def _durations(outcomes: pa.Table) -> list[dict[str, Any]]:
    """How long the sources are, by outcome; those without a known duration are left out."""
    known = outcomes.filter(outcomes["source_s"].is_valid())
    bins = np.searchsorted(DURATION_STEPS, known["source_s"].to_numpy(), side="right")
    names = known["outcome"]
    counts = {
        name: np.bincount(bins[pc.equal(names, name).to_numpy()], minlength=len(DURATION_STEPS)) for name in OUTCOMES
    }
    return [
        {"below_s": None if math.isinf(below_s) else below_s} | {name: int(counts[name][index]) for name in OUTCOMES}
        for index, below_s in enumerate(DURATION_STEPS)
    ]


def _num_listed(ledger: pa.Table) -> int:
    """Distinct sources in the listing, counted without looking at what became of them."""
    listing = ledger.select(["source_id"]).filter(pc.equal(ledger["attempt"], 0))
    return int(pc.count_distinct(listing["source_id"]).as_py())


def _count_problems(ledger: pa.Table, outcomes: pa.Table) -> list[str]:
    found = []
    if (listed := _num_listed(ledger)) != outcomes.num_rows:
        found.append(f"{listed} sources are listed, but the outcomes of {outcomes.num_rows} add up.")
    if nameless := ledger["source_id"].null_count:
        found.append(f"{nameless} ledger rows name no source.")
    kept = _where(ledger.select(["status", "key", "video_id", "part_index"]), "status", "kept")
    contents = kept.group_by(["key", "video_id", "part_index"]).aggregate([])
    if clashes := contents.num_rows - int(pc.count_distinct(kept["key"], mode="all").as_py()):
        found.append(f"{clashes} sample keys stand for more than one part of a video.")
    return found


def _second_problems(outcomes: pa.Table, samples: pa.Table) -> list[str]:
    """Seconds counted one way against the same counted another way; a hundredth of a second is rounding."""
    found = []
    total_s, spent_s = _sum(outcomes["source_s"]), sum(_sum(outcomes[f"{name}_s"]) for name in (*OUTCOMES, "missing"))
    if abs(total_s - spent_s) > 0.01:
        found.append(f"the sources last {total_s:.3f} s, but their outcomes add up to {spent_s:.3f} s.")
    kept_s, sample_s = _sum(outcomes["kept_s"]), _sum(_part_s(samples))
    if abs(kept_s - sample_s) > 0.01:
        found.append(f"{kept_s:.3f} s of the sources are kept, but the samples last {sample_s:.3f} s.")
    known_s = pc.max_element_wise(outcomes["declared_s"], outcomes["decoded_s"])
    over_s = pc.subtract(pc.add(outcomes["kept_s"], outcomes["filtered_s"]), known_s)
    longer = outcomes.filter(pc.greater(over_s, MISSING_NAMED_S)).sort_by("uri")
    if longer.num_rows:
        found.append(
            f"the parts of {longer.num_rows} sources last longer than the source, the first is {longer['uri'][0]}."
        )
    return found


def _shard_problems(samples: pa.Table, shards: Mapping[str, int]) -> list[str]:
    """Shards of samples that count which are not there, or end before their last sample does."""
    found = []
    ends = pc.add(samples["offset"], samples["num_bytes"])
    needed = samples.append_column("end", ends).group_by("shard").aggregate([("end", "max")]).sort_by("shard")
    wanted_bytes = dict(zip(needed["shard"].to_pylist(), needed["end_max"].to_pylist(), strict=True))
    if missing := [str(name) for name in wanted_bytes if name not in shards]:
        found.append(f"{len(missing)} shards of the ledger are missing, the first is {missing[0]}; ingest again.")
    short = [name for name, size in wanted_bytes.items() if name in shards and shards[name] < (size or 0)]
    if short:
        found.append(
            f"{len(short)} shards are shorter than their samples need, the first is {short[0]}; "
            "restore them from a copy, or ingest into another folder."
        )
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


def _stages(ledger: pa.Table) -> list[dict[str, Any]]:
    """Where the workers' time went, over all attempts; copies of a row count once."""
    per_row = ["source_id", "attempt", "run_id", "part_index", "status"]
    named = ledger.select([*per_row, "declared_s", *(f"{stage}_s" for stage in STAGES)])
    named = named.append_column("part_s", pa.chunked_array([_part_s(ledger)])).filter(ledger["source_id"].is_valid())
    found = []
    for stage in STAGES:
        rows = named.filter(named[f"{stage}_s"].is_valid())
        # A source is fetched once, whatever the number of its parts.
        identity, length = (per_row[:3], "declared_s") if stage == "fetch" else (per_row, "part_s")
        spent = rows.group_by(identity).aggregate([(f"{stage}_s", "max"), (length, "max")])
        seconds, video_s = _sum(spent[f"{stage}_s_max"]), _sum(spent[f"{length}_max"])
        found.append(
            {
                "stage": stage,
                "rows": spent.num_rows,
                "seconds": seconds,
                "video_seconds": video_s,
                "seconds_per_video_second": round(seconds / video_s, 4) if video_s else None,
            }
        )
    return found


def _part_s(rows: pa.Table) -> pa.Array:
    """[num_rows] seconds of each row's part; null where it has none."""
    return pc.subtract(rows["part_end_s"], rows["part_start_s"]).combine_chunks()


def _counts(column: pa.ChunkedArray) -> dict[Any, int]:
    """Value -> count, the most frequent first, then by name; nulls are left out."""
    pairs = [(item["values"], item["counts"]) for item in pc.value_counts(column.drop_null()).to_pylist()]
    return dict(sorted(pairs, key=lambda pair: (-pair[1], pair[0])))


def _where(table: pa.Table, column: str, value: str) -> pa.Table:
    return table.filter(pc.equal(table[column], value))


def _count(table: pa.Table, column: str, value: str) -> int:
    return _where(table, column, value).num_rows


def _sum(column: pa.Array | pa.ChunkedArray) -> float:
    # Exact, so that the order of rows cannot show.
    return _round(math.fsum(column.drop_null().to_numpy(zero_copy_only=False)))


def _round(value: float | None) -> float:
    return round(float(value or 0.0), 3)


def render_text(report: Report, *, num_failures: int = 20) -> str:
    """The report for a terminal: notes and problems first, then the books, then where the time went and what failed."""
    lines = [f"!! {note}" for note in report.notes] + [f"!! unbalanced: {problem}" for problem in report.problems]
    lines += [""] if lines else []
    lines += _table(("sources", "videos", "duration"), _balance(report), rule_before="total")
    lines.append("balanced, in videos and in seconds" if report.balanced else "NOT BALANCED, see above")
    if rows := _reasons(report):
        lines += ["", *_table(("reason", "videos", "duration", "for example"), rows)]
    lines += ["", *_table(("dataset", "", ""), _contents(report))]
    stages = [
        (
            stage["stage"],
            f"{stage['rows']:,}",
            duration(stage["seconds"]),
            "" if stage["seconds_per_video_second"] is None else f"{stage['seconds_per_video_second']:.3f}",
        )
        for stage in report.stages
    ]
    lines += ["", *_table(("worker time", "rows", "seconds", "per second of video"), stages)]
    if report.missing_seconds:
        lines += ["", *_shortened(report.missing_seconds, num_failures)]
    quarantined = [failure for failure in report.failures if failure["outcome"] == "quarantined"]
    if quarantined:
        lines += ["", *_failures(quarantined, num_failures)]
    return "\n".join(line.rstrip() for line in lines)


def _balance(report: Report) -> list[tuple[str, str, str]]:
    rows = [(name, f"{report.sources[name]:,}", duration(report.seconds[name])) for name in OUTCOMES]
    rows.append(("missing", "", duration(report.seconds["missing"])))
    return [*rows, ("total", f"{report.sources['total']:,}", duration(report.seconds["total"]))]


def _reasons(report: Report) -> list[tuple[str, str, str, str]]:
    """The reasons of sources by how many they struck, then those that only struck parts."""
    names = [*report.reasons, *(name for name in report.seconds_by_reason if name not in report.reasons)]
    return [
        (
            name,
            f"{report.reasons.get(name, 0):,}",
            duration(report.seconds_by_reason.get(name, 0.0)),
            _example(report, name),
        )
        for name in names
    ]


def _shortened(missing: Sequence[Mapping[str, Any]], limit: int) -> list[str]:
    lines = [f"seconds missing in kept sources ({min(limit, len(missing))} of {len(missing)}):"]
    for source in missing[:limit]:
        lines.append(f"  {source['uri']}")
        lines.append(
            f"      {source['declared_s']:.1f} s declared, {source['decoded_s']:.1f} s decoded, "
            f"{source['missing_s']:.1f} s missing{'. ' if source['detail'] else ''}{_short(source['detail'], 80)}"
        )
    return lines


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
    """Each with its reason, its attempts, and the end of what the child process said."""
    lines = [f"quarantined ({min(limit, len(quarantined))} of {len(quarantined)}):"]
    for failure in quarantined[:limit]:
        times = f"failed {failure['failures']} time{'' if failure['failures'] == 1 else 's'}"
        lines.append(f"  {failure['uri']}")
        lines.append(f"      {failure['reason']} in {failure['stage']}, {times}")
        said = [line.strip() for line in (failure["detail"] or "").splitlines() if line.strip()]
        lines += [f"      | {_short(line, 150)}" for line in said[-TAIL_LINES:]]
    return lines


def _example(report: Report, reason: str) -> str:
    failure = next((failure for failure in report.failures if failure["reason"] == reason), None)
    if failure is None:
        return "parts of kept sources"
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
