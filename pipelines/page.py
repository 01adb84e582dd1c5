"""The report as one self-contained HTML file: the ledger, where the time went, and what the visual tokens look like.

Numbers say that a run succeeded; pictures say whether the tokens mean anything. So the page shows, for the most used
tokens, the real clips nearest to their centroids and the words spoken over them, and stretches of video with transcript
and tokens on one time axis. Everything is inlined (no script, no network), which bounds what it can show: at most
MAX_SAMPLES samples are read, NUM_TOKENS tokens drawn, and a typical page is one to three megabytes.
"""

from __future__ import annotations

import base64
import collections
import io
import math
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipelines import vocabulary
from pipelines.dataset import Dataset, Sample
from pipelines.errors import REASONS
from pipelines.ledger import OUTCOMES, judged_parts
from pipelines.report import Report, duration, report_of
from pipelines.storage import Folder

MAX_SAMPLES = 5000
MAX_SEGMENTS = 100_000  # held in memory for the words of a token, about 200 bytes each
NUM_TOKENS = 18
CLIPS_PER_TOKEN = 3
FRAMES_PER_CLIP = 4
NUM_STORIES = 2
CLIPS_PER_STORY = 12
NUM_RANKS = 80  # bars of the token histogram
NUM_NAMED = 20  # sources that are named one by one, of the quarantined ones and of those with missing seconds
TRANSCRIPTS_BY_SURENESS = ("captions", "whisper", "sphinx")
CELLS_PER_CLIP = 12  # resolution of a story's time axis: an eighth of a second for the paper's clips
STRIP_PIXELS, STRIP_GAP = 96, 2
STORY_PIXELS = 132

# Words that say nothing about a picture. Short on purpose: PMI takes care of the rest.
STOPWORDS = frozenset(
    """the and you your for this that with now then just its it's are was will can going gonna have has had let lets
    let's what when where how here there they them our out about into from all not but one some get got okay
    also very really want don't i'm we're you're it'll we'll i'll than because like well yeah""".split()  # noqa: SIM905
)
WORD = re.compile(r"[^\W\d_]{3,}(?:'[^\W\d_]+)?")


@dataclass(frozen=True)
class Section:
    """Something that the caller adds to the page; `html` is inserted as it is, so it must be trusted and escaped."""

    title: str
    html: str


@dataclass(frozen=True, order=True)
class Clip:
    """One clip of a token, ordered by the distance of its standardised feature to the token's centroid."""

    distance: float
    video_id: str
    start_s: float
    title: str = field(compare=False)


@dataclass
class Gathered:
    """What the page needs from the samples, collected in one pass over them."""

    num_samples: int = 0
    counts: collections.Counter[int] = field(default_factory=collections.Counter)
    # token -> (n, video) -> the video's n-th nearest clip of a sample: in this order one clip per video comes first
    nearest: dict[int, dict[tuple[int, str], Clip]] = field(default_factory=dict)
    segments: list[tuple[frozenset[int], frozenset[str]]] = field(default_factory=list)
    stories: list[Sample] = field(default_factory=list)  # without features
    has_features: bool = True


def render_page(
    dataset: Dataset | str, out: Path | str, *, extra: Sequence[Section] = (), title: str = "What became of the videos"
) -> Path:
    """Write the page for a dataset (or its URL) to a local file and return its path.

    A folder whose ledger holds failures only has a page too, and so has one whose shards are damaged, both without
    tokens. Videos without a preview are noted on it.
    Raises FileNotFoundError where there is neither a ledger nor a dataset.
    """
    import jinja2

    url = dataset if isinstance(dataset, str) else dataset.url
    report = report_of(url)
    if isinstance(dataset, str) and Folder.at(url).exists("dataset.json"):
        dataset = Dataset(url)
    shown: dict[str, Any] = {}
    if isinstance(dataset, Dataset):
        try:
            shown = _pictures(dataset, report)
        except (OSError, ValueError, tarfile.TarError) as error:  # a shard is gone or cut; the report says which
            shown = {"unreadable": f"The samples cannot be read, so none is shown: {error}"}
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("pipelines"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    templates.filters |= {"duration": duration, "number": lambda value: f"{value:,}"}
    page = templates.get_template("page.html").render(
        title=title,
        url=url,
        report=report,
        outcomes=OUTCOMES,
        balance=balance_bars(report),
        durations=duration_columns(report),
        missing=report.missing_seconds[:NUM_NAMED],
        quarantined=[failure for failure in report.failures if failure["outcome"] == "quarantined"],
        num_named=NUM_NAMED,
        stages=stage_bars(report),
        extra=extra,
        **shown,
    )
    path = Path(out).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _pictures(dataset: Dataset, report: Report) -> dict[str, Any]:
    """What the template shows of samples and previews."""
    gathered, previews = gather(dataset), Previews(dataset)
    return {
        "dataset": dataset,
        "digest": dataset.digest()[:16],
        "subset": gathered if gathered.num_samples < report.samples else None,
        "has_features": gathered.has_features,
        "tokens": contact_sheet(gathered, previews, clip_s=dataset.info.clip_grid.clip_s),
        "stories": [story(sample, previews) for sample in choose_stories(gathered.stories, previews)],
        "histogram": histogram(gathered.counts, num_tokens=dataset.info.num_visual_tokens),
        "cells_per_clip": CELLS_PER_CLIP,
        "without_preview": sorted(previews.missing),
    }


def balance_bars(report: Report) -> list[dict[str, Any]]:
    """Where videos and seconds went: kept, each reason, pending, missing; with their share of the largest of each."""
    rows = [("kept", "kept", report.sources["kept"], report.seconds["kept"])]
    for name in dict.fromkeys([*report.reasons, *report.seconds_by_reason]):
        status = REASONS[name].status if name in REASONS else "quarantined"
        rows.append((name, status, report.reasons.get(name, 0), report.seconds_by_reason.get(name, 0.0)))
    rows[1:] = sorted(rows[1:], key=lambda row: (OUTCOMES.index(row[1]), -row[2], -row[3], row[0]))
    rows.append(("pending", "pending", report.sources["pending"], report.seconds["pending"]))
    rows.append(("missing", "missing", len(report.missing_seconds), report.seconds["missing"]))
    most, longest = max(row[2] for row in rows) or 1, max(row[3] for row in rows) or 1.0
    return [
        {"name": name, "outcome": outcome, "videos": videos, "seconds": seconds}
        | {"video_width": videos / most, "second_width": seconds / longest}
        for name, outcome, videos, seconds in rows
    ]


def duration_columns(report: Report) -> list[dict[str, Any]]:
    """The histogram of durations: for each step its label and its stack of outcomes, with heights in [0, 1]."""
    columns, above_s = [], 0.0
    tallest = max(sum(step[name] for name in OUTCOMES) for step in report.durations) or 1
    for step in report.durations:
        stack, foot = [], 0.0
        for name in OUTCOMES:
            stack.append({"outcome": name, "count": step[name], "foot": foot, "height": step[name] / tallest})
            foot += step[name] / tallest
        columns.append({"label": _span(above_s, step["below_s"]), "stack": stack, "top": foot})
        columns[-1]["count"] = sum(step[name] for name in OUTCOMES)
        above_s = step["below_s"] or 0.0
    return columns


def _span(above_s: float, below_s: float | None) -> str:
    """A step of the duration histogram: `30 to 60 s`, `over 2 h`."""
    last_s = above_s if below_s is None else below_s
    size, unit = (1, "s") if last_s <= 60 else (60, "min") if last_s <= 3600 else (3600, "h")
    if below_s is None:
        return f"over {above_s / size:g} {unit}"
    return f"{above_s / size:g}–{below_s / size:g} {unit}"


def gather(dataset: Dataset, *, max_samples: int = MAX_SAMPLES) -> Gathered:
    """One pass over at most `max_samples` samples that speak the dataset's current vocabulary."""
    gathered = Gathered()
    scale: np.ndarray | None = None
    centroids = np.empty(0)
    for sample in dataset.samples():
        if gathered.num_samples == max_samples:
            break
        if sample.vocabulary != dataset.info.vocabulary:
            continue
        if scale is None:
            tree = vocabulary.load(dataset.info.vocabulary, dataset.folder)
            scale, centroids = tree.scale, tree.centroids()
        _add_sample(gathered, sample, scale=scale, centroids=centroids)
    return gathered


def _add_sample(gathered: Gathered, sample: Sample, *, scale: np.ndarray, centroids: np.ndarray) -> None:
    tokens = sample.visual_tokens.astype(np.int64)
    gathered.num_samples += 1
    gathered.counts.update(tokens.tolist())
    distances = np.zeros(len(tokens))
    if sample.features is None:
        gathered.has_features = False
    else:
        distances = np.linalg.norm((sample.features.astype(np.float32) - centroids[tokens]) / scale, axis=1)
    rank: collections.Counter[int] = collections.Counter()
    for index in np.argsort(distances, kind="stable").tolist():
        token = int(tokens[index])
        if rank[token] == CLIPS_PER_TOKEN:
            continue
        place = (rank[token], sample.video_id)
        rank[token] += 1
        clip = Clip(float(distances[index]), sample.video_id, sample.clip_span_s(index)[0], sample.title)
        best = gathered.nearest.setdefault(token, {})
        best[place] = min(best.get(place, clip), clip)
        if len(best) > 3 * CLIPS_PER_TOKEN:  # some to spare for videos without a preview
            del best[max(best, key=lambda place: (place[0], best[place]))]
    if sample.sentences and len(gathered.segments) < MAX_SEGMENTS:
        for segment in sample.segments():
            words = frozenset(WORD.findall(segment.text.lower())) - STOPWORDS
            gathered.segments.append((frozenset(segment.visual_tokens.tolist()), words))
    if len(gathered.stories) < 200:
        light = {name: getattr(sample, name) for name in sample.__dataclass_fields__}
        gathered.stories.append(Sample(**{**light, "features": None}))


class Previews:
    """The normalised videos of a dataset, read by clock time; remembers which ones it could not show."""

    def __init__(self, dataset: Dataset) -> None:
        self._folder = dataset.folder
        self._there = {Path(name).stem for name in dataset.folder.names("media", suffix=".mp4")}
        # The first part may have been filtered: the preview begins with it all the same.
        index = judged_parts(dataset.ledger()).select(["video_id", "part_index", "part_start_s"]).to_pylist()
        # Preview time 0 is the clock time at which the first part starts.
        self._start_s = {row["video_id"]: row["part_start_s"] for row in index if row["part_index"] == 0}
        self.missing: set[str] = set()

    def has(self, video_id: str) -> bool:
        """Whether there is a preview on a known clock; notes the video as missing if not."""
        if video_id in self._there and video_id in self._start_s:
            return True
        self.missing.add(video_id)
        return False

    def frames(self, video_id: str, clock_s: Sequence[float]) -> list[Any]:
        """The picture (PIL) shown at each of the ascending clock times; fewer if the preview ends or breaks before."""
        if not self.has(video_id):
            return []
        wanted_s = [time_s - self._start_s[video_id] for time_s in clock_s]
        try:
            with self._folder.fs.open_input_file(self._folder.path(f"media/{video_id}.mp4")) as stream:
                return list(_pictures_at(stream, wanted_s))
        except (OSError, ValueError, IndexError):  # PyAV's errors are among these
            self.missing.add(video_id)
            return []


def _pictures_at(stream: Any, wanted_s: Sequence[float]) -> Iterator[Any]:
    """Decode from the key frame before the first wanted time to the last one, in one pass."""
    import av

    with av.open(stream) as container:
        video = container.streams.video[0]
        assert video.time_base is not None
        first = video.start_time or 0
        half_frame_s = 0.5 / float(video.average_rate or 20)
        container.seek(first + max(0, int(wanted_s[0] / video.time_base)), stream=video)
        wanted = collections.deque(wanted_s)
        for frame in container.decode(video):
            shown_s = float(((frame.pts or 0) - first) * video.time_base)
            while wanted and shown_s + half_frame_s > wanted[0]:
                wanted.popleft()
                yield frame.to_image()
            if not wanted:
                return


def contact_sheet(gathered: Gathered, previews: Previews, *, clip_s: float) -> list[dict[str, Any]]:
    """The most used tokens, each with the clips nearest to its centroid and the words that go with it."""
    shown = sorted(gathered.counts.items(), key=lambda item: (-item[1], item[0]))[:NUM_TOKENS]
    words = associated_words(gathered.segments, [token for token, _ in shown])
    sheet = []
    for token, count in shown:
        clips: list[dict[str, str]] = []
        for _, clip in sorted(gathered.nearest[token].items(), key=lambda item: (item[0][0], item[1])):
            if len(clips) < CLIPS_PER_TOKEN and (strip := _strip(clip, previews, clip_s=clip_s)):
                clips.append({"image": strip, "title": f"{clip.title or clip.video_id}, {duration(clip.start_s)}"})
        sheet.append({"id": token, "count": count, "hue": token_hue(token), "words": words[token], "clips": clips})
    return sheet


def _strip(clip: Clip, previews: Previews, *, clip_s: float) -> str | None:
    """Frames of a clip side by side as a data URI."""
    from PIL import Image

    times_s = [clip.start_s + (index + 0.5) / FRAMES_PER_CLIP * clip_s for index in range(FRAMES_PER_CLIP)]
    frames = previews.frames(clip.video_id, times_s)
    if not frames:
        return None
    pitch = STRIP_PIXELS + STRIP_GAP
    strip = Image.new("RGB", (pitch * FRAMES_PER_CLIP - STRIP_GAP, STRIP_PIXELS), "gray")
    for index, frame in enumerate(frames):
        strip.paste(frame.resize((STRIP_PIXELS, STRIP_PIXELS)), (index * pitch, 0))
    return _data_uri(strip)


def associated_words(
    segments: Sequence[tuple[frozenset[int], frozenset[str]]], tokens: Sequence[int], *, num_words: int = 5
) -> dict[int, list[tuple[str, float]]]:
    """The words with the highest pointwise mutual information with each token, over segments, in bits.

    A pair must be seen twice; scores are discounted by n / (n + 1) for a pair seen n times, or rare words would win.
    """
    together: dict[int, collections.Counter[str]] = {token: collections.Counter() for token in tokens}
    word_counts: collections.Counter[str] = collections.Counter()
    token_counts: collections.Counter[int] = collections.Counter()
    for under, words in segments:
        word_counts.update(words)
        token_counts.update(under)
        for token in under & together.keys():
            together[token].update(words)
    found = {}
    for token, pairs in together.items():
        scores = [
            (word, math.log2(count * len(segments) / (word_counts[word] * token_counts[token])) * count / (count + 1))
            for word, count in pairs.items()
            if count >= 2
        ]
        best = sorted(scores, key=lambda pair: (-pair[1], pair[0]))[:num_words]
        found[token] = [(word, round(score, 1)) for word, score in best if score > 0.05]
    return found


def choose_stories(samples: Sequence[Sample], previews: Previews) -> list[Sample]:
    """Samples with a preview: the surest transcript first, then the most sentences, each video once."""

    def rank(sample: Sample) -> tuple[int, int, str]:
        origin = sample.sentences[0].origin if sample.sentences else ""
        sureness = TRANSCRIPTS_BY_SURENESS.index(origin) if origin in TRANSCRIPTS_BY_SURENESS else 9
        return sureness, -min(len(sample.sentences), 8), sample.key

    ranked = sorted(samples, key=rank)
    chosen: dict[str, Sample] = {}
    for sample in ranked:
        if len(chosen) < NUM_STORIES and len(sample.visual_tokens) and previews.has(sample.video_id):
            chosen.setdefault(sample.video_id, sample)
    return list(chosen.values())


def story(sample: Sample, previews: Previews) -> dict[str, Any]:
    """A stretch of a sample as columns of a grid: a frame and a token for each clip, sentences in lanes below."""
    grid, tokens = sample.clip_grid, sample.visual_tokens
    spoken_s = sample.sentences[0].start_s if sample.sentences else sample.part_start_s
    under = int(np.searchsorted(sample.starts_s, spoken_s, side="right")) - 1
    first = max(0, min(under, len(tokens) - CLIPS_PER_STORY))
    last = min(first + CLIPS_PER_STORY, len(tokens))
    starts_s = sample.starts_s[first:last].tolist()
    frames = previews.frames(sample.video_id, [start_s + grid.clip_s / 2 for start_s in starts_s])
    begin_s, num_cells = starts_s[0], (last - first) * CELLS_PER_CLIP
    # A column per clip, whose time runs evenly to the next one; clips at key frames are not equally far apart.
    end_s = starts_s[-1] + (grid.stride_s if sample.clip_starts_s is None else grid.clip_s)
    edges_s, edges = [*starts_s, end_s], np.arange(last - first + 1) * CELLS_PER_CLIP
    lanes: list[int] = []  # the cell at which each lane is free again
    sentences = []
    for sentence in sample.sentences:
        start = round(np.interp(sentence.start_s, edges_s, edges))
        end = min(num_cells, max(start + 4, round(np.interp(sentence.end_s, edges_s, edges))))
        if sentence.end_s <= begin_s or start >= num_cells:
            continue
        lane = next((lane for lane, free in enumerate(lanes) if free <= start), len(lanes))
        lanes[lane : lane + 1] = [end]
        sentences.append({"start": start + 1, "end": end + 1, "lane": lane, "text": sentence.text})
    return {
        "title": sample.title or sample.video_id,
        "source": sample.source,
        "origin": sample.sentences[0].origin if sample.sentences else "nobody speaks",
        "num_cells": num_cells,
        "seconds": [f"{start_s:.1f}" for start_s in starts_s],
        "frames": [_data_uri(frame.resize((STORY_PIXELS, STORY_PIXELS))) for frame in frames],
        "tokens": [{"id": int(token), "hue": token_hue(int(token))} for token in tokens[first:last]],
        "sentences": sentences,
        "shown": f"{duration(begin_s)} to {duration(starts_s[-1] + grid.clip_s)}",
        "is_uniform": sample.clip_starts_s is None,
    }


def histogram(counts: Mapping[int, int], *, num_tokens: int) -> dict[str, Any]:
    """Tokens by rank, and how much of the vocabulary the dataset uses; perplexity is the effective number of tokens."""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    total = sum(counts.values())
    shares = [count / total for _, count in ranked]
    return {
        "bars": [{"id": token, "count": count, "height": count / ranked[0][1]} for token, count in ranked[:NUM_RANKS]],
        "num_used": len(ranked),
        "num_tokens": num_tokens,
        "num_clips": total,
        "top_share": sum(shares[:10]),
        "perplexity": math.exp(-sum(share * math.log(share) for share in shares)) if shares else 0.0,
    }


def stage_bars(report: Report) -> list[dict[str, Any]]:
    """The report's stages, each with its share of the whole and of the longest."""
    total, longest = sum(report.stage_seconds.values()) or 1.0, max(report.stage_seconds.values()) or 1.0
    return [
        {**stage, "share": stage["seconds"] / total, "width": stage["seconds"] / longest} for stage in report.stages
    ]


def token_hue(token: int) -> int:
    """A colour of its own for each token, in degrees; neighbours in the id space get distant ones (golden angle)."""
    return int(token * 137.508) % 360


def curves_figure(curves: Mapping[str, Sequence[tuple[float, float]]], *, num_columns: int = 3) -> str:
    """Curves as small multiples in one inline SVG that follows the page's colours: {name: [(step, value), ...]}.

    Beyond 40 points the raw curve is drawn faintly under its running mean. Values that are not finite are left out.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    if not curves:
        return "<p>No curves were recorded.</p>"
    columns = min(num_columns, len(curves))
    rows = -(-len(curves) // columns)
    # Text stays text, so that it is sharp, selectable and takes the page's colour.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "/".join(curves), "font.size": 9}):
        figure = Figure(figsize=(3.6 * columns, 2.3 * rows), layout="constrained", facecolor="none")
        axes = figure.subplots(rows, columns, squeeze=False).flat
        for (name, points), axis in zip(curves.items(), axes, strict=False):
            _draw_curve(axis, name, points)
        for axis in list(figure.axes)[len(curves) :]:
            axis.remove()
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor").replace(_LINE, "var(--accent, #2563eb)")
    return f'<figure class="curves">{svg}</figure>'


_INK, _LINE = "#010203", "#040506"  # stand for the page's colours until the SVG is text


def _draw_curve(axis: Any, name: str, points: Sequence[tuple[float, float]]) -> None:
    data = np.array([point for point in points if math.isfinite(point[1])], float).reshape(-1, 2)
    axis.set_title(name, loc="left", color=_INK, fontsize=10)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(_INK)
    axis.tick_params(colors=_INK, labelsize=8)
    axis.grid(axis="y", color=_INK, alpha=0.12)
    axis.patch.set_visible(False)
    axis.set_xlabel("step", color=_INK, fontsize=8)
    if not len(data):
        return
    steps, values = data.T
    is_long = len(data) > 40
    smooth = _running_mean(values, width=max(5, len(data) // 30)) if is_long else values
    if is_long:
        axis.plot(steps, values, color=_LINE, alpha=0.25, linewidth=0.8)
    axis.plot(steps, smooth, color=_LINE, linewidth=1.6, marker="o" if len(data) == 1 else None)
    axis.set_title(f"{smooth[-1]:.4g}", loc="right", color=_LINE, fontsize=9)


def _running_mean(values: np.ndarray, *, width: int) -> np.ndarray:
    """[num] the mean of the last `width` values, of fewer at the beginning."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    stops = np.arange(1, len(values) + 1)
    starts = np.maximum(0, stops - width)
    return np.asarray((sums[stops] - sums[starts]) / (stops - starts))


def _data_uri(picture: Any) -> str:
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
