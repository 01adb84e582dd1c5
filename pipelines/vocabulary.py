"""The visual vocabulary: hierarchical k-means, k children a node, `depth` levels, so k ** depth visual tokens (paper
section 4.1).

A token id is the path from the root written in base k: ids that share leading digits share ancestors. Assignment walks
the tree, k comparisons a level (48 for the paper's 12 x 4) where a flat search would take 20,736. Small corpora leave
leaves empty; an empty leaf keeps its id and is never assigned, so the id range depends on k and depth only and the
model's embedding table need not change when more video arrives.

Features are standardised per dimension before distances are taken. S3D's pooled activations are positive and differ in
scale by orders of magnitude; without it a few loud dimensions decide every split. Centroids are kept in the extractor's
own units.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np

from pipelines.dataset import token_dtype
from pipelines.storage import Folder

MAX_ITERATIONS = 50


@dataclass(frozen=True, kw_only=True)
class VocabularyConfig:
    """Shape and fit of the visual vocabulary."""

    k: int = 12
    """Children of each node (paper: 12)."""
    depth: int = 4
    """Levels of the tree (paper: 4, so 20,736 leaves)."""
    seed: int = 0
    """Seed of the k-means starts."""
    sample_videos: int = 2000
    """Videos whose features the first fit may use."""

    def __post_init__(self) -> None:
        if self.k < 2 or self.depth < 1 or self.k**self.depth > 1 << 24:
            raise ValueError(
                f"vocabulary.k={self.k}, vocabulary.depth={self.depth} is no usable tree: "
                "take k >= 2, depth >= 1 and at most 16,777,216 leaves."
            )


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """A fitted tree. Arrays are float32; `levels[d]` is [k ** (d + 1), dim] in standardised units, empty nodes are
    NaN."""

    k: int
    depth: int
    extractor: str  # name and digest of the features it was fitted on
    mean: np.ndarray  # [dim]
    scale: np.ndarray  # [dim]
    levels: tuple[np.ndarray, ...]

    @property
    def num_tokens(self) -> int:
        return self.k**self.depth

    @property
    def dim(self) -> int:
        return int(self.mean.shape[0])

    @property
    def id(self) -> str:
        """Names the vocabulary by its content."""
        digest = hashlib.sha256(f"{self.k} {self.depth} {self.extractor}".encode())
        for array in (self.mean, self.scale, *self.levels):
            digest.update(np.ascontiguousarray(array, "<f4").tobytes())
        return digest.hexdigest()[:16]

    def assign(self, features: np.ndarray) -> np.ndarray:
        """[num_clips] token ids of features [num_clips, dim]; at each level the nearest child that is not empty."""
        points = (np.asarray(features, np.float32) - self.mean) / self.scale
        nodes = np.zeros(len(points), np.int64)
        for level in self.levels:
            children = nodes[:, None] * self.k + np.arange(self.k)
            distances = np.full(children.shape, np.inf, np.float32)
            for column in range(self.k):  # k gathers of [num_clips, dim] instead of one of [num_clips, k, dim]
                distances[:, column] = ((points - level[children[:, column]]) ** 2).sum(axis=1)
            distances[np.isnan(distances)] = np.inf
            nodes = children[np.arange(len(points)), distances.argmin(axis=1)]
        return nodes.astype(token_dtype(self.num_tokens))

    def centroids(self) -> np.ndarray:
        """[num_tokens, dim] in the extractor's units; an empty leaf has the nearest ancestor that is not empty."""
        filled = np.zeros((1, self.dim), np.float32)
        for level in self.levels:
            parents = np.repeat(filled, self.k, axis=0)
            filled = np.where(np.isnan(level), parents, level)
        return (filled * self.scale + self.mean).astype(np.float32)

    def used_leaves(self) -> int:
        return int((~np.isnan(self.levels[-1][:, 0])).sum())


def fit(features: np.ndarray, *, config: VocabularyConfig, extractor: str) -> Vocabulary:
    """Fit the tree to features [num_clips, dim], level by level. Deterministic by seed and by the set of rows.

    Raises ValueError for no rows, or for values that are not finite.
    """
    points = np.asarray(features, np.float32)
    if points.ndim != 2 or len(points) == 0:
        raise ValueError("no features to fit a visual vocabulary on: every source was filtered or quarantined.")
    if not np.isfinite(points).all():
        bad = int((~np.isfinite(points)).any(axis=1).sum())
        raise ValueError(f"{bad} of {len(points)} feature rows are not finite: check the extractor's weights.")
    points = points[np.lexsort(points.T[::-1])]  # independent of the order in which workers finished
    mean, scale = points.mean(axis=0), points.std(axis=0)
    scale = np.where(scale > 1e-6, scale, 1.0).astype(np.float32)
    points = (points - mean) / scale
    nodes = np.zeros(len(points), np.int64)
    levels = []
    for depth in range(config.depth):
        level = np.full((config.k ** (depth + 1), points.shape[1]), np.nan, np.float32)
        children = np.empty_like(nodes)
        for node in np.unique(nodes):
            rows = np.flatnonzero(nodes == node)
            rng = np.random.Generator(np.random.Philox(key=config.seed, counter=[0, 0, depth, int(node)]))
            centres, labels = _kmeans(points[rows], k=config.k, rng=rng)
            level[node * config.k : node * config.k + len(centres)] = centres
            children[rows] = node * config.k + labels
        nodes = children
        levels.append(level)
    return Vocabulary(k=config.k, depth=config.depth, extractor=extractor, mean=mean, scale=scale, levels=tuple(levels))


def _kmeans(points: np.ndarray, *, k: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Lloyd's algorithm from a k-means++ start: (centres [<= k, dim], label of each point); no returned centre is
    empty."""
    centres = _spread_starts(points, k=k, rng=rng)
    labels = np.full(len(points), -1, np.int64)
    for _ in range(MAX_ITERATIONS):
        nearest = _squared_distances(points, centres).argmin(axis=1)
        if np.array_equal(nearest, labels):
            break
        labels = nearest
        used = np.unique(labels)
        labels = np.searchsorted(used, labels)
        centres = np.stack([points[labels == label].mean(axis=0) for label in range(len(used))])
    return centres, labels


def _spread_starts(points: np.ndarray, *, k: int, rng: np.random.Generator) -> np.ndarray:
    """Up to k starts by k-means++ (Arthur and Vassilvitskii, 2007); fewer where fewer distinct points exist."""
    chosen = [int(rng.integers(len(points)))]
    distances = ((points - points[chosen[0]]) ** 2).sum(axis=1)
    while len(chosen) < k and distances.max() > 1e-10:
        threshold = rng.random() * distances.sum(dtype=np.float64)
        chosen.append(min(int(np.searchsorted(np.cumsum(distances, dtype=np.float64), threshold)), len(points) - 1))
        distances = np.minimum(distances, ((points - points[chosen[-1]]) ** 2).sum(axis=1))
    return points[chosen]


def _squared_distances(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    products = points @ centres.T
    return (points**2).sum(axis=1)[:, None] - 2 * products + (centres**2).sum(axis=1)[None, :]


def save(vocabulary: Vocabulary, folder: Folder) -> str:
    """Write vocabularies/ID/ into a dataset folder; returns the id."""
    from safetensors.numpy import save as to_bytes

    tensors = {"centroids": vocabulary.centroids(), "mean": vocabulary.mean, "scale": vocabulary.scale}
    tensors |= {f"level_{depth}": level for depth, level in enumerate(vocabulary.levels)}
    about = {"k": vocabulary.k, "depth": vocabulary.depth, "extractor": vocabulary.extractor, "id": vocabulary.id}
    about |= {"num_tokens": vocabulary.num_tokens, "used_leaves": vocabulary.used_leaves(), "dim": vocabulary.dim}
    place = f"vocabularies/{vocabulary.id}"
    folder.write(f"{place}/vocabulary.safetensors", to_bytes(tensors))
    folder.write(f"{place}/vocabulary.json", (json.dumps(about, sort_keys=True, indent=1) + "\n").encode())
    return vocabulary.id


def load(vocabulary_id: str, folder: Folder) -> Vocabulary:
    """Read vocabularies/ID/ of a dataset folder. Raises FileNotFoundError if there is none, ValueError if it was
    altered."""
    from safetensors.numpy import load as from_bytes

    about = json.loads(folder.read(f"vocabularies/{vocabulary_id}/vocabulary.json"))
    tensors = from_bytes(folder.read(f"vocabularies/{vocabulary_id}/vocabulary.safetensors"))
    vocabulary = Vocabulary(
        k=about["k"],
        depth=about["depth"],
        extractor=about["extractor"],
        mean=tensors["mean"],
        scale=tensors["scale"],
        levels=tuple(tensors[f"level_{depth}"] for depth in range(about["depth"])),
    )
    if vocabulary.id != vocabulary_id:
        raise ValueError(
            f"the vocabulary in vocabularies/{vocabulary_id} has id {vocabulary.id}: restore the original."
        )
    return vocabulary


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """How a corpus uses its vocabulary."""

    num_tokens: int
    num_used: int
    num_clips: int
    perplexity: float  # of the token histogram; num_used at most
    repeat_ratio: float  # share of clips with the same token as the clip before


def usage(sequences: list[np.ndarray], *, num_tokens: int) -> Usage:
    """Figures over the token sequences of samples."""
    counts = np.bincount(np.concatenate([s.astype(np.int64) for s in sequences] or [np.empty(0, np.int64)]))
    shares = counts[counts > 0] / max(counts.sum(), 1)
    pairs = sum(max(len(s) - 1, 0) for s in sequences)
    repeats = sum(int((s[1:] == s[:-1]).sum()) for s in sequences)
    return Usage(
        num_tokens=num_tokens,
        num_used=int((counts > 0).sum()),
        num_clips=int(counts.sum()),
        perplexity=float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else 0.0,
        repeat_ratio=repeats / pairs if pairs else 0.0,
    )
