"""Why a source does not become a sample: the closed set of reasons, and the exception that carries one.

A reason is a value that the ledger keeps, reports count and `ingest --retry REASON` selects, so the set is closed and
each member says what to do about it. *Filtered* sources are sound but unwanted; *quarantined* ones failed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Reason:
    status: Literal["filtered", "quarantined"]
    meaning: str


REASONS: dict[str, Reason] = {
    "duplicate": Reason("filtered", "byte for byte the same as another source; the first by name is kept"),
    "near_duplicate": Reason("filtered", "nearly the same as another kept video (filters.near_duplicate)"),
    "superseded": Reason("filtered", "the file was changed since; its new version is a source of its own"),
    "removed": Reason("filtered", "no longer in its place, and the run was asked to drop such sources"),
    "no_video": Reason("filtered", "no moving pictures (audio only, or cover art)"),
    "too_short": Reason("filtered", "shorter than one clip as decoded, or than filters.min_seconds"),
    "too_long": Reason("filtered", "longer than filters.max_seconds"),
    "static": Reason("filtered", "the picture hardly moves (filters.min_motion)"),
    "blank": Reason("filtered", "the picture shows next to nothing (filters.min_contrast)"),
    "no_speech": Reason("filtered", "nobody says a word (filters.require_speech)"),
    "language": Reason("filtered", "spoken in a language that filters.languages does not name"),
    "fetch_failed": Reason("quarantined", "the bytes could not be read; look at the storage, then retry"),
    "wrong_content": Reason(
        "quarantined", "the server answered with something that is not media, a web page for example"
    ),
    "too_large": Reason(
        "quarantined", "more bytes, pixels, streams or seconds than the limits allow; raise fetch.max_* or media.max_*"
    ),
    "unreadable": Reason("quarantined", "not a media file that ffmpeg can open"),
    "forbidden_format": Reason("quarantined", "a playlist or another format that may point at other files"),
    "decode_failed": Reason("quarantined", "opened, but its pictures could not be decoded"),
    "timeout": Reason("quarantined", "a child process was stopped after media.timeout_s (the probe: 60 s)"),
    "limit_exceeded": Reason("quarantined", "a child process ran into its limit of memory, CPU time or output bytes"),
    "transcribe_failed": Reason("quarantined", "speech recognition failed"),
    "features_failed": Reason("quarantined", "feature extraction failed"),
    "worker_lost": Reason(
        "quarantined", "every worker that took it was killed, by a crash in a library or for want of memory; then retry"
    ),
    "stage_failed": Reason("quarantined", "an error that no stage foresaw; the detail names it, please report it"),
}


class StageError(Exception):
    """A row failed in a stage for a known reason; `detail` is for people, the end of stderr for example."""

    def __init__(self, reason: str, detail: str) -> None:
        if reason not in REASONS:
            raise AssertionError(f"reason {reason!r} is not in pipelines.errors.REASONS")
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail[-2000:]

    @property
    def status(self) -> str:
        return REASONS[self.reason].status
