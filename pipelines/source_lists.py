"""Lists of sources: .csv, .jsonl or .parquet, one source a row, read row by row and not whole.

uri (or path, or url)   where it is; relative paths count from the list's own folder
title, captions, language, version    optional
anything else           carried to the samples as metadata, licence for example
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

SUFFIXES = frozenset({".csv", ".jsonl", ".parquet"})
_URI_COLUMNS = ("uri", "path", "url")
_OWN_COLUMNS = ("title", "captions", "language")


@dataclass(frozen=True, kw_only=True, slots=True)
class ListRow:
    """A row of a list; paths as they are written there."""

    uri: str
    title: str | None
    captions: str | None
    language: str | None
    extra: dict[str, Any]  # the other columns that have a value


def read_list(fs: pafs.FileSystem, path: str) -> Iterator[ListRow]:
    """The rows of a list. Raises ValueError, in one sentence, for a list that is malformed or a row that names nothing;
    OSError if it cannot be read."""
    kind = PurePosixPath(path).suffix.lower()[1:]
    try:
        with fs.open_input_file(path) as stream:
            for number, row in enumerate(_records(stream, kind), start=1):
                yield _row(row, where=f"row {number} of {path}")
    except _BadRow as error:
        raise ValueError(str(error)) from error
    except (ValueError, csv.Error, pa.ArrowException) as error:  # of JSON, of the encoding, of Arrow
        why = " ".join(str(error).split())[:200]
        raise ValueError(f"the list {path} cannot be read ({why}): write it as UTF-8 {kind}.") from error


def as_metadata(fields: Mapping[str, Any]) -> str:
    """Metadata as a source carries it: a JSON object with sorted keys, empty values left out; "" if nothing is left."""
    kept = {name: value for name, value in fields.items() if not _is_empty(value)}
    return json.dumps(kept, sort_keys=True, ensure_ascii=False, default=str) if kept else ""


class _BadRow(Exception):
    """A row without what it must have."""


def _row(row: Any, *, where: str) -> ListRow:
    if not isinstance(row, dict):
        raise _BadRow(f"{where} is {str(row)[:40]!r}: write an object with a key uri in each line.")
    if None in row:  # csv's name for fields behind the last column
        raise _BadRow(f"{where} has more fields than the header: quote values that hold commas.")
    column = next((name for name in _URI_COLUMNS if row.get(name)), None)
    if column is None or not isinstance(row[column], str):
        raise _BadRow(f"{where} has no uri: name that column uri, path or url, and write text in it.")
    own = {name: str(row[name]) if row.get(name) and not _is_empty(row[name]) else None for name in _OWN_COLUMNS}
    extra = {name: value for name, value in row.items() if name not in (column, *_OWN_COLUMNS)}
    return ListRow(uri=row[column], **own, extra=extra)


def _is_empty(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _records(stream: pa.NativeFile, kind: str) -> Iterator[Any]:
    if kind == "parquet":
        for batch in pq.ParquetFile(stream).iter_batches(batch_size=10_000):
            yield from batch.to_pylist()
        return
    text = io.TextIOWrapper(io.BufferedReader(stream, 1 << 20), encoding="utf-8-sig", newline="")
    if kind == "csv":
        yield from csv.DictReader(text, strict=True)
    else:
        yield from (json.loads(line) for line in text if line.strip())
