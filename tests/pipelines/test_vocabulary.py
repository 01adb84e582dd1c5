"""The tree of visual tokens: deterministic, total, and at home with very little data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import vocabulary
from pipelines.storage import Folder
from pipelines.vocabulary import VocabularyConfig, fit, usage


def blobs(rng: np.random.Generator, *, num: int, per: int = 20, dim: int = 16) -> np.ndarray:
    centres = rng.normal(size=(num, dim)) * 10
    return np.concatenate([centre + rng.normal(size=(per, dim)) * 0.1 for centre in centres]).astype(np.float32)


def test_well_separated_groups_get_tokens_of_their_own(rng: np.random.Generator) -> None:
    points = blobs(rng, num=8)
    tree = fit(points, config=VocabularyConfig(k=8, depth=1), extractor="t")
    tokens = tree.assign(points).reshape(8, 20)
    assert (tokens == tokens[:, :1]).all()
    assert len(set(tokens[:, 0].tolist())) == 8


def test_tokens_that_share_leading_digits_share_ancestors(rng: np.random.Generator) -> None:
    points = blobs(rng, num=9)
    deep = fit(points, config=VocabularyConfig(k=3, depth=2), extractor="t")
    shallow = fit(points, config=VocabularyConfig(k=3, depth=1), extractor="t")
    assert (deep.assign(points) // 3 == shallow.assign(points)).all()


def test_the_order_of_rows_does_not_matter(rng: np.random.Generator) -> None:
    points = blobs(rng, num=5)
    shuffled = points[rng.permutation(len(points))]
    config = VocabularyConfig(k=4, depth=2, seed=3)
    assert fit(points, config=config, extractor="t").id == fit(shuffled, config=config, extractor="t").id


def test_seed_and_extractor_are_part_of_the_identity(rng: np.random.Generator) -> None:
    points = rng.normal(size=(200, 8))
    config = VocabularyConfig(k=4, depth=2)
    same, other = fit(points, config=config, extractor="a"), fit(points, config=config, extractor="b")
    assert same.id != other.id


@settings(max_examples=30, deadline=None)
@given(num=st.integers(1, 30), distinct=st.integers(1, 5), seed=st.integers(0, 5))
def test_few_points_and_repeated_points_leave_leaves_empty_but_every_point_gets_a_used_one(
    num: int, distinct: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(distinct, 4)).astype(np.float32)[rng.integers(distinct, size=num)]
    tree = fit(points, config=VocabularyConfig(k=12, depth=3, seed=seed), extractor="t")
    tokens = tree.assign(points).astype(int)
    assert not np.isnan(tree.levels[-1][tokens]).any()
    assert len(np.unique(tokens)) == len(np.unique(points, axis=0)) == tree.used_leaves()


def test_centroids_lie_among_their_points_and_empty_leaves_take_an_ancestors(rng: np.random.Generator) -> None:
    points = rng.normal(loc=5.0, size=(50, 4)).astype(np.float32)
    tree = fit(points, config=VocabularyConfig(k=8, depth=2), extractor="t")
    centroids = tree.centroids()
    assert centroids.shape == (64, 4)
    assert np.isfinite(centroids).all()
    tokens = tree.assign(points)
    for token in np.unique(tokens):
        np.testing.assert_allclose(centroids[token], points[tokens == token].mean(axis=0), atol=1e-3)


def test_values_that_are_not_finite_are_refused(rng: np.random.Generator) -> None:
    points = rng.normal(size=(10, 4))
    points[3, 2] = np.nan
    with pytest.raises(ValueError, match="1 of 10 feature rows are not finite"):
        fit(points, config=VocabularyConfig(), extractor="t")


def test_no_features_is_an_error_that_says_why() -> None:
    with pytest.raises(ValueError, match="every source was filtered or quarantined"):
        fit(np.empty((0, 4)), config=VocabularyConfig(), extractor="t")


def test_a_saved_vocabulary_assigns_as_before_and_notices_alteration(tmp_path: Path, rng: np.random.Generator) -> None:
    points = rng.normal(size=(100, 8)).astype(np.float32)
    folder = Folder.at(str(tmp_path))
    tree = fit(points, config=VocabularyConfig(k=3, depth=2), extractor="t")
    again = vocabulary.load(vocabulary.save(tree, folder), folder)
    np.testing.assert_array_equal(again.assign(points), tree.assign(points))
    about = tmp_path / "vocabularies" / tree.id / "vocabulary.json"
    about.write_text(about.read_text().replace('"extractor": "t"', '"extractor": "u"'))
    with pytest.raises(ValueError, match="restore the original"):
        vocabulary.load(tree.id, folder)


def test_the_papers_tree_has_20736_leaves() -> None:
    config = VocabularyConfig()
    assert config.k**config.depth == 20_736


def test_usage_counts_neighbours_within_a_sample_only() -> None:
    figures = usage([np.array([1, 1, 2]), np.array([2, 2])], num_tokens=4)
    assert (figures.num_used, figures.num_clips) == (2, 5)
    assert figures.repeat_ratio == pytest.approx(2 / 3)
    assert figures.perplexity == pytest.approx(np.exp(-(0.4 * np.log(0.4) + 0.6 * np.log(0.6))))
