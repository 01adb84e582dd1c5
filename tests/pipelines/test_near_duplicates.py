"""Near duplicates: a verdict is a function of the set of videos, whatever came when and however often it is asked."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import vocabulary
from pipelines.dataset import ClipGrid, Sample
from pipelines.ledger import LEDGER_SCHEMA, read_ledger, source_outcomes, unique_samples
from pipelines.near_duplicates import near_earlier, verdicts
from pipelines.rows import ROW_SCHEMA
from pipelines.sink import publish, write_ledger
from pipelines.storage import Folder

DIM = 16
CONFIG = vocabulary.VocabularyConfig(k=8, depth=3)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A dataset folder with a vocabulary of its own; videos are features around a scene."""

    folder: Folder
    tree: vocabulary.Vocabulary

    def clips(self, scene: int, *, copy: int = 0, num_clips: int = 12) -> np.ndarray:
        """[num_clips, DIM] features of a scene; another copy has the noise of another encoder."""
        noise = np.random.default_rng(scene * 1000 + copy + 1).normal(0, 0.05, (num_clips, DIM))
        return (scenes()[scene] + noise).astype(np.float32)

    def add(self, name: str, features: np.ndarray, *, content: str = "", parts: int = 1, attempt: int = 1) -> None:
        """A kept source, as the sink writes it. Equal `content` means equal bytes."""
        video_id = f"{content or name:_<16}"[:16]
        listing = {"source_id": name, "uri": f"/v/{name}", "version": "1", "size_bytes": 7, "video_id": video_id}
        rows, samples = [], {}
        for index, piece in enumerate(np.array_split(features, parts)):
            tokens = self.tree.assign(piece)
            about = {"part_index": index, "part_start_s": index * 60.0, "part_end_s": index * 60.0 + 1.5 * len(tokens)}
            known = listing | about | {"num_parts": parts, "num_clips": len(tokens), "attempt": attempt}
            rows.append(dict.fromkeys(ROW_SCHEMA.names) | known | {"transcode_s": 1.0})
            samples[f"{video_id}-{index:04d}"] = Sample(
                key=f"{video_id}-{index:04d}",
                video_id=video_id,
                source=listing["uri"],
                title="",
                clip_grid=ClipGrid(),
                sentences=(),
                language=None,
                asr={"name": "none", "version": ""},
                extractor={"name": "test", "digest": "0"},
                vocabulary=self.tree.id,
                lineage={},
                visual_tokens=tokens,
                **about,
            )
        publish(rows, samples, folder=self.folder, common={"run_id": "r", "vocabulary": self.tree.id})

    def judge(self, threshold: float = 0.9) -> list[dict]:
        """Ask for verdicts, and write them down as the run does."""
        found = verdicts(self.folder, threshold=threshold)
        if found:
            rows = [row | {"run_id": "near"} for row in found]
            write_ledger(pa.Table.from_pylist(rows, schema=LEDGER_SCHEMA), folder=self.folder, name="near-duplicates")
        return found

    def outcomes(self) -> dict[str, str]:
        table = source_outcomes(read_ledger(self.folder)).to_pylist()
        return {row["source_id"]: row["reason"] or row["outcome"] for row in table}


def scenes() -> np.ndarray:
    """[8, DIM]: what eight films look like."""
    return np.random.default_rng(0).normal(0, 1.0, (8, DIM))


@pytest.fixture(scope="module")
def tree() -> vocabulary.Vocabulary:
    noise = np.random.default_rng(1).normal(0, 0.3, (480, DIM))
    return vocabulary.fit((np.repeat(scenes(), 60, axis=0) + noise).astype(np.float32), config=CONFIG, extractor="test")


@pytest.fixture
def corpus(tmp_path: Path, tree: vocabulary.Vocabulary) -> Corpus:
    folder = Folder.at(str(tmp_path))
    vocabulary.save(tree, folder)
    return Corpus(folder, tree)


def test_a_copy_is_filtered_with_its_original_named_and_others_stay(corpus: Corpus) -> None:
    corpus.add("a", corpus.clips(0))
    corpus.add("b", corpus.clips(1))
    corpus.add("c", corpus.clips(0, copy=1), parts=3)
    (row,) = corpus.judge()
    assert (row["source_id"], row["status"], row["reason"], row["attempt"]) == ("c", "filtered", "near_duplicate", 2)
    assert row["uri"] == "/v/c"
    assert row["detail"].startswith("likeness 0.9")
    assert row["detail"].endswith("to /v/a, filters.near_duplicate is 0.9")
    assert corpus.outcomes() == {"a": "kept", "b": "kept", "c": "near_duplicate"}
    assert set(unique_samples(read_ledger(corpus.folder))["source_id"].to_pylist()) == {"a", "b"}


def test_asking_again_changes_nothing(corpus: Corpus) -> None:
    for name, scene in (("a", 0), ("b", 0), ("c", 1), ("d", 1), ("e", 2)):
        corpus.add(name, corpus.clips(scene, copy=ord(name)))
    assert len(corpus.judge()) == 2
    before = read_ledger(corpus.folder)
    assert corpus.judge() == []
    assert read_ledger(corpus.folder).equals(before)


@pytest.mark.parametrize("order", list(itertools.permutations("abc")), ids="".join)
def test_the_order_of_arrival_does_not_show(corpus: Corpus, order: Sequence[str]) -> None:
    """Judged after each arrival, as by three runs."""
    for name in order:
        corpus.add(name, corpus.clips(0 if name in "ac" else 1, copy=ord(name)))
        corpus.judge()
    assert corpus.outcomes() == {"a": "kept", "b": "kept", "c": "near_duplicate"}


def test_a_video_comes_back_when_its_original_has_gone(corpus: Corpus) -> None:
    corpus.add("a", corpus.clips(0))
    corpus.add("b", corpus.clips(0, copy=1), parts=2)
    corpus.judge()
    gone = {"source_id": "a", "uri": "/v/a", "attempt": 2, "status": "filtered", "stage": "discover"}
    removal = pa.Table.from_pylist([gone | {"reason": "removed"}], schema=LEDGER_SCHEMA)
    write_ledger(removal, folder=corpus.folder, name="listing")
    assert [(row["source_id"], row["status"], row["attempt"]) for row in corpus.judge()] == [("b", "kept", 3)] * 2
    assert corpus.outcomes() == {"a": "removed", "b": "kept"}
    samples = unique_samples(read_ledger(corpus.folder))
    assert samples["part_index"].to_pylist() == [0, 1]
    assert samples["transcode_s"].to_pylist() == [None, None]  # the work was done once
    assert corpus.judge() == []


def test_a_lower_limit_filters_and_a_higher_one_brings_back(corpus: Corpus) -> None:
    corpus.add("a", corpus.clips(0))
    corpus.add("b", corpus.clips(0, copy=1))
    assert corpus.judge(1.0) == []
    assert len(corpus.judge(0.9)) == 1
    assert len(corpus.judge(1.0)) == 1
    assert corpus.outcomes() == {"a": "kept", "b": "kept"}


def test_an_exact_copy_does_not_take_the_place_of_a_filtered_video(corpus: Corpus) -> None:
    """The ledger settles equal bytes by itself: with one copy filtered, it would count the next one as kept."""
    corpus.add("a", corpus.clips(0))
    for name in ("b", "c", "d"):
        corpus.add(name, corpus.clips(0, copy=1), content="same")
    assert corpus.outcomes()["c"] == "duplicate"
    assert {row["source_id"] for row in corpus.judge()} == {"b", "c", "d"}
    assert corpus.outcomes() == {"a": "kept", "b": "near_duplicate", "c": "near_duplicate", "d": "near_duplicate"}
    assert corpus.judge() == []


def test_clips_too_few_to_tell_are_left_alone(corpus: Corpus) -> None:
    corpus.add("a", corpus.clips(0, num_clips=3))
    corpus.add("b", corpus.clips(0, num_clips=3))
    assert corpus.judge() == []


def test_a_sample_with_a_long_transcript_is_read(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first read does not reach is read with a second one."""
    monkeypatch.setattr("pipelines.near_duplicates._HEAD_BYTES", 700)
    corpus.add("a", corpus.clips(0))
    corpus.add("b", corpus.clips(0, copy=1))
    assert len(corpus.judge()) == 1


def test_an_empty_dataset_has_no_near_duplicates(tmp_path: Path) -> None:
    assert verdicts(Folder.at(str(tmp_path)), threshold=0.9) == []


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), threshold=st.floats(0.3, 0.99), block=st.sampled_from([1, 3, 7, 64]))
def test_blocks_give_what_one_comparison_at_a_time_gives(seed: int, threshold: float, block: int) -> None:
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(6, 8))
    vectors = base[rng.integers(0, 6, 40)] + rng.normal(0, 0.3, (40, 8))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    kept: list[int] = []
    expected = {}
    for row, vector in enumerate(vectors.astype(np.float64)):
        like = [(other, float(vector @ vectors[other].astype(np.float64))) for other in kept]
        if found := [pair for pair in like if pair[1] >= threshold]:
            expected[row] = found[0][0]
        else:
            kept.append(row)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.near_duplicates._BLOCK", block)
        patch.setattr("pipelines.near_duplicates._KEPT_BLOCK", 2 * block)
        assert {row: other for row, (other, _) in near_earlier(vectors, threshold=threshold).items()} == expected
