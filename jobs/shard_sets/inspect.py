"""What is in a download before it is packed: files by kind, formats, the data sets recognised, and what to run next."""

import os
import random
import re
import shlex
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from rich.table import Table

from erann_dist.data.audio import SUFFIXES, DecodeError, read_header
from erann_dist.errors import UsageError, UserError
from erann_dist.words import count
from jobs.terminal.show import console, size
from shards.clip import Rejected, first_block
from shards.sources.data_sets import DATA_SETS, Options, read_source
from shards.sources.files import find_audio
from shards.sources.lists import find_list, next_to
from shards.sources.ravdess import NAME as RAVDESS_NAME
from shards.sources.rows import Source, SourceRow, printable
from shards.sources.walk import walk

_ARCHIVES = (".tar", ".zip", ".h5", ".hdf5", ".hdf", ".tgz", ".7z", ".rar")
_COMPRESSED = (".gz", ".zst", ".xz", ".bz2")  # after another suffix
_LISTS = (".csv", ".tsv", ".txt", ".json", ".jsonl")
_KINDS = ("sound", "archive", "Parquet", "list", "other")
# The list by which a data set is known, and those of which one must be next to it.
_OWN_LISTS = {
    "esc50": ("esc50.csv", ()),
    "urbansound8k": ("UrbanSound8K.csv", ()),
    "fsd50k": ("vocabulary.csv", ("dev.csv", "eval.csv")),
}
_SEGMENT_LIST = re.compile(r".*segments\.csv(\.gz)?")
_VIDEO_ID = re.compile(r"(?:Y|id_)?([A-Za-z0-9_-]{11})(?:[_-][\d.]+){0,2}|.*[\[-]([A-Za-z0-9_-]{11})\]?(?:\.f\d+)?")
_KEPT = 200  # files of each kind, chosen at random, by whose names data sets are recognised
_SAMPLE = 20  # files whose headers are read
_SAMPLE_OF_ARCHIVE = 3  # clips of an archive that are opened
_EXAMPLES = 3


@dataclass
class _Kind:
    """The files of one suffix."""

    kind: str
    files: int = 0
    bytes: int = 0
    kept: list[str] = field(default_factory=list)  # a random sample of their paths


@dataclass
class _Files:
    """What is below a folder."""

    kinds: dict[str, _Kind] = field(default_factory=dict)  # by suffix
    lists: dict[str, list[str]] = field(default_factory=dict)  # folder -> the names of the lists in it
    hidden: int = 0
    not_plain: int = 0  # pipes, devices, links to nothing


def inspect(folder: Path, segments: Path | None = None) -> dict[str, Any]:
    """What is in a folder or archive, ready for JSON. Nothing is written.

    segments: an AudioSet segment list to match the files with. What can't be read is part of the result. Raises
    UsageError when there is no such folder or list.
    """
    if not folder.exists():
        raise UsageError(f"{folder}: no such folder")
    if segments and not segments.exists():
        raise UsageError(f"{segments}: no such file")
    found = _walk(folder)
    sounds = [kind for kind in found.kinds.values() if kind.kind == "sound"]
    archives = [kind for kind in found.kinds.values() if kind.kind in ("archive", "Parquet")]
    inside = [_archive(kind) for kind in sorted(archives, key=lambda kind: -kind.bytes)]
    sample = [
        *_headers(_spread(kind.kept for kind in sounds)),
        *(clip for each in inside for clip in each.pop("sample")),
    ]
    recognised = [_matched(name, folder, segments) for name in _recognised(folder, found, segments)]
    kinds = sorted(found.kinds.items(), key=lambda pair: (_KINDS.index(pair[1].kind), -pair[1].files, pair[0]))
    return {
        "folder": str(folder),
        "files": sum(kind.files for kind in found.kinds.values()),
        "bytes": sum(kind.bytes for kind in found.kinds.values()),
        "hidden": found.hidden,
        "not_plain": found.not_plain,
        "kinds": [
            {
                "kind": kind.kind,
                "suffix": suffix,
                "files": kind.files,
                "bytes": kind.bytes,
                "example": _shown(kind.kept[0], folder),
            }
            for suffix, kind in kinds
        ],
        "archives": [each | {"file": _shown(each["file"], folder)} for each in inside],
        "sample": [each | {"file": _shown(each["file"], folder)} for each in sample],
        "recognised": recognised,
        "command": _command(folder, found, recognised, segments),
    }


def inspected_page(result: dict[str, Any]) -> None:
    """The files by kind, the formats of the sample, what each data set would find, and the command to run."""
    console.print(f"{result['folder']}: {count(result['files'], 'file')}, {size(result['bytes'])}")
    kinds = _table("kind", "suffix", "files:n", "bytes:n", "for example")
    for kind in result["kinds"]:
        row = (kind["kind"], kind["suffix"] or "none", f"{kind['files']:,}", size(kind["bytes"]), kind["example"])
        kinds.add_row(*row)
    if result["kinds"]:
        console.print(kinds)
    for number, what in ((result["hidden"], "hidden"), (result["not_plain"], "no plain file: a pipe, a dead link")):
        if number:
            console.print(f"left out: {number:,} {what}")
    for archive in result["archives"]:
        examples = ", ".join(archive["examples"])
        console.print(archive["problem"] or f"{archive['file']}: {count(archive['clips'], 'clip')}: {examples}, …")
    if result["sample"]:
        console.print(f"\nformats, of {count(len(result['sample']), 'file')}:")
        console.print(_formats(result["sample"]))
    for each in result["recognised"]:
        console.print(f"\n{each['data_set']}:")
        for line in _findings(each):
            console.print(f"  {line}")
    console.print(
        f"\nnext: {result['command']}" if result["command"] else "\nnothing here that erann pack reads as it is"
    )


def _formats(sample: list[dict[str, Any]]) -> Table:
    table = _table("format", "files:n", "seconds:n", "for example")
    groups: dict[str, list[dict[str, Any]]] = {}
    for each in sample:
        groups.setdefault(each["format"] or f"unreadable: {each['problem']}", []).append(each)
    for name, files in sorted(groups.items(), key=lambda pair: -len(pair[1])):
        seconds = [each["seconds"] for each in files if each["seconds"] is not None]
        shown = sorted({f"{value:.1f}" for value in (min(seconds), max(seconds))}, key=float) if seconds else ["–"]
        table.add_row(name, f"{len(files):,}", " to ".join(shown), files[0]["file"])
    return table


def _findings(match: dict[str, Any]) -> Iterator[str]:
    if match["problem"]:
        yield match["problem"]
    elif match["packable"] is None:
        yield "names with videos' ids, or a segment list; give a list with --segments to see what matches"
    else:
        yield f"{count(match['packable'], 'clip')} of {count(match['classes'], 'class')} can be packed"
        if match["reasons"]:
            yield "not packed: " + ", ".join(f"{number:,} {reason}" for reason, number in match["reasons"].items())
        yield from match["notes"]


def _table(*columns: str) -> Table:
    """A table; a column of numbers ends in :n."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column.removesuffix(":n"), justify="right" if column.endswith(":n") else "left")
    return table


def _walk(root: Path) -> _Files:
    """Every file below the root, by the rules of find_audio: links are followed, hidden names left out."""
    found = _Files()
    rng = random.Random(0)  # for the same files in the same order the same sample
    if root.is_file():
        _add(found, str(root), root.name, root.stat(), rng)
        return found
    for entry, is_folder in walk(str(root)):
        if entry.name.startswith("."):
            found.hidden += 1
            continue
        if is_folder:
            continue
        try:
            status = entry.stat()
        except OSError:  # a link to nothing or to itself
            found.not_plain += 1
            continue
        if stat.S_ISREG(status.st_mode):
            _add(found, entry.path, entry.name, status, rng)
        else:
            found.not_plain += 1
    return found


def _add(found: _Files, path: str, name: str, status: os.stat_result, rng: random.Random) -> None:
    stem, suffix = os.path.splitext(name)
    suffix = suffix.lower()
    if suffix in _COMPRESSED:
        suffix = os.path.splitext(stem)[1].lower() + suffix
    kind = found.kinds.get(suffix)
    if kind is None:
        kind = found.kinds[suffix] = _Kind(_kind_of(suffix))
    kind.files += 1
    kind.bytes += status.st_size
    if kind.files <= _KEPT:
        kind.kept.append(path)
    elif (place := int(rng.random() * kind.files)) < _KEPT:
        kind.kept[place] = path
    if kind.kind == "list":
        found.lists.setdefault(os.path.dirname(path), []).append(name)


def _kind_of(suffix: str) -> str:
    plain = next((suffix.removesuffix(end) for end in _COMPRESSED if suffix.endswith(end)), suffix)
    if suffix in SUFFIXES:
        return "sound"
    if plain in _ARCHIVES:
        return "archive"
    if suffix == ".parquet":
        return "Parquet"
    return "list" if plain in _LISTS else "other"


def _spread(samples: Iterable[list[str]]) -> list[str]:
    """At most _SAMPLE paths, as many of each sample as there are enough of."""
    paths = (path for row in zip_longest(*samples) for path in row if path is not None)
    return list(islice(paths, _SAMPLE))


def _headers(paths: list[str]) -> Iterator[dict[str, Any]]:
    for path in paths:
        try:
            if not os.path.getsize(path):
                raise DecodeError("0 bytes")
            yield {"file": path, **asdict(read_header(Path(path))), "problem": None}
        except DecodeError as error:
            yield {"file": path, "format": None, "rate": None, "seconds": None, "problem": str(error)}


def _archive(kind: _Kind) -> dict[str, Any]:
    """What is in the first archive of a kind, as packing reads it, with a sample of its clips."""
    path = min(kind.kept)
    result: dict[str, Any] = {"file": path, "files": kind.files, "clips": None, "examples": [], "problem": None}
    try:
        files = find_audio(Path(path))
    except UserError as error:
        return result | {"problem": str(error), "sample": []}
    names = files.table["name"].slice(0, _EXAMPLES).to_pylist()
    clips = files.table.slice(0, _SAMPLE_OF_ARCHIVE).drop_columns(["stem", "name", "lossy"]).to_pylist()
    sample: list[dict[str, Any]] = []
    for name, clip in zip(names, clips, strict=True):
        about: dict[str, Any] = {
            "file": os.path.join(path, printable(name)),
            "format": None,
            "rate": None,
            "seconds": None,
            "problem": None,
        }
        try:
            block = first_block(SourceRow("", [], source=printable(name), **clip))
            sample.append(about | {"format": block.format, "rate": block.rate})
        except (DecodeError, Rejected) as error:
            sample.append(about | {"problem": ": ".join(filter(None, error.args))})
    return result | {"clips": len(files.table), "examples": [printable(name) for name in names], "sample": sample}


def _recognised(folder: Path, found: _Files, segments: Path | None) -> list[str]:
    """The data sets whose layout is there, the surest first."""
    if not any(kind.kind in ("sound", "archive", "Parquet") for kind in found.kinds.values()):
        return []
    if segments:
        return ["audioset"]
    names = []
    has_zips = any(path.lower().endswith(".zip") for kind in found.kinds.values() for path in kind.kept)
    for name, (own, others) in _OWN_LISTS.items():
        is_loose = any(own in there and (not others or {*others} & {*there}) for there in found.lists.values())
        if is_loose or (has_zips and _is_in_zip(folder, own, others)):
            names.append(name)
    stems = [Path(path).stem for kind in found.kinds.values() if kind.kind == "sound" for path in kind.kept]
    if 2 * sum(bool(RAVDESS_NAME.fullmatch(stem)) for stem in stems) > len(stems):
        names.append("ravdess")
    if not names and (_segment_lists(found) or 2 * sum(map(_is_video, stems)) > len(stems)):
        names.append("audioset")
    return names or ["folder"]


def _is_in_zip(folder: Path, own: str, others: tuple[str, ...]) -> bool:
    """Whether a data set's list is in a zip, next to one of the others if there are any."""
    path = find_list(folder, own)
    return path is not None and (not others or any(next_to(path, other).exists() for other in others))


def _is_video(stem: str) -> bool:
    """Whether a name has the id of a video: 11 characters, nearly always with small and capital letters."""
    match = _VIDEO_ID.fullmatch(stem)
    found = (match[1] or match[2]) if match else ""
    return found not in (found.lower(), found.upper())


def _segment_lists(found: _Files) -> list[str]:
    names = (os.path.join(folder, name) for folder, names in found.lists.items() for name in names)
    return sorted(path for path in names if _SEGMENT_LIST.fullmatch(os.path.basename(path)))


def _matched(name: str, folder: Path, segments: Path | None) -> dict[str, Any]:
    """What packing this data set from the folder would find; for AudioSet only with a segment list."""
    result: dict[str, Any] = {
        "data_set": name,
        "shard_set": name,
        "files": None,
        "packable": None,
        "reasons": {},
        "notes": [],
    }
    if name == "audioset" and not segments:
        return result | {"problem": None}
    options = Options(segments=segments, audio=folder, root=folder)
    variants = [(each, replace(options, **facts.options)) for each, facts in DATA_SETS[name].shard_sets.items()]
    try:
        sources = [(each, read_source(name, variant)) for each, variant in variants]
    except UserError as error:
        return result | {"problem": str(error)}
    shard_set, source = max(sources, key=lambda pair: _share(pair[1]))
    reasons = Counter(source.rows["reason"].drop_null().to_pylist())
    return result | {
        "shard_set": shard_set,
        "files": asdict(source.files) if source.files else None,
        "packable": pc.sum(pc.is_null(source.rows["reason"])).as_py() or 0,
        "classes": len(source.label_ids),
        "reasons": dict(sorted(reasons.items())),
        "notes": source.notes,
        "problem": None,
    }


def _share(source: Source) -> float:
    """How much of the list could be packed."""
    share: float = pc.mean(pc.is_null(source.rows["reason"]).cast("float64")).as_py()
    return share


def _command(folder: Path, found: _Files, recognised: list[dict[str, Any]], segments: Path | None) -> str | None:
    """The next command, or None when there is nothing to pack."""
    for each in recognised:
        name, shard_set = each["data_set"], each["shard_set"]
        if each["problem"]:
            continue
        words = ["erann", "pack", name]
        if name == "audioset":
            lists = [str(segments)] if segments else _segment_lists(found)
            path = lists[0] if lists else "balanced_train_segments.csv"
            words += ["--segments", path, "--audio", str(folder)]
            shard_set = f"audioset/{os.path.basename(path).split('.')[0].removesuffix('_segments')}"
        else:
            options = DATA_SETS[name].shard_sets[shard_set].options
            words += ["--root", str(folder), *(f"--{option}" for option in options)]
        return shlex.join([*words, "--out", f"shard-sets/{shard_set}"])
    return None


def _shown(path: str, folder: Path) -> str:
    """The path below the folder, as printable text."""
    relative = os.path.relpath(path, folder) if folder.is_dir() else path
    return printable(os.fsencode(relative))
