"""What to ingest: a folder, a glob, a list or a single file becomes sources, minus what the ledger already holds.

A source is named by (uri, version); version is its size and modification time, so a changed file is a new source. Exact
duplicates are found here, before any work: only files of equal size can be equal, so only those are hashed, and the
verdict does not depend on which worker is faster. Remote files are listed the same way through pyarrow.
"""

from __future__ import annotations

import csv
import fnmatch
import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from pyarrow import Table

from pipelines.dataset import filesystem_of

_VIDEO = "mp4 m4v mov mkv webm avi mpg mpeg ts mts m2ts flv wmv asf ogv 3gp gif mxf"
# Sound files are listed too: the books must balance, and a recording without pictures is filtered with its reason.
_SOUND = "mp3 m4a wav flac ogg opus aac wma"
MEDIA_SUFFIXES = frozenset(f".{name}" for name in f"{_VIDEO} {_SOUND}".split())
CAPTION_SUFFIXES = (".srt", ".vtt")
LIST_SUFFIXES = frozenset({".csv", ".jsonl", ".parquet"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """An input video as listed."""

    uri: str
    version: str
    size_bytes: int
    title: str
    captions_uri: str | None = None

    @property
    def source_id(self) -> str:
        return hashlib.sha256(f"{self.uri}\n{self.version}".encode()).hexdigest()[:16]


def discover(places: Sequence[str]) -> list[Source]:
    """All sources in some places, sorted by uri, each once.

    A place is a folder (searched for media files by their suffix), a glob, a media file of any name, or a list: .csv or
    .jsonl or .parquet with a column `uri` (also `path` or `url`) and optionally `title` and `captions`. Paths in a list
    count from the list's own folder.

    Raises FileNotFoundError for a place that is not there and ValueError for one that holds no media.
    """
    found: dict[str, Source] = {}
    for place in places:
        listed = _discover_place(place)
        if not listed:
            raise ValueError(
                f"no media files in {place}: expected files ending in {', '.join(sorted(MEDIA_SUFFIXES)[:6])}, ... ; "
                "name a file itself, or a .csv/.jsonl/.parquet list, to ingest other names."
            )
        found.update((source.uri, source) for source in listed)
    return [found[uri] for uri in sorted(found)]


def _discover_place(place: str) -> list[Source]:
    fs, path = filesystem_of(place)
    prefix = place.split("://", 1)[0] + "://" if "://" in place else ""
    if any(letter in path for letter in "*?[") and fs.get_file_info(path).type == pafs.FileType.NotFound:
        return _discover_glob(fs, path, prefix=prefix)
    info = fs.get_file_info(path)
    if info.type == pafs.FileType.NotFound:
        raise FileNotFoundError(f"no file or folder {place}: check the spelling and that it is mounted or readable.")
    if info.type == pafs.FileType.Directory:
        return _media_under(fs, path, prefix=prefix)
    if PurePosixPath(path).suffix.lower() in LIST_SUFFIXES:
        return _discover_list(fs, path, prefix=prefix)
    return [_source(info, prefix=prefix, siblings=_siblings(fs, path))]


def _discover_glob(fs: pafs.FileSystem, pattern: str, *, prefix: str) -> list[Source]:
    base = pattern
    while any(letter in base for letter in "*?["):
        base = os.path.dirname(base)
    under = _media_under(fs, base, prefix=prefix)
    return [source for source in under if fnmatch.fnmatchcase(source.uri.removeprefix(prefix), pattern)]


def _media_under(fs: pafs.FileSystem, folder: str, *, prefix: str) -> list[Source]:
    infos = fs.get_file_info(pafs.FileSelector(folder, recursive=True))
    files = [info for info in infos if info.type == pafs.FileType.File and not info.base_name.startswith(".")]
    names = {info.path for info in files}
    return [
        _source(info, prefix=prefix, siblings=names)
        for info in files
        if PurePosixPath(info.path).suffix.lower() in MEDIA_SUFFIXES
    ]


def _siblings(fs: pafs.FileSystem, path: str) -> set[str]:
    candidates = [str(PurePosixPath(path).with_suffix(suffix)) for suffix in CAPTION_SUFFIXES]
    return {info.path for info in fs.get_file_info(candidates) if info.type == pafs.FileType.File}


def _source(
    info: pafs.FileInfo, *, prefix: str, siblings: Iterable[str], title: str | None = None, captions: str | None = None
) -> Source:
    path = PurePosixPath(info.path)
    sidecars = [str(path.with_suffix(suffix)) for suffix in CAPTION_SUFFIXES]
    sidecar = next((prefix + name for name in sidecars if name in siblings), None)
    return Source(
        uri=prefix + info.path,
        version=f"{info.size}-{info.mtime_ns or 0}",
        size_bytes=info.size,
        title=title or path.stem,
        captions_uri=captions or sidecar,
    )


def _discover_list(fs: pafs.FileSystem, path: str, *, prefix: str) -> list[Source]:
    sources = []
    for number, row in enumerate(_list_rows(fs, path), start=1):
        uri = row.get("uri") or row.get("path") or row.get("url")
        if not uri:
            raise ValueError(f"row {number} of {path} has no uri: name that column uri, path or url.")
        captions = _beside(row.get("captions"), path, prefix=prefix)
        own_fs, own_path = filesystem_of(str(_beside(uri, path, prefix=prefix)))
        own_prefix = str(uri).split("://", 1)[0] + "://" if "://" in str(uri) else prefix
        info = own_fs.get_file_info(own_path)
        if info.type != pafs.FileType.File:
            raise FileNotFoundError(f"row {number} of {path} names {uri}, which is not there: mend or drop the row.")
        siblings = _siblings(own_fs, own_path)
        sources.append(_source(info, prefix=own_prefix, siblings=siblings, title=row.get("title"), captions=captions))
    return sources


def _beside(uri: Any, list_path: str, *, prefix: str) -> str | None:
    """A uri of a list: absolute as it is, relative from the folder of the list."""
    if not uri or "://" in str(uri) or str(uri).startswith("/"):
        return str(uri) if uri else None
    return f"{prefix}{os.path.dirname(list_path)}/{uri}"


def _list_rows(fs: pafs.FileSystem, path: str) -> list[dict[str, Any]]:
    if path.endswith(".parquet"):
        return pq.read_table(path, filesystem=fs).to_pylist()
    with fs.open_input_file(path) as stream:
        text = stream.read().decode("utf-8-sig")
    if path.endswith(".csv"):
        return list(csv.DictReader(text.splitlines()))
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def duplicates(sources: Sequence[Source], ledger: Table) -> dict[str, tuple[str, str]]:
    """Source id -> (video id, uri it repeats) of each source whose bytes equal an earlier one's or a kept one's.

    The first by uri stays. Only sources of equal size are read; sizes and video ids of earlier runs come from the
    ledger.
    """
    by_size: dict[int, list[Source]] = defaultdict(list)
    for source in sources:
        by_size[source.size_bytes].append(source)
    kept = ledger.filter(pc.equal(ledger["status"], "kept")).select(["size_bytes", "video_id", "uri"])
    earlier: dict[int, dict[str, str]] = defaultdict(dict)
    for row in kept.to_pylist():
        earlier[row["size_bytes"]].setdefault(row["video_id"], row["uri"])
    repeated: dict[str, tuple[str, str]] = {}
    for size_bytes, group in by_size.items():
        if len(group) < 2 and size_bytes not in earlier:
            continue
        first = dict(earlier.get(size_bytes, {}))
        for source in sorted(group, key=lambda source: source.uri):
            video_id = remote_content_id(source.uri)
            if video_id is not None and video_id in first:
                repeated[source.source_id] = (video_id, first[video_id])
            elif video_id is not None:
                first[video_id] = source.uri
    return repeated


def remote_content_id(uri: str) -> str | None:
    """The video id of a source wherever it lies, read in pieces; None if it cannot be read (the fetch stage says
    why)."""
    fs, path = filesystem_of(uri)
    digest = hashlib.sha256()
    try:
        with fs.open_input_stream(path) as stream:
            while piece := stream.read(1 << 22):
                digest.update(piece)
    except OSError:
        return None
    return digest.hexdigest()[:16]
