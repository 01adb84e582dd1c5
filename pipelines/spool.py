"""Extracted rows that wait on disk for the first visual vocabulary: `extracted/NAME.parquet` in the dataset folder.

A dataset's first run cannot make tokens before it has seen features. Kept in memory they would be lost with the run;
here a killed run goes on with what it had (2 kB a clip, about as large as the shards that they become), and the fit
reads them back in order. The folder is gone when the dataset is committed.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.rows import ROW_SCHEMA
from pipelines.storage import Folder

_NAMES = ["source_id", "attempt", "status", "reason", "part_index", "num_parts"]


@dataclass(frozen=True, kw_only=True)
class Spool:
    """Rows of one dataset folder under one configuration; rows of another configuration are dropped, not mixed in."""

    folder: Folder
    digest: str  # of the configuration

    def put(self, table: pa.Table) -> pa.Table:
        """Write rows; returns what names them, with a column `name` for `get`."""
        buffer = io.BytesIO()
        pq.write_table(table.replace_schema_metadata({"digest": self.digest}), buffer)
        rows = table.select(["source_id", "attempt", "part_index"]).to_pylist()
        name = f"{hashlib.sha256(repr((self.digest, rows)).encode()).hexdigest()[:20]}.parquet"
        self.folder.write(f"extracted/{name}", buffer.getvalue())
        return table.select(_NAMES).append_column("name", pa.array([name] * table.num_rows))

    def get(self, table: pa.Table) -> pa.Table:
        """The rows of the files in column `name`."""
        return pa.concat_tables(self._read(name) for name in table["name"].to_pylist())

    def complete(self, todo: pa.Table) -> pa.Table:
        """What names the rows (as `put` returns it) of those sources of `todo` all of whose rows are here, for the same
        attempt. Sources of which only some parts are here have to be done again."""
        found = [self._names(name) for name in self._files()]
        rows = pa.concat_tables([self._no_names(), *(table for table in found if table is not None)])
        rows = rows.join(todo.select(["source_id", "attempt"]), ["source_id", "attempt"], join_type="inner")
        by_source = rows.group_by("source_id").aggregate(
            [("part_index", "count_distinct"), ("num_parts", "max"), ("status", "count"), ("part_index", "count")]
        )
        # A verdict over a whole source has no part; a half-spooled source lacks its last part or one before.
        ended = pc.fill_null(pc.equal(by_source["part_index_count_distinct"], by_source["num_parts_max"]), False)
        judged = self._judged_whole(rows)
        whole = pc.or_(ended, pc.is_in(by_source["source_id"], judged))
        return rows.filter(pc.is_in(rows["source_id"], by_source.filter(whole)["source_id"].combine_chunks()))

    @staticmethod
    def _judged_whole(rows: pa.Table) -> pa.Array:
        stopped = pc.or_(pc.is_null(rows["part_index"]), pc.fill_null(pc.equal(rows["status"], "quarantined"), False))
        return rows.filter(stopped)["source_id"].combine_chunks()

    def features(self, names: list[str]) -> np.ndarray:
        """[num_clips, dim] float16 features of the rows that are well, file by file; empty where there are none."""
        found = [
            np.frombuffer(row["features"], np.float16).reshape(row["num_clips"], -1)
            for name in sorted(names)
            for row in self._read(name).select(["status", "num_clips", "features"]).to_pylist()
            if row["status"] is None
        ]
        return np.concatenate(found) if found else np.empty((0, 0), np.float16)

    def clear(self) -> None:
        """Remove every spooled file, of whatever configuration."""
        for name in self._files():
            self.folder.delete(f"extracted/{name}")
        self.folder.delete_empty("extracted")

    def _files(self) -> list[str]:
        return [name.removeprefix("extracted/") for name in self.folder.names("extracted", suffix=".parquet")]

    def _read(self, name: str) -> pa.Table:
        return pq.read_table(io.BytesIO(self.folder.read(f"extracted/{name}"))).cast(ROW_SCHEMA)

    def _names(self, name: str) -> pa.Table | None:
        """What names the rows of a file; None if they are of another configuration."""
        file = pq.ParquetFile(self.folder.fs.open_input_file(self.folder.path(f"extracted/{name}")))
        if (file.schema_arrow.metadata or {}).get(b"digest") != self.digest.encode():
            return None
        rows = file.read(columns=_NAMES)
        return rows.append_column("name", pa.array([name] * rows.num_rows)).replace_schema_metadata()

    @staticmethod
    def _no_names() -> pa.Table:
        fields = [ROW_SCHEMA.field(name) for name in _NAMES]
        return pa.schema([*fields, pa.field("name", pa.string())]).empty_table()
