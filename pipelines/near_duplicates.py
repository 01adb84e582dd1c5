"""Videos that are nearly the same as an earlier one: a pass over the samples of a dataset after a run, off by default.

A video is its mean visual token: the mean of its tokens' centroids in the vocabulary's standardised units, so the
features themselves need not be stored, and likeness is the cosine. Both depend on nothing but the two videos and the
vocabulary, hence a verdict on a pair never changes because the corpus grows. Measured on ten real clips with untrained
S3D and the paper's 12 x 4 tree: a strong re-encoding 0.92 to 1.00 (median 0.98), one that begins 0.7 s later and is
brighter 0.80 to 0.99, different videos 0.55 at most, but generated kitchens that share their pictures up to 0.95, and
two clips of one person in one room 0.92. Histograms of tokens, the obvious choice, give 0.00 for a re-encoding where
the tree has more leaves than clips.

Videos are taken in the order of their URIs, and one is filtered if and only if it is too like one that is kept before
it (so no chain of likenesses joins what is different). The verdicts are a function of the set of videos, not of the
order in which they came: a newcomer with an earlier name takes the place of a later one, and a video whose original has
gone comes back, from its samples and without work. A run that finds the same set writes nothing.

Cost: one read of at most 256 kB a sample (2 ms on a local disk) and one product a pair of videos: 36 s for 30,000 on
one core, growing with the square, so 7 minutes for 100,000. They hold 4 kB a video and 1 kB a part in memory.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import vocabulary
from pipelines.ledger import LEDGER_SCHEMA, read_ledger, source_outcomes
from pipelines.storage import Folder

MIN_CLIPS = 4
"""Shorter videos are left alone: one or two clips of the same room are alike whatever happens in it."""

_STAGE, _REASON = "near_duplicates", "near_duplicate"
_WORK_COLUMNS = ("fetch_s", "transcode_s", "transcribe_s", "features_s")  # spent once, however often a row is repeated
_IDENTITY = ("source_id", "uri", "version", "size_bytes", "video_id")
_PART_COLUMNS = [
    *_IDENTITY,
    "attempt",
    "status",
    "part_index",
    "shard",
    "offset",
    "num_bytes",
    "num_clips",
    "vocabulary",
]
_BLOCK = 1024  # videos compared at once
_KEPT_BLOCK = 8192
_SLACK = 1e-4  # of float32 products; what lies within is computed again in float64, so blocks cannot decide
_HEAD_BYTES = 256 << 10  # holds a sample's json and tokens, unless its transcript is very long
_NUM_READERS = 16

Row = dict[str, Any]


def verdicts(folder: Folder, *, threshold: float) -> list[Row]:
    """Ledger rows (keys of LEDGER_SCHEMA, without run_id and code_version) that make the ledger say what is a near
    duplicate now: a filtered row for each source that has become one, its kept rows again for each that is none any
    more, all as an attempt of their own. Empty where the ledger says so already. Raises OSError if storage fails.
    """
    ledger = read_ledger(folder)
    reader = _Reader(folder)
    rows: list[Row] = []
    while found := _changes(ledger, reader, threshold=threshold):
        rows += found
        # An exact copy of a video that was filtered just now takes its place, until it is judged itself.
        ledger = pa.concat_tables([ledger, pa.Table.from_pylist(found, schema=LEDGER_SCHEMA)])
    return rows


@dataclass(frozen=True, kw_only=True)
class _Video:
    """A video with the sources that hold it: those that count as kept, and those filtered for being nearly another."""

    video_id: str
    uri: str  # of the first source, by which videos are ordered
    vocabulary: str
    kept: tuple[Row, ...]  # outcomes
    filtered: tuple[Row, ...]
    samples: tuple[Row, ...]  # ledger rows of the first source's kept parts


def _changes(ledger: pa.Table, reader: _Reader, *, threshold: float) -> list[Row]:
    """The rows that are missing in a ledger, exact copies not yet considered."""
    parts = _latest_parts(ledger)
    videos = list(_videos(ledger, parts))
    originals: dict[str, tuple[str, float]] = {}  # video id -> uri and likeness of what it nearly is
    for name in sorted({video.vocabulary for video in videos}):  # tokens of two vocabularies cannot be compared
        comparable = [v for v in videos if v.vocabulary == name and _num_clips(v) >= MIN_CLIPS]
        vectors = reader.vectors(comparable, vocabulary_id=name)
        for index, (original, likeness) in near_earlier(vectors, threshold=threshold).items():
            originals[comparable[index].video_id] = comparable[original].uri, likeness
    rows: list[Row] = []
    for video in videos:
        if found := originals.get(video.video_id):
            rows += [_filtered(outcome, *found, threshold=threshold) for outcome in video.kept]
        else:
            rows += [row for outcome in video.filtered for row in _kept_again(outcome, parts, ledger)]
    return rows


def near_earlier(vectors: np.ndarray, *, threshold: float) -> dict[int, tuple[int, float]]:
    """Which rows of [num_videos, dim] float32 unit vectors are too like an earlier row that is itself none of them:
    row -> (the first such row, likeness). Memory: blocks of 1024 x 8192 products."""
    kept: list[int] = []
    found: dict[int, tuple[int, float]] = {}
    for first in range(0, len(vectors), _BLOCK):
        block = vectors[first : first + _BLOCK]
        before = _candidates(block, vectors, kept, threshold=threshold)
        within = block @ block.T >= threshold - _SLACK
        for place, row in enumerate(range(first, first + len(block))):
            earlier = before.get(place, []) + [first + int(i) for i in np.flatnonzero(within[place, :place])]
            for other in earlier:
                likeness = float(np.dot(vectors[row].astype(np.float64), vectors[other].astype(np.float64)))
                if likeness >= threshold and other not in found:
                    found[row] = other, likeness
                    break
            else:
                kept.append(row)
    return found


def _candidates(block: np.ndarray, vectors: np.ndarray, kept: list[int], *, threshold: float) -> dict[int, list[int]]:
    """Row of a block -> kept rows before it that may be too like it, ascending."""
    found: dict[int, list[int]] = {}
    for first in range(0, len(kept), _KEPT_BLOCK):
        some = np.array(kept[first : first + _KEPT_BLOCK])
        for place, column in zip(*np.nonzero(block @ vectors[some].T >= threshold - _SLACK), strict=True):
            found.setdefault(int(place), []).append(int(some[column]))
    return found


def _latest_parts(ledger: pa.Table) -> dict[str, list[Row]]:
    """Source id -> what matters of the rows of its parts, kept or filtered, of the latest attempt that made any."""
    numbered = ledger.select(_PART_COLUMNS).append_column("row", pa.array(range(ledger.num_rows), pa.int64()))
    judged = pc.and_(pc.is_valid(ledger["part_index"]), pc.is_in(ledger["status"], pa.array(["kept", "filtered"])))
    found: dict[str, list[Row]] = {}
    for row in numbered.filter(judged).to_pylist():
        rows = found.setdefault(row["source_id"], [])
        if rows and rows[0]["attempt"] < row["attempt"]:
            rows.clear()
        if not rows or rows[0]["attempt"] == row["attempt"]:
            rows.append(row)
    return found


def _videos(ledger: pa.Table, parts: dict[str, list[Row]]) -> Iterator[_Video]:
    """The videos that are kept or would be but for their likeness, in the order of their first source's URI."""
    outcomes = source_outcomes(ledger)
    is_kept = pc.equal(outcomes["outcome"], "kept")
    is_near = pc.and_(pc.equal(outcomes["outcome"], "filtered"), pc.equal(outcomes["reason"], _REASON))
    members = outcomes.filter(pc.or_(is_kept, pc.fill_null(is_near, False)))
    members = members.sort_by([("uri", "ascending"), ("source_id", "ascending")])
    by_video: dict[str, list[Row]] = {}
    for outcome in members.select(["source_id", "uri", "video_id", "outcome", "attempt"]).to_pylist():
        if outcome["source_id"] in parts and outcome["video_id"] is not None:
            by_video.setdefault(outcome["video_id"], []).append(outcome)
    for video_id, sources in by_video.items():
        samples = _one_each(parts[sources[0]["source_id"]])
        yield _Video(
            video_id=video_id,
            uri=sources[0]["uri"],
            vocabulary=samples[0]["vocabulary"] or "" if samples else "",
            kept=tuple(one | _identity(parts[one["source_id"]]) for one in sources if one["outcome"] == "kept"),
            filtered=tuple(one for one in sources if one["outcome"] != "kept"),
            samples=samples,
        )


def _one_each(rows: list[Row]) -> tuple[Row, ...]:
    """The kept rows, one for each part: of two writers' the one whose shard comes first by name."""
    kept = sorted((row for row in rows if row["status"] == "kept"), key=lambda row: row["shard"], reverse=True)
    by_part = {row["part_index"]: row for row in kept}
    return tuple(by_part[index] for index in sorted(by_part))


def _identity(rows: list[Row]) -> Row:
    return {name: rows[0][name] for name in _IDENTITY}


def _num_clips(video: _Video) -> int:
    return sum(row["num_clips"] or 0 for row in video.samples)


def _filtered(outcome: Row, original: str, likeness: float, *, threshold: float) -> Row:
    return {name: outcome[name] for name in _IDENTITY} | {
        "attempt": outcome["attempt"] + 1,
        "status": "filtered",
        "stage": _STAGE,
        "reason": _REASON,
        "detail": f"likeness {likeness:.4f} to {original}, filters.near_duplicate is {threshold:g}",
    }


def _kept_again(outcome: Row, parts: dict[str, list[Row]], ledger: pa.Table) -> list[Row]:
    """The rows of a source's parts as an attempt after the verdict over it."""
    rows = ledger.take([row["row"] for row in parts[outcome["source_id"]]]).to_pylist()
    return [row | dict.fromkeys(_WORK_COLUMNS) | {"attempt": outcome["attempt"] + 1} for row in rows]


class _Reader:
    """Reads the tokens of videos and keeps what it has made of them."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._known: dict[str, np.ndarray] = {}

    def vectors(self, videos: list[_Video], *, vocabulary_id: str) -> np.ndarray:
        """[num_videos, dim] float32 of unit length: the mean centroid of each video, standardised."""
        missing = [video for video in videos if video.video_id not in self._known]
        if missing:
            self._read(missing, vocabulary_id=vocabulary_id)
        return np.stack([self._known[video.video_id] for video in videos]) if videos else np.empty((0, 1), np.float32)

    def _read(self, videos: list[_Video], *, vocabulary_id: str) -> None:
        tree = vocabulary.load(vocabulary_id, self._folder)
        centroids = (tree.centroids() - tree.mean) / tree.scale
        by_shard: dict[str, list[tuple[str, Row]]] = {}
        for video in videos:
            for row in video.samples:
                by_shard.setdefault(row["shard"], []).append((video.video_id, row))
        tokens: dict[str, list[np.ndarray]] = {}
        with ThreadPoolExecutor(_NUM_READERS) as pool:
            for pairs in pool.map(self._read_shard, by_shard, by_shard.values()):
                for video_id, found in pairs:
                    tokens.setdefault(video_id, []).append(found)
        for video_id, parts in tokens.items():
            used, counts = np.unique(np.concatenate(parts), return_counts=True)  # sorted: the order of parts is gone
            total = counts @ centroids[used].astype(np.float64)
            self._known[video_id] = (total / max(float(np.linalg.norm(total)), 1e-9)).astype(np.float32)

    def _read_shard(self, shard: str, wanted: list[tuple[str, Row]]) -> list[tuple[str, np.ndarray]]:
        wanted = sorted(wanted, key=lambda pair: pair[1]["offset"])
        with self._folder.fs.open_input_file(self._folder.path(f"shards/{shard}")) as stream:
            return [(owner, _read_tokens(stream, row["offset"], row["num_bytes"])) for owner, row in wanted]


def _read_tokens(stream: Any, offset: int, num_bytes: int) -> np.ndarray:
    """[num_clips] int64 visual tokens of the sample that lies at a place in a shard."""
    for size in (min(num_bytes, _HEAD_BYTES), num_bytes):
        stream.seek(offset)
        data = bytes(stream.read(size)) + bytes(1024 if size == num_bytes else 0)
        try:
            with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
                for member in tar:
                    if member.name.endswith(".tokens.npy"):
                        array = np.load(io.BytesIO(tar.extractfile(member).read()), allow_pickle=False)  # type: ignore[union-attr]
                        return np.asarray(array, np.int64)
        except (tarfile.ReadError, ValueError, EOFError):  # cut off in the middle
            if size == num_bytes:
                raise
    raise ValueError("a sample has no member *.tokens.npy; its shard was altered, ingest into another folder.")
