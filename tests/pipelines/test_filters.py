"""Filters: off unless asked for, and every verdict gives the figure and the limit."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.dataset import Sentence
from pipelines.errors import StageError
from pipelines.filters import FiltersConfig, judge_part, judge_source, judge_transcript, primary_language

OFF = FiltersConfig()


@dataclass(frozen=True)
class Stats:
    motion: float
    contrast: float


def said(text: str) -> list[Sentence]:
    return [Sentence(start_s=0.0, end_s=1.0, text=text, origin="captions")]


@given(
    seconds=st.none() | st.floats(0, 1e6),
    motion=st.floats(0, 255),
    contrast=st.floats(0, 255),
    text=st.text(),
    language=st.none() | st.text(),
)
def test_nothing_is_filtered_by_default(
    seconds: float | None, motion: float, contrast: float, text: str, language: str | None
) -> None:
    judge_source(seconds, config=OFF)
    judge_part(Stats(motion, contrast), config=OFF)
    judge_transcript(said(text), language, config=OFF)


def test_verdicts_on_length_give_the_figure_and_the_limit() -> None:
    config = FiltersConfig(min_seconds=5.0, max_seconds=60.0)
    judge_source(5.0, config=config)
    judge_source(60.0, config=config)
    judge_source(None, config=config)
    with pytest.raises(StageError, match=r"too_short: 4\.99 s decode, filters\.min_seconds is 5"):
        judge_source(4.99, config=config)
    with pytest.raises(StageError, match=r"too_long: 60\.50 s, filters\.max_seconds is 60"):
        judge_source(60.5, config=config)


def test_a_stated_length_can_be_too_long_but_not_too_short() -> None:
    """Containers that were never closed state less than they hold."""
    config = FiltersConfig(min_seconds=5.0, max_seconds=60.0)
    judge_source(0.04, config=config, is_stated=True)
    with pytest.raises(StageError, match="too_long"):
        judge_source(61.0, config=config, is_stated=True)


def test_a_blank_part_is_called_blank_and_a_still_one_static() -> None:
    config = FiltersConfig(min_motion=0.05, min_contrast=5.0)
    judge_part(Stats(0.05, 5.0), config=config)
    with pytest.raises(StageError, match=r"blank: contrast 0\.700, filters\.min_contrast is 5"):
        judge_part(Stats(0.0, 0.7), config=config)
    with pytest.raises(StageError, match=r"static: motion 0\.0100, filters\.min_motion is 0\.05"):
        judge_part(Stats(0.01, 90.0), config=config)


def test_speech_is_words_and_not_sentences() -> None:
    config = FiltersConfig(require_speech=True)
    judge_transcript(said("chop"), None, config=config)
    for silence in ([], said(" \n")):
        with pytest.raises(StageError, match="no_speech"):
            judge_transcript(silence, "en", config=config)


def test_a_language_passes_by_whatever_code_it_is_named() -> None:
    config = FiltersConfig(languages=("en-US", "ger"))
    for language in ("en", "eng", "EN_gb", "de", "deu", "de-AT"):
        judge_transcript(said("x"), language, config=config)
    for unknown in (None, "", "und", "mul", "0", "english"):
        judge_transcript(said("x"), unknown, config=config)
    for other in ("fr", "fre", "fra-CA", "enm"):  # Middle English is not English
        with pytest.raises(StageError, match=rf"language: {other} is spoken, filters\.languages is en-US, ger"):
            judge_transcript(said("x"), other, config=config)


def test_both_codes_of_a_language_are_one() -> None:
    assert {primary_language(tag) for tag in ("fre", "fra", "fr", "fr-CA")} == {"fr"}
    assert primary_language("haw") == "haw"  # has no code of two letters
    assert primary_language("zxx") is None


@pytest.mark.parametrize(
    "settings",
    [
        {"min_seconds": -1.0},
        {"min_seconds": 5.0, "max_seconds": 5.0},
        {"min_motion": 256.0},
        {"min_contrast": -0.1},
        {"near_duplicate": 0.0},
        {"near_duplicate": 1.1},
        {"languages": ("english",)},
    ],
    ids=str,
)
def test_limits_that_make_no_sense_are_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match=r"filters\."):
        FiltersConfig(**settings)
