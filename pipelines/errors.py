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
    "no_video": Reason("filtered", "no moving pictures (audio only, or cover art)"),
    "too_short": Reason("filtered", "shorter than one clip, as decoded"),
    "fetch_failed": Reason("quarantined", "the bytes could not be read; look at the storage, then retry"),
    "too_large": Reason(
        "quarantined", "more bytes, pixels or seconds than the limits allow; raise media.max_* to accept it"
    ),
    "unreadable": Reason("quarantined", "not a media file that ffmpeg can open"),
    "forbidden_format": Reason("quarantined", "a playlist or another format that may point at other files"),
    "decode_failed": Reason("quarantined", "opened, but its pictures could not be decoded"),
    "timeout": Reason("quarantined", "a child process was stopped after media.timeout_s (the probe: 60 s)"),
    "transcribe_failed": Reason("quarantined", "speech recognition failed"),
    "stage_failed": Reason("quarantined", "an error that no stage foresaw; the detail names it, please report it"),
    "features_failed": Reason("quarantined", "feature extraction failed"),
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
