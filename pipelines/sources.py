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
import urllib.parse
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from pyarrow import Table

from pipelines.dataset import content_id, filesystem_of

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


@dataclass(frozen=True, slots=True)
class _Store:
    """A file system and how its files are named from outside: names in a URI are quoted, its query belongs to all."""

    fs: pafs.FileSystem
    scheme: str  # "" for this machine
    query: str

    @classmethod
    def of(cls, place: str) -> tuple[_Store, str]:
        """The store of a place, and the place's path in it."""
        fs, path = filesystem_of(place)
        if "://" not in place:
            return cls(fs, "", ""), path
        split = urllib.parse.urlsplit(place)
        return cls(fs, split.scheme, f"?{split.query}" if split.query else ""), path

    def uri(self, path: str) -> str:
        return f"{self.scheme}://{urllib.parse.quote(path)}{self.query}" if self.scheme else path


def discover(places: Sequence[str], *, outside: str | None = None) -> list[Source]:
    """All sources in some places, sorted by uri, each once; nothing under `outside` (the dataset itself) is a source.

    A place is a folder (searched for media files by their suffix), a glob, a media file of any name, or a list: .csv or
    .jsonl or .parquet with a column `uri` (also `path` or `url`) and optionally `title` and `captions`. Paths in a list
    count from the list's own folder.

    Raises FileNotFoundError for a place that is not there and ValueError for one that holds no media.
    """
    found: dict[str, Source] = {}
    for place in places:
        listed = _discover_place(place)
        if outside is not None:
            store, path = _Store.of(outside)
            listed = [source for source in listed if not source.uri.startswith(store.uri(f"{path}/"))]
        if not listed:
            raise ValueError(
                f"no media files in {place}: expected files ending in {', '.join(sorted(MEDIA_SUFFIXES)[:6])}, ... ; "
                "name a file itself, or a .csv/.jsonl/.parquet list, to ingest other names."
            )
        found.update((source.uri, source) for source in listed)
    return [found[uri] for uri in sorted(found)]


def _discover_place(place: str) -> list[Source]:
    store, path = _Store.of(place)
    info = store.fs.get_file_info(path)
    if info.type == pafs.FileType.NotFound:
        if any(letter in path for letter in "*?["):
            return _discover_glob(store, path)
        raise FileNotFoundError(f"no file or folder {place}: check the spelling and that it is mounted or readable.")
    if info.type == pafs.FileType.Directory:
        return _media_under(store, path)
    if PurePosixPath(path).suffix.lower() in LIST_SUFFIXES:
        return _discover_list(store, path)
    return [_source(store, info, siblings=_siblings(store, path))]


def _discover_glob(store: _Store, pattern: str) -> list[Source]:
    """As in a shell, `*` stays within a folder; `**` does not."""
    base = pattern
    while any(letter in base for letter in "*?["):
        base = os.path.dirname(base)
    if store.fs.get_file_info(base).type != pafs.FileType.Directory:
        raise FileNotFoundError(
            f"no folder {base} for {pattern}: check the spelling and that it is mounted or readable."
        )
    parts = pattern.split("/")

    def matches(path: str) -> bool:
        if "**" in parts:
            return fnmatch.fnmatchcase(path, pattern.replace("/**/", "/*")) or fnmatch.fnmatchcase(path, pattern)
        names = path.split("/")
        return len(names) == len(parts) and all(map(fnmatch.fnmatchcase, names, parts))

    under = _media_under(store, base)
    return [source for source in under if matches(_Store.of(source.uri)[1])]


def _media_under(store: _Store, folder: str) -> list[Source]:
    infos = store.fs.get_file_info(pafs.FileSelector(folder, recursive=True))
    files = [info for info in infos if info.type == pafs.FileType.File and not info.base_name.startswith(".")]
    captions: dict[str, list[str]] = defaultdict(list)
    for info in files:
        if info.path.lower().endswith(CAPTION_SUFFIXES):
            captions[os.path.dirname(info.path)].append(info.path)
    return [
        _source(store, info, siblings=captions[os.path.dirname(info.path)])
        for info in files
        if PurePosixPath(info.path).suffix.lower() in MEDIA_SUFFIXES
    ]


def _siblings(store: _Store, path: str) -> list[str]:
    infos = store.fs.get_file_info(pafs.FileSelector(os.path.dirname(path), allow_not_found=True))
    return [i.path for i in infos if i.type == pafs.FileType.File and i.path.lower().endswith(CAPTION_SUFFIXES)]


def _source(
    store: _Store,
    info: pafs.FileInfo,
    *,
    siblings: Iterable[str],
    title: str | None = None,
    captions: str | None = None,
) -> Source:
    stem = PurePosixPath(info.path).stem
    # NAME.srt, or NAME.LANGUAGE.vtt as downloaders write it; the plain name first.
    belonging = sorted((n for n in siblings if PurePosixPath(n).name.startswith(f"{stem}.")), key=lambda n: (len(n), n))
    sidecar = next((store.uri(name) for name in belonging), None)
    return Source(
        uri=store.uri(info.path),
        version=f"{info.size}-{info.mtime_ns or 0}",
        size_bytes=info.size or 0,
        title=str(title) if title else stem,
        captions_uri=captions or sidecar,
    )


def _discover_list(store: _Store, path: str) -> list[Source]:
    sources = []
    for number, row in enumerate(_list_rows(store.fs, path), start=1):
        uri = row.get("uri") or row.get("path") or row.get("url")
        if not uri:
            raise ValueError(f"row {number} of {path} has no uri: name that column uri, path or url.")
        own, own_path = _Store.of(_beside(store, str(uri), path))
        info = own.fs.get_file_info(own_path)
        if info.type != pafs.FileType.File:
            raise FileNotFoundError(f"row {number} of {path} names {uri}, which is not there: mend or drop the row.")
        captions = _beside(store, str(row["captions"]), path) if row.get("captions") else None
        siblings = _siblings(own, own_path)
        sources.append(_source(own, info, siblings=siblings, title=row.get("title"), captions=captions))
    return sources


def _beside(store: _Store, uri: str, list_path: str) -> str:
    """A uri of a list: absolute as it is, relative from the folder of the list."""
    if "://" in uri or uri.startswith("/"):
        return uri
    return store.uri(f"{os.path.dirname(list_path)}/{uri}")


def _list_rows(fs: pafs.FileSystem, path: str) -> list[dict[str, Any]]:
    suffix = PurePosixPath(path).suffix.lower()
    try:
        if suffix == ".parquet":
            return pq.read_table(path, filesystem=fs).to_pylist()
        with fs.open_input_file(path) as stream:
            text = stream.read().decode("utf-8-sig")
        if suffix == ".csv":
            return list(csv.DictReader(text.splitlines()))
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:  # of JSON, of Arrow, of the encoding
        raise ValueError(f"the list {path} cannot be read ({error}): write it as UTF-8 {suffix[1:]}.") from error


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
            try:
                video_id = content_id(source.uri)
            except OSError:  # the fetch stage says why
                continue
            if video_id in first:
                repeated[source.source_id] = (video_id, first[video_id])
            else:
                first[video_id] = source.uri
    return repeated
