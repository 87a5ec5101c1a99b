"""A recipe's data: the clips that its sources select."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from erann_dist import SAMPLE_RATE
from erann_dist.data.manifest import REPORT, Manifest, concatenate, load_manifest, read_table, require_same_labels
from erann_dist.errors import UsageError, UserError
from erann_dist.recipe import DataSection, DataSource
from erann_dist.storage.folder import open_folder
from erann_dist.storage.plain_file import read_plain_file

MAX_LIST_BYTES = 2**30  # of a list of keys


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
            raise UsageError(f"{path}: none of its {len(listed)} keys is in {source.url}; it needs one key per line")
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


def _key_lists(source: DataSource) -> list[tuple[str, pa.Array, bool]]:
    """The source's lists of keys: file, keys, and whether to keep these or all other clips. Raises UsageError."""
    lists = []
    for path, wanted in ((source.keys, True), (source.without, False)):
        if path is not None:
            try:
                lines = read_plain_file(Path(path), MAX_LIST_BYTES).decode().split()
            except UnicodeDecodeError as error:
                raise UsageError(f"{path}: not a list of keys ({error})") from error
            lists.append((path, pa.array(sorted(set(lines)), pa.string()), wanted))
    return lists


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
