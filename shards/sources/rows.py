"""What every source becomes: labelled rows that say where the sound is."""

import os
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from erann_dist.audio import SUFFIXES
from erann_dist.errors import UsageError, UserError
from erann_dist.manifest import Task


@dataclass(frozen=True)
class SourceRow:
    """One clip of a data set, before anything is decoded."""

    key: str  # unique; see safe_key
    labels: tuple[int, ...]  # label indices, ascending
    path: Path | None  # None when the file was not found
    source: str  # the file below the audio folder, or what was looked for
    split: str | None = None
    fold: int | None = None
    segment: tuple[float, float] | None = None  # start and end in the whole recording, seconds


@dataclass(frozen=True)
class Source:
    """A data set: its labels in its own order, and its rows."""

    name: str
    task: Task
    label_ids: list[str]
    label_names: list[str]
    rows: list[SourceRow]


def safe_key(name: str) -> str:
    """The name as a key: any byte but A-Z a-z 0-9 _ - becomes %XX, so that no dot or slash confuses a tar's reader."""
    return re.sub(rb"[^A-Za-z0-9_-]", lambda m: b"%%%02X" % m[0][0], name.encode()).decode()


def find_audio(folder: Path) -> dict[str, list[str]]:
    """The audio files below a folder, however deep: stem -> paths relative to the folder, in a fixed order.

    Raises UsageError when there is no such folder, UserError when it holds no audio file.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder of audio")
    found: dict[str, list[str]] = defaultdict(list)
    for directory, folders, files in os.walk(folder):
        folders.sort()
        relative = Path(directory).relative_to(folder)
        for file in sorted(files):
            stem, suffix = os.path.splitext(file)
            if suffix.lower() in SUFFIXES:
                found[stem].append(str(relative / file))
    if not found:
        raise UserError(f"{folder}: no audio file in it or below it")
    return found
