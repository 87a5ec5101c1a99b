"""Compares two evaluations on the clips that they share: figures on different clips can't be compared."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from erann_dist.data.manifest import Manifest, list_hash, require_printable
from erann_dist.data.sources import require_labels
from erann_dist.errors import UsageError, UserError
from erann_dist.storage.folder import open_folder
from erann_dist.storage.plain_file import require_plain_file
from erann_dist.train.evaluation import Predictions, read_predictions, summarise


@dataclass(frozen=True)
class CommonClips:
    """The clips of a manifest that another evaluation has scored too, in the manifest's order."""

    file: str  # the other evaluation's predictions
    rows: npt.NDArray[np.int64]  # (k,) of the manifest
    theirs: Predictions  # (k, N), in the order of the manifest's labels
    only_theirs: int  # number of the other evaluation's clips that are not in the manifest


def read_common(file: str, clips: Manifest) -> CommonClips:
    """What the predictions.parquet at a path or s3:// URL has of the clips.

    Raises UsageError when there is no such file, UserError when it is damaged, is for other labels or has none of the
    clips.
    """
    folder, _, name = file.rpartition("/")
    if "://" not in file:
        require_plain_file(Path(file))
    try:
        with open_folder(folder or ".").reading(name) as opened:
            keys, label_ids, predictions = read_predictions(opened, file)
    except FileNotFoundError as error:
        raise UsageError(f"{file}: no such file") from error
    require_printable(file, label_ids)
    if set(label_ids) != set(clips.info.label_ids) or len(label_ids) != clips.num_classes:
        raise UserError(
            f"{file}: scores other labels ({_first_other(label_ids, clips.info.label_ids)}); only evaluations with the "
            "same labels, in any order, can be compared"
        )
    listed = pa.array(keys, pa.string())
    if (distinct := len(pc.unique(listed))) != len(keys):
        raise UserError(f"{file}: has {len(keys) - distinct:,} keys twice; evaluate the model again to write it again")
    place = pc.index_in(clips.keys, listed).combine_chunks()
    rows = np.flatnonzero(place.is_valid().to_numpy(zero_copy_only=False))
    if not len(rows):
        first = f"a key there is {keys[0][:100]!r}, one here {clips.keys[0].as_py()!r}" if keys else "it has no clips"
        raise UserError(f"{file}: has none of the {len(clips):,} clips to evaluate: {first}")
    order = [label_ids.index(label) for label in clips.info.label_ids]
    found = place.drop_null().to_numpy()
    theirs = Predictions(predictions.scores[found][:, order], predictions.targets[found][:, order])
    common = CommonClips(file, rows, theirs, len(keys) - len(rows))
    require_labels(clips.select(np.isin(np.arange(len(clips)), rows)), file)
    return common


def common_detail(common: CommonClips, predictions: Predictions, clips: Manifest) -> dict[str, Any]:
    """The metrics of both evaluations on the clips that they share, both against the manifest's labels; JSON-ready.

    predictions: of the manifest's clips.
    """
    task, names = clips.info.task, clips.info.label_names
    targets = predictions.targets[common.rows]
    keys = clips.keys.take(pa.array(common.rows))
    differ = np.flatnonzero((targets != common.theirs.targets).any(axis=1))
    result: dict[str, Any] = {
        "file": common.file,
        "clips": len(common.rows),
        "only_ours": len(clips) - len(common.rows),
        "only_theirs": common.only_theirs,
        "list_hash": list_hash(keys),
        "ours": summarise(Predictions(predictions.scores[common.rows], targets), task),
        "theirs": summarise(Predictions(common.theirs.scores, targets), task),
        "labels_differ": len(differ),
    }
    if len(differ):
        first = int(differ[0])
        of_first = {"ours": targets[first], "theirs": common.theirs.targets[first]}
        labels = {whose: [names[c] for c in np.flatnonzero(row)] for whose, row in of_first.items()}
        result["labels_example"] = {"key": keys[first].as_py()} | labels
    return result


def _first_other(theirs: list[str], ours: list[str]) -> str:
    """The first label that only one of the two has, or else their numbers."""
    for label in theirs:
        if label not in ours:
            return f"{label} is not one of the set's"
    for label in ours:
        if label not in theirs:
            return f"{label} is missing"
    return f"{len(theirs)} in place of {len(ours)}"
