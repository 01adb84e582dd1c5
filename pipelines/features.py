"""Clips to features: S3D over the preview's clips, one batch of clips in memory at a time.

On a CPU this is the bottleneck of ingestion, about ten to one over decoding, so its workers get all cores (one thread
each: two one-thread workers do more than one two-thread worker) and everything else is squeezed beside them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import av
import numpy as np

from pipelines import media
from pipelines.dataset import ClipGrid
from pipelines.errors import StageError

if TYPE_CHECKING:
    from pipelines.s3d import S3DExtractor


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """The feature extractor."""

    weights: str = ""
    """S3D weights in torchvision's layout: a path, a URL ending in #sha256=DIGEST, or random:SEED (untrained, for
    trials)."""
    pixels: int = 224
    """Width and height of the clips that S3D sees, in pixels; the preview has 224."""
    batch_clips: int = 4
    """Clips that go through S3D at once."""
    store: bool = True
    """Keep the features in the shards (2 kB a clip): new vocabularies and pictures need them, training does not."""

    def __post_init__(self) -> None:
        if not 32 <= self.pixels <= media.PREVIEW_PIXELS or self.batch_clips < 1:
            raise ValueError(
                f"features.pixels={self.pixels} and features.batch_clips={self.batch_clips}: "
                f"take 32 to {media.PREVIEW_PIXELS} pixels and at least 1 clip."
            )


def load_extractor(config: FeaturesConfig) -> S3DExtractor:
    """The extractor that the configuration names. Raises ValueError where no weights are named."""
    weights = _named(config)
    from pipelines.s3d import load_s3d  # torch takes seconds; a command's --help should not

    return load_s3d(weights=weights, batch_size=config.batch_clips)


def _named(config: FeaturesConfig) -> str:
    if not config.weights:
        raise ValueError(
            "no S3D weights named: give --features.weights PATH (torchvision's s3d-d76dad2f.pth), a URL#sha256=DIGEST, "
            "or random:0 to try the pipeline with an untrained network."
        )
    return config.weights


def extract(
    preview: bytes,
    *,
    extractor: S3DExtractor,
    grid: ClipGrid,
    config: FeaturesConfig,
    first_frames: Sequence[int] | None = None,
) -> np.ndarray:
    """[num_clips, dim] float16 features of a preview's clips, those of the grid or those that begin at given frames.

    Raises StageError("features_failed").
    """
    try:
        clips = media.clips(preview, grid=grid, pixels=config.pixels, first_frames=first_frames)
        batches = _batches(clips, size=config.batch_clips)
        found = [extractor.extract(np.stack(batch)) for batch in batches]
    except (av.FFmpegError, RuntimeError) as error:  # torch reports exhausted memory as RuntimeError
        raise StageError("features_failed", str(error)) from error
    features = np.concatenate(found or [np.empty((0, extractor.dim), np.float32)]).astype(np.float16)
    if not np.isfinite(features).all():
        raise StageError("features_failed", "the extractor gave values that are not finite in half precision")
    return features


def _batches(clips: Iterator[np.ndarray], *, size: int) -> Iterator[list[np.ndarray]]:
    while batch := list(islice(clips, size)):
        yield batch


@functools.cache
def identity(config: FeaturesConfig) -> tuple[str, str, int]:
    """Name, digest and width of the features: equal if and only if features may be mixed.

    Raises ValueError where no weights are named, and what `load_extractor` raises for those that are.
    """
    weights = _named(config)
    from pipelines.s3d import FEATURE_DIM, identify

    name, digest = identify(weights)
    return f"{name}-{config.pixels}px", digest, FEATURE_DIM
