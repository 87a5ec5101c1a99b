"""UrbanSound8K (Salamon 2014), with its ten official folds: a folder or zip with UrbanSound8K.csv and the
clips, or the Parquet files of the Hugging Face Hub (danavery/urbansound8K)."""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from erann_dist.errors import UserError
from shards.sources.csvfile import fold_number
from shards.sources.files import find_audio, locate
from shards.sources.lists import read_list
from shards.sources.rows import Source, SourceRow, rows_table, safe_key

# In the order of classID; source: urbansounddataset.weebly.com/urbansound8k.html.
LABELS = (
    "air_conditioner car_horn children_playing dog_bark drilling engine_idling gun_shot jackhammer siren street_music"
).split()
_COLUMNS = ("slice_file_name", "fold", "classID", "class")


def read_urbansound8k(root: Path) -> Source:
    """The clips of the list, which may be in any format. They are already cut, so the list's start and end are ignored.

    Raises UsageError or UserError: which file, which line, what is wrong. A row whose classID disagrees with its class,
    or with the file's name (RECORDING-CLASSID-occurrence-slice), is reported as a wrong label.
    """
    found = read_list(root, "UrbanSound8K.csv", _COLUMNS)
    listed = []
    for where, line in found.lines:
        try:
            label, fold = int(line["classID"]), fold_number(where, line["fold"])
        except ValueError as error:
            raise UserError(f"{where}: not a clip ({error})") from error
        stem = Path(line["slice_file_name"]).stem
        row = SourceRow(safe_key(stem), [label], None, stem, fold=fold)
        class_ids = {line["classID"], *stem.split("-")[1:2]}
        if not 0 <= label < len(LABELS) or LABELS[label] != line["class"] or class_ids != {line["classID"]}:
            detail = f"classID {line['classID']}, class {line['class']}, file name {line['slice_file_name']}"
            row = SourceRow(row.key, [], None, stem, fold=fold, reason="wrong label", detail=detail)
        listed.append((stem, row))
    if not listed:
        raise UserError(f"{found.name}: lists no clip")
    files = find_audio(found.sound)
    stems = pa.array([stem.encode() for stem, _ in listed])
    place = pc.index_in(stems, value_set=files.table["stem"].combine_chunks())
    rows = locate(rows_table(row for _, row in listed), place, files)
    names = [label.replace("_", " ") for label in LABELS]
    counts = files.counts(place)
    return Source("urbansound8k", "classification", LABELS, names, rows, files.notes(counts), counts)
