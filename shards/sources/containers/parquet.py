"""Parquet files of sound, as the Hugging Face Hub has them: a column audio of {bytes, path}, and columns about it.

Parquet has no access to a single row: a row group's sound is one compressed stream, of about 100 clips in files from
the Hub. So a row is found by streaming its row group, and the rows of one group, asked for in ascending order, cost one
pass over it. Plans keep the rows of a group together for that reason.
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa

from erann_dist.data.audio import SUFFIXES, DecodeError, NoSamples
from erann_dist.formats.strict_parquet import arrow_file
from shards.sources.containers.members import Damaged, Member

# Columns with a clip's own name, of AudioSet, UrbanSound8K, ESC-50; without one of them it is the name of its file.
_NAMES = ("video_id", "slice_file_name", "filename", "file_name")
_BUFFER = 1 << 20
_ERRORS = (pa.ArrowException, OSError, ValueError)


def members(path: bytes, notes: list[str]) -> Iterator[Member]:
    """The rows that have a name, grouped by row group. Only the names are read. Raises Damaged, OSError."""
    try:
        with _open(path) as parquet:
            column = _sound_column(parquet.schema_arrow)
            if column is None:
                raise Damaged("has no column of sound, which is audio with a field bytes")
            row = 0
            for group in range(parquet.num_row_groups):
                first = row
                for name in _names(parquet, group, column):
                    if name:
                        yield Member(name, row, group=first)
                    row += 1
    except _ERRORS as error:
        raise Damaged(f"damaged ({_first_line(error)}); fetch it again") from error


def _names(parquet: Any, group: int, column: str) -> list[bytes]:
    """What each row of a row group is called, with its file's suffix if that is a sound file's."""
    own = next((name for name in _NAMES if name in parquet.schema_arrow.names), None)
    has_path = "path" in [field.name for field in parquet.schema_arrow.field(column).type]
    wanted = ([own] if own else []) + ([f"{column}.path"] if has_path else [])
    if not wanted:
        return [b""] * parquet.metadata.row_group(group).num_rows
    table = parquet.read_row_group(group, columns=wanted, use_threads=False)
    nothing = [None] * len(table)
    paths = [field and field["path"] for field in table[column].to_pylist()] if has_path else nothing
    names = table[own].to_pylist() if own else nothing
    return [_name(name, path) for name, path in zip(names, paths, strict=True)]


def _name(name: object, path: str | None) -> bytes:
    path = path or ""
    if name is None:
        return path.encode()
    suffix = os.path.splitext(path)[1]
    text = str(name)
    has_suffix = os.path.splitext(text)[1].lower() in SUFFIXES
    return (text + suffix if suffix.lower() in SUFFIXES and not has_suffix else text).encode()


def read_columns(path: Path, columns: tuple[str, ...]) -> list[dict[str, Any]] | None:
    """These columns of all rows; None when the file has no sound, or lacks one of them. Raises Damaged, OSError."""
    try:
        with _open(os.fsencode(path)) as parquet:
            if _sound_column(parquet.schema_arrow) is None or not set(columns) <= set(parquet.schema_arrow.names):
                return None
            rows: list[dict[str, Any]] = parquet.read(columns=list(columns), use_threads=False).to_pylist()
            return rows
    except _ERRORS as error:
        raise Damaged(f"damaged ({_first_line(error)}); fetch it again") from error


@contextmanager
def open_member(path: bytes, row: int, size: int | None) -> Iterator[IO[bytes]]:
    """A row's file. Raises DecodeError; NoSamples for a row without one."""
    try:
        status = os.stat(path)
        data = _rows(path, status.st_mtime_ns, status.st_size).read(row)
    except _ERRORS as error:
        _rows.cache_clear()
        raise DecodeError(_first_line(error)) from error
    if not data:
        raise NoSamples("no sound in this row of the Parquet file")
    yield io.BytesIO(data)


class _Rows:
    """A file's sound by row. A row after the last one in the same row group is reached by reading on."""

    def __init__(self, path: bytes) -> None:
        self._open = _open(path)
        parquet = self._open.__enter__()
        column = _sound_column(parquet.schema_arrow)
        if column is None:
            raise OSError("has no column of sound any more")
        self._parquet, self._column = parquet, column
        sizes = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
        self._starts = np.cumsum([0, *sizes])
        self._group, self._row, self._data = -1, -1, b""  # the last row that was read
        self._batches: Iterator[pa.RecordBatch] = iter(())

    def read(self, row: int) -> bytes:
        if row == self._row:
            return self._data
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        if not 0 <= group < self._parquet.num_row_groups:
            raise OSError(f"has no row {row}")
        if group != self._group or row < self._row:
            columns = [f"{self._column}.bytes"]
            self._batches = self._parquet.iter_batches(1, row_groups=[group], columns=columns, use_threads=False)
            self._group, self._row = group, int(self._starts[group]) - 1
        wanted = next(islice(self._batches, row - self._row - 1, None), None)
        if wanted is None:
            raise OSError(f"its row group ends before row {row}")
        self._row = row
        self._data = (wanted.column(self._column)[0].as_py() or {}).get("bytes") or b""
        return self._data


@lru_cache(maxsize=1)
def _rows(path: bytes, modified: int, size: int) -> _Rows:
    """The file's rows; the last file stays open, since a shard's rows are asked for file by file."""
    return _Rows(path)


@contextmanager
def _open(path: bytes) -> Iterator[Any]:
    import pyarrow.parquet as pq  # a decoder process that reads no Parquet starts faster without it

    with open(path, "rb") as file:
        # Without pre-buffering, as that reads a whole row group's sound at once.
        yield pq.ParquetFile(arrow_file(file), pre_buffer=False, buffer_size=_BUFFER, page_checksum_verification=True)


def _sound_column(schema: pa.Schema) -> str | None:
    """The column audio, or else the only one, that has the bytes of a file in each row."""

    def has_bytes(kind: pa.DataType) -> bool:
        if not pa.types.is_struct(kind):
            return False
        found = [field.type for field in kind if field.name == "bytes"]
        return bool(found) and (pa.types.is_binary(found[0]) or pa.types.is_large_binary(found[0]))

    names = [field.name for field in schema if has_bytes(field.type)]
    return "audio" if "audio" in names else names[0] if len(names) == 1 else None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
