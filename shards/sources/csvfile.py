"""Reads CSV files, gzipped or not, line by line with line numbers."""

import csv
import gzip
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from erann_dist.errors import UsageError, UserError
from erann_dist.storage.plain_file import require_plain_file

_MAX_BYTES_IN_ZIP = 1 << 30


def read_lines(path: Path | zipfile.Path, comment: str | None = None) -> Iterator[tuple[int, list[str]]]:
    """The number and the fields of each line; empty lines, and those that start with `comment`, are skipped.

    Raises UsageError when there is no such file, UserError when it is not CSV in UTF-8.
    """
    number = 0
    try:
        with _open(path) as file:
            lines = ("\n" if comment and line.startswith(comment) else line for line in file)
            reader = csv.reader(lines, skipinitialspace=True, strict=True)
            for fields in reader:
                number = reader.line_num
                if fields:
                    yield number, fields
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such file") from error
    except csv.Error as error:
        raise UserError(f"{path}:{number + 1}: {error}") from error
    except (OSError, UnicodeDecodeError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a text file ({error})") from error
    except (RuntimeError, NotImplementedError) as error:  # of zipfile: encrypted, or an unknown compression
        raise UserError(f"{path}: {error}") from error


def read_table(path: Path | zipfile.Path, columns: tuple[str, ...]) -> Iterator[tuple[str, dict[str, str]]]:
    """The lines after a header line, as FILE:LINE and a value for each of the header's columns.

    Raises what read_lines raises, and UserError when one of `columns` is not in the header or a line has a different
    number of fields.
    """
    lines = read_lines(path)
    _, header = next(lines, (0, []))
    header = [name.strip() for name in header]
    if missing := [name for name in columns if name not in header]:
        raise UserError(f"{path}:1: no column {missing[0]}; the required columns are {', '.join(columns)}")
    for number, fields in lines:
        if len(fields) != len(header):
            raise UserError(f"{path}:{number}: {len(fields)} fields where the header has {len(header)}")
        yield f"{path}:{number}", dict(zip(header, fields, strict=True))


def fold_number(where: str, text: str) -> int:
    """A fold, which the manifest stores in 8 bits. Raises UserError, naming the line."""
    if not re.fullmatch("0*[0-9]{1,3}", text.strip()) or int(text) > 127:
        raise UserError(f"{where}: {text!r} is not a fold; a number from 0 to 127 is needed")
    return int(text)


def _open(path: Path | zipfile.Path) -> TextIO:
    if isinstance(path, zipfile.Path):
        if path.root.getinfo(path.at).file_size > _MAX_BYTES_IN_ZIP:
            raise UserError(f"{path}: unpacks to more than {_MAX_BYTES_IN_ZIP:,} bytes; is it the right file?")
        return path.open(encoding="utf-8-sig", newline="")
    if path.exists():
        require_plain_file(path)
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")
