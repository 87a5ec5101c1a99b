"""AudioSet's own segment lists, and clip files under the usual names."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from erann_dist.errors import UserError
from shards.sources.class_lists import require_few_labels
from shards.sources.csvfile import read_lines
from shards.sources.files import find_audio, locate
from shards.sources.rows import ROW_SCHEMA, Source, safe_key

# AudioSet's class_labels_indices.csv, 527 classes, by Google, CC BY 4.0.
CLASSES = Path(__file__).parent / "audioset_classes.csv"
_SEGMENT_SCHEMA = pa.schema(
    [("key", pa.string()), ("ytid", pa.string()), ("start", pa.float64()), ("end", pa.float64()), ("mids", pa.string())]
)
_CHUNK = 65_536  # lines at a time that are Python objects


def read_audioset(segments: Path, audio: Path, classes: Path = CLASSES) -> Source:
    """The rows of one segment list. Raises UserError with file and line for a line not in AudioSet's format.

    Segments without a file are reported, those with a label that is not in the class list, and as duplicates repeated
    segments and further files of the same name.
    """
    label_ids, label_names = read_classes(classes)
    listed = _read_segments(segments)
    files = find_audio(audio)
    labels, unknown = _label_indices(listed["mids"], label_ids)
    mislabelled = pc.is_valid(unknown)
    count = len(listed)
    place, is_segment = _find(listed, files.table["stem"])
    start = pc.if_else(is_segment, 0.0, listed["start"])
    columns = {
        "key": listed["key"],
        "labels": labels,
        "source": listed["ytid"],
        "split": pa.repeat(pa.scalar(segments.name.split(".")[0].removesuffix("_segments")), count),
        # A name with times is of a file that holds the segment and no more.
        "start": start,
        "end": pc.add(start, pc.subtract(listed["end"], listed["start"])),
        "reason": pc.if_else(mislabelled, "wrong label", None),
        "detail": pc.binary_join_element_wise(unknown, classes.name, " is not in "),
        "shared": _shared(listed["key"], place, is_segment),
    }
    nulls = {field.name: pa.nulls(count, field.type) for field in ROW_SCHEMA if field.name not in columns}
    rows = pa.table({**columns, **nulls}).select(ROW_SCHEMA.names).cast(ROW_SCHEMA)
    rows = locate(rows, place, files)
    counts = files.counts(place)
    notes = files.notes(counts)
    if counts.unmatched or counts.without_file:
        notes.append(f"{audio}: names tried: {NAMES_TRIED}")
    return Source("audioset", "tagging", label_ids, label_names, rows, notes, counts)


def read_classes(path: Path) -> tuple[list[str], list[str]]:
    """MIDs and display names in index order. Raises UserError with file and line."""
    ids: list[str] = []
    names: list[str] = []
    for line, fields in read_lines(path):
        if line == 1:
            continue
        if len(fields) != 3 or fields[0] != str(len(ids)):
            raise UserError(f"{path}:{line}: not a class; expected: {len(ids)},MID,display name")
        ids.append(fields[1])
        names.append(fields[2])
    if not ids:
        raise UserError(f"{path}: lists no class")
    require_few_labels(path, ids)
    return ids, names


def _read_segments(path: Path) -> pa.Table:
    """The list in columns, _SEGMENT_SCHEMA. Raises UserError with file and line."""
    tables: list[pa.Table] = []
    chunk: list[tuple[str, str, float, float, str]] = []

    def flush() -> None:
        columns = list(zip(*chunk, strict=True)) or [()] * len(_SEGMENT_SCHEMA)
        tables.append(
            pa.table(
                [pa.array(c, f.type) for c, f in zip(columns, _SEGMENT_SCHEMA, strict=True)], schema=_SEGMENT_SCHEMA
            )
        )
        chunk.clear()

    for number, (line, fields) in enumerate(read_lines(path, comment="#")):
        if number == 0 and _is_header(fields):
            continue
        try:
            ytid, start_text, end_text, mids = fields
            start, end = float(start_text), float(end_text)
        except ValueError as error:
            raise UserError(f'{path}:{line}: not a segment; expected: YTID, start, end, "MID,MID"') from error
        if not ytid or not 0 <= start < end < math.inf:
            raise UserError(f"{path}:{line}: not a segment of a video (YTID {ytid!r}, from {start:g} to {end:g} s)")
        chunk.append((f"{safe_key(ytid)}_{round(start * 1000)}", ytid, start, end, mids))
        if len(chunk) == _CHUNK:
            flush()
    flush()
    table = pa.concat_tables(tables)
    if not len(table):
        raise UserError(f"{path}: lists no segment")
    return table.combine_chunks()


def _is_header(fields: list[str]) -> bool:
    """Whether these are column names, as in lists whose header has lost its #."""
    return len(fields) == 4 and "start" in fields[1].lower() and "end" in fields[2].lower()


def _label_indices(mids: pa.ChunkedArray, label_ids: list[str]) -> tuple[pa.ListArray, pa.Array]:
    """The class indices of each "MID,MID", ascending and unique; and its first MID that is not a class, or null."""
    lists = pc.split_pattern(mids.combine_chunks(), ",")
    counts = pc.list_value_length(lists).to_numpy()
    names = pc.utf8_trim_whitespace(lists.flatten())
    indices = pc.index_in(names, value_set=pa.array(label_ids))
    row = np.repeat(np.arange(len(lists)), counts)
    unknown = pc.is_null(indices).to_numpy(zero_copy_only=False)
    rows_unknown, first = np.unique(row[unknown], return_index=True)
    bad = np.full(len(lists), -1)
    bad[rows_unknown] = np.flatnonzero(unknown)[first]
    known = np.sort(row[~unknown] * len(label_ids) + indices.drop_null().to_numpy())
    known = known[np.diff(known, prepend=-1) > 0]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(known // len(label_ids), minlength=len(lists)))])
    labels = pa.ListArray.from_arrays(offsets.astype(np.int32), (known % len(label_ids)).astype(np.int16))
    return labels, names.take(pa.array(bad, mask=bad < 0))


def _find(listed: pa.Table, stems: pa.ChunkedArray) -> tuple[pa.Array, pa.Array]:
    """Where the file of each segment is in the list of files, or null; and whether its name has the segment's times."""
    place = pa.nulls(len(listed), pa.int32())
    # Most names end in a time in all of the list or nowhere in it, and few stems are soon searched.
    timed = np.flatnonzero(pc.match_substring_regex(stems, _TIMED).to_numpy()).astype(np.int32)
    for names in _timed_names(listed):
        if not len(timed):
            break
        found = pc.index_in(names.cast(pa.binary()), value_set=stems.take(timed).combine_chunks())
        place = pc.coalesce(place, pa.array(timed).take(found))
        timed = np.delete(timed, pc.unique(found.drop_null()).to_numpy())
    is_segment = pc.is_valid(place)
    for names in _plain_names(listed):
        place = pc.coalesce(place, pc.index_in(names.cast(pa.binary()), value_set=stems.combine_chunks()))
    # A title comes before the id in what yt-dlp and youtube-dl write, and a format's number may follow it.
    if place.null_count:
        for pattern in _TITLED:
            found = pc.struct_field(pc.extract_regex(stems.combine_chunks(), pattern), "id")
            place = pc.coalesce(place, pc.index_in(listed["ytid"].combine_chunks().cast(pa.binary()), value_set=found))
    return place, is_segment


def _shared(keys: pa.ChunkedArray, place: pa.Array, is_segment: pa.Array) -> pa.Array:
    """Whether a file without times in its name was found for several segments: it can't be each of them."""
    whole = pc.if_else(is_segment, None, place)
    if np.bincount(whole.drop_null().to_numpy(), minlength=1).max() < 2:
        return pa.repeat(pa.scalar(False), len(whole))
    first = pc.index_in(keys, value_set=keys.combine_chunks())
    once = pc.if_else(pc.equal(first.combine_chunks(), pa.array(np.arange(len(first)))), whole, None)  # not twice
    counts = once.drop_null().value_counts()
    several = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    return pc.and_(pc.is_valid(whole), pc.is_in(whole, value_set=several))


# For the user: what _timed_names, _plain_names and _TITLED search for.
NAMES_TRIED = (
    "ID_START_END, ID_START-END, ID-START-END and ID_START (times in ms, or in seconds with 0 to 3 decimals), "
    "also after Y; YID, ID, id_ID, ID_out; TITLE [ID], TITLE-ID, ID.fNUMBER"
)
_TIMED = r"^.{11,}[_-][0-9]+(?:\.[0-9]+)?$"
_ID = r"(?P<id>[A-Za-z0-9_-]{11})"
_TITLED = (rf"\[{_ID}\](?:\.f[0-9]+)?$", rf"^{_ID}\.f[0-9]+(?:-[0-9]+)?$", rf".-{_ID}$")


def _timed_names(listed: pa.Table) -> Iterator[pa.Array]:
    """The stems with the segment's times under which people keep the clips, the most specific and commonest first."""
    ytid = listed["ytid"].combine_chunks()
    different = {name: pc.dictionary_encode(listed[name].combine_chunks()) for name in ("start", "end")}

    def text(column: str, form: Callable[[float], str]) -> pa.Array:
        values = different[column].dictionary.to_pylist()
        return pa.array([form(value) for value in values]).take(different[column].indices)

    def joined(*parts: pa.Array) -> pa.Array:
        return pc.binary_join_element_wise(*parts, "_")

    def milliseconds(seconds: float) -> str:
        return str(round(seconds * 1000))

    forms = (milliseconds, "{:.3f}".format, "{:g}".format, "{:.1f}".format)
    for before in ("", "Y"):
        names = pc.binary_join_element_wise(before, ytid, "")
        for form in forms:
            start, end = text("start", form), text("end", form)
            yield joined(names, start, end)
            yield joined(names, pc.binary_join_element_wise(start, end, "-"))
            yield pc.binary_join_element_wise(names, start, end, "-")
        for form in forms:
            yield joined(names, text("start", form))


def _plain_names(listed: pa.Table) -> Iterator[pa.Array]:
    """The stems without times, the commonest first."""
    ytid = listed["ytid"].combine_chunks()
    for before, after in (("Y", ""), ("", ""), ("id_", ""), ("", "_out")):
        yield pc.binary_join_element_wise(before, ytid, after, "")
