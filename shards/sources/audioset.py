"""AudioSet's own segment lists, and clip files under the usual names."""

import csv
import gzip
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from erann_dist.errors import UsageError, UserError
from shards.sources.rows import Source, SourceRow, find_audio, safe_key

# AudioSet's class_labels_indices.csv, 527 classes, by Google, CC BY 4.0.
CLASSES = Path(__file__).parent / "audioset_classes.csv"


def read_audioset(segments: Path, audio: Path, classes: Path = CLASSES) -> Source:
    """The rows of one segment list. Raises UserError with file and line for what is not AudioSet's format."""
    label_ids, label_names = read_classes(classes)
    index = {mid: i for i, mid in enumerate(label_ids)}
    files = find_audio(audio)
    split = segments.name.split(".")[0].removesuffix("_segments")
    rows: dict[str, SourceRow] = {}
    for line, fields in _lines(segments):
        where = f"{segments}:{line}"
        try:
            ytid, start_text, end_text, mids = fields
            start, end = float(start_text), float(end_text)
        except ValueError as error:
            raise UserError(f'{where}: not a segment; wanted: YTID, start, end, "MID,MID"') from error
        if not ytid or not 0 <= start < end < math.inf:
            raise UserError(f"{where}: no segment of a video (YTID {ytid!r}, from {start:g} to {end:g} s)")
        unknown = [mid for mid in mids.split(",") if mid not in index]
        if unknown:
            raise UserError(f"{where}: unknown MID {unknown[0]!r}; it is not in {classes}")
        key = f"{safe_key(ytid)}_{round(start * 1000)}"
        if key in rows:
            raise UserError(f"{where}: the segment {ytid} at {start:g} s is listed twice")
        found = next((files[name][0] for name in _file_names(ytid, start, end) if name in files), None)
        rows[key] = SourceRow(
            key=key,
            labels=tuple(sorted({index[mid] for mid in mids.split(",")})),
            path=(audio / found).resolve() if found else None,
            source=found or ytid,
            split=split,
            segment=(start, end),
        )
    if not rows:
        raise UserError(f"{segments}: lists no segment")
    return Source("audioset", "tagging", label_ids, label_names, list(rows.values()))


def read_classes(path: Path) -> tuple[list[str], list[str]]:
    """MIDs and display names in index order. Raises UserError with file and line."""
    ids: list[str] = []
    names: list[str] = []
    for line, fields in _lines(path):
        if line == 1:
            continue
        if len(fields) != 3 or fields[0] != str(len(ids)):
            raise UserError(f"{path}:{line}: not a class; wanted: {len(ids)},MID,display name")
        ids.append(fields[1])
        names.append(fields[2])
    if not ids:
        raise UserError(f"{path}: lists no class")
    return ids, names


def _file_names(ytid: str, start: float, end: float) -> Iterator[str]:
    """The stems under which people keep a clip, the most specific first."""
    yield f"{ytid}_{round(start * 1000)}_{round(end * 1000)}"
    for a, b in ((f"{start:.3f}", f"{end:.3f}"), (f"{start:g}", f"{end:g}"), (f"{start:.1f}", f"{end:.1f}")):
        yield f"{ytid}_{a}_{b}"
        yield f"{ytid}_{a}"
    yield f"Y{ytid}"
    yield ytid


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The lines of a CSV, gzipped or not, with their numbers; comments and empty lines are passed over."""
    try:
        with _open(path) as file:
            for number, text in enumerate(file, start=1):
                if text.strip() and not text.startswith("#"):
                    yield number, next(csv.reader([text.strip()], skipinitialspace=True, strict=True))
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such file") from error
    except csv.Error as error:
        raise UserError(f"{path}:{number}: {error}") from error
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise UserError(f"{path}: not a text file ({error})") from error


def _open(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")
