"""Finds a data set's own list: a CSV in a folder or in a zip, or the columns of the Parquet files with the sound."""

import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from erann_dist.errors import UsageError, UserError
from shards.sources.containers import Damaged
from shards.sources.containers.parquet import read_columns
from shards.sources.csvfile import ListFile, read_table

_MOST_FOLDERS = 20_000  # that are searched
_FOLDERS_OF_LISTS = ("meta", "metadata")  # next to the clips or to their folder


@dataclass(frozen=True)
class List:
    """A data set's own list, and where to look for its clips."""

    name: str  # for messages
    lines: Iterator[tuple[str, dict[str, str]]]  # where a line is, and its fields by column, as read_table gives them
    sound: Path


def read_list(root: Path, name: str, columns: tuple[str, ...]) -> List:
    """The CSV of that name, in the folder or zip or below it, with these columns; else these columns of Parquet files.

    Raises UsageError when there is neither, and what read_table raises.
    """
    path = find_list(root, name)
    if path is not None:
        return List(str(path), read_table(path, columns), sound_folder(root, path))
    rows = [
        (f"{file}: row {number}", {column: str(value) for column, value in row.items()})
        for file in _files(root, ".parquet")
        for number, row in enumerate(_columns(file, columns))
    ]
    if not rows:
        raise no_list(root, name)
    return List(str(root), iter(rows), root)


def no_list(root: Path, name: str) -> UsageError:
    if not root.exists():
        return UsageError(f"{root}: no such folder")
    return UsageError(f"{root}: no {name} in it or below it; --root is the folder that the data set was unpacked to")


def find_list(root: Path, name: str) -> ListFile | None:
    """The data set's own list of that name, in the folder or below it; of several the one that is nearest.

    If there is none, the zips are searched, or `root` itself where it is one.
    """
    zips = []
    for file in _files(root, ""):
        if file.name == name:
            return file
        if file.suffix.lower() == ".zip":
            zips.append(file)
    return next((found for archive in zips if (found := _find_in_zip(archive, name))), None)


def next_to(path: ListFile, name: str) -> ListFile:
    """The file of that name in the same folder as a list."""
    if isinstance(path, zipfile.Path):
        return zipfile.Path(path.root, path.at.rpartition("/")[0] + "/" * ("/" in path.at) + name)
    return path.with_name(name)


def sound_folder(root: Path, path: ListFile) -> Path:
    """Where a list's clips are: in a folder audio, next to the list's folder or to the list; otherwise near the list,
    or anywhere below `root` for a list in a zip."""
    if isinstance(path, zipfile.Path):
        return root
    candidates = (path.parent.parent / "audio", path.parent / "audio")
    near = path.parent.parent if path.parent.name in _FOLDERS_OF_LISTS and path.parent != root else path.parent
    return next((folder for folder in candidates if folder.is_dir()), near)


def _files(root: Path, suffix: str) -> Iterator[Path]:
    """The files of that suffix below a folder, the nearest first, without hidden ones; or `root`, if it is one."""
    if root.is_file():
        yield from [root] if root.name.lower().endswith(suffix) else []
        return
    waiting = [root]
    for folder in waiting:  # grows: level by level
        try:
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError:
            continue
        visible = [entry for entry in entries if not entry.name.startswith(".")]
        yield from (Path(entry) for entry in visible if entry.name.lower().endswith(suffix) and entry.is_file())
        waiting += [Path(entry) for entry in visible if entry.is_dir()]
        if len(waiting) > _MOST_FOLDERS:
            break


def _find_in_zip(archive: Path, name: str) -> zipfile.Path | None:
    try:
        with zipfile.ZipFile(archive) as opened:
            names = [each for each in opened.namelist() if each.rpartition("/")[2] == name]
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError):
        return None  # reported when the sound is looked for
    if not names:
        return None
    return zipfile.Path(archive, min(names, key=lambda each: each.count("/")))


def _columns(path: Path, columns: tuple[str, ...]) -> list[dict[str, object]]:
    try:
        return read_columns(path, columns) or []
    except (Damaged, OSError) as error:
        raise UserError(f"{path}: {error}") from error
