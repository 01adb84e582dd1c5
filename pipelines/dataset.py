"""The dataset folder: the contract between ingestion and everything that comes after it.

    dataset.json           schema version, clip grid, feature extractor + weights digest, vocabulary id
    shards/NAME.tar        WebDataset: {key}.json {key}.tokens.npy [{key}.features.npy]
    ledger/NAME.parquet    what became of every source; written after its shard, so a shard without it does not exist
    media/VIDEO_ID.mp4     normalised preview (optional; only people and pictures read it)
    vocabularies/ID/       vocabulary.safetensors + vocabulary.json

A dataset lives in a local folder or at any URL that pyarrow can open (s3://, gs://). Files are immutable and named
after their content, so a write that is repeated lands on itself, and two writers never disagree: readers take the union
of the ledger files and see each sample once. There is no lock and no index to corrupt; the price is that opening a
dataset reads all its ledger files (they are united when there are many, see `pipelines.ledger.compact`).

Time is container presentation time in seconds everywhere (the *clock*): what `ffprobe` calls `pts_time`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa

# The schema and the storage are part of the contract: whoever may import this module only finds them here.
from pipelines.ledger import LEDGER_SCHEMA as LEDGER_SCHEMA
from pipelines.ledger import read_ledger, unique_samples
from pipelines.storage import Folder as Folder
from pipelines.storage import absolute_url as absolute_url
from pipelines.storage import filesystem_of as filesystem_of

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ClipGrid:
    """Which frames make a clip. The paper's grid is the default: 20 fps, 30 frames, no overlap, 1.5 s (section 4.1)."""

    fps: float = 20.0
    """Frames per second that a video is brought to."""
    num_frames: int = 30
    """Frames of a clip."""
    stride_frames: int = 30
    """From the first frame of a clip to that of the next, where clips are uniform."""
    choice: Literal["uniform", "keyframes"] = "uniform"
    """uniform: a clip every stride_frames. keyframes: a clip at the first frame of each shot."""

    def __post_init__(self) -> None:
        if self.fps <= 0 or self.num_frames < 1 or self.stride_frames < 1:
            raise ValueError(f"clip grid {self} needs fps > 0, num_frames >= 1 and stride_frames >= 1.")
        if self.choice not in ("uniform", "keyframes"):
            raise ValueError(f"clip grid {self} needs choice uniform or keyframes.")

    @property
    def clip_s(self) -> float:
        return self.num_frames / self.fps

    @property
    def stride_s(self) -> float:
        return self.stride_frames / self.fps

    def first_frames(self, num_frames: int, shots: Sequence[int] = ()) -> list[int]:
        """First frame of each clip in a video or part of `num_frames` frames, whole clips only.

        `shots` are the first frames of shots, in any order. With keyframes a clip begins at frame 0 and at each shot,
        unless the clip before is still going on there.
        """
        if self.choice == "uniform":
            return [clip * self.stride_frames for clip in range(self.num_clips(num_frames))]
        chosen: list[int] = []
        for first in sorted({0, *shots}):
            is_free = not chosen or first >= chosen[-1] + self.num_frames
            if first >= 0 and is_free and first + self.num_frames <= num_frames:
                chosen.append(first)
        return chosen

    def num_clips(self, num_video_frames: int) -> int:
        """Whole clips on the uniform grid in a video of so many frames; an incomplete last clip is not one."""
        if num_video_frames < self.num_frames:
            return 0
        return 1 + (num_video_frames - self.num_frames) // self.stride_frames


@dataclass(frozen=True, kw_only=True, slots=True)
class Sentence:
    """A transcript unit on the clock. `confidence` is the recogniser's own, in [0, 1]; null where it gives none."""

    start_s: float
    end_s: float
    text: str
    confidence: float | None = None
    origin: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """A sentence with the visual tokens under it (paper section 4.1); text is empty where nobody speaks."""

    text: str
    start_s: float
    end_s: float
    first_clip: int
    visual_tokens: np.ndarray  # [num_clips] int64


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What one shard entry holds: one part of one video."""

    key: str
    video_id: str
    source: str
    title: str
    part_index: int
    part_start_s: float
    part_end_s: float
    clip_grid: ClipGrid
    sentences: tuple[Sentence, ...]
    language: str | None
    asr: Mapping[str, str]  # name, version
    extractor: Mapping[str, str]  # name, digest
    vocabulary: str
    lineage: Mapping[str, str]  # code version, config digest; the run id is in the ledger, or bytes would differ by run
    visual_tokens: np.ndarray  # [num_clips], unsigned
    features: np.ndarray | None = field(default=None)  # [num_clips, dim] float16
    metadata: Mapping[str, str] = field(default_factory=dict)  # what a source list said beside uri and title
    clip_starts_s: tuple[float, ...] | None = None  # on the clock; null where clips lie on the uniform grid

    @property
    def starts_s(self) -> np.ndarray:
        """[num_clips] float64: the start of each clip on the clock."""
        if self.clip_starts_s is not None:
            return np.array(self.clip_starts_s, np.float64)
        return self.part_start_s + np.arange(len(self.visual_tokens)) * self.clip_grid.stride_s

    def clip_span_s(self, clip: int) -> tuple[float, float]:
        """Start and end of a clip on the clock."""
        start_s = self.part_start_s + clip * self.clip_grid.stride_s
        if self.clip_starts_s is not None:
            start_s = self.clip_starts_s[clip]
        return start_s, start_s + self.clip_grid.clip_s

    def segments(self, *, silent_tokens: int = 16) -> list[Segment]:
        """Each sentence with the tokens whose clip overlaps it; a sample without speech is cut every `silent_tokens`.

        Sixteen tokens per segment where there is no speech is the paper's choice (section 4.1). A sentence that falls
        behind the last whole clip keeps its text and gets no tokens.
        """
        tokens = self.visual_tokens.astype(np.int64)
        if not self.sentences:
            return [
                self._segment("", first, min(first + silent_tokens, len(tokens)), tokens)
                for first in range(0, len(tokens), silent_tokens)
            ]
        starts_s = self.starts_s
        segments = []
        for sentence in self.sentences:
            under = (starts_s < sentence.end_s) & (starts_s + self.clip_grid.clip_s > sentence.start_s)
            clips = np.flatnonzero(under)
            first, last = (int(clips[0]), int(clips[-1]) + 1) if len(clips) else (0, 0)
            segments.append(
                Segment(
                    text=sentence.text,
                    start_s=sentence.start_s,
                    end_s=sentence.end_s,
                    first_clip=first,
                    visual_tokens=tokens[first:last],
                )
            )
        return segments

    def _segment(self, text: str, first: int, last: int, tokens: np.ndarray) -> Segment:
        return Segment(
            text=text,
            start_s=self.clip_span_s(first)[0],
            end_s=self.clip_span_s(last - 1)[1],
            first_clip=first,
            visual_tokens=tokens[first:last],
        )

    def members(self) -> dict[str, bytes]:
        """The files of this sample in a shard, in the order in which they are written."""
        arrays = {"visual_tokens", "features"}
        record = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in arrays}
        record["clip_grid"] = dataclasses.asdict(self.clip_grid)
        record["sentences"] = [dataclasses.asdict(sentence) for sentence in self.sentences]
        members = {
            f"{self.key}.json": json.dumps(record, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode(),
            f"{self.key}.tokens.npy": _npy(self.visual_tokens),
        }
        if self.features is not None:
            members[f"{self.key}.features.npy"] = _npy(self.features)
        return members

    @classmethod
    def from_members(cls, members: Mapping[str, bytes]) -> Sample:
        """The inverse of `members`. Raises ValueError if a member is missing or is not what it should be."""
        by_suffix = {name.split(".", 1)[1]: data for name, data in members.items()}
        if missing := {"json", "tokens.npy"} - by_suffix.keys():
            raise ValueError(f"a sample lacks its members {sorted(missing)}; found {sorted(members)}.")
        record = json.loads(by_suffix["json"])
        record["clip_grid"] = ClipGrid(**record["clip_grid"])
        record["sentences"] = tuple(Sentence(**sentence) for sentence in record["sentences"])
        if record.get("clip_starts_s") is not None:
            record["clip_starts_s"] = tuple(record["clip_starts_s"])
        features = by_suffix.get("features.npy")
        return cls(
            **record,
            visual_tokens=_from_npy(by_suffix["tokens.npy"]),
            features=None if features is None else _from_npy(features),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetInfo:
    """dataset.json: what every sample of a dataset has in common."""

    clip_grid: ClipGrid
    extractor: str
    extractor_digest: str
    feature_dim: int
    vocabulary: str
    num_visual_tokens: int
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> bytes:
        return (json.dumps(dataclasses.asdict(self), sort_keys=True, indent=1) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes) -> DatasetInfo:
        record = json.loads(data)
        if record.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(
                f"the dataset has schema version {record.get('schema_version')}, this code reads {SCHEMA_VERSION}; "
                "ingest it again or use the matching release."
            )
        return cls(**{**record, "clip_grid": ClipGrid(**record["clip_grid"])})


class Dataset:
    """A dataset opened for reading: the index of its samples in memory, the samples on demand."""

    def __init__(self, url: str) -> None:
        """Raises FileNotFoundError where there is no dataset."""
        self.url = absolute_url(url)
        self.folder = Folder.at(url)
        if not self.folder.exists("dataset.json"):
            raise FileNotFoundError(f"no dataset at {url}: make one with `videobert ingest SOURCE --dataset {url}`.")
        self.info = DatasetInfo.from_json(self.folder.read("dataset.json"))
        self._index: pa.Table | None = None

    def ledger(self) -> pa.Table:
        """All rows of all ledger files, in the order of their names. Columns: LEDGER_SCHEMA."""
        return read_ledger(self.folder)

    def sample_index(self) -> pa.Table:
        """The rows of the samples that count, one per key, sorted by key; see `pipelines.ledger.unique_samples`.

        Read once, so that digest and samples speak of the same set while others write; open again to see more.
        """
        if self._index is None:
            self._index = unique_samples(self.ledger())
        return self._index

    def digest(self) -> str:
        """Names the set of samples: equal if and only if the same samples lie in the same shards."""
        index = self.sample_index()
        lines = zip(*(index[name].to_pylist() for name in ("key", "shard", "offset")), strict=True)
        return hashlib.sha256("\n".join(f"{k} {s} {o}" for k, s, o in lines).encode()).hexdigest()

    def samples(self) -> Iterator[Sample]:
        """Every kept sample once, sorted by key within its shard, shard by shard; each shard is read once."""
        by_shard: dict[str, list[tuple[int, int]]] = {}
        index = self.sample_index()
        for shard, offset, size in zip(
            *(index[name].to_pylist() for name in ("shard", "offset", "num_bytes")), strict=True
        ):
            by_shard.setdefault(shard, []).append((offset, size))
        for shard in sorted(by_shard):
            with self.folder.fs.open_input_file(self.folder.path(f"shards/{shard}")) as stream:
                for offset, size in sorted(by_shard[shard]):
                    stream.seek(offset)
                    yield Sample.from_members(read_members(bytes(stream.read(size))))

    def centroids(self) -> np.ndarray:
        """[num_visual_tokens, feature_dim] float32: the centroid of each visual token; an empty leaf has its
        parent's."""
        from safetensors.numpy import load

        tensors = load(self.folder.read(f"vocabularies/{self.info.vocabulary}/vocabulary.safetensors"))
        return np.asarray(tensors["centroids"])


def read_members(data: bytes) -> dict[str, bytes]:
    """The files in a run of tar members, by name."""
    # A slice out of the middle of a tar has no end marker; two zero blocks make it a whole one.
    with tarfile.open(fileobj=io.BytesIO(data + bytes(1024)), mode="r:") as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def token_dtype(num_visual_tokens: int) -> np.dtype[Any]:
    """The smallest unsigned type that holds every token id: the paper's 20,736 fit in two bytes."""
    return np.dtype(np.uint16 if num_visual_tokens <= 1 << 16 else np.uint32)


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def _from_npy(data: bytes) -> np.ndarray:
    return np.asarray(np.load(io.BytesIO(data), allow_pickle=False))
