"""ESC-50 and its subset ESC-10 (Piczak 2015), with the official folds: a folder or zip with esc50.csv and the clips, or
the Parquet files of the Hugging Face Hub (ashraq/esc50)."""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from erann_dist.errors import UserError
from shards.sources.csvfile import fold_number
from shards.sources.files import find_audio, locate
from shards.sources.lists import read_list
from shards.sources.rows import Source, SourceRow, rows_table, safe_key

_COLUMNS = ("filename", "fold", "target", "category", "esc10")


def read_esc50(root: Path, esc10: bool = False) -> Source:
    """ESC-50, or with esc10 its ten-class subset. The clips may be in any format, with the names in the list.

    Raises UsageError or UserError: which file, which line, what is wrong.
    """
    listed = read_list(root, "esc50.csv", _COLUMNS)
    lines: list[tuple[str, int, str, int]] = []  # stem, target, category, fold
    for where, line in listed.lines:
        if line["esc10"] not in ("True", "False"):
            raise UserError(f"{where}: {line['esc10']!r} under esc10, where True or False is needed")
        try:
            clip = Path(line["filename"]).stem, int(line["target"]), line["category"], fold_number(where, line["fold"])
        except ValueError as error:
            raise UserError(f"{where}: not a clip ({error})") from error
        if not esc10 or line["esc10"] == "True":
            lines.append(clip)
    if not lines:
        raise UserError(f"{listed.name}: lists no clip")
    names = dict(sorted({target: category for _, target, category, _ in lines}.items()))
    index = {target: i for i, target in enumerate(names)}
    rows = rows_table(
        SourceRow(safe_key(stem), [index[target]], None, stem, fold=fold) for stem, target, _, fold in lines
    )
    files = find_audio(listed.sound)
    stems = pa.array([stem.encode() for stem, *_ in lines])
    place = pc.index_in(stems, value_set=files.table["stem"].combine_chunks())
    rows = locate(rows, place, files)
    ids = list(names.values())
    labels = [name.replace("_", " ") for name in ids]
    name, counts = "esc10" if esc10 else "esc50", files.counts(place)
    return Source(name, "classification", ids, labels, rows, files.notes(counts), counts)
