"""A dataset as training sees it: segments in memory, tokenised once.

Wordpieces and visual tokens of the paper's whole corpus are 23,186 h / 1.5 s = 56 M visual tokens and about as many
wordpieces, half a gigabyte as int32, so there is no streaming here: reading shards is a pass at the start, after
which a pack costs a few gathers. Videos are held out by a hash of their id, so a video keeps its side while the
corpus grows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from pipelines.dataset import Dataset, Sample
from training.counter import Stream
from training.masking import MaskConfig, mask
from training.packing import Document, Pack, Targets, collate, sequence, visual_offset
from training.plan import EpochPlan, Examples, Lengths
from training.text import MASK, TextVocabulary, TokenLayout


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The segments of some videos: ids in one row, with offsets."""

    text: np.ndarray  # int32 [all wordpieces]
    text_offsets: np.ndarray  # int64 [N + 1]
    visual: np.ndarray  # int32 [all visual tokens], counted from 0
    visual_offsets: np.ndarray  # int64 [N + 1]
    video: np.ndarray  # int64 [N]
    next: np.ndarray  # int64 [N]
    video_ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.video)

    @property
    def lengths(self) -> Lengths:
        return Lengths(
            text=np.diff(self.text_offsets), visual=np.diff(self.visual_offsets), video=self.video, next=self.next
        )

    def text_of(self, segment: int) -> np.ndarray:
        return self.text[self.text_offsets[segment] : self.text_offsets[segment + 1]].astype(np.int64)

    def visual_of(self, segment: int) -> np.ndarray:
        return self.visual[self.visual_offsets[segment] : self.visual_offsets[segment + 1]].astype(np.int64)


def held_out(video_id: str, fraction: float) -> bool:
    """Whether a video is kept from training: about `fraction` of all videos, by nothing but its id."""
    word = int.from_bytes(hashlib.sha256(f"held out {video_id}".encode()).digest()[:8], "big")
    return word < fraction * 2**64


def sentences(samples: Iterable[Sample]) -> Iterator[str]:
    """The sentences of some samples as they are trained on, in their order."""
    for sample in samples:
        for sentence in sample.sentences:
            yield spoken(sentence.text)


def spoken(text: str) -> str:
    """A sentence without its closing mark: captions have one, recognisers and masked templates do not."""
    return text.strip().rstrip(".!?").rstrip()


def read_split(dataset: Dataset, *, fraction: float) -> tuple[list[Sample], list[Sample]]:
    """Samples to train on and samples held out.

    Raises ValueError where nothing is left to train on.
    """
    samples = sorted(dataset.samples(), key=lambda sample: (sample.video_id, sample.part_index, sample.key))
    train = [sample for sample in samples if not held_out(sample.video_id, fraction)]
    held = [sample for sample in samples if held_out(sample.video_id, fraction)]
    if not samples:
        raise ValueError(f"{dataset.url} holds no samples; `videobert report` says what became of the sources.")
    if not train:
        raise ValueError(f"all {len(held)} samples are held out; ingest more videos or set held_out_fraction=0.")
    return train, held


def build_corpus(samples: Iterable[Sample], vocabulary: TextVocabulary) -> Corpus:
    """Tokenise the segments of samples. A segment with neither words nor visual tokens is left out."""
    texts: list[str] = []
    visual: list[np.ndarray] = []
    video: list[int] = []
    following: list[int] = []
    video_ids: dict[str, int] = {}
    for sample in samples:
        kept = [segment for segment in sample.segments() if spoken(segment.text) or len(segment.visual_tokens)]
        number = video_ids.setdefault(sample.video_id, len(video_ids))
        for index, segment in enumerate(kept):
            following.append(len(texts) + 1 if index + 1 < len(kept) else -1)
            texts.append(spoken(segment.text))
            visual.append(segment.visual_tokens)
            video.append(number)
    text = vocabulary.encode_all(texts) if texts else []
    return Corpus(
        text=_flat(text),
        text_offsets=_offsets(text),
        visual=_flat(visual),
        visual_offsets=_offsets(visual),
        video=np.array(video, np.int64),
        next=np.array(following, np.int64),
        video_ids=tuple(video_ids),
    )


@dataclass(frozen=True, kw_only=True)
class PackReader:
    """Makes the packs of a plan."""

    corpus: Corpus
    vocabulary: TextVocabulary
    layout: TokenLayout
    masking: MaskConfig
    mask_misaligned: bool
    seed: int

    def pack(self, plan: EpochPlan, index: int) -> Pack:
        return collate([self.document(plan, int(row)) for row in plan.pack(index)])

    def document(self, plan: EpochPlan, row: int) -> Document:
        """One example of a plan with its masks."""
        examples = plan.examples
        text, visual = self._material(examples, row)
        example, epoch = int(examples.segment[row]), plan.epoch
        text, text_targets = self._mask(text, self.vocabulary.ordinary_ids, Stream.TEXT_MASK, epoch, example)
        shifted = visual + self.layout.first_visual
        all_visual = np.arange(self.layout.first_visual, self.layout.size)
        shifted, visual_targets = self._mask(shifted, all_visual, Stream.VISUAL_MASK, epoch, example)
        tokens, types = sequence(
            text, shifted - self.layout.first_visual, layout=self.layout, vocabulary=self.vocabulary
        )
        aligned = int(examples.aligned[row])
        if aligned == 0 and not self.mask_misaligned:
            return Document(tokens=tokens, types=types, aligned=aligned)
        return Document(
            tokens=tokens,
            types=types,
            text=Targets(text_targets.positions + 1, text_targets.ids),
            visual=Targets(
                visual_targets.positions + visual_offset(len(text)), visual_targets.ids - self.layout.first_visual
            ),
            aligned=aligned,
        )

    def _material(self, examples: Examples, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Wordpieces and visual tokens of an example, joined, subsampled and cut as planned."""
        segment, joined = int(examples.segment[row]), bool(examples.joined[row])
        text = _with_next(self.corpus.text_of, segment, self.corpus.next, joined)[: examples.num_text[row]]
        visual = _with_next(self.corpus.visual_of, int(examples.visual_segment[row]), self.corpus.next, joined)
        visual = visual[examples.phase[row] :: examples.rate[row]][: examples.num_visual[row]]
        assert (len(text), len(visual)) == (examples.num_text[row], examples.num_visual[row])
        return text, visual

    def _mask(
        self, tokens: np.ndarray, replacements: np.ndarray, stream: Stream, epoch: int, example: int
    ) -> tuple[np.ndarray, Targets]:
        rate = self.masking.text_rate if stream is Stream.TEXT_MASK else self.masking.visual_rate
        return mask(
            tokens,
            rate=rate,
            config=self.masking,
            mask_id=self.vocabulary.ids[MASK],
            replacements=replacements,
            seed=self.seed,
            epoch=epoch,
            stream=stream,
            example=example,
        )


def _with_next(read: Callable[[int], np.ndarray], segment: int, following: np.ndarray, joined: bool) -> np.ndarray:
    after = int(following[segment])
    return np.concatenate([read(segment), read(after)]) if joined and after >= 0 else read(segment)


def _flat(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts).astype(np.int32) if parts else np.empty(0, np.int32)


def _offsets(parts: list[np.ndarray]) -> np.ndarray:
    return np.cumsum([0, *map(len, parts)]).astype(np.int64)
