"""The data sets that `erann pack` reads. To add one, add a file here and an entry in DATA_SETS."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from erann_dist.errors import UsageError

if TYPE_CHECKING:
    from shards.sources.rows import Source


@dataclass(frozen=True)
class Options:
    """The options of `erann pack` that locate a data set. Each data set declares which of them it needs."""

    segments: Path | None = None
    audio: Path | None = None
    classes: Path | None = None
    root: Path | None = None
    esc10: bool = False
    labels: Path | None = None  # for webdataset the place of the labels, such as json:tag
    columns: str | None = None
    label_separator: str | None = None
    suffix: str | None = None
    labels_from_folders: Literal["classes", "all"] = "classes"
    tars: str | None = None
    split: str | None = None
    fold: str | None = None
    endpoint: str | None = None  # of the S3 server
    on_progress: Callable[[str], None] = lambda text: None


@dataclass(frozen=True)
class ShardSetFacts:
    """What is known about a shard set of this name, made from a data set."""

    folds: int | None = None  # the number of official folds
    clips: int | None = None  # the number of clips in them
    options: Mapping[str, Any] = field(default_factory=dict)  # that make it, other than the location of the files


@dataclass(frozen=True)
class DataSet:
    read: Callable[[Options], "Source"]  # raises UsageError or UserError: which file, which line, what is wrong
    needs: tuple[str, ...] = ("root",)  # required options
    shard_sets: Mapping[str, ShardSetFacts] = field(default_factory=dict)  # by name
    # What clips in different folds must not share, such as a recording, and a function from a clip's key to its own.
    recordings: tuple[str, Callable[[str], str]] | None = None
    folds_by_actor: bool = False


def _audioset(options: Options) -> "Source":
    from shards.sources.audioset import CLASSES, read_audioset

    assert options.segments
    assert options.audio
    return read_audioset(options.segments, options.audio, options.classes or CLASSES)


def _esc50(options: Options) -> "Source":
    from shards.sources.esc50 import read_esc50

    assert options.root
    return read_esc50(options.root, options.esc10)


def _urbansound8k(options: Options) -> "Source":
    from shards.sources.urbansound8k import read_urbansound8k

    assert options.root
    return read_urbansound8k(options.root)


def _ravdess(options: Options) -> "Source":
    from shards.sources.ravdess import read_ravdess

    assert options.root
    return read_ravdess(options.root)


def _fsd50k(options: Options) -> "Source":
    from shards.sources.fsd50k import read_fsd50k

    assert options.root
    return read_fsd50k(options.root)


def _folder(options: Options) -> "Source":
    from shards.sources.folder import ListFormat, find_metadata, parse_columns, read_folder, read_listed_folder

    assert options.root
    if options.label_separator == "":
        raise UsageError("--label-separator: is empty; without the option labels are divided at , and ;")
    columns = parse_columns(options.columns) if options.columns is not None else {}
    suffix = f".{options.suffix.removeprefix('.')}" if options.suffix else ""
    form = ListFormat(columns, options.label_separator, suffix)
    is_all = options.labels_from_folders == "all"
    found, notes = find_metadata(options.root, form) if not options.labels and not is_all else (None, [])
    if labels := options.labels or found:
        source = read_listed_folder(options.root, labels, form, options.classes)
    elif form != ListFormat():
        raise UsageError("--columns, --label-separator and --suffix are for a list; give it with --labels")
    else:
        source = read_folder(options.root, options.classes, splits=not is_all)
    return replace(source, notes=notes + source.notes)


def _webdataset(options: Options) -> "Source":
    from shards.sources.samples import parse_fields
    from shards.sources.webdataset import read_webdataset

    assert options.tars
    fields = parse_fields(str(options.labels) if options.labels else None, options.split, options.fold)
    return read_webdataset(options.tars, fields, options.classes, options.endpoint, options.on_progress)


DATA_SETS = {
    "audioset": DataSet(_audioset, ("segments", "audio"), {"audioset": ShardSetFacts()}),
    "esc50": DataSet(
        _esc50,
        shard_sets={"esc50": ShardSetFacts(5, 2000), "esc10": ShardSetFacts(5, 400, {"esc10": True})},
        recordings=("Freesound recording", lambda key: key.split("-")[1]),  # fold-RECORDING-take-target
    ),
    "urbansound8k": DataSet(
        _urbansound8k,
        shard_sets={"urbansound8k": ShardSetFacts(10, 8732)},
        recordings=("Freesound recording", lambda key: key.split("-")[0]),
    ),
    "ravdess": DataSet(
        _ravdess,
        shard_sets={"ravdess": ShardSetFacts(4, 1440)},
        recordings=("actor", lambda key: f"actor {key.split('-')[-1]}"),
        folds_by_actor=True,
    ),
    "fsd50k": DataSet(_fsd50k, shard_sets={"fsd50k": ShardSetFacts()}),
    "folder": DataSet(_folder, shard_sets={"folder": ShardSetFacts()}),
    "webdataset": DataSet(_webdataset, ("tars",), {"webdataset": ShardSetFacts()}),
}


def find_data_set(shard_set: str) -> tuple[DataSet, ShardSetFacts] | None:
    """The data set that shard sets of this name are made from."""
    found = ((each, each.shard_sets[shard_set]) for each in DATA_SETS.values() if shard_set in each.shard_sets)
    return next(found, None)


def read_source(name: str, options: Options) -> "Source":
    """A data set's rows. Raises UsageError when a required option is missing, and what the data set's reader raises."""
    data_set = DATA_SETS[name]
    if any(getattr(options, need) is None for need in data_set.needs):
        raise UsageError(f"{name} needs {' and '.join(f'--{need}' for need in data_set.needs)}")
    return data_set.read(options)


def read_source_of(shard_set: str, options: Options) -> "Source":
    """The rows that a shard set of this name was made from. Raises what read_source raises."""
    for name, data_set in DATA_SETS.items():
        if facts := data_set.shard_sets.get(shard_set):
            return read_source(name, replace(options, **facts.options))
    raise UsageError(f"no known data set makes a shard set named {shard_set!r}")
