"""Labelled rows with the location of their sound, read from any data set; in columns, as AudioSet has two million."""

import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from erann_dist.words import count

if TYPE_CHECKING:  # a decoder process starts in half the time without S3 and Parquet
    from erann_dist.data.manifest import Task

_SAFE = re.compile("[A-Za-z0-9_-]+")

# Another file of the same clip; the columns are ROW_SCHEMA's.
CANDIDATES = pa.struct([("path", pa.binary()), ("offset", pa.int64()), ("size", pa.int64()), ("source", pa.string())])
PLACE = ("path", "offset", "size", "group")  # the columns that say where the sound is
ROW_SCHEMA = pa.schema(
    [
        ("key", pa.string()),  # unique; see safe_key
        ("labels", pa.list_(pa.int16())),  # label indices, ascending
        ("path", pa.binary()),  # absolute, of the file to open, in the file system's bytes; null when not found
        ("offset", pa.int64()),  # of a clip in an archive, in its kind's unit: a byte, or a row; null for a file
        ("size", pa.int64()),  # of a clip in an archive, in bytes, where it is known
        ("group", pa.int64()),  # rows of one archive with the same number are read together; null: on its own
        ("source", pa.string()),  # the file relative to the audio folder, or what was searched for
        ("split", pa.string()),
        ("fold", pa.int8()),
        ("start", pa.float64()),  # of the segment in the whole recording, seconds; null for the whole file
        ("end", pa.float64()),
        ("reason", pa.string()),  # why it can't be packed, when that is known before anything is decoded
        ("detail", pa.string()),
        ("shared", pa.bool_()),  # whether other rows are segments of the same file, which is the whole recording then
        ("candidates", pa.list_(CANDIDATES)),  # further files, tried in order when the first can't be decoded
    ]
)


@dataclass(frozen=True)
class SourceRow:
    """One clip of a data set, before anything is decoded. The columns are ROW_SCHEMA's."""

    key: str
    labels: list[int]
    path: bytes | None
    source: str
    offset: int | None = None
    size: int | None = None
    group: int | None = None
    split: str | None = None
    fold: int | None = None
    start: float | None = None
    end: float | None = None
    reason: str | None = None
    detail: str | None = None
    shared: bool | None = None
    candidates: list[dict[str, Any]] | None = None

    def with_next_file(self) -> "SourceRow":
        """The same clip from the first of its candidates."""
        file, *rest = self.candidates or []
        return replace(self, **file, candidates=rest)


@dataclass(frozen=True)
class FileCounts:
    """How the sound files that were found and the clips of the list fit together."""

    found: int  # sound files
    matched: int  # of them: those of a listed clip, further copies included
    unmatched: int
    examples: list[str]  # a few names of those that match no clip
    listed: int | None = None  # clips of the list; None where the files themselves are the list
    with_file: int | None = None
    without_file: int | None = None

    def lines(self) -> list[str]:
        """For the user: the files, then the clips where there is a list."""
        more = ", …" if self.unmatched > len(self.examples) else ""
        examples = f": {', '.join(self.examples)}{more}" if self.unmatched else ""
        found = f"{count(self.found, 'sound file')} found, {self.matched:,} matched, {self.unmatched:,} unmatched"
        lines = [found + examples]
        if self.listed is not None:
            listed = f"{count(self.listed, 'clip')} listed, {self.with_file:,} with a file"
            lines.append(f"{listed}, {self.without_file:,} without")
        return lines


@dataclass(frozen=True)
class Source:
    """A data set: its labels in its own order, and its rows (ROW_SCHEMA)."""

    name: str
    task: "Task"
    label_ids: list[str]
    label_names: list[str]
    rows: pa.Table
    notes: list[str]  # for the user: oddities of the files
    files: FileCounts | None = None


def rows_table(rows: Iterable[SourceRow]) -> pa.Table:
    """The rows as a table, built in parts: as Python objects two million rows would take gigabytes."""
    rows = iter(rows)
    parts = iter(lambda: [asdict(row) for row in islice(rows, 65_536)], [])
    return pa.concat_tables([pa.Table.from_pylist(part, ROW_SCHEMA) for part in parts] or [ROW_SCHEMA.empty_table()])


def safe_key(name: str | bytes) -> str:
    """The name as a key: any byte except A-Z a-z 0-9 _ - becomes %XX, so that no dot or slash confuses a tar reader."""
    if isinstance(name, str) and _SAFE.fullmatch(name):
        return name
    return re.sub(rb"[^A-Za-z0-9_-]", lambda m: b"%%%02X" % m[0][0], os.fsencode(name)).decode()


def printable(name: bytes) -> str:
    """A file name as text; bytes that are not UTF-8 are shown as \\xNN."""
    return name.decode(errors="backslashreplace")
