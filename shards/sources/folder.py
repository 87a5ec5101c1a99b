"""The user's own sound files: a folder with one sub-folder per class, or with a CSV of paths and labels."""

import os
import re
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from erann_dist.data.manifest import Task
from erann_dist.errors import UserError
from shards.sources.csvfile import fold_number, read_table
from shards.sources.files import find_audio, report_duplicates, with_files
from shards.sources.rows import Source, SourceRow, printable, rows_table, safe_key


def read_folder(root: Path) -> Source:
    """One class per sub-folder, with files at any depth; labels in alphabetical order.

    A clip's key is its path without the suffix: of two files that differ only in the suffix, the second is reported as
    a duplicate. A file outside the sub-folders is reported as a wrong label. Raises UsageError or UserError.
    """
    files = find_audio(root)
    names = files.table["name"].to_pylist()
    classes = [printable(name.split(b"/")[0]) if b"/" in name else None for name in names]
    labels = sorted({name for name in classes if name is not None})
    if not labels:
        raise UserError(f"{root}: no sub-folder with sound; sub-folders are classes, or give a list with --labels")
    index = {label: i for i, label in enumerate(labels)}
    rows = rows_table(
        SourceRow(safe_key(os.path.splitext(name)[0]), [index[label]], None, "")
        if label is not None
        else SourceRow(safe_key(name), [], None, "", reason="wrong label", detail="is not in a class's folder")
        for name, label in zip(names, classes, strict=True)
    )
    rows = report_duplicates(with_files(rows, pa.array(range(len(names)), pa.int32()), files))
    return Source("folder", "classification", labels, labels, rows, files.notes())


def read_listed_folder(root: Path, labels: Path) -> Source:
    """The files that a CSV lists: path (below root), labels (separated by , or ;), and optionally split and fold.

    If no row has more than one label, the task is classification, otherwise tagging. Labels in alphabetical order.
    Raises UsageError or UserError: which file, which line.
    """
    lines = []
    for where, line in read_table(labels, ("path", "labels")):
        names = sorted({name.strip() for name in re.split("[,;]", line["labels"]) if name.strip()})
        fold = fold_number(where, line["fold"]) if line.get("fold") else None
        lines.append((line["path"], names, line.get("split") or None, fold))
    label_ids = sorted({name for _, names, _, _ in lines for name in names})
    if not label_ids:
        raise UserError(f"{labels}: lists no clip with a label")
    index = {label: i for i, label in enumerate(label_ids)}
    rows = []
    for name, names, split, fold in lines:
        path = root.absolute() / name
        row = SourceRow(
            key=safe_key(os.path.splitext(name)[0]),
            labels=[index[n] for n in names],
            path=os.fsencode(path),
            source=printable(os.fsencode(name)),
            split=split,
            fold=fold,
        )
        if not names:
            row = replace(row, reason="wrong label", detail="no label")
        elif not os.path.lexists(path):
            row = replace(row, reason="missing", detail="no such file")
        rows.append(row)
    task: Task = "classification" if all(len(names) <= 1 for _, names, _, _ in lines) else "tagging"
    return Source("folder", task, label_ids, label_ids, report_duplicates(rows_table(rows)), [])
