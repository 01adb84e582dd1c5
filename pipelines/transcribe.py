"""Words and their times: captions where the source has them, else speech recognition.

`transcripts` is the order of preference; for each part the first origin that is usable and finds something wins. A back
end that cannot run here (no Whisper weights, say) is passed over by `choose_recogniser`, which says so once; it never
downloads, because a worker that fetches gigabytes unasked is worse than one that tells you where to put them. Sentences
leave this module on the clock.
"""

from __future__ import annotations

import codecs
import hashlib
import html
import importlib.metadata
import itertools
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from pipelines.dataset import Sentence
from pipelines.media import SAMPLE_RATE

Origin = Literal["captions", "whisper", "sphinx"]

MAX_PAUSE_S = 0.6  # a longer silence between two words ends a sentence where the recogniser gives no punctuation
MAX_SENTENCE_S = 12.0


@dataclass(frozen=True, kw_only=True)
class TranscribeConfig:
    """Where the words come from."""

    transcripts: tuple[Origin, ...] = ("captions", "whisper", "sphinx")
    """Origins by preference; the first that is usable and finds something wins."""
    whisper_model: str = "base"
    """Size of the openai-whisper model, looked for in the cache of that package."""
    whisper_checkpoint: str | None = None
    """Path of an openai-whisper checkpoint, instead of a size."""
    language: str = "en"
    """Language of the speech (Whisper), and of the caption track to prefer."""


class Recogniser(Protocol):
    """A speech recogniser. Times in its sentences count from the first sample of the sound."""

    name: str
    version: str
    language: str

    def transcribe(self, sound: np.ndarray) -> list[Sentence]:
        """sound: [num_samples] int16 at 16 kHz."""
        ...


class Sphinx:
    """PocketSphinx with the English model inside its wheel: small, offline, hears about half of the words."""

    name = "sphinx"
    language = "en"

    def __init__(self) -> None:
        import pocketsphinx

        self._decoder = pocketsphinx.Decoder(loglevel="FATAL", samprate=SAMPLE_RATE)
        self._endpointer_class = pocketsphinx.Endpointer
        self.version = f"pocketsphinx {importlib.metadata.version('pocketsphinx')} en-us"

    def transcribe(self, sound: np.ndarray) -> list[Sentence]:
        # The decoder adapts to what it hears; a text must not depend on which video the worker heard before.
        self._decoder.reinit_feat()
        words = [word for start_s, speech in self._utterances(sound) for word in self._words(speech, start_s=start_s)]
        return sentences_of_words(words, origin=self.name)

    def _utterances(self, sound: np.ndarray) -> Iterable[tuple[float, bytes]]:
        """Stretches of speech, with the second at which each begins."""
        endpointer = self._endpointer_class(sample_rate=SAMPLE_RATE)
        size = endpointer.frame_bytes
        data = sound.astype("<i2").tobytes()
        speech, start_s = bytearray(), 0.0
        for first in range(0, len(data), size):
            frame = data[first : first + size]
            heard = endpointer.process(frame) if len(frame) == size else endpointer.end_stream(frame)
            if heard is not None:
                if not speech:
                    start_s = endpointer.speech_start
                speech += heard
            if speech and not endpointer.in_speech:
                yield start_s, bytes(speech)
                speech.clear()
        if speech:
            yield start_s, bytes(speech)

    def _words(self, speech: bytes, *, start_s: float) -> list[Sentence]:
        self._decoder.start_utt()
        self._decoder.process_raw(speech, full_utt=True)
        self._decoder.end_utt()
        frame_s = 1.0 / self._decoder.config["frate"]
        words = []
        for segment in self._decoder.seg() or ():
            text = re.sub(r"\(\d+\)$", "", segment.word)  # alternative pronunciations are written word(2)
            if not text.startswith(("<", "[")):
                words.append(
                    Sentence(
                        start_s=start_s + segment.start_frame * frame_s,
                        end_s=start_s + (segment.end_frame + 1) * frame_s,
                        text=text,
                        confidence=segment.prob,
                        origin=self.name,
                    )
                )
        return words


class Whisper:
    """openai-whisper from a checkpoint on this machine."""

    name = "whisper"

    def __init__(self, checkpoint: Path, *, language: str) -> None:
        import whisper

        # On the CPU: Ray gives this stage no GPU, and one process per core on a shared GPU would fill its memory.
        self._model = whisper.load_model(str(checkpoint), device="cpu")
        self._options = {"language": language, "fp16": False, "verbose": None}
        self.language = language
        digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()[:16]
        self.version = f"openai-whisper {importlib.metadata.version('openai-whisper')} {checkpoint.stem} {digest}"

    def transcribe(self, sound: np.ndarray) -> list[Sentence]:
        result: dict[str, Any] = self._model.transcribe(sound.astype(np.float32) / 32768.0, **self._options)
        return [
            Sentence(
                start_s=float(segment["start"]),
                end_s=float(segment["end"]),
                text=segment["text"].strip(),
                confidence=min(1.0, math.exp(segment["avg_logprob"])),
                origin=self.name,
            )
            for segment in result["segments"]
            if segment["text"].strip()
        ]


def find_whisper_checkpoint(config: TranscribeConfig) -> Path | None:
    """The Whisper weights on this machine: the path asked for, or the size in the package's own cache folder.

    Raises FileNotFoundError if a path was asked for and is not there.
    """
    if config.whisper_checkpoint is not None:
        path = Path(config.whisper_checkpoint).expanduser()
        if not path.is_file():
            raise FileNotFoundError(
                f"no Whisper checkpoint at {path}: give the path of a .pt file of openai-whisper, "
                "or drop transcribe.whisper_checkpoint to do without."
            )
        return path
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "whisper")
    path = cache / f"{config.whisper_model}.pt"
    return path if path.is_file() else None


def choose_recogniser(config: TranscribeConfig) -> tuple[Origin | None, str]:
    """The first speech recogniser that can run here, and a sentence for people about those passed over."""
    note = ""
    for origin in config.transcripts:
        if origin == "whisper":
            if find_whisper_checkpoint(config) is not None:
                return origin, note
            note = (
                f"No weights of Whisper {config.whisper_model!r} on this machine: "
                "give --transcribe.whisper_checkpoint PATH to use it."
            )
        elif origin == "sphinx":
            return origin, note
    return None, note


def make_recogniser(config: TranscribeConfig) -> Recogniser | None:
    """Load the recogniser that `choose_recogniser` names; None where the configuration asks for captions only."""
    origin, _ = choose_recogniser(config)
    if origin == "whisper":
        checkpoint = find_whisper_checkpoint(config)
        assert checkpoint is not None
        return Whisper(checkpoint, language=config.language)
    return Sphinx() if origin == "sphinx" else None


def sentences_of_words(words: Sequence[Sentence], *, origin: str) -> list[Sentence]:
    """Words in order, joined into sentences at pauses; a sentence's confidence is the mean of its words'."""
    sentences: list[Sentence] = []
    group: list[Sentence] = []
    for word in [*words, None]:
        ends = group and (
            word is None
            or word.start_s - group[-1].end_s > MAX_PAUSE_S
            or word.end_s - group[0].start_s > MAX_SENTENCE_S
        )
        if ends:
            known = [w.confidence for w in group if w.confidence is not None]
            sentences.append(
                Sentence(
                    start_s=group[0].start_s,
                    end_s=group[-1].end_s,
                    text=" ".join(w.text for w in group),
                    confidence=sum(known) / len(known) if known else None,
                    origin=origin,
                )
            )
            group = []
        if word is not None:
            group.append(word)
    return sentences


def decode_captions(data: bytes) -> str:
    """The text of a caption file: UTF-16 with its mark, else UTF-8, else Windows-1252, which old tools write."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", errors="replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace")


_CUE_TIME = re.compile(r"(?:(\d+):)?(\d{1,2}):(\d{2})[.,](\d{1,3})\s*-->\s*(?:(\d+):)?(\d{1,2}):(\d{2})[.,](\d{1,3})")
_MARKUP = re.compile(r"<[^>]*>|\{\\[^}]*\}")


def parse_captions(text: str) -> list[Sentence]:
    """The cues of SubRip or WebVTT text, one sentence each, sorted by start; cues without words or with bad times drop
    out."""
    sentences = []
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    matches = list(_CUE_TIME.finditer(text))
    for match, following in itertools.zip_longest(matches, matches[1:]):
        body = text[match.end() : following.start() if following else len(text)].split("\n")
        # The rest of the time line are WebVTT cue settings; an empty line ends the cue.
        lines = []
        for line in body[1:]:
            if not line.strip():
                break
            lines.append(line)
        words = " ".join(html.unescape(_MARKUP.sub("", " ".join(lines))).split())
        start_s, end_s = _seconds(match.groups()[:4]), _seconds(match.groups()[4:])
        if words and end_s > start_s:
            sentences.append(Sentence(start_s=start_s, end_s=end_s, text=words, origin="captions"))
    return sorted(sentences, key=lambda sentence: (sentence.start_s, sentence.end_s))


def _seconds(groups: Sequence[str | None]) -> float:
    hours, minutes, seconds, fraction = groups
    return int(hours or 0) * 3600 + int(minutes or 0) * 60 + int(seconds or 0) + float(f"0.{fraction}")


def shifted(sentences: Iterable[Sentence], *, by_s: float) -> list[Sentence]:
    """The same sentences later by so many seconds: from a part's own time to the clock."""
    return [replace(s, start_s=s.start_s + by_s, end_s=s.end_s + by_s) for s in sentences]
