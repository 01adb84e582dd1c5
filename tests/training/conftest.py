"""Datasets made without video: shards, ledger, centroids and truth files as ingestion would write them."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from pipelines.dataset import LEDGER_SCHEMA, ClipGrid, DatasetInfo, Sample, Sentence
from training import recipes
from training.recipes import PretrainConfig

VERBS = ("chop", "stir", "pour", "grate", "whisk", "peel")
OBJECTS = ("onion", "carrot", "tomato", "cheese", "garlic", "pepper", "mushroom", "potato")
PHRASES = (
    "now {} the {}",
    "you {} the {} like this",
    "Now let me show you how to {} the {}.",
    "next we {} the {} in the pan",
)
CHATTER = ("thank you for watching", "do not forget to subscribe", "this is my favourite recipe")
TOKENS_PER_STEP = 2
FEATURE_DIM = 32


@dataclass(frozen=True, kw_only=True)
class Kitchen:
    """A dataset whose visual tokens determine verb and object: token = (verb, object, one of two looks)."""

    url: str
    num_visual: int


def make_kitchen(
    root: Path, *, num_videos: int = 25, steps_per_video: int = 16, seed: int = 0, speech: bool = True
) -> Kitchen:
    """Write a dataset folder and truth files; every step lasts two clips and has one sentence."""
    draw = np.random.default_rng(seed)
    media, grid = root / "media", ClipGrid()
    media.mkdir(parents=True)
    samples = []
    for video in range(num_videos):
        tokens, sentences, steps = [], [], []
        for index in range(steps_per_video):
            verb, thing = int(draw.integers(len(VERBS))), int(draw.integers(len(OBJECTS)))
            start_s = index * TOKENS_PER_STEP * grid.clip_s
            end_s = start_s + TOKENS_PER_STEP * grid.clip_s
            tokens += [int((verb * len(OBJECTS) + thing) * 2 + draw.integers(2)) for _ in range(TOKENS_PER_STEP)]
            text = str(draw.choice(PHRASES)).format(VERBS[verb], OBJECTS[thing])
            if draw.random() < 0.1:
                text = str(draw.choice(CHATTER))
            sentences.append(Sentence(start_s=start_s + 0.1, end_s=end_s - 0.1, text=text, origin="captions"))
            steps.append(
                {"index": index, "verb": VERBS[verb], "object": OBJECTS[thing], "start_s": start_s, "end_s": end_s}
            )
        source = media / f"video-{video}.mp4"
        truth = {"video": source.name, "steps": steps, "verbs": VERBS, "objects": OBJECTS}
        source.with_suffix("").with_suffix(".truth.json").write_text(json.dumps(truth))
        samples.append(make_sample(f"video-{video}", tokens, tuple(sentences) if speech else (), source=str(source)))
    centroids = verb_object_centroids(draw)
    write_dataset(root / "dataset", samples, centroids)
    return Kitchen(url=str(root / "dataset"), num_visual=len(centroids))


def verb_object_centroids(draw: np.random.Generator) -> np.ndarray:
    """[tokens, FEATURE_DIM] a part for the verb, a part for the object and a little of the token's own."""
    verb_VD = draw.normal(size=(len(VERBS), FEATURE_DIM))
    object_OD = draw.normal(size=(len(OBJECTS), FEATURE_DIM))
    pairs = (verb_VD[:, None] + object_OD[None]).reshape(-1, FEATURE_DIM).repeat(2, axis=0)
    return (pairs + 0.3 * draw.normal(size=pairs.shape) + 2.0).astype(np.float32)


def make_sample(
    name: str, tokens: list[int], sentences: tuple[Sentence, ...] = (), *, source: str = "/nowhere/video.mp4"
) -> Sample:
    video_id = hashlib.sha256(name.encode()).hexdigest()[:16]
    grid = ClipGrid()
    return Sample(
        key=f"{video_id}-0000",
        video_id=video_id,
        source=source,
        title=name,
        part_index=0,
        part_start_s=0.0,
        part_end_s=len(tokens) * grid.stride_s,
        clip_grid=grid,
        sentences=sentences,
        language="en",
        asr={"name": "captions", "version": "1"},
        extractor={"name": "test", "digest": "0"},
        vocabulary="v",
        lineage={},
        visual_tokens=np.array(tokens, np.uint16),
    )


def write_dataset(root: Path, samples: list[Sample], centroids: np.ndarray) -> str:
    """dataset.json, one shard, its ledger and the vocabulary."""
    for folder in ("shards", "ledger", "vocabularies/v"):
        (root / folder).mkdir(parents=True)
    rows, shard = [], io.BytesIO()
    with tarfile.open(fileobj=shard, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            offset = tar.offset
            for name, data in sample.members().items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            row = dict.fromkeys(LEDGER_SCHEMA.names)
            row |= {
                "source_id": sample.video_id,
                "attempt": 1,
                "status": "kept",
                "part_index": 0,
                "num_parts": 1,
                "key": sample.key,
                "shard": "one.tar",
                "video_id": sample.video_id,
            }
            rows.append({**row, "offset": offset, "num_bytes": tar.offset - offset})
    (root / "shards/one.tar").write_bytes(shard.getvalue())
    pq.write_table(pa.Table.from_pylist(rows, schema=LEDGER_SCHEMA), root / "ledger/one.parquet")
    save_file({"centroids": centroids}, root / "vocabularies/v/vocabulary.safetensors")
    info = DatasetInfo(
        clip_grid=ClipGrid(),
        extractor="test",
        extractor_digest="0",
        feature_dim=centroids.shape[1],
        vocabulary="v",
        num_visual_tokens=len(centroids),
    )
    (root / "dataset.json").write_bytes(info.to_json())
    return str(root)


def small_config(**optim: Any) -> PretrainConfig:
    """A model and packs so small that a step takes milliseconds."""
    config = recipes.tiny()
    shape = {"num_layers": 2, "hidden": 16, "num_heads": 2, "intermediate": 32}
    return replace(
        config,
        model=replace(config.model, **shape),
        plan=replace(config.plan, token_budget=128),
        optim=replace(config.optim, **{"steps": 6, "packs_per_step": 3, "warmup_steps": 2, **optim}),
        checkpoint_every_steps=3,
        eval_every_steps=3,
        log_every_steps=1,
        workers=1,
    )


@pytest.fixture(scope="session")
def kitchen(tmp_path_factory: pytest.TempPathFactory) -> Kitchen:
    return make_kitchen(tmp_path_factory.mktemp("kitchen"))


@pytest.fixture(scope="session")
def small_kitchen(tmp_path_factory: pytest.TempPathFactory) -> Kitchen:
    return make_kitchen(tmp_path_factory.mktemp("small"), num_videos=6, steps_per_video=6)
