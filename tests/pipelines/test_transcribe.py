"""Captions and speech become sentences with times."""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.dataset import Sentence
from pipelines.media import ffmpeg_path
from pipelines.transcribe import (
    MAX_PAUSE_S,
    Sphinx,
    TranscribeConfig,
    Whisper,
    choose_recogniser,
    decode_captions,
    find_whisper_checkpoint,
    parse_captions,
    sentences_of_words,
    shifted,
)

SUBRIP = """\ufeff1
00:00:01,000 --> 00:00:02,500
<i>Chop</i> the {\\an8}onion &amp; stir.

2
00:00:03,000 --> 00:00:02,000
this one ends before it begins

3
00:01:03,250 --> 00:01:04,000
two
lines
"""
WEBVTT = """WEBVTT

NOTE nothing to see

intro
00:01.000 --> 00:02.500 align:start position:0%
Pour <00:01.500><c>the</c> milk

00:02:03.250 --> 00:02:04.000
"""


def word(text: str, start_s: float, end_s: float) -> Sentence:
    return Sentence(start_s=start_s, end_s=end_s, text=text, confidence=0.5, origin="sphinx")


def test_subrip_cues_lose_markup_and_keep_times() -> None:
    first, second = parse_captions(SUBRIP)
    assert (first.start_s, first.end_s, first.text) == (1.0, 2.5, "Chop the onion & stir.")
    assert (second.start_s, second.end_s, second.text) == (63.25, 64.0, "two lines")


def test_webvtt_cues_may_leave_out_hours_and_text() -> None:
    (cue,) = parse_captions(WEBVTT)
    assert (cue.start_s, cue.end_s, cue.text, cue.origin) == (1.0, 2.5, "Pour the milk", "captions")


@given(st.text(max_size=400))
def test_any_text_parses_without_an_error(text: str) -> None:
    parse_captions(text)
    parse_captions(text + "\n00:00:01,000 --> 00:00:02,000\n" + text)


@pytest.mark.parametrize("text", ["", "WEBVTT\n\n", "hello"])
def test_captions_without_a_cue_are_no_sentences(text: str) -> None:
    assert parse_captions(text) == []


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_captions_of_any_usual_encoding_and_line_end_are_read(encoding: str) -> None:
    data = "1\r00:00:01,000 --> 00:00:02,000\rZwiebeln schälen\r".encode(encoding)
    assert [cue.text for cue in parse_captions(decode_captions(data))] == ["Zwiebeln schälen"]


def test_words_are_joined_until_a_pause() -> None:
    words = [word("chop", 0.0, 0.3), word("it", 0.4, 0.5), word("now", 0.6 + MAX_PAUSE_S, 1.5)]
    first, second = sentences_of_words(words, origin="sphinx")
    assert (first.text, first.start_s, first.end_s, first.confidence) == ("chop it", 0.0, 0.5, 0.5)
    assert second.text == "now"


@given(st.lists(st.tuples(st.floats(0, 2), st.floats(0.01, 1)), max_size=40))
def test_no_word_is_lost_and_sentences_do_not_overlap(gaps: list[tuple[float, float]]) -> None:
    words, now_s = [], 0.0
    for index, (pause_s, length_s) in enumerate(gaps):
        now_s += pause_s
        words.append(word(f"w{index}", now_s, now_s + length_s))
        now_s += length_s
    sentences = sentences_of_words(words, origin="sphinx")
    assert " ".join(s.text for s in sentences).split() == [w.text for w in words]
    assert all(a.end_s <= b.start_s for a, b in itertools.pairwise(sentences))


def test_shifting_moves_both_ends() -> None:
    (moved,) = shifted([word("a", 1.0, 2.0)], by_s=10.0)
    assert (moved.start_s, moved.end_s) == (11.0, 12.0)


def test_sphinx_finds_nothing_in_silence() -> None:
    assert Sphinx().transcribe(np.zeros(16000 * 2, np.int16)) == []


def test_without_whisper_weights_the_next_origin_serves_and_the_remedy_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    origin, note = choose_recogniser(TranscribeConfig())
    assert origin == "sphinx"
    assert "whisper_checkpoint PATH" in note
    assert choose_recogniser(TranscribeConfig(transcripts=("captions",))) == (None, "")


def test_a_whisper_checkpoint_that_is_not_there_is_an_error() -> None:
    with pytest.raises(FileNotFoundError, match="no Whisper checkpoint"):
        find_whisper_checkpoint(TranscribeConfig(whisper_checkpoint="/nowhere/tiny.pt"))


@pytest.mark.integration
def test_whisper_loads_a_checkpoint_of_its_own_format_and_keeps_to_the_sound(tmp_path: Path) -> None:
    """A tiny, randomly initialised checkpoint says nonsense, but through the real loader and decoder."""
    import torch
    from whisper.model import ModelDimensions
    from whisper.model import Whisper as Network

    torch.manual_seed(0)
    dims = ModelDimensions(80, 1500, 32, 2, 1, 51865, 448, 32, 2, 1)
    checkpoint = tmp_path / "nano.pt"
    network = Network(dims)
    # Whisper allocates this table without filling it, for a checkpoint to do so: raw memory may hold NaN.
    torch.nn.init.normal_(network.decoder.positional_embedding, std=0.01)
    torch.save({"dims": dims.__dict__, "model_state_dict": network.state_dict()}, checkpoint)
    assert find_whisper_checkpoint(TranscribeConfig(whisper_checkpoint=str(checkpoint))) == checkpoint
    recogniser = Whisper(checkpoint, language="en")
    sentences = recogniser.transcribe((np.random.default_rng(0).normal(size=16000 * 2) * 3000).astype(np.int16))
    assert "nano" in recogniser.version
    assert all(0 <= s.start_s <= s.end_s <= 30.0 for s in sentences)


@pytest.mark.integration
def test_sphinx_hears_a_recording_the_same_whatever_it_heard_before(shared_media: Path) -> None:
    recogniser = Sphinx()
    first, second = (_sound(shared_media / name, seconds=5) for name in ("jfk.flac", "nasa_subtitles.mp4"))
    alone = [Sphinx().transcribe(sound) for sound in (first, second)]
    assert alone[0]
    assert [recogniser.transcribe(sound) for sound in (second, first, second)] == [alone[1], alone[0], alone[1]]


def _sound(path: Path, *, seconds: float) -> np.ndarray:
    command = [ffmpeg_path(), "-v", "error", "-i", str(path), "-t", str(seconds), "-ac", "1", "-ar", "16000"]
    out = subprocess.run([*command, "-f", "s16le", "pipe:"], capture_output=True, check=True).stdout
    return np.frombuffer(out, "<i2")
