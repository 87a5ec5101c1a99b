"""Writes tables row by row as CSV, JSON Lines or Parquet, by the file's suffix; what was written remains readable."""

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from erann_dist.errors import UsageError

SUFFIXES = (".csv", ".jsonl", ".parquet")

Rows = Sequence[Mapping[str, Any]]


def require_table(file: Path) -> None:
    """Raise UsageError unless the file's suffix names a format."""
    if file.suffix not in SUFFIXES:
        raise UsageError(f"{file}: its suffix has to be {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")


@contextmanager
def table_writer(file: Path, schema: pa.Schema) -> Iterator[Callable[[Rows], None]]:
    """A function that appends rows, for as long as the context is open. In CSV a list is columns NAME.0, NAME.1, …,
    or those of the field's metadata `columns`, one a line.
    """
    if file.suffix == ".parquet":
        with pq.ParquetWriter(file, schema) as parquet:
            yield lambda rows: parquet.write_table(pa.Table.from_pylist([dict(row) for row in rows], schema))
        return
    with file.open("w", newline="", encoding="utf-8") as text:
        if file.suffix == ".jsonl":
            yield lambda rows: text.writelines(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows)
            return
        writer = csv.writer(text)
        columns = {field.name: _columns(field) for field in schema}
        writer.writerow([name for names in columns.values() for name in names])

        def append(rows: Rows) -> None:
            for row in rows:
                cells: list[Any] = []
                for name, names in columns.items():
                    value = row.get(name)
                    cells += value if isinstance(value, list) else [value] * len(names)
                writer.writerow(cells)

        yield append


def _columns(field: pa.Field) -> list[str]:
    metadata = field.metadata or {}
    return metadata[b"columns"].decode().split("\n") if b"columns" in metadata else [field.name]
