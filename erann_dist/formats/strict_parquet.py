"""Parquet from a disk or a bucket: cast to the declared columns, with checked values."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from erann_dist.errors import UserError

MAX_ROWS = 2**31 - 1


@dataclass(frozen=True)
class Range:
    """The numbers that a column, or a column of lists, may contain, or the pattern that its strings match."""

    least: float = -math.inf
    most: float = math.inf
    pattern: str | None = None


# By the column's name, in any table. Nulls are not checked.
RANGES = {
    "labels": Range(0),
    "targets": Range(0),
    "fold": Range(0, 127),
    "shard": Range(0),
    "offset": Range(0, 2**60),
    "size": Range(0, 2**60),
    "clips": Range(0),
    "samples": Range(1, 2**32),  # 27 hours
    "lost": Range(0),
    "key": Range(pattern=r"^[^\x00-\x1f\x7f]+$"),
    "sha256": Range(pattern="^([0-9a-f]{64})?$"),
}


def arrow_file(file: BinaryIO) -> pa.OSFile:
    """The same file, read by Arrow itself. Arrow's threads may keep what they read a moment longer than the program
    lives; bytes objects from a Python file would crash it then."""
    return pa.OSFile(f"/dev/fd/{file.fileno()}")


def read(
    file: BinaryIO,
    where: str,
    schema: pa.Schema,
    required: Collection[str],
    advice: str,
    columns: list[str] | None = None,
    optional: Collection[str] = (),
) -> pa.Table:
    """The declared columns of a file, or some of them, with the file's metadata.

    required: columns without nulls. advice: what to do about a damaged file. optional: columns that older files lack;
    they are null there. Raises UserError, which names the file and the column.
    """
    wanted = schema if columns is None else pa.schema([schema.field(name) for name in columns])
    try:
        parquet = pq.ParquetFile(arrow_file(file), page_checksum_verification=True)
        found = parquet.schema_arrow
        there = [name for name in wanted.names if name in found.names or name not in optional]
        if missing := [name for name in there if found.names.count(name) != 1]:
            raise UserError(f"{where}: has no column {missing[0]}, or has it twice; {advice}")
        if parquet.metadata.num_rows > MAX_ROWS:
            raise UserError(f"{where}: {parquet.metadata.num_rows:,} rows are more than {MAX_ROWS:,}; {advice}")
        table = parquet.read(there).select(there)
        for name in wanted.names:
            if name not in there:
                table = table.append_column(wanted.field(name), pa.nulls(len(table), wanted.field(name).type))
        table = table.select(wanted.names)
        for field in wanted:
            _require_kind(where, field, table.schema.field(field.name).type, advice)
        table = table.cast(wanted.with_metadata(found.metadata))
        table.validate(full=True)
        for name in wanted.names:
            _require_values(where, name, table[name], name in required, advice)
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where}: damaged ({_first_line(error)}); {advice}") from error
    return table


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0] if lines[0].isprintable() else ascii(lines[0])


def _require_kind(where: str, field: pa.Field, found: pa.DataType, advice: str) -> None:
    """Raise UserError for another kind of type: Arrow would cast strings to numbers, and floats to integers."""
    if _kind(found) != _kind(field.type):
        raise UserError(f"{where}: the column {field.name} is of type {found}, not {field.type}; {advice}")


def _kind(type_: pa.DataType) -> str:
    if pa.types.is_dictionary(type_):
        return _kind(type_.value_type)
    if pa.types.is_list(type_) or pa.types.is_large_list(type_):
        return f"list of {_kind(type_.value_type)}"
    kinds = {"integer": pa.types.is_integer, "float": pa.types.is_floating}
    is_text = pa.types.is_string(type_) or pa.types.is_large_string(type_)
    return "text" if is_text else next((name for name, is_kind in kinds.items() if is_kind(type_)), "another")


def _require_values(where: str, name: str, column: pa.ChunkedArray, required: bool, advice: str) -> None:
    if required and column.null_count:
        raise UserError(f"{where}: the column {name} has nulls, which are not allowed; {advice}")
    if pa.types.is_list(column.type):
        column = pc.list_flatten(column)
        if column.null_count:
            raise UserError(f"{where}: the lists of the column {name} have nulls, which are not allowed; {advice}")
    allowed = RANGES.get(name)
    if allowed is None or len(column) == column.null_count:
        return
    if allowed.pattern is not None:
        matches = pc.match_substring_regex(column, allowed.pattern)
        if not pc.all(matches).as_py():
            value = column.filter(pc.invert(matches))[0].as_py()
            raise UserError(f"{where}: {value[:100]!r} is not a valid {name}; {advice}")
        return
    found = pc.min_max(column).as_py()
    if found["min"] < allowed.least or found["max"] > allowed.most:
        wrong = found["min"] if found["min"] < allowed.least else found["max"]
        raise UserError(f"{where}: the column {name} has {wrong:,}, which is out of range; {advice}")
