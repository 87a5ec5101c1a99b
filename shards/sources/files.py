"""Finds the sound files below a folder: plain files, and the clips in archives of any kind in CONTAINERS."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from erann_dist.data.audio import LOSSLESS_SUFFIXES, SUFFIXES
from erann_dist.errors import UsageError, UserError
from erann_dist.words import count
from shards.sources.containers import COMPRESSED_TARS, CONTAINERS, Container, Damaged, container_of
from shards.sources.rows import CANDIDATES, PLACE, FileCounts, printable
from shards.sources.walk import walk

FILE_SCHEMA = pa.schema(
    [
        ("stem", pa.binary()),  # the name without folder and suffix
        ("name", pa.binary()),  # relative to the folder; ARCHIVE/NAME for a clip in an archive
        ("path", pa.binary()),  # these four: see ROW_SCHEMA
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("group", pa.int64()),
        ("lossy", pa.bool_()),
    ]
)
_CHUNK = 65_536  # rows held as Python objects at a time; two million at once would take a gigabyte

HIDDEN = "hidden"  # under which passed_over counts hidden sound files and folders
_EXAMPLES = 3  # How many names a note lists.
_Found = tuple[bytes, bytes, int | None, int | None, int | None]  # name, path, offset, size, group


@dataclass(frozen=True)
class AudioFiles:
    """The sound files found below a folder."""

    folder: Path
    table: pa.Table  # FILE_SCHEMA; of files with the same stem the preferred one comes first: see find_audio
    passed_over: dict[str, int]  # suffix -> number of files that are not sound files by their names; HIDDEN
    warnings: list[str]

    def counts(self, place: pa.Array | None = None) -> FileCounts:
        """How many files are used.

        place: the files that rows were found for, as locate takes them; if not given, all files are used.
        """
        if place is None:
            return FileCounts(len(self.table), len(self.table), 0, [])
        stems = self.table["stem"].combine_chunks()
        counts = self.counts_of(pc.is_in(stems, value_set=pc.unique(stems.take(place.drop_null()))))
        without = place.null_count
        return replace(counts, listed=len(place), with_file=len(place) - without, without_file=without)

    def counts_of(self, used: pa.Array) -> FileCounts:
        """The same where `used` says of each file whether a clip of the list uses it."""
        matched = pc.sum(used).as_py()
        examples = self.table["name"].filter(pc.invert(used))[:_EXAMPLES].to_pylist()
        return FileCounts(len(used), matched, len(used) - matched, [printable(name) for name in examples])

    def notes(self, counts: FileCounts | None = None) -> list[str]:
        """For the user: what was odd about the files and, where counts are given, which of them are used."""
        notes = list(self.warnings)
        if counts is not None:
            notes += [f"{self.folder}: {line}" for line in counts.lines()]
        if hidden := self.passed_over.get(HIDDEN):
            notes.append(f"{self.folder}: left out: {hidden:,} hidden (sound files and folders that begin with a dot)")
        if kinds := [f"{number:,} {suffix}" for suffix, number in self.passed_over.items() if suffix != HIDDEN]:
            notes.append(f"{self.folder}: skipped, not sound files by their names: {', '.join(kinds)}")
        return notes


def find_audio(folder: Path) -> AudioFiles:
    """The sound files of one archive, or those below a folder at any depth, following links and skipping hidden files.

    Of several files with one stem an empty one comes last and a lossless one before the others; of those in one format
    the largest comes first, which has the highest rate or is the whole one.

    Raises UsageError when there is no such folder, UserError when it contains no sound file.
    """
    if not folder.exists():
        raise UsageError(f"{folder}: no such audio folder")
    passed_over: Counter[str] = Counter()
    warnings: list[str] = []
    tables, chunk = [], []
    for found in _walk(os.fsencode(folder.resolve()), passed_over, warnings):
        chunk.append(found)
        if len(chunk) == _CHUNK:
            tables.append(_table(chunk))
            chunk = []
    table = pa.concat_tables([*tables, _table(chunk)])
    if not len(table):
        raise UserError(f"{folder}: no sound file in it or below it{'; ' * bool(warnings)}{'; '.join(warnings[:1])}")
    order = [(column, "ascending") for column in ("empty", "lossy", "suffix")]
    order += [("bytes", "descending"), ("name", "ascending")]
    table = _with_sizes(table).sort_by(order).combine_chunks().drop_columns(["empty", "suffix", "bytes"])
    return AudioFiles(folder, table, dict(sorted(passed_over.items())), warnings)


def _with_sizes(table: pa.Table) -> pa.Table:
    """The files with their bytes and suffixes, and whether they are empty while another of that stem is not.

    These are looked up only where several files have one stem.
    """
    stems = table["stem"].combine_chunks()
    counts = stems.value_counts()
    several = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    index = pc.index_in(stems, value_set=several).fill_null(-1).to_numpy()
    size = np.zeros(len(table), np.int64)
    suffixes = np.full(len(table), b"", object)  # sizes of different formats can't be compared
    largest = np.zeros(len(several), np.int64)
    where = np.flatnonzero(index >= 0)
    columns = (table[name].take(pa.array(where)).to_pylist() for name in ("path", "offset", "size", "name"))
    for i, path, offset, inside, name in zip(where, *columns, strict=True):
        suffixes[i] = os.path.splitext(name)[1].lower()
        try:
            size[i] = (inside or 1) if offset is not None else os.stat(path).st_size
        except OSError:  # a link that leads nowhere
            size[i] = 0
        largest[index[i]] = max(largest[index[i]], size[i])
    empty = (index >= 0) & (size == 0)
    empty[empty] = largest[index[empty]] > 0
    table = table.append_column("empty", pa.array(empty)).append_column("bytes", pa.array(size))
    return table.append_column("suffix", pa.array(suffixes, pa.binary()))


def locate(rows: pa.Table, place: pa.Array, files: AudioFiles) -> pa.Table:
    """The rows with their files: row i's is file place[i]; where that is null the row is reported as missing.

    A row whose key occurred before is reported as a duplicate. So is a file with the same stem as one that is used, in
    an additional row after the others.
    """
    missing = pc.and_(pc.is_null(place), pc.is_null(rows["reason"]))
    rows = _replace(rows, "reason", pc.if_else(missing, "missing", rows["reason"]))
    rows = _replace(rows, "detail", pc.if_else(missing, "no file under a usual name", rows["detail"]))
    rows = with_files(rows, place, files)
    stems = files.table["stem"].combine_chunks()
    first = pc.index_in(stems, value_set=stems)
    again = pa.array(np.flatnonzero(first.to_numpy() != np.arange(len(stems))), pa.int32())
    row = pc.index_in(first.take(again), value_set=place)
    twins = with_files(rows.take(row.drop_null()), again.filter(pc.is_valid(row)), files)
    return report_duplicates(pa.concat_tables([rows, twins]))


def with_files(rows: pa.Table, place: pa.Array, files: AudioFiles) -> pa.Table:
    """The rows with path, offset, size, group and source of file place[i], where that is not null."""
    taken = files.table.take(place)
    for name in PLACE:
        rows = _replace(rows, name, taken[name])
    names = zip(taken["name"].to_pylist(), rows["source"].to_pylist(), strict=True)
    return _replace(rows, "source", [wanted if name is None else printable(name) for name, wanted in names])


def report_duplicates(rows: pa.Table) -> pa.Table:
    """The rows; of those with the same key, all but the first are reported as duplicates.

    Their files become the first's candidates: they are tried, in order, when its own file can't be decoded.
    """
    first = pc.index_in(rows["key"], value_set=rows["key"].combine_chunks()).to_numpy()
    again = first != np.arange(len(rows))
    if not again.any():
        return rows
    rows = _with_candidates(rows, first, np.flatnonzero(again))
    before = pc.binary_join_element_wise(rows["source"].take(pa.array(first)), "comes first and has the same key", " ")
    rows = _replace(rows, "detail", pc.if_else(pa.array(again), before, rows["detail"]))
    return _replace(rows, "reason", pc.if_else(pa.array(again), "duplicate", rows["reason"]))


def _with_candidates(rows: pa.Table, first: npt.NDArray[np.int64], again: npt.NDArray[np.int64]) -> pa.Table:
    """The rows `first` with the files of the rows `again`, which have the same keys, where the labels are the same."""
    one, other = rows.take(pa.array(first[again])), rows.take(pa.array(again))
    usable = pc.and_(pc.is_valid(one["path"]), pc.is_valid(other["path"]))
    usable = pc.and_(usable, pc.and_(pc.is_null(one["reason"]), pc.is_null(other["reason"])))
    places = [pc.fill_null(pc.not_equal(one[name], other[name]), False) for name in ("path", "offset")]
    usable = pc.and_(usable, pc.or_(*places)).to_numpy()  # the row itself may stand twice in a list
    usable[usable] = [
        a == b for a, b in zip(*(each["labels"].filter(usable).to_pylist() for each in (one, other)), strict=True)
    ]
    again = again[usable]
    if not len(again):
        return rows
    order = np.argsort(first[again], kind="stable")
    files = rows.select([field.name for field in CANDIDATES]).take(pa.array(again[order])).combine_chunks()
    offsets = np.concatenate([[0], np.cumsum(np.bincount(first[again], minlength=len(rows)))])
    values = pa.StructArray.from_arrays([column.combine_chunks() for column in files.columns], fields=list(CANDIDATES))
    lists = pa.ListArray.from_arrays(offsets.astype(np.int32), values)
    return _replace(rows, "candidates", pc.if_else(pc.equal(pc.list_value_length(lists), 0), None, lists))


def _replace(rows: pa.Table, name: str, values: Any) -> pa.Table:
    field = rows.schema.field(name)
    column = values if isinstance(values, pa.ChunkedArray) else pa.array(values, field.type)
    return rows.set_column(rows.schema.get_field_index(name), field, column)


def _table(found: list[_Found]) -> pa.Table:
    splits = [name.rpartition(b"/")[2].rpartition(b".") for name, *_ in found]
    columns = {name: [row[i] for row in found] for i, name in enumerate(("name", *PLACE))}
    stems = [stem if dot else suffix for stem, dot, suffix in splits]
    lossy = [b"." + suffix.lower() not in LOSSLESS_SUFFIXES for _, _, suffix in splits]
    return pa.Table.from_pydict({"stem": stems, "lossy": lossy, **columns}, FILE_SCHEMA)


def _walk(root: bytes, passed_over: Counter[str], warnings: list[str]) -> Iterator[_Found]:
    """Raises UsageError for a file that is no archive, UserError when a library for archives is not installed."""
    if os.path.isfile(root):
        container = container_of(root)
        if container is None:
            kinds = ", ".join(CONTAINERS)
            raise UsageError(f"{printable(root)}: neither a folder nor an archive of clips ({kinds}){_unpack(root)}")
        yield from _archived(root, container, b"", warnings)
        return
    compressed = []
    for entry, is_folder in walk(root):
        suffix = os.path.splitext(entry.name)[1].lower().decode(errors="replace")
        if entry.name.startswith(b"."):
            if suffix in SUFFIXES or is_folder:
                passed_over[HIDDEN] += 1
            continue
        name = entry.path[len(root) + 1 :]
        if not is_folder and (container := CONTAINERS.get(suffix)):
            yield from _archived(entry.path, container, name + b"/", warnings)
        elif suffix in SUFFIXES:  # also a folder of such a name, so that it is reported
            yield name, entry.path, None, None, None
        elif not is_folder and _unpack(entry.name):
            compressed.append(name)
        elif not is_folder:
            passed_over[suffix or "none"] += 1
    if compressed:
        some = ", ".join(printable(name) for name in compressed[:_EXAMPLES]) + ", …" * (len(compressed) > _EXAMPLES)
        tars = count(len(compressed), "compressed tar")
        warnings.append(f"{printable(root)}: not read: {tars} ({some}){_unpack(compressed[0])}")


def _unpack(name: bytes) -> str:
    """What to do about a compressed tar; empty for other files."""
    if not name.lower().endswith(tuple(suffix.encode() for suffix in COMPRESSED_TARS)):
        return ""
    return f"; single clips in it can't be reached without unpacking: tar -xf {printable(os.path.basename(name))}"


def _archived(path: bytes, container: Container, prefix: bytes, warnings: list[str]) -> Iterator[_Found]:
    """The clips in an archive. What is wrong with it becomes a warning: the others are still of use."""
    notes: list[str] = []
    try:
        for name, offset, size, group in container.members(path, notes):
            yield prefix + name, path, offset, size, group
    except (Damaged, OSError) as error:
        notes.append(str(error))
    warnings += [f"{printable(path)}: {note}" for note in notes]
