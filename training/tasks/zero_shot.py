"""Zero-shot action classification by a masked template (paper section 5.1, table 1).

Text "now let me show you how to [MASK] the [MASK]" and the visual tokens of a step; the first mask is read as its
verb, the second as its object. Nothing was trained for it. Items come from truth files beside the source videos,
`v.mp4` with `v.truth.json`: one item a step, with the visual tokens whose clip lies at least half within the step.

Modes: `open` ranks the whole text vocabulary, as the paper does; `restricted` ranks the labels; `prior-corrected`
ranks the labels by log p(label | video) - log p(label | no video), which takes out what the sentence alone suggests.
Baselines: the language prior (template without video) and the most frequent labels of the training videos. A label of
several wordpieces gets as many masks and the sum of their log-probabilities; in `open` mode it cannot be right, and
counts as wrong. Ties count against us.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import numpy as np

from pipelines.dataset import Dataset, Sample, filesystem_of
from training.metrics import Share, top_k
from training.reader import held_out
from training.text import MASK, UNKNOWN
from training.trained import Query, TrainedModel

TEMPLATE = f"now let me show you how to {MASK} the {MASK}"
NO_VIDEO = np.empty(0, np.int64)
MIN_CLIP_OVERLAP = 0.5

Split = Literal["held_out", "train", "all"]


@dataclass(frozen=True, kw_only=True)
class Item:
    """A step of a video: what is to be read, and from which tokens."""

    video_id: str
    index: int
    verb: str
    object: str
    visual_tokens: np.ndarray  # [num_clips] int64


class Row(NamedTuple):
    """One method in one mode: top-1 and top-5 of verbs and objects."""

    method: str
    mode: str
    verb_top1: Share
    verb_top5: Share
    object_top1: Share
    object_top5: Share


@dataclass(frozen=True, kw_only=True)
class ZeroShotResult:
    """All numbers of an evaluation."""

    model: str
    split: str
    num_videos: int
    num_steps: int  # in the truth files of the split
    num_without_tokens: int  # steps under which no clip lies
    num_verbs: int
    num_objects: int
    num_eligible: int  # items whose verb and object are both among the labels
    num_multi_piece_labels: int
    rows: tuple[Row, ...]  # over the eligible
    rows_all: tuple[Row, ...]  # over all steps; what cannot be answered is wrong

    def row(self, method: str, mode: str) -> Row:
        return next(row for row in self.rows if (row.method, row.mode) == (method, mode))

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    def to_dict(self) -> dict[str, Any]:
        plain = (field.name for field in fields(self) if not field.name.startswith("rows"))
        record: dict[str, Any] = {name: getattr(self, name) for name in plain}
        record["chance"] = {"verb_top1": 1 / max(1, self.num_verbs), "object_top1": 1 / max(1, self.num_objects)}
        record["eligible"] = [_row_dict(row) for row in self.rows]
        record["all"] = [_row_dict(row) for row in self.rows_all]
        return record

    def table(self) -> str:
        """For a terminal: percentages over the eligible items, denominators above."""
        lines = [
            f"zero-shot, {self.split} videos: {self.num_videos} videos, {self.num_steps} steps, "
            f"{self.num_eligible} eligible ({self.num_without_tokens} steps without visual tokens), "
            f"{self.num_verbs} verbs, {self.num_objects} objects",
            f"{'':<34}{'verb t1':>9}{'verb t5':>9}{'obj t1':>9}{'obj t5':>9}",
        ]
        for row in self.rows:
            shares = (row.verb_top1, row.verb_top5, row.object_top1, row.object_top5)
            lines.append(f"{row.method + ', ' + row.mode:<34}" + "".join(f"{100 * s.value:>9.1f}" for s in shares))
        chance = (min(1.0, k / max(1, n)) for n in (self.num_verbs, self.num_objects) for k in (1, 5))
        lines.append(f"{'chance, restricted':<34}" + "".join(f"{100 * value:>9.1f}" for value in chance))
        return "\n".join(lines)


class Labels(NamedTuple):
    verbs: tuple[str, ...]
    objects: tuple[str, ...]


def evaluate(
    trained: TrainedModel,
    dataset: Dataset,
    *,
    model_name: str,
    split: Split = "held_out",
    verbs: Sequence[str] = (),
    objects: Sequence[str] = (),
) -> ZeroShotResult:
    """Score a model on the steps of a dataset's videos.

    Args:
        split: by the model's own held-out fraction.
        verbs, objects: labels; without them those of the truth files.

    Raises FileNotFoundError if no video has a truth file, ValueError if the split has no step to score.
    """
    samples, truths = list(dataset.samples()), {}
    for sample in samples:
        if sample.video_id not in truths:
            truths[sample.video_id] = read_truth(sample.source)
    known = {video: truth for video, truth in truths.items() if truth is not None}
    if not known:
        raise FileNotFoundError(
            f"none of the {len(truths)} videos of {dataset.url} has its truth beside it; "
            "put v.truth.json next to the source v.mp4."
        )
    fraction = float(trained.training["held_out_fraction"])
    chosen = {video: truth for video, truth in known.items() if in_split(video, split, fraction)}
    items = step_items(samples, chosen)
    if not any(len(item.visual_tokens) for item in items):
        raise ValueError(
            f"no step of the {len(chosen)} {split} videos has a visual token; choose another --split or ingest more."
        )
    labels = Labels(
        tuple(verbs) or tuple(sorted({verb for truth in known.values() for verb in truth["verbs"]})),
        tuple(objects) or tuple(sorted({name for truth in known.values() for name in truth["objects"]})),
    )
    training = [truth for video, truth in known.items() if in_split(video, "train", fraction)]
    return _score(trained, items, labels, training, model_name=model_name, split=split, num_videos=len(chosen))


def in_split(video_id: str, split: Split, fraction: float) -> bool:
    return split == "all" or held_out(video_id, fraction) == (split == "held_out")


def read_truth(source: str) -> dict[str, Any] | None:
    """The truth file beside a source video, or None where there is none."""
    from pyarrow.fs import FileType

    fs, path = filesystem_of(source)
    path = f"{path.rpartition('.')[0]}.truth.json"
    if fs.get_file_info(path).type != FileType.File:
        return None
    with fs.open_input_file(path) as stream:
        return dict(json.loads(bytes(stream.read())))


def step_items(samples: Iterable[Sample], truths: dict[str, dict[str, Any]]) -> list[Item]:
    """One item a step, over the parts of a video in their order; a step without clips has no tokens."""
    by_video: dict[str, list[Sample]] = {}
    for sample in sorted(samples, key=lambda sample: (sample.video_id, sample.part_index)):
        by_video.setdefault(sample.video_id, []).append(sample)
    return [
        Item(
            video_id=video,
            index=int(step["index"]),
            verb=str(step["verb"]),
            object=str(step["object"]),
            visual_tokens=np.concatenate(
                [tokens_under(part, start_s=step["start_s"], end_s=step["end_s"]) for part in by_video[video]]
            ),
        )
        for video, truth in sorted(truths.items())
        for step in truth["steps"]
    ]


def tokens_under(sample: Sample, *, start_s: float, end_s: float) -> np.ndarray:
    """[num_clips] the visual tokens whose clip lies at least half within a stretch of the clock."""
    starts_s = sample.starts_s
    clip_s = sample.clip_grid.clip_s
    overlap_s = np.minimum(starts_s + clip_s, end_s) - np.maximum(starts_s, start_s)
    return sample.visual_tokens[overlap_s >= MIN_CLIP_OVERLAP * clip_s].astype(np.int64)


def label_scores(
    trained: TrainedModel, visual: Sequence[np.ndarray], labels: Sequence[str], *, slot: int
) -> np.ndarray:
    """[N, num_labels] log-probability of each label at a slot of the template: 0 the verb, 1 the object.

    A label of n wordpieces is read from n masks in its slot; the other slot keeps one. A label with a letter that the
    vocabulary lacks gets minus infinity.
    """
    unknown = trained.vocabulary.ids[UNKNOWN]
    pieces = [trained.vocabulary.encode(label) for label in labels]
    pieces = [piece[:0] if unknown in piece else piece for piece in pieces]
    scores_NC = np.full((len(visual), len(labels)), -np.inf)
    for count in sorted({len(piece) for piece in pieces if len(piece)}):
        masks = [MASK, MASK]
        masks[slot] = " ".join([MASK] * count)
        text = "now let me show you how to {} the {}".format(*masks)
        columns = [column for column, piece in enumerate(pieces) if len(piece) == count]
        ids_Cn = np.stack([pieces[column] for column in columns])
        first = slot  # the verb's masks stand first; the object's come after the verb's one
        for row, answer in enumerate(trained.ask([Query(text, tokens) for tokens in visual])):
            log_nW = answer.log_probabilities[first : first + count]
            scores_NC[row, columns] = log_nW[np.arange(count), ids_Cn].sum(axis=1)
    return scores_NC


def open_scores(trained: TrainedModel, visual: Sequence[np.ndarray]) -> np.ndarray:
    """[N, 2, num_text] log-probabilities at the two masks of the template."""
    answers = trained.ask([Query(TEMPLATE, tokens) for tokens in visual])
    return np.stack([answer.log_probabilities for answer in answers])


def _score(
    trained: TrainedModel,
    items: Sequence[Item],
    labels: Labels,
    training: Sequence[dict[str, Any]],
    *,
    model_name: str,
    split: str,
    num_videos: int,
) -> ZeroShotResult:
    answerable = [item for item in items if len(item.visual_tokens)]
    eligible = [i for i in answerable if i.verb in labels.verbs and i.object in labels.objects]
    if not eligible:
        raise ValueError("no step has both its verb and its object among the labels; give other --verbs and --nouns.")
    longest = trained.model.config.max_positions - len(trained.vocabulary.encode(TEMPLATE)) - 16
    visual = [item.visual_tokens[:longest] for item in eligible]
    rows, rows_all = [], []
    for ranking in _rankings(trained, visual, labels, training):
        parts = []
        for scores_NC, known, key in zip(ranking.scores, ranking.names, ("verb", "object"), strict=True):
            column_of = {name: column for column, name in enumerate(known)}
            truths = [column_of.get(getattr(item, key), -1) for item in eligible]
            parts += [top_k(scores_NC, truths, k=k) for k in (1, 5)]
        rows.append(Row(ranking.method, ranking.mode, *parts))
        rows_all.append(Row(ranking.method, ranking.mode, *(Share(right=part.right, of=len(items)) for part in parts)))
    pieces = [len(trained.vocabulary.encode(label)) for label in (*labels.verbs, *labels.objects)]
    return ZeroShotResult(
        model=model_name,
        split=split,
        num_videos=num_videos,
        num_steps=len(items),
        num_without_tokens=len(items) - len(answerable),
        num_verbs=len(labels.verbs),
        num_objects=len(labels.objects),
        num_eligible=len(eligible),
        num_multi_piece_labels=sum(count > 1 for count in pieces),
        rows=tuple(rows),
        rows_all=tuple(rows_all),
    )


class Ranking(NamedTuple):
    """One method's scores, [N, columns] for verbs and for objects, and what the columns mean."""

    method: str
    mode: str
    scores: tuple[np.ndarray, np.ndarray]
    names: tuple[Sequence[str], Sequence[str]]


def _rankings(
    trained: TrainedModel, visual: Sequence[np.ndarray], labels: Labels, training: Sequence[dict[str, Any]]
) -> list[Ranking]:
    """Every method in every mode it has."""
    num, words = len(visual), trained.vocabulary.tokens
    open_N2W, prior_2W = open_scores(trained, visual), open_scores(trained, [NO_VIDEO])[0]
    steps = [step for truth in training for step in truth["steps"]]
    seen, prior, corrected, frequent = [], [], [], []
    for slot, (key, names) in enumerate(zip(("verb", "object"), labels, strict=True)):
        seen.append(label_scores(trained, visual, names, slot=slot))
        without = label_scores(trained, [NO_VIDEO], names, slot=slot)
        prior.append(without.repeat(num, 0))
        # A label that cannot be spelled has minus infinity on both sides; it stays last.
        corrected.append(np.where(np.isfinite(without), seen[slot] - np.nan_to_num(without, neginf=0.0), -np.inf))
        frequent.append(_frequencies([step[key] for step in steps], names)[None].repeat(num, 0))
    vocabulary = (words, words)
    prior_open = (prior_2W[0][None].repeat(num, 0), prior_2W[1][None].repeat(num, 0))
    return [
        Ranking("VideoBERT", "open", (open_N2W[:, 0], open_N2W[:, 1]), vocabulary),
        Ranking("VideoBERT", "restricted", (seen[0], seen[1]), labels),
        Ranking("VideoBERT", "prior-corrected", (corrected[0], corrected[1]), labels),
        Ranking("language prior", "open", prior_open, vocabulary),
        Ranking("language prior", "restricted", (prior[0], prior[1]), labels),
        Ranking("most frequent", "restricted", (frequent[0], frequent[1]), labels),
    ]


def _frequencies(seen: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """[num_labels] how often each label occurs; equal counts are ranked by the order of the labels."""
    counts = Counter(seen)
    return np.array([counts[name] - column / (len(names) + 1) for column, name in enumerate(names)], float)


def _row_dict(row: Row) -> dict[str, Any]:
    record: dict[str, Any] = {"method": row.method, "mode": row.mode}
    for name in ("verb_top1", "verb_top5", "object_top1", "object_top5"):
        share: Share = getattr(row, name)
        record[name] = {"value": share.value, "right": share.right, "of": share.of}
    return record
