"""What is sound but unwanted: filters as configuration, each with its own reason in the ledger.

All are off by default, because a filter that surprises loses videos: what is kept can still be left out of training,
what was dropped is not there. Each verdict names the measured figure and the limit, so that a limit can be chosen from
a report. A filter judges what is in hand when it runs: the whole source (its length), or one part (picture, speech,
language). A part that is filtered takes no other part with it; a source is kept if one of its parts is. So a film of
two hours with ten silent minutes keeps its other parts, and `require_speech` on sources shorter than
`media.part_seconds` is a filter on whole sources.

Measured at 20 fps and 224x224: contrast (P90 - P10) is 77 to 254 in 25 real clips, 14 in a test card dimmed to near
black, 1 in noise on black, 0 in one colour, so 5 is a safe limit. Motion has no such gap: 0.5 to 14 in real clips, but
0.08 in a real talk over slides, 0.07 in slides that change every 8 s, and 0.5 in a still with camera noise; above 0.05
it costs lectures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pipelines.dataset import Sentence
from pipelines.errors import StageError


@dataclass(frozen=True, kw_only=True)
class FiltersConfig:
    """What is left out though nothing is wrong with it; nothing by default."""

    min_seconds: float = 0.0
    """Shortest source kept, in seconds as decoded; one clip is needed in any case."""
    max_seconds: float | None = None
    """Longest source kept, in seconds; no limit if not given (media.max_seconds guards the workers)."""
    require_speech: bool = False
    """Leave out parts in which nobody says a word."""
    languages: tuple[str, ...] = ()
    """Languages to keep, as en or eng or en-US; where the language is not known the part is kept. All if empty."""
    min_motion: float = 0.0
    """Least mean change of brightness from frame to frame, 0 to 255; 0 is off. 0.1 already drops talks over slides."""
    min_contrast: float = 0.0
    """Least spread of brightness in the pictures, 0 to 255; 0 is off. One colour has 0 or 1, real clips 77 on."""
    near_duplicate: float | None = None
    """Likeness from which a video counts as a copy of an earlier one, above 0 to 1 (try 0.97); off if not given."""

    def __post_init__(self) -> None:
        if self.min_seconds < 0 or (self.max_seconds is not None and self.max_seconds <= self.min_seconds):
            raise ValueError("filters.min_seconds must be 0 or more, and filters.max_seconds above it.")
        if not (0 <= self.min_motion <= 255 and 0 <= self.min_contrast <= 255):
            raise ValueError("filters.min_motion and filters.min_contrast are levels of brightness, 0 to 255.")
        if self.near_duplicate is not None and not 0 < self.near_duplicate <= 1:
            raise ValueError("filters.near_duplicate is a likeness above 0 and up to 1.")
        if unknown := [tag for tag in self.languages if primary_language(tag) is None]:
            raise ValueError(f"filters.languages: {unknown[0]!r} is no language tag; write it as en, eng or en-US.")


class PartStats(Protocol):
    """What `judge_part` looks at; a `media.Part` has it."""

    @property
    def motion(self) -> float: ...

    @property
    def contrast(self) -> float: ...


def judge_source(seconds: float | None, *, config: FiltersConfig, is_stated: bool = False) -> None:
    """Judge the length of a source; None is not known and passes.

    `is_stated`: the length is the container's word, good enough to spare a source that is far too long its decoding,
    but not to lose a short one that may hold more than it says. Raises StageError: too_short, too_long.
    """
    if seconds is None:
        return
    if config.max_seconds is not None and seconds > config.max_seconds:
        raise StageError("too_long", f"{seconds:.2f} s, filters.max_seconds is {config.max_seconds:g}")
    if seconds < config.min_seconds and not is_stated:
        raise StageError("too_short", f"{seconds:.2f} s decode, filters.min_seconds is {config.min_seconds:g}")


def judge_part(part: PartStats, *, config: FiltersConfig) -> None:
    """Judge the pictures of a part. Raises StageError: blank, static."""
    if part.contrast < config.min_contrast:
        raise StageError("blank", f"contrast {part.contrast:.3f}, filters.min_contrast is {config.min_contrast:g}")
    if part.motion < config.min_motion:
        raise StageError("static", f"motion {part.motion:.4f}, filters.min_motion is {config.min_motion:g}")


def judge_transcript(sentences: Sequence[Sentence], language: str | None, *, config: FiltersConfig) -> None:
    """Judge what is said in a part. Raises StageError: no_speech, language.

    Parts come one by one, so the question is asked of each of them; a language that is not known passes.
    """
    if config.require_speech and not any(sentence.text.strip() for sentence in sentences):
        raise StageError("no_speech", f"{len(sentences)} sentences with words, filters.require_speech wants 1")
    spoken = primary_language(language)
    if config.languages and spoken and spoken not in {primary_language(tag) for tag in config.languages}:
        raise StageError("language", f"{language} is spoken, filters.languages is {', '.join(config.languages)}")


def primary_language(tag: str | None) -> str | None:
    """The language of a tag in its shortest code: `en-US`, `en_GB`, `eng` and `EN` are all `en`; None if not known.

    Containers name languages by ISO 639-2, recognisers by ISO 639-1, captions by BCP 47.
    """
    subtag = (tag or "").strip().lower().replace("_", "-").split("-")[0]
    if not (subtag.isascii() and subtag.isalpha() and 2 <= len(subtag) <= 3) or subtag in _NO_LANGUAGE:
        return None
    return _TWO_LETTERS.get(subtag, subtag)


_NO_LANGUAGE = frozenset({"und", "mis", "mul", "zxx"})  # undetermined, uncoded, several, none

# ISO 639-2 with ISO 639-1 behind it, both the bibliographic and the terminological codes (ger, deu).
_ISO_639 = (
    "aaraa abkab afraf akaak albsq amham araar argan armhy asmas avaav aveae aymay azeaz bakba bambm baqeu belbe "
    "benbn bihbh bisbi bodbo bosbs brebr bulbg burmy catca cescs chach chece chizh chucu chvcv corkw cosco crecr "
    "cymcy czecs danda deude divdv dutnl dzodz ellel engen epoeo estet euseu eweee faofo fasfa fijfj finfi frafr "
    "frefr fryfy fulff geoka gerde glagd glega glggl glvgv greel grngn gujgu hatht hauha hebhe herhz hinhi hmoho "
    "hrvhr hunhu hyehy iboig iceis idoio iiiii ikuiu ileie inaia indid ipkik islis itait javjv jpnja kalkl kankn "
    "kasks katka kaukr kazkk khmkm kikki kinrw kirky komkv konkg korko kuakj kurku laolo latla lavlv limli linln "
    "litlt ltzlb lublu luglg macmk mahmh malml maomi marmr mayms mkdmk mlgmg mltmt monmn mrimi msams myamy nauna "
    "navnv nblnr ndend ndong nepne nldnl nnonn nobnb norno nyany ocioc ojioj orior ormom ossos panpa perfa plipi "
    "polpl porpt pusps quequ rohrm ronro rumro runrn rusru sagsg sansa sinsi slksk slosk slvsl smese smosm snasn "
    "sndsd somso sotst spaes sqisq srdsc srpsr sswss sunsu swasw swesv tahty tamta tattt telte tgktg tgltl thath "
    "tibbo tirti tonto tsntn tsots tuktk turtr twitw uigug ukruk urdur uzbuz venve vievi volvo welcy wlnwa wolwo "
    "xhoxh yidyi yoryo zhaza zhozh zulzu "
)
_TWO_LETTERS = {pair[:3]: pair[3:] for pair in _ISO_639.split()}
