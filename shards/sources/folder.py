"""The user's own sound files: a folder with one sub-folder per class, or with a list of paths and labels."""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from erann_dist.data.audio import SUFFIXES
from erann_dist.data.manifest import Task
from erann_dist.errors import UsageError, UserError
from erann_dist.words import count
from shards.sources.class_lists import ClassList, read_class_list, require_few_labels
from shards.sources.csvfile import fold_number, read_header, read_table, read_text_lines
from shards.sources.files import find_audio, report_duplicates, with_files
from shards.sources.rows import PLACE, FileCounts, Source, SourceRow, printable, rows_table, safe_key

METADATA = "metadata.csv"  # of the Hub's audiofolder: huggingface.co/docs/datasets/audio_dataset
SPLITS = frozenset("train val valid validation test dev eval evaluation".split())  # names of folders
# Google's Speech Commands (Warden 2018): lists of WORD/FILE.wav; other clips are for training.
_SPEECH_COMMANDS = {"validation_list.txt": "val", "testing_list.txt": "test"}
_NOISE = "_background_noise_"
# Our columns, and the header's names for them where --columns does not say; the first that is there.
_COLUMNS = {
    "path": ("path", "file_name"),
    "labels": ("labels",),
    "label": ("label",),
    "split": ("split",),
    "fold": ("fold",),
}


@dataclass(frozen=True)
class ListFormat:
    """How a list of sound files and labels is written."""

    # Our column -> the list's, by its name in the header; or all by number, from 0, in a list without one.
    columns: Mapping[str, str] = field(default_factory=dict)
    separator: str | None = None  # of the labels in a field; None: comma or semicolon
    suffix: str = ""  # for names that do not end in a sound file's


@dataclass(frozen=True)
class _Listed:
    """A line of a list."""

    path: str
    labels: list[str]
    split: str | None
    fold: int | None


def parse_columns(text: str) -> dict[str, str]:
    """`path=fname,labels=labels` as our column -> the list's. Raises UsageError."""
    columns = {}
    for part in text.split(","):
        ours, equals, theirs = (each.strip() for each in part.partition("="))
        if not equals or not theirs or ours not in _COLUMNS or ours in columns:
            raise UsageError(f"--columns {text}: {part!r} is not one of {', '.join(_COLUMNS)}, once, = a column's name")
        columns[ours] = theirs
    if "path" not in columns or ("labels" in columns) == ("label" in columns):
        raise UsageError(f"--columns {text}: path is needed, and either labels or label (one, never divided)")
    if len({theirs.isdecimal() for theirs in columns.values()}) > 1:
        raise UsageError(f"--columns {text}: either names, or numbers for a list without a header")
    return columns


def find_metadata(root: Path, form: ListFormat) -> tuple[Path | None, list[str]]:
    """The folder's own metadata.csv if it lists sound files with labels, and a note if it is there and does not.

    Raises UsageError or UserError when it can't be read.
    """
    path = root / METADATA
    if not path.is_file():
        return None, []
    header = read_header(path)
    if form.columns or ({"path", "file_name"} & {*header} and {"labels", "label"} & {*header}):
        return path, []
    return None, [f"{path}: not used, as it has no columns file_name and label; --labels and --columns use it"]


def read_folder(root: Path, classes: Path | None = None, splits: bool = True) -> Source:
    """One class per sub-folder, with files at any depth; labels in alphabetical order, or in that of a class list.

    With `splits`, sub-folders named train, val, valid, validation, test, dev, eval or evaluation are splits and theirs
    are the classes: when there are no others, or when there are several and all have sub-folders; Speech Commands'
    lists of files give splits; and its _background_noise_ is left out. Without, every sub-folder is a class.

    A clip's key is its path without the suffix: of two files that differ only in the suffix, the second is reported as
    a duplicate. A file outside the classes' folders is reported as a wrong label. Raises UsageError or UserError.
    """
    files = find_audio(root)
    names = files.table["name"].to_pylist()
    ways = [[printable(folder) for folder in name.split(b"/")[:-1]] for name in names]
    split_folders, notes = _split_folders(root, ways) if splits else (frozenset(), [])
    lists: Mapping[bytes, str] = {}
    if splits and not split_folders:
        lists, more = _speech_commands(root, names)
        notes += more
    depth = 1 if split_folders else 0
    kept = [i for i, way in enumerate(ways) if not splits or way[depth : depth + 1] != [_NOISE]]
    if len(kept) < len(names):
        notes.append(f"{root}: left out: {count(len(names) - len(kept), 'sound file')} in {_NOISE}")

    def class_of(way: list[str]) -> str | None:
        is_in_class = len(way) > depth and (not split_folders or way[0] in split_folders)
        return way[depth] if is_in_class else None

    found = {label for i in kept if (label := class_of(ways[i])) is not None}
    if not found:
        raise UserError(f"{root}: no sub-folder with sound; sub-folders are classes, or give a list with --labels")
    listed = _classes(root, classes, found)
    index = listed.index()

    def row(name: bytes, way: list[str]) -> SourceRow:
        label = class_of(way)
        split = lists.get(name, "train") if lists else None
        if way and way[0] in split_folders:
            split = way[0]
        key = safe_key(name if label is None else os.path.splitext(name)[0])
        if label is not None and label in index:
            return SourceRow(key, [index[label]], None, "", split=split)
        detail = "is not in a class's folder" if label is None else f"{label} is not in {listed.file}"
        return SourceRow(key, [], None, "", split=split, reason="wrong label", detail=detail)

    rows = rows_table(row(names[i], ways[i]) for i in kept)
    rows = report_duplicates(with_files(rows, pa.array(kept, pa.int32()), files))
    is_kept = np.zeros(len(names), bool)
    is_kept[kept] = True
    counts = files.counts_of(pa.array(is_kept))
    return Source("folder", "classification", listed.ids, listed.names, rows, notes + files.notes(), counts)


def read_listed_folder(
    root: Path, labels: Path, form: ListFormat = ListFormat(), classes: Path | None = None
) -> Source:
    """The files that a list names: path (below root), labels, and optionally split and fold.

    A field of labels is divided at commas and semicolons, or at the format's separator; a label that contains one is
    quoted as in RFC 4180. In place of labels the list may have label: one, which is not divided unless a separator is
    given. path may be called file_name, as in the Hub's audiofolder; its files in a folder named as a split are in that
    split, unless the list has splits. A path that is no file may name a clip in an archive, as ARCHIVE/NAME.

    If no row has more than one label, the task is classification, otherwise tagging. Labels in alphabetical order, or
    in that of `classes`; a label that is not among these is reported. Raises UsageError or UserError: which file, which
    line.
    """
    lines = list(_read_list(labels, form))
    found = {name for line in lines for name in line.labels}
    if not found:
        raise UserError(f"{labels}: lists no clip with a label")
    listed = _classes(labels, classes, found)
    index = listed.index()
    rows = []
    for line in lines:
        unknown = [name for name in line.labels if name not in index]
        row = SourceRow(
            key=safe_key(os.path.splitext(line.path)[0]),
            labels=sorted({index[name] for name in line.labels if name in index}),
            path=os.fsencode(root.absolute() / line.path),
            source=printable(os.fsencode(line.path)),
            split=line.split,
            fold=line.fold,
        )
        if not line.labels:
            row = replace(row, reason="wrong label", detail="no label")
        elif unknown:
            row = replace(row, reason="wrong label", detail=f"{unknown[0]} is not in {listed.file}")
        rows.append(row)
    rows, notes, counts = _with_listed_files(root, [line.path for line in lines], rows)
    task: Task = "classification" if all(len(line.labels) <= 1 for line in lines) else "tagging"
    return Source("folder", task, listed.ids, listed.names, report_duplicates(rows_table(rows)), notes, counts)


def split_labels(text: str, separator: str | None = None) -> list[str]:
    """The labels in a field, without repeats, in alphabetical order. Those in double quotes may contain a separator."""
    end = rf"(?:{re.escape(separator) if separator else '[,;]'}|\Z)"
    label = re.compile(rf'\s*"((?:[^"]|"")*)"\s*{end}|(.*?){end}', re.DOTALL)
    names: set[str] = set()
    place = 0
    while place < len(text):
        found = label.match(text, place)
        assert found
        quoted, plain = found.groups()
        names.add(plain.strip() if quoted is None else quoted.replace('""', '"').strip())
        place = found.end()
    return sorted(names - {""})


def _read_list(path: Path, form: ListFormat) -> Iterator[_Listed]:
    columns = dict(form.columns)
    if not columns:
        header = read_header(path)
        columns = {ours: next((name for name in names if name in header), "") for ours, names in _COLUMNS.items()}
        columns = {ours: theirs for ours, theirs in columns.items() if theirs}
        columns.setdefault("path", "path")
        columns.setdefault("label" if "label" in columns else "labels", "labels")
    is_numbered = columns["path"].isdecimal()
    several = "labels" in columns
    for where, line in read_table(path, tuple(columns.values()), header=not is_numbered):
        text = line[columns["labels" if several else "label"]]
        fold, split = (line[columns[name]] if name in columns else "" for name in ("fold", "split"))
        name = line[columns["path"]]
        if form.suffix and os.path.splitext(name)[1].lower() not in SUFFIXES:
            name += form.suffix
        folder = name.split("/")[0]
        if "split" not in columns and columns["path"] == "file_name" and folder.lower() in SPLITS:
            split = folder
        yield _Listed(
            path=name,
            labels=split_labels(text, form.separator) if several or form.separator else [*filter(None, [text.strip()])],
            split=split or None,
            fold=fold_number(where, fold) if fold else None,
        )


def _classes(where: Path, classes: Path | None, found: set[str]) -> ClassList:
    """The class list in the file, or the labels that were found, in alphabetical order."""
    if classes:
        return read_class_list(classes)
    labels = sorted(found)
    require_few_labels(where, labels)
    return ClassList("", labels, labels)


def _split_folders(root: Path, ways: list[list[str]]) -> tuple[frozenset[str], list[str]]:
    """Which folders directly below root are splits, and notes for the user. Raises UserError for splits only."""
    tops = {way[0] for way in ways if way} - {_NOISE}
    named = frozenset(top for top in tops if top.lower() in SPLITS)
    if not named:
        return named, []
    with_folders = {way[0] for way in ways if len(way) > 1}
    some = ", ".join(sorted(named))
    every = "--labels-from-folders all makes every folder a class"
    if named == tops and not named & with_folders:
        raise UserError(
            f"{root}: {some}: splits by name, without sub-folders as classes; give a list with --labels, or {every}"
        )
    if named == tops or (len(named) > 1 and named <= with_folders):
        return named, [f"{root}: {some}: splits by name, their sub-folders are the classes; {every}"]
    return frozenset(), [f"{root}: {some}: a class, as other folders are next to it"]


def _speech_commands(root: Path, names: list[bytes]) -> tuple[dict[bytes, str], list[str]]:
    """The split of each file in Speech Commands' lists, if they are there, and notes for the user."""
    if not all((root / name).is_file() for name in _SPEECH_COMMANDS):
        return {}, []
    lists = {
        os.fsencode(line): split for name, split in _SPEECH_COMMANDS.items() for line in read_text_lines(root / name)
    }
    here = Counter(lists[name] for name in names if name in lists)
    gone = len(lists) - here.total()
    splits = ", ".join(f"{count(here[split], 'clip')} in {split}" for split in _SPEECH_COMMANDS.values())
    missing = f"; no file for {gone:,} of their names" if gone else ""
    return lists, [f"{root}: {' and '.join(_SPEECH_COMMANDS)} give the splits: {splits}, the others in train{missing}"]


def _with_listed_files(
    root: Path, listed: list[str], rows: list[SourceRow]
) -> tuple[list[SourceRow], list[str], FileCounts | None]:
    """The rows, without a file reported as missing; notes for the user; and how rows and files fit together."""
    is_there = [os.path.lexists(row.path or b"") for row in rows]
    try:
        files = find_audio(root)
    except UserError as error:  # the files of the list may be elsewhere
        return [row if there else _missing(row) for row, there in zip(rows, is_there, strict=True)], [str(error)], None
    names = pa.array([os.fsencode(os.path.normpath(name)) for name in listed], pa.binary())
    place = pc.index_in(names, value_set=files.table["name"].combine_chunks())
    clips = files.table.select(list(PLACE)).take(place).to_pylist()
    found = [
        row if there else replace(row, **clip) if clip["path"] is not None else _missing(row)
        for row, there, clip in zip(rows, is_there, clips, strict=True)
    ]
    with_file = sum(there or clip["path"] is not None for there, clip in zip(is_there, clips, strict=True))
    counts = replace(
        files.counts_of(pc.is_in(files.table["name"], value_set=names)),
        listed=len(rows),
        with_file=with_file,
        without_file=len(rows) - with_file,
    )
    notes = files.notes(counts)
    if not with_file and not any(os.path.splitext(name)[1].lower() in SUFFIXES for name in listed):
        notes.append(
            f"{root}: the list's names do not end as those of sound files do; --suffix .wav adds what is missing"
        )
    return found, notes, counts


def _missing(row: SourceRow) -> SourceRow:
    return row if row.reason else replace(row, reason="missing", detail="no such file")
