"""ESC-50 and its subset ESC-10 (Piczak 2015), with the official folds: a folder with meta/esc50.csv and audio/."""

import csv
from pathlib import Path

from erann_dist.errors import UsageError, UserError
from shards.sources.rows import Source, SourceRow, find_audio, safe_key

_COLUMNS = {"filename", "fold", "target", "category", "esc10"}


def read_esc50(root: Path, esc10: bool = False) -> Source:
    """ESC-50, or with esc10 its ten-class subset. The clips may be in any format, under the names of the list.

    Raises UsageError or UserError: which file, which line, what is wrong.
    """
    path = root / "meta" / "esc50.csv"
    if not path.is_file():
        raise UsageError(f"{path}: no such file; --root is the folder that holds meta/ and audio/")
    audio = root / "audio"
    files = find_audio(audio)
    lines: dict[str, tuple[int, str, int]] = {}  # by the file's stem: target, category, fold
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if not set(reader.fieldnames or ()) >= _COLUMNS:
                raise UserError(f"{path}:1: the columns {', '.join(sorted(_COLUMNS))} are needed")
            for line in reader:
                where = f"{path}:{reader.line_num}"
                if None in line or None in line.values() or line["esc10"] not in ("True", "False"):
                    raise UserError(f"{where}: not a clip; wanted a value for each column, True or False for esc10")
                stem = Path(line["filename"]).stem
                if stem in lines:
                    raise UserError(f"{where}: {stem} is listed twice")
                try:
                    clip = int(line["target"]), line["category"], int(line["fold"])
                except ValueError as error:
                    raise UserError(f"{where}: not a clip ({error})") from error
                if not esc10 or line["esc10"] == "True":
                    lines[stem] = clip
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a CSV file ({error})") from error
    if not lines:
        raise UserError(f"{path}: lists no clip")
    names = dict(sorted({target: category for target, category, _ in lines.values()}.items()))
    index = {target: i for i, target in enumerate(names)}
    rows = []
    for stem, (target, _, fold) in lines.items():
        found = files[stem][0] if stem in files else None
        rows.append(
            SourceRow(
                key=safe_key(stem),
                labels=(index[target],),
                path=(audio / found).resolve() if found else None,
                source=found or stem,
                fold=fold,
            )
        )
    ids = list(names.values())
    return Source("esc10" if esc10 else "esc50", "classification", ids, [i.replace("_", " ") for i in ids], rows)
