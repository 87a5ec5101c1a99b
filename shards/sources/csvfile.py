"""Reads lists, gzipped or not, line by line with line numbers: CSV as spreadsheets and scripts write it, and TSV."""

import codecs
import csv
import gzip
import io
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import BinaryIO, TextIO, cast

from erann_dist.errors import UsageError, UserError
from erann_dist.storage.plain_file import require_plain_file

ListFile = Path | zipfile.Path
_MAX_BYTES_IN_ZIP = 1 << 30
_HEAD_BYTES = 4096  # that are searched for a byte order mark or, without one, for zeros, which no UTF-8 text contains
_QUOTED = r'"(?:[^"]|"")*+"'


def read_lines(path: ListFile, comment: str | None = None) -> Iterator[tuple[int, list[str]]]:
    """The number and the fields of each line; lines without content, and those that start with `comment`, are skipped.

    The text is UTF-8 or, with a byte order mark, UTF-16. Fields are separated by tabs in a file named .tsv, otherwise
    by the first of comma, semicolon and tab in the first line. A field may be quoted as in RFC 4180, and blanks before
    and after a quoted field are ignored.

    Raises UsageError when there is no such file, UserError when it is not such a text.
    """
    number = 0
    try:
        with _opened(path) as file:
            head = list(_through_first_with_content(file, comment))
            delimiter = _delimiter(path, head[-1] if head else "")
            lines = _cleaned(chain(head, file), comment, delimiter)
            reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
            for fields in reader:
                number = reader.line_num
                if fields and (fields[0].strip() or any(map(str.strip, fields))):
                    yield number, fields
    except csv.Error as error:
        raise UserError(f"{path}:{number + 1}: {error}") from error


def read_header(path: Path) -> list[str]:
    """The column names in the first line. Raises what read_lines raises."""
    _, fields = next(read_lines(path), (0, []))
    return [name.strip() for name in fields]


def read_table(path: ListFile, columns: tuple[str, ...], header: bool = True) -> Iterator[tuple[str, dict[str, str]]]:
    """The lines after a header line, as FILE:LINE and a value for each of the header's columns.

    header: whether there is one; without it the columns are named by their numbers, from "0". Raises what read_lines
    raises, and UserError when one of `columns` is not there or a line has a different number of fields.
    """
    lines = read_lines(path)
    first = next(lines, (1, []))
    names = [name.strip() for name in first[1]] if header else [str(column) for column in range(len(first[1]))]
    if missing := [name for name in columns if name not in names]:
        raise UserError(f"{path}:{first[0]}: no column {missing[0]}; the required columns are {', '.join(columns)}")
    for number, fields in lines if header else chain([first], lines):
        if len(fields) != len(names):
            model = "the header" if header else "the first line"
            raise UserError(f"{path}:{number}: {len(fields)} fields where {model} has {len(names)}")
        yield f"{path}:{number}", dict(zip(names, fields, strict=True))


def read_text_lines(path: Path) -> Iterator[str]:
    """The lines of a plain text, stripped, without the empty ones. Raises as read_lines does."""
    with _opened(path) as file:
        yield from filter(None, map(str.strip, file))


def fold_number(where: str, text: str) -> int:
    """A fold, which the manifest stores in 8 bits. Raises UserError, naming the line."""
    if not re.fullmatch("0*[0-9]{1,3}", text.strip()) or int(text) > 127:
        raise UserError(f"{where}: {text!r} is not a fold; a number from 0 to 127 is needed")
    return int(text)


def _is_comment(line: str, comment: str | None) -> bool:
    return comment is not None and comment in line and line.lstrip().startswith(comment)


def _through_first_with_content(lines: Iterable[str], comment: str | None) -> Iterator[str]:
    for line in lines:
        yield line
        if line.strip() and not _is_comment(line, comment):
            return


def _delimiter(path: ListFile, first: str) -> str:
    if ".tsv" in path.suffixes[-2:]:
        return "\t"
    found = re.search("[,;\t]", re.sub(_QUOTED, "", first))
    return found[0] if found else ","


def _cleaned(lines: Iterable[str], comment: str | None, delimiter: str) -> Iterator[str]:
    """The lines, empty in place of comments, and without blanks between a closing quote and the end of its field.

    The csv module rejects such blanks.
    """
    pattern = re.compile(rf"({_QUOTED})(?: +(?=[{delimiter}\r\n]|$))?")
    for line in lines:
        if _is_comment(line, comment):
            yield "\n"
        else:
            yield pattern.sub(r"\1", line) if '" ' in line else line


@contextmanager
def _opened(path: ListFile) -> Iterator[TextIO]:
    """The file as text, its line ends untouched. Raises UsageError, UserError."""
    encoding = "UTF-8"
    try:
        with _binary(path) as file:
            head = cast(io.BufferedReader, file).peek(_HEAD_BYTES)[:_HEAD_BYTES]
            if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                encoding = "UTF-16"
            elif b"\0" in head:
                raise UserError(f"{path}: not a text file in UTF-8 (it contains zeros); save it as CSV in UTF-8")
            yield io.TextIOWrapper(file, encoding="utf-16" if encoding == "UTF-16" else "utf-8-sig", newline="")
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such file") from error
    except UnicodeDecodeError as error:
        place = _first_undecodable_line(path) if encoding == "UTF-8" else ""
        raise UserError(
            f"{path}{place}: not a text file in {encoding} ({error.reason}); save it as UTF-8, or convert it: "
            "iconv -f latin1 -t utf-8"
        ) from error
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a text file ({error})") from error
    except (RuntimeError, NotImplementedError) as error:  # of zipfile: encrypted, or an unknown compression
        raise UserError(f"{path}: {error}") from error


def _first_undecodable_line(path: ListFile) -> str:
    with _binary(path) as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return f":{number}"
    return ""


def _binary(path: ListFile) -> BinaryIO:
    if isinstance(path, zipfile.Path):
        if path.root.getinfo(path.at).file_size > _MAX_BYTES_IN_ZIP:
            raise UserError(f"{path}: unpacks to more than {_MAX_BYTES_IN_ZIP:,} bytes; is it the right file?")
        return cast(BinaryIO, path.open("rb"))
    if path.exists():
        require_plain_file(path)
    return cast(BinaryIO, gzip.open(path)) if path.suffix == ".gz" else path.open("rb")
