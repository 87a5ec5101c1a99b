"""A recipe's data: the clips that its sources select."""

import csv
import dataclasses
import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from erann_dist import SAMPLE_RATE
from erann_dist.data.manifest import (
    REPORT,
    Manifest,
    concatenate,
    load_manifest,
    read_manifest,
    read_table,
    require_same_labels,
)
from erann_dist.errors import UsageError, UserError
from erann_dist.formats import strict_parquet
from erann_dist.recipe import DataSection, DataSource
from erann_dist.storage.folder import open_folder
from erann_dist.storage.plain_file import read_plain_file

MAX_LIST_BYTES = 2**30  # of a list of keys
_KEY_SCHEMA = pa.schema([("key", pa.string())])
_LIST_ADVICE = "it needs one key per line, or a column `key` in a CSV or Parquet file"
_EXAMPLES = 3  # how many keys that are not in the set are named


def load_source(source: DataSource) -> Manifest:
    """The clips of one source. Raises UsageError when there are none, UserError when the sample rate is not ERANN's."""
    manifest = load_manifest(source.url)
    if manifest.info.sample_rate != SAMPLE_RATE:
        raise UserError(
            f"{source.url}: is at {manifest.info.sample_rate} Hz, ERANN needs {SAMPLE_RATE} Hz; pack it again"
        )
    lists = _key_lists(source)
    for path, listed, _ in lists:
        if not pc.any(pc.is_in(manifest.keys, listed)).as_py():
            raise UsageError(f"{path}: none of its {len(listed)} keys is in {source.url}; {_LIST_ADVICE}")
    keep = _selected(source, manifest.splits, manifest.folds) & _listed(lists, manifest.keys)
    if not keep.any() and (source.keys or source.without):
        raise UsageError(f"{source.url}: the lists of keys, the split and the folds leave no clip")
    if not keep.any():
        folds = sorted(set(manifest.folds[manifest.folds >= 0].tolist()))
        splits = sorted(s for s in pc.unique(manifest.splits).to_pylist() if s is not None)
        raise UsageError(
            f"{source.url}: no clip has split {source.split} and fold {source.fold}; "
            f"the splits are {splits} and the folds {folds}"
        )
    if keep.all():
        return manifest
    # A run must not resume with other clips than it began with, for example after a list of keys was edited.
    selected = hashlib.sha256(manifest.info.content_hash.encode() + np.packbits(keep).tobytes()).hexdigest()
    return dataclasses.replace(manifest.select(keep), info=dataclasses.replace(manifest.info, content_hash=selected))


def load_sources(sources: list[DataSource]) -> Manifest:
    """The clips of all sources as one. Raises UserError when their labels differ."""
    return concatenate([load_source(source) for source in sources])


def load_train_and_eval(data: DataSection) -> tuple[Manifest, Manifest]:
    """A recipe's training and evaluation clips.

    Raises UserError when their labels, task or rate differ, UsageError when they share clips and that is not allowed.
    """
    clips, eval_clips = load_sources(data.train), load_sources(data.eval)
    require_same_labels(clips.info, eval_clips.info, data.train[0].url, data.eval[0].url)
    require_labels(eval_clips, data.eval[0].url)
    if not data.allow_overlap and (shared := count_shared(clips, eval_clips)):
        raise UsageError(
            f"data.train and data.eval share {shared:,} of the {len(eval_clips):,} clips to evaluate, and a model must "
            "not be evaluated on clips that it was trained on; give them different sets, splits or folds "
            "(data.train.fold, data.eval.fold), or data.allow_overlap=true"
        )
    return clips, eval_clips


def count_shared(clips: Manifest, eval_clips: Manifest) -> int:
    """How many of eval_clips are also in clips, with the same key and the same bytes, in any set."""
    place = pc.index_in(eval_clips.keys, clips.keys.combine_chunks()).combine_chunks()
    found = place.is_valid().to_numpy(zero_copy_only=False)
    rows = place.drop_null().to_numpy()
    return int((clips.crc32s[rows] == eval_clips.crc32s[found]).sum())


def count_reported(source: DataSource) -> int:
    """How many listed clips of the source's split, folds and lists of keys are not in the shard set."""
    report = read_table(open_folder(source.url), REPORT)
    once = pc.not_equal(report["reason"], "duplicate").to_numpy()  # a duplicate is not one more clip
    selected = _selected(source, report["split"], report["fold"].fill_null(-1).to_numpy())
    return int((once & selected & _listed(_key_lists(source), report["key"])).sum())


def selection(source: DataSource) -> dict[str, Any]:
    """What of a set is evaluated, ready for JSON: its URL as `shards`, and those of split, fold, keys and without that
    are given, with the keys of the lists that are not in the set: [{file, count, examples}, ...]."""
    parts = source.model_dump(exclude={"url"}, exclude_none=True)
    lists = _key_lists(source)
    if not lists:
        return {"shards": source.url} | parts
    keys = read_manifest(open_folder(source.url), ["key"])[1]["key"]
    absent = []
    for path, listed, _ in lists:
        unknown = listed.filter(pc.invert(pc.is_in(listed, keys.combine_chunks())))
        if len(unknown):
            examples = [_shown(key) for key in unknown[:_EXAMPLES].to_pylist()]
            absent.append({"file": path, "count": len(unknown), "examples": examples})
    return {"shards": source.url} | parts | {"not_in_set": absent}


def _shown(key: str) -> str:
    """A line of a user's file, which may be any text, in a form for messages."""
    return key[:100] if key.isprintable() else ascii(key[:100])


def require_labels(clips: Manifest, where: str) -> None:
    """Raise UserError when no clip has a label: there is no metric then."""
    if not len(clips.label_values):
        raise UserError(f"{where}: none of its {len(clips):,} clips to evaluate has a label, so there is no metric")


def _key_lists(source: DataSource) -> list[tuple[str, pa.Array, bool]]:
    """The source's lists of keys: file, sorted keys, and whether to keep these or all other clips. Raises UserError."""
    return [
        (path, pa.array(sorted(set(_read_keys(path))), pa.string()), wanted)
        for path, wanted in ((source.keys, True), (source.without, False))
        if path is not None
    ]


def _read_keys(path: str) -> list[str]:
    """The keys in a file: the column `key` of a Parquet or CSV file, or a key per line."""
    data = read_plain_file(Path(path), MAX_LIST_BYTES)
    if data.startswith(b"PAR1"):
        with Path(path).open("rb") as file:
            keys: list[str] = strict_parquet.read(file, path, _KEY_SCHEMA, ["key"], _LIST_ADVICE)["key"].to_pylist()
            return keys
    try:
        text = data.decode("utf-8-sig")
        header = [name.strip(' "') for name in text.partition("\n")[0].rstrip("\r").split(",")]
        if "key" not in header:
            return [key for line in text.split("\n") if (key := line.strip())]
        _, *rows = csv.reader(io.StringIO(text, newline=""), strict=True)
        return [row[header.index("key")].strip() for row in rows if row]
    except (UnicodeDecodeError, csv.Error, IndexError) as error:
        raise UsageError(f"{path}: not a list of keys ({error}); {_LIST_ADVICE}") from error


def _listed(lists: list[tuple[str, pa.Array, bool]], keys: pa.ChunkedArray) -> npt.NDArray[np.bool_]:
    """Whether each key is to be kept according to all of the lists."""
    keep = np.ones(len(keys), dtype=np.bool_)
    for _, listed, wanted in lists:
        keep &= pc.is_in(keys, listed).to_numpy() == wanted
    return keep


def _selected(source: DataSource, splits: pa.ChunkedArray, folds: npt.NDArray[np.int8]) -> npt.NDArray[np.bool_]:
    keep = np.ones(len(folds), dtype=np.bool_)
    if source.split is not None:
        keep &= pc.equal(splits, source.split).fill_null(False).to_numpy()
    if source.fold is not None:
        keep &= np.isin(folds, source.fold)
    return keep
