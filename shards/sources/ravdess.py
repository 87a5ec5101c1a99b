"""RAVDESS's speech (Livingstone 2018): labels and actors from the file names, folds by actor."""

import re
from dataclasses import replace
from pathlib import Path

import pyarrow.compute as pc

from shards.sources.files import find_audio, locate
from shards.sources.rows import Source, SourceRow, printable, rows_table, safe_key

LABELS = "neutral calm happy sad angry fearful disgust surprised".split()  # emotion 01 to 08
# modality-channel-emotion-intensity-statement-repetition-actor; zenodo.org/records/1188976
NAME = re.compile(r"(\d\d)-(\d\d)-(\d\d)-(\d\d)-(\d\d)-(\d\d)-(\d\d)")
FOLDS = 4
_ACTORS = 24
_FILM, _SOUND = 1, b"03"  # modalities; 02 is the film alone


def read_ravdess(root: Path) -> Source:
    """The speech files below a folder. An actor is in one fold, ((actor − 1) // 2) mod 4 + 1, with both sexes in each.

    Of an utterance that is there as sound (modality 03) and in a film (01), the sound is packed and the film reported
    as a duplicate. Songs, films without sound (02) and names that are not RAVDESS's are reported as wrong labels.
    Raises UsageError or UserError.
    """
    files = find_audio(root)
    stems = files.table["stem"].combine_chunks()
    names = pc.unique(stems)
    as_sound = {name[2:] for name in names.to_pylist() if name.startswith(_SOUND)}
    rows = rows_table(_row(name, name[2:] in as_sound) for name in names.to_pylist())
    first = pc.index_in(names, value_set=stems)
    labels = [label.capitalize() for label in LABELS]
    return Source(
        "ravdess", "classification", LABELS, labels, locate(rows, first, files), files.notes(), files.counts()
    )


def _row(stem: bytes, is_there_as_sound: bool) -> SourceRow:
    name, key = printable(stem), safe_key(stem)
    match = NAME.fullmatch(name)
    if not match:
        return SourceRow(key, [], None, name, reason="wrong label", detail="not a RAVDESS file name")
    modality, channel, emotion, _, _, _, actor = (int(field) for field in match.groups())
    if not 1 <= actor <= _ACTORS:
        return SourceRow(key, [], None, name, reason="wrong label", detail=f"actor {actor:02d}")
    fold = (actor - 1) // 2 % FOLDS + 1
    if modality not in (_FILM, int(_SOUND)):
        return SourceRow(key, [], None, name, fold=fold, reason="wrong label", detail="film without sound")
    if channel != 1:
        return SourceRow(key, [], None, name, fold=fold, reason="wrong label", detail="song, not speech")
    if not 1 <= emotion <= len(LABELS):
        return SourceRow(key, [], None, name, fold=fold, reason="wrong label", detail=f"emotion {emotion:02d}")
    row = SourceRow(key, [emotion - 1], None, name, fold=fold)
    if modality == _FILM and is_there_as_sound:
        return replace(row, reason="duplicate", detail=f"the film of {_SOUND.decode()}{name[2:]}")
    return row
