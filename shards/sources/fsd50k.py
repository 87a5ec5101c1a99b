"""FSD50K (Fonseca 2022), multi-label, with its official splits: lists and clips, anywhere in a folder or in zips.

The lists are FSD50K.ground_truth/{dev,eval,vocabulary}.csv: zenodo.org/records/4060432.
"""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from erann_dist.errors import UserError
from shards.sources.class_lists import require_few_labels
from shards.sources.csvfile import ListFile, read_lines, read_table
from shards.sources.files import find_audio, locate
from shards.sources.lists import find_list, next_to, no_list
from shards.sources.rows import Source, SourceRow, rows_table, safe_key

_SPLITS = {"dev": ("train", "val"), "eval": ("eval",)}


def read_fsd50k(root: Path) -> Source:
    """The clips of the lists that are there, in the splits train, val and eval, with all their labels.

    Raises UsageError or UserError: which file, which line, what is wrong.
    """
    vocabulary = find_list(root, "vocabulary.csv")
    if vocabulary is None:
        raise no_list(root, "vocabulary.csv")
    mids, names = _read_vocabulary(vocabulary)
    index = {name: i for i, name in enumerate(names)}
    rows = []
    for part in _SPLITS:
        path = next_to(vocabulary, f"{part}.csv")
        if path.exists():
            rows += list(_rows(path, part, index, vocabulary.name))
    if not rows:
        raise UserError(f"{vocabulary}: neither dev.csv nor eval.csv, with a clip, next to it")
    files = find_audio(vocabulary.parent.parent if isinstance(vocabulary, Path) and vocabulary.parent != root else root)
    stems = pa.array([row.source.encode() for row in rows])
    place = pc.index_in(stems, value_set=files.table["stem"].combine_chunks())
    table = locate(rows_table(rows), place, files)
    counts = files.counts(place)
    labels = [name.replace("_", " ") for name in names]
    return Source("fsd50k", "tagging", mids, labels, table, files.notes(counts), counts)


def _read_vocabulary(path: ListFile) -> tuple[list[str], list[str]]:
    """MIDs and names, in the list's order: index, name, MID."""
    mids: list[str] = []
    names: list[str] = []
    for number, fields in read_lines(path):
        if len(fields) != 3 or fields[0] != str(len(mids)):
            raise UserError(f"{path}:{number}: not a class; expected: {len(mids)},name,MID")
        names.append(fields[1])
        mids.append(fields[2])
    if not mids:
        raise UserError(f"{path}: lists no class")
    require_few_labels(path, mids)
    return mids, names


def _rows(path: ListFile, part: str, index: dict[str, int], vocabulary: str) -> Iterator[SourceRow]:
    columns = ("fname", "labels", "split") if part == "dev" else ("fname", "labels")
    for where, line in read_table(path, columns):
        split = line.get("split", "eval")
        if split not in _SPLITS[part]:
            raise UserError(f"{where}: {split!r} under split, where {' or '.join(_SPLITS[part])} is needed")
        key, name = safe_key(line["fname"]), line["fname"]
        labels = line["labels"].split(",")
        unknown = [label for label in labels if label not in index]
        if unknown:
            detail = f"{unknown[0]} is not in {vocabulary}"
            yield SourceRow(key, [], None, name, split=split, reason="wrong label", detail=detail)
        else:
            yield SourceRow(key, sorted({index[label] for label in labels}), None, name, split=split)
