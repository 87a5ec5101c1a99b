"""Lists of classes: the order of a data set's labels."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from erann_dist.data.manifest import MAX_LABELS
from erann_dist.errors import UserError
from shards.sources.csvfile import ListFile, read_lines, read_text_lines

_NAME_COLUMNS = ("display_name", "label", "name", "class", "category")  # in a header, the first of them that is there
_MID = re.compile(r"/[a-z]/\S+")  # of Freebase, as in AudioSet's and FSD50K's lists


@dataclass(frozen=True)
class ClassList:
    """Classes in order. An id is the MID where the file has MIDs, otherwise the name."""

    file: str
    ids: list[str]
    names: list[str]

    def index(self) -> dict[str, int]:
        """The index of each class, by name and by id."""
        return {label: i for labels in (self.ids, self.names) for i, label in enumerate(labels)}


def read_class_list(path: Path) -> ClassList:
    """The classes in a file's order: one per line in a .txt, otherwise a CSV.

    With a header the name is in the column display_name, label, name, class or category, without one in the last column
    that is neither a number nor a MID (such as /m/09x0r): class_labels_indices.csv of AudioSet and vocabulary.csv of
    FSD50K are read as they are. Raises UsageError or UserError, which names the file.
    """
    if path.suffix == ".txt":
        names = list(read_text_lines(path))
        return _checked(path, names, names)
    rows = [[field.strip() for field in fields] for _, fields in read_lines(path)]
    header = [field.lower() for field in rows[0]] if rows else []
    if titled := [header.index(title) for title in _NAME_COLUMNS if title in header]:
        del rows[0]
        column = titled[0]
    else:
        wordy = [i for i, field in enumerate(header) if field and not field.isdigit() and not _MID.fullmatch(field)]
        column = wordy[-1] if wordy else 0
    mids = [i for i, field in enumerate(rows[0]) if _MID.fullmatch(field)] if rows else []
    id_column = mids[0] if mids else column
    if short := [i for i, row in enumerate(rows) if len(row) <= max(column, id_column) or not row[column]]:
        raise UserError(f"{path}: class {short[0]} has no name; expected: one class per line")
    return _checked(path, [row[id_column] for row in rows], [row[column] for row in rows])


def require_few_labels(where: ListFile, labels: Sequence[str]) -> None:
    """Raise UserError, naming the file or folder, when there are more labels than a shard set can have."""
    if len(labels) > MAX_LABELS:
        raise UserError(
            f"{where}: {len(labels):,} labels, a shard set can have {MAX_LABELS:,}; is it the right column?"
        )


def _checked(path: Path, ids: list[str], names: list[str]) -> ClassList:
    if not names:
        raise UserError(f"{path}: lists no class")
    require_few_labels(path, names)
    for labels in (ids, names):
        label, times = Counter(labels).most_common(1)[0]
        if times > 1:
            raise UserError(f"{path}: lists the class {label!r} {times} times")
    return ClassList(path.name, ids, names)
