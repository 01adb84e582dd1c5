"""What to ingest: folders, globs, lists, tars, datasets and single files become sources, each once.

A source is named by (uri, version); version is its size and modification time, so a changed file is a new source. What
a list names on the web has no version but that of its column `version`: a URL stands for the same bytes for ever.
Exact duplicates are found here as far as that is cheap: only files of equal size can be equal, so only those are read.

A local folder costs some microseconds per file (one `stat` each), a remote one a request per 1,000 files, a tar one
pass over its headers.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import hashlib
import json
import os
import stat
import tarfile
import urllib.parse
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import PurePosixPath
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from pipelines import fetch, source_lists, tars
from pipelines.dataset import Dataset
from pipelines.storage import Folder, absolute_url, digest_of, filesystem_of, is_plain, local_path, local_uri

_VIDEO = "mp4 m4v mov mkv webm avi mpg mpeg ts mts m2ts flv wmv asf ogv 3gp gif mxf"
# Sound files are listed too: the books must balance, and a recording without pictures is filtered with its reason.
_SOUND = "mp3 m4a wav flac ogg opus aac wma"
MEDIA_SUFFIXES = frozenset(f".{name}" for name in f"{_VIDEO} {_SOUND}".split())
CAPTION_SUFFIXES = (".srt", ".vtt")
MISSING = "missing"  # the version of a source that was named and is not there; fetch says why

Item = TypeVar("Item")
Out = TypeVar("Out")

_NUM_REQUESTS = 16  # at once, to an object store
_MAX_JSON_BYTES = 1 << 20  # of metadata beside a member of a tar


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """An input video as listed."""

    uri: str
    version: str
    size_bytes: int  # 0 where it is not known (on the web) or the file is missing
    title: str
    captions_uri: str | None = None
    language: str | None = None  # as a list says it
    metadata: str = ""  # JSON object of a list's other columns, keys sorted; "" if there are none

    @property
    def source_id(self) -> str:
        return hashlib.sha256(f"{self.uri}\n{self.version}".encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Reach:
    """What a folder, glob, tar or dataset place takes in, as prefixes of URIs."""

    prefixes: tuple[str, ...]
    query: str = ""  # of a remote place: its URIs carry it too
    unread: tuple[str, ...] = ()  # prefixes of what could not be looked into
    pattern: tuple[str, ...] = ()  # of a glob, below the prefix

    def holds(self, uri: str) -> bool:
        prefix = next((prefix for prefix in self.prefixes if uri.startswith(prefix)), None)
        if prefix is None or self.query not in uri or (self.unread and uri.startswith(self.unread)):
            return False
        member = tars.split_member(uri)
        below = uri[len(prefix) :]
        if "://" in uri:
            below = urllib.parse.unquote(below.partition("?")[0].partition("#")[0])
        elif member and not prefix.endswith("#"):
            below = below.partition(".tar#")[0] + ".tar"
        name = member[1] if member else below
        is_listed = _suffix(name) in MEDIA_SUFFIXES or name.endswith(".tar")
        names = below.split("/")
        return is_listed and not _is_hidden(names) and (not self.pattern or _matches(names, self.pattern))


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """All that some places hold."""

    sources: list[Source]  # sorted by uri, each once
    num_ignored: int  # files left out because their name is no media name; hidden files and captions do not count
    notes: tuple[str, ...] = ()  # what could not be looked into, a sentence each
    reaches: tuple[_Reach, ...] = ()

    def covers(self, uri: str) -> bool:
        """Whether the uri lies in a folder, glob, tar or dataset place that was listed in full and would have been
        listed there: a known source that is covered and not in `sources` is gone."""
        return any(reach.holds(uri) for reach in self.reaches)


def discover(places: Sequence[str], *, outside: str | None = None) -> Listing:
    """All sources in some places; nothing under `outside` (the dataset itself) is a source.

    A place is a folder (searched for media files and tars by their suffix), a glob, a media file of any name, a .tar in
    WebDataset layout, a videobert dataset (its previews are the sources), an http(s) URL, or a list: .csv, .jsonl or
    .parquet, see `pipelines.source_lists`. A list's row stands over what a folder says of the same file.

    Raises FileNotFoundError for a place that is not there, ValueError for one that holds no media or a malformed list,
    OSError for storage that does not answer.
    """
    lister = _Lister(outside=outside)
    for place in places:
        before = lister.num_found
        lister.add_place(place)
        if lister.num_found == before:
            raise ValueError(
                f"no media files in {place}: expected files ending in {', '.join(sorted(MEDIA_SUFFIXES)[:6])}, ... ; "
                "name a file itself, or a .csv/.jsonl/.parquet list, to ingest other names."
            )
    found = lister.described | {uri: s for uri, s in lister.plain.items() if uri not in lister.described}
    return Listing(
        sources=[found[uri] for uri in sorted(found)],
        num_ignored=lister.num_ignored,
        notes=tuple(lister.notes),
        reaches=tuple(lister.reaches),
    )


@dataclass(kw_only=True)
class _Lister:
    """What has been found so far."""

    outside: str | None
    plain: dict[str, Source] = field(default_factory=dict)  # by uri
    described: dict[str, Source] = field(default_factory=dict)  # by lists, tars and datasets, which know more
    num_found: int = 0
    num_ignored: int = 0
    notes: list[str] = field(default_factory=list)
    reaches: list[_Reach] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._outside_uri = "\0"
        self._outside_path = ""
        self._captions: dict[str, dict[str, str]] = {}  # by folder
        if self.outside is not None:
            path = local_path(self.outside)
            self._outside_path = path or ""
            self._outside_uri = local_uri(f"{path}/") if path else _Remote.of(self.outside).uri_prefix()

    def add_place(self, place: str) -> None:
        if fetch.is_web(place):
            if _suffix(place.partition("?")[0]) in source_lists.SUFFIXES:
                raise ValueError(f"{place} is a list on the web: download it and name the file.")
            self._add(self.plain, _located(place))
            return
        path = local_path(place) if "://" in place else absolute_url(place)
        if path is None:
            self._add_remote(place)
        elif os.path.isdir(path):
            if os.path.isfile(os.path.join(path, "dataset.json")) and _is_dataset(path):
                self._add_dataset(place)
            else:
                self._add_folder(path)
        elif os.path.isfile(path):
            self._add_file(local_uri(path))
        else:
            self._add_unseen(path, place)

    def _add(self, found: dict[str, Source], source: Source) -> None:
        if not source.uri.startswith(self._outside_uri):
            found[source.uri] = source
            self.num_found += 1

    def _add_unseen(self, path: str, place: str) -> None:
        """A place that is no file and no folder."""
        if os.path.exists(path):
            raise ValueError(f"{place} is neither a file nor a folder: pipes and devices are no sources.")
        if any(letter in path for letter in "*?["):
            base, pattern = _split_glob(path, "*?[")
            if not os.path.isdir(base):
                raise FileNotFoundError(
                    f"no folder {base} for {place}: check the spelling and that it is mounted or readable."
                )
            self._add_folder(base, pattern=pattern)
            return
        located = _located(place) if tars.split_member(place) else None
        if located is None or located.version == MISSING:
            raise FileNotFoundError(
                f"no file or folder {place}: check the spelling and that it is mounted or readable."
            )
        self._add(self.plain, located)

    def _add_file(self, uri: str) -> None:
        """A place that is one file: a list, a tar, or a source of whatever name."""
        suffix = _suffix(filesystem_of(uri)[1])
        if suffix in source_lists.SUFFIXES:
            self._add_list(uri)
        elif suffix == ".tar":
            self._add_tar(uri)
            self.reaches.append(_Reach(prefixes=tars.member_prefixes(uri)))
        else:
            self._add(self.plain, self._with_sidecar(_located(uri)))

    # --- folders of this machine ---

    def _add_folder(self, root: str, *, pattern: tuple[str, ...] = ()) -> None:
        unread: list[str] = []
        depth = len(pattern) if pattern and "**" not in pattern else None
        for folder, entries in _walk(root, avoid=self._outside_path, max_depth=depth, unread=unread):
            captions = _captions_by_stem(entry.name for entry in entries)
            for entry in entries:
                if pattern and not _matches(os.path.relpath(entry.path, root).split("/"), pattern):
                    continue
                self._add_entry(entry, folder=folder, captions=captions)
        if root in unread:
            raise PermissionError(f"cannot look into {root}: mend its permissions.")
        self.notes += [f"cannot look into {local_uri(folder)}: what lies there is not listed." for folder in unread]
        self.reaches.append(
            _Reach(
                prefixes=_local_prefixes(root),
                unread=tuple(prefix for folder in unread for prefix in _local_prefixes(folder)),
                pattern=pattern,
            )
        )

    def _add_entry(self, entry: os.DirEntry[str], *, folder: str, captions: Mapping[str, str]) -> None:
        name = entry.name
        suffix = _suffix(name)
        if suffix not in MEDIA_SUFFIXES:
            if suffix == ".tar" and entry.is_file():
                self._add_tar(local_uri(entry.path))
            elif suffix not in CAPTION_SUFFIXES:
                self.num_ignored += 1
            return
        version, size_bytes = MISSING, 0
        try:
            found = entry.stat()
            if not stat.S_ISREG(found.st_mode):
                self.num_ignored += 1
                return
            version, size_bytes = f"{found.st_size}-{found.st_mtime_ns}", found.st_size
        except OSError:
            if not os.path.lexists(entry.path):  # gone since it was read; a link to nowhere is a source that is missing
                return
        stem = name[: -len(suffix)]
        sidecar = captions.get(stem)
        self._add(
            self.plain,
            Source(
                uri=entry.path if is_plain(entry.path) else local_uri(entry.path),
                version=version,
                size_bytes=size_bytes,
                title=_text(stem),
                captions_uri=local_uri(os.path.join(folder, sidecar)) if sidecar else None,
            ),
        )

    # --- object stores ---

    def _add_remote(self, place: str) -> None:
        if tars.split_member(place):
            self._add(self.plain, _located(place))
            return
        remote = _Remote.of(place)
        info = remote.fs.get_file_info(remote.path)
        if info.type == pafs.FileType.File:
            self._add_file(remote.uri(remote.path))
        elif info.type == pafs.FileType.Directory:
            if remote.fs.get_file_info(f"{remote.path}/dataset.json").type == pafs.FileType.File and _is_dataset(place):
                self._add_dataset(place)
            else:
                self._add_remote_folder(remote, remote.path)
        elif any(letter in remote.path for letter in "*["):
            base, pattern = _split_glob(remote.path, "*[")
            self._add_remote_folder(remote, base, pattern=pattern)
        else:
            raise FileNotFoundError(f"no file or folder {place}: check the spelling and the right to read it.")

    def _add_remote_folder(self, remote: _Remote, folder: str, *, pattern: tuple[str, ...] = ()) -> None:
        files: dict[str, list[pafs.FileInfo]] = defaultdict(list)
        selector = pafs.FileSelector(folder, recursive=True, allow_not_found=True)
        for info in remote.fs.get_file_info(selector):
            names = info.path[len(folder) + 1 :].split("/")
            if info.type == pafs.FileType.File and not _is_hidden(names):
                files[os.path.dirname(info.path)].append(info)
        for base, infos in files.items():
            captions = _captions_by_stem(info.base_name for info in infos)
            for info in infos:
                suffix = _suffix(info.path)
                if pattern and not _matches(info.path[len(folder) + 1 :].split("/"), pattern):
                    continue
                if suffix in MEDIA_SUFFIXES:
                    sidecar = captions.get(PurePosixPath(info.path).stem)
                    uri = remote.uri(f"{base}/{sidecar}") if sidecar else None
                    self._add(self.plain, remote.source(info, captions_uri=uri))
                elif suffix == ".tar":
                    self._add_tar(remote.uri(info.path))
                elif suffix not in CAPTION_SUFFIXES:
                    self.num_ignored += 1
        self.reaches.append(_Reach(prefixes=(remote.uri_prefix(folder),), query=remote.query, pattern=pattern))

    # --- tars, datasets, lists ---

    def _add_tar(self, uri: str) -> None:
        """The media members of a tar in WebDataset layout: KEY.mp4 with KEY.json and KEY.srt beside it.

        A tar without any is ignored; one that is cut is a source itself besides its sound members, so that the loss
        is on the books.
        """
        version = _located(uri).version
        members: list[tuple[str, int]] = []
        fields: dict[str, dict[str, Any]] = {}
        whole = True
        try:
            with tars.opened(uri) as file:
                for name, first, size_bytes in tars.scan(file):
                    members.append((name, size_bytes))
                    if name.endswith(".json") and size_bytes <= _MAX_JSON_BYTES:
                        file.seek(first)
                        fields[_key(name)] = _flat(file.read(size_bytes))
        except (OSError, tarfile.TarError) as error:
            whole = False
            self.notes.append(f"{uri} cannot be read to its end ({error}): only what comes before is listed.")
            self._add(self.plain, _located(uri))
        captions = _captions_by_stem(name for name, _ in members)
        media = [
            (name, size)
            for name, size in members
            if _suffix(name) in MEDIA_SUFFIXES and not _is_hidden(name.split("/"))
        ]
        for name, size_bytes in media:
            key = _key(name)
            known = dict(fields.get(key, {}))
            title, language = known.pop("title", None), known.pop("language", None)
            source = Source(
                uri=tars.member_uri(uri, name),
                version=version,
                size_bytes=size_bytes,
                title=str(title) if title else _text(os.path.basename(key)),
                captions_uri=tars.member_uri(uri, captions[key]) if key in captions else None,
                language=str(language) if language else None,
                metadata=source_lists.as_metadata(known),
            )
            self._add(self.described, source)
        self.num_ignored += whole and not media

    def _add_dataset(self, place: str) -> None:
        """The previews of a dataset, one for each video with a sample; times then count from the preview's start."""
        dataset = Dataset(place)
        uri = _Remote.of(place).uri if local_path(place) is None else local_uri
        selector = pafs.FileSelector(dataset.folder.path("media"), allow_not_found=True)
        previews = {info.base_name: info for info in dataset.folder.fs.get_file_info(selector)}
        records = _first_records(dataset)
        if records and not previews:
            raise ValueError(
                f"the dataset {place} has no previews (media/): it was ingested with media.keep_previews=False, so "
                "ingest its sources instead."
            )
        for video_id, record in records.items():
            info = previews.get(f"{video_id}.mp4")
            source = Source(
                uri=uri(dataset.folder.path(f"media/{video_id}.mp4")),
                version=_version(info) if info else MISSING,
                size_bytes=(info.size or 0) if info else 0,
                title=record["title"],
                metadata=source_lists.as_metadata({"source": record["source"], **record.get("metadata", {})}),
            )
            self._add(self.described, source)
        root = dataset.folder.path("media")
        remote = _Remote.of(place) if local_path(place) is None else None
        prefixes = (remote.uri_prefix(root),) if remote else _local_prefixes(root)
        self.reaches.append(_Reach(prefixes=prefixes, query=remote.query if remote else ""))

    def _add_list(self, uri: str) -> None:
        fs, path = filesystem_of(uri)
        beside = functools.partial(_beside, list_uri=uri)
        for row, located in _in_threads(_located, source_lists.read_list(fs, path), lambda row: beside(row.uri)):
            extra = dict(row.extra)
            version = located.version
            if fetch.is_web(located.uri):
                version = str(extra.pop("version", None) or "")
            captions_uri = beside(row.captions) if row.captions else None
            if captions_uri is None and local_path(located.uri) is not None:
                captions_uri = self._with_sidecar(located).captions_uri
            source = Source(
                uri=located.uri,
                version=version,
                size_bytes=located.size_bytes,
                title=row.title or located.title,
                captions_uri=captions_uri,
                language=row.language,
                metadata=source_lists.as_metadata(extra),
            )
            self._add(self.described, source)

    def _with_sidecar(self, source: Source) -> Source:
        """The source with the captions that lie beside it; of a folder with many sources the names are read once."""
        path = local_path(source.uri)
        remote = None if path is not None else _Remote.of(source.uri)
        folder, name = os.path.split(path if path is not None else filesystem_of(source.uri)[1])
        if folder not in self._captions:
            try:
                names = [info.base_name for info in remote.infos(folder)] if remote else os.listdir(folder)
            except OSError:
                names = []
            self._captions[folder] = _captions_by_stem(names)
        sidecar = self._captions[folder].get(os.path.splitext(name)[0])
        if sidecar is None:
            return source
        beside = f"{folder}/{sidecar}"
        return dataclasses.replace(source, captions_uri=remote.uri(beside) if remote else local_uri(beside))


@dataclass(frozen=True, slots=True)
class _Remote:
    """An object store and how its files are named from outside: names in a URI are quoted, its query belongs to all."""

    fs: pafs.FileSystem
    path: str
    head: str
    query: str

    @classmethod
    def of(cls, place: str) -> _Remote:
        fs, path = filesystem_of(place)
        split = urllib.parse.urlsplit(place)
        user, at, _ = split.netloc.rpartition("@")
        authority = "" if path.startswith(urllib.parse.unquote(split.netloc[len(user + at) :])) else split.netloc
        head = f"{split.scheme}://{user}{at}" if not authority else f"{split.scheme}://{authority}"
        return cls(fs, path, head, f"?{split.query}" if split.query else "")

    def uri(self, path: str) -> str:
        return f"{self.head}{urllib.parse.quote(path)}{self.query}"

    def uri_prefix(self, path: str | None = None) -> str:
        return f"{self.head}{urllib.parse.quote(self.path if path is None else path)}/"

    def infos(self, folder: str) -> list[pafs.FileInfo]:
        return self.fs.get_file_info(pafs.FileSelector(folder, allow_not_found=True))

    def source(self, info: pafs.FileInfo, *, captions_uri: str | None = None) -> Source:
        return Source(
            uri=self.uri(info.path),
            version=_version(info),
            size_bytes=info.size or 0,
            title=PurePosixPath(info.path).stem,
            captions_uri=captions_uri,
        )


def _located(uri: str) -> Source:
    """A single source without what lies beside it; its version is MISSING if it is not there."""
    if fetch.is_web(uri):
        name = urllib.parse.unquote(uri.partition("?")[0].partition("#")[0]).rpartition("/")[2]
        return Source(uri=uri, version="", size_bytes=0, title=os.path.splitext(name)[0] or uri)
    path, member = local_path(uri), tars.split_member(uri)
    if path is not None:
        uri = local_uri(path)
    title = _text(os.path.splitext(os.path.basename(path or (member[1] if member else uri)))[0])
    try:
        if path is not None:
            found = os.stat(path)
            if stat.S_ISREG(found.st_mode):
                version = f"{found.st_size}-{found.st_mtime_ns}"
                return Source(uri=uri, version=version, size_bytes=found.st_size, title=title)
        elif member:
            version = _located(member[0]).version
            return Source(uri=uri, version=version, size_bytes=tars.find(uri)[2], title=title)
        else:
            remote = _Remote.of(uri)
            info = remote.fs.get_file_info(remote.path)
            if info.type == pafs.FileType.File:
                return remote.source(info)
    except (OSError, ValueError):  # no such file, no such bucket, no right to it, no such scheme: fetch says which
        pass
    return Source(uri=uri, version=MISSING, size_bytes=0, title=title)


def _beside(uri: str, *, list_uri: str) -> str:
    """A uri of a list: absolute as it is, relative from the folder of the list."""
    if "://" in uri:
        return uri
    path = local_path(list_uri)
    if path is None and not uri.startswith("/"):
        remote = _Remote.of(list_uri)
        return remote.uri(os.path.normpath(f"{os.path.dirname(remote.path)}/{uri}"))
    full = os.path.normpath(os.path.join(os.path.dirname(path or "/"), os.path.expanduser(uri)))
    return full if tars.split_member(full) and not os.path.exists(full) else local_uri(full)


def _walk(
    root: str, *, avoid: str, max_depth: int | None, unread: list[str]
) -> Iterator[tuple[str, list[os.DirEntry[str]]]]:
    """Each folder from `root` down with its files, hidden ones left out; folders that cannot be read go to `unread`.

    Links to folders are followed, after all real folders, and each folder is entered once: so a loop of links ends,
    and a file has its real name where it has one. `avoid` is a folder that is not entered.
    """
    seen = {identity for identity in [_identity(avoid)] if identity} if avoid else set()
    pending, linked = [(root, 1)], deque[tuple[str, int]]()
    while pending or linked:
        folder, depth = pending.pop() if pending else linked.popleft()
        identity = _identity(folder)
        if identity is None or identity in seen:
            continue
        seen.add(identity)
        try:
            with os.scandir(folder) as scanned:
                entries = [entry for entry in scanned if entry.name[0] != "."]
        except FileNotFoundError:
            continue
        except OSError:
            unread.append(folder)
            continue
        files: list[os.DirEntry[str]] = []
        folders: list[os.DirEntry[str]] = []
        for entry in entries:
            try:
                (folders if entry.is_dir() else files).append(entry)
            except OSError:  # a link to itself
                files.append(entry)
        if max_depth is None or depth < max_depth:
            for entry in sorted(folders, key=lambda entry: entry.name, reverse=True):
                (linked if entry.is_symlink() else pending).append((entry.path, depth + 1))
        yield folder, files


def _identity(folder: str) -> tuple[int, int] | None:
    try:
        found = os.stat(folder)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _local_prefixes(folder: str) -> tuple[str, ...]:
    """What the URIs of all files under a folder begin with; those of odd names with the second."""
    folder = folder.rstrip("/")
    quoted = f"file://{urllib.parse.quote(os.fsencode(folder))}/"
    return (f"{folder}/", quoted) if is_plain(folder) else (quoted,)


def _split_glob(pattern: str, letters: str) -> tuple[str, tuple[str, ...]]:
    """The folder above all wildcards, and the names below it."""
    base = pattern
    while any(letter in base for letter in letters):
        base = os.path.dirname(base)
    return base, tuple(pattern[len(base) :].strip("/").split("/"))


def _matches(names: Sequence[str], pattern: Sequence[str]) -> bool:
    """As in a shell: `*` stays within a folder, `**` takes in any number of folders."""
    if not pattern:
        return not names
    if pattern[0] == "**":
        return any(_matches(names[first:], pattern[1:]) for first in range(len(names) + 1))
    return bool(names) and fnmatch.fnmatchcase(names[0], pattern[0]) and _matches(names[1:], pattern[1:])


def _captions_by_stem(names: Iterable[str]) -> dict[str, str]:
    """Stem of a video -> its captions: NAME.srt, or NAME.LANGUAGE.vtt as downloaders write it; the plain name first."""
    found: dict[str, str] = {}
    for name in names:
        stem, dot, suffix = name.rpartition(".")
        if f".{suffix.lower()}" not in CAPTION_SUFFIXES:
            continue
        while dot and "/" not in suffix:
            found[stem] = min(found.get(stem, name), name, key=lambda known: (len(known), known))
            stem, dot, suffix = stem.rpartition(".")
    return found


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _is_hidden(names: Iterable[str]) -> bool:
    return any(name.startswith(".") and name not in (".", "..") for name in names)


def _text(name: str) -> str:
    """A file name as text; bytes that are no UTF-8 become question marks."""
    return name if name.isascii() else os.fsencode(name).decode(errors="replace")


def _version(info: pafs.FileInfo) -> str:
    return f"{info.size or 0}-{info.mtime_ns or 0}"


def _key(member: str) -> str:
    """WebDataset's key of a member: its name up to the first dot, folders apart."""
    folder, slash, name = member.rpartition("/")
    return f"{folder}{slash}{name.partition('.')[0]}"


def _flat(data: bytes) -> dict[str, Any]:
    """The strings and numbers of a JSON object; nothing where it is none."""
    try:
        record = json.loads(data)
    except ValueError:
        return {}
    fields = record.items() if isinstance(record, dict) else ()
    return {name: value for name, value in fields if isinstance(value, str | int | float)}


def _is_dataset(place: str) -> bool:
    try:
        record = json.loads(Folder.at(place).read("dataset.json"))
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and {"schema_version", "clip_grid", "vocabulary"} <= record.keys()


def _first_records(dataset: Dataset) -> dict[str, dict[str, Any]]:
    """Video id -> the JSON of its first sample; its tokens and features are not read."""
    index = dataset.sample_index().select(["video_id", "part_index", "shard", "offset"])
    first: dict[str, dict[str, Any]] = {}
    for row in index.sort_by([("video_id", "ascending"), ("part_index", "ascending")]).to_pylist():
        first.setdefault(row["video_id"], row)
    by_shard: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for video_id, row in first.items():
        by_shard[row["shard"]].append((row["offset"], video_id))
    records = {}
    for shard in sorted(by_shard):
        with dataset.folder.fs.open_input_file(dataset.folder.path(f"shards/{shard}")) as stream:
            for offset, video_id in sorted(by_shard[shard]):
                stream.seek(offset)
                header = tarfile.TarInfo.frombuf(stream.read(tarfile.BLOCKSIZE), "utf-8", "strict")
                records[video_id] = json.loads(stream.read(header.size))
    return records


def _in_threads(
    function: Callable[[str], Out], items: Iterable[Item], uri_of: Callable[[Item], str]
) -> Iterator[tuple[Item, Out]]:
    """Each item with the function of its uri, in order; what another machine has to answer is asked for at once."""
    remaining = iter(items)
    with ThreadPoolExecutor(_NUM_REQUESTS) as pool:
        while batch := list(islice(remaining, 1000)):
            uris = [uri_of(item) for item in batch]
            waiting = {uri: pool.submit(function, uri) for uri in uris if _is_remote(uri)}
            for item, uri in zip(batch, uris, strict=True):
                yield item, waiting[uri].result() if uri in waiting else function(uri)


def _is_remote(uri: str) -> bool:
    return "://" in uri and not uri.startswith("file:") and not fetch.is_web(uri)


def duplicates(sources: Sequence[Source], ledger: pa.Table) -> dict[str, tuple[str, str]]:
    """Source id -> (video id, uri it repeats) of each source whose bytes equal an earlier one's or a kept one's.

    The first by uri stays. Only sources of equal size are read; sizes and video ids of earlier runs come from the
    ledger. What cannot be read, or has no size as listed, is left to fetch and to the ledger.
    """
    by_size: dict[int, list[Source]] = defaultdict(list)
    for source in sources:
        if source.size_bytes > 0:
            by_size[source.size_bytes].append(source)
    sizes = pa.array(by_size, pa.int64())
    is_met = pc.and_(pc.equal(ledger["status"], "kept"), pc.is_in(ledger["size_bytes"], sizes))
    first: dict[tuple[int, str], str] = {}
    for row in ledger.filter(is_met).select(["size_bytes", "video_id", "uri"]).to_pylist():
        first.setdefault((row["size_bytes"], row["video_id"]), row["uri"])
    met = {size_bytes for size_bytes, _ in first}
    doubtful = [s for size_bytes, group in by_size.items() if len(group) > 1 or size_bytes in met for s in group]
    repeated: dict[str, tuple[str, str]] = {}
    for source, video_id in _in_threads(_digest, sorted(doubtful, key=lambda s: s.uri), lambda s: s.uri):
        if video_id and (source.size_bytes, video_id) in first:
            repeated[source.source_id] = (video_id, first[source.size_bytes, video_id])
        elif video_id:
            first[source.size_bytes, video_id] = source.uri
    return repeated


def _digest(uri: str) -> str:
    """The video id of a source; "" if it cannot be read, and the fetch stage says why."""
    try:
        return digest_of(fetch.pieces(uri))
    except (OSError, ValueError):
        return ""
