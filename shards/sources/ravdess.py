"""RAVDESS's speech (Livingstone 2018): labels and actors from the file names, folds by actor."""

import re
from pathlib import Path

import pyarrow.compute as pc

from shards.sources.files import find_audio, locate
from shards.sources.rows import Source, SourceRow, printable, rows_table, safe_key

LABELS = "neutral calm happy sad angry fearful disgust surprised".split()  # emotion 01 to 08
# modality-channel-emotion-intensity-statement-repetition-actor; zenodo.org/records/1188976
_NAME = re.compile(r"(\d\d)-(\d\d)-(\d\d)-(\d\d)-(\d\d)-(\d\d)-(\d\d)")
FOLDS = 4


def read_ravdess(root: Path) -> Source:
    """The speech files below a folder. An actor is in one fold, ((actor − 1) // 2) mod 4 + 1, with both sexes in each.

    Songs, and files without a RAVDESS name, are reported as wrong labels. Raises UsageError or UserError.
    """
    files = find_audio(root)
    stems = files.table["stem"].combine_chunks()
    names = pc.unique(stems)
    rows = rows_table(_row(name) for name in names.to_pylist())
    first = pc.index_in(names, value_set=stems)
    labels = [label.capitalize() for label in LABELS]
    return Source("ravdess", "classification", LABELS, labels, locate(rows, first, files), files.warnings)


def _row(stem: bytes) -> SourceRow:
    name, key = printable(stem), safe_key(stem)
    match = _NAME.fullmatch(name)
    if not match:
        return SourceRow(key, [], None, name, reason="wrong label", detail="not a RAVDESS file name")
    _, channel, emotion, _, _, _, actor = (int(field) for field in match.groups())
    fold = (actor - 1) // 2 % FOLDS + 1
    if channel != 1:
        return SourceRow(key, [], None, name, fold=fold, reason="wrong label", detail="song, not speech")
    if not 1 <= emotion <= len(LABELS):
        return SourceRow(key, [], None, name, fold=fold, reason="wrong label", detail=f"emotion {emotion:02d}")
    return SourceRow(key, [emotion - 1], None, name, fold=fold)
