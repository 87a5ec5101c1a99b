"""Scores every clip of a shard set exactly once, on any number of workers, with the same result."""

from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import Field, model_validator

from erann_dist.data import loader
from erann_dist.data.clip_reader import ReadStats
from erann_dist.data.manifest import Manifest, Task, list_hash
from erann_dist.data.streaming import decode_clips, stream_clips, worker_rows
from erann_dist.errors import UserError
from erann_dist.formats import strict_json, strict_parquet
from erann_dist.models.base import AudioModel
from erann_dist.models.log_mel import LogMel
from erann_dist.models.mel_config import padded_samples
from erann_dist.storage.slow_reads import SlowReads
from erann_dist.train.distributed import Workers
from erann_dist.train.metrics import classification_metrics, tagging_metrics

MICRO_BATCH = 16
PREDICTIONS_SCHEMA = pa.schema(
    [("key", pa.string()), ("scores", pa.list_(pa.float32())), ("targets", pa.list_(pa.int16()))]
)


@dataclass(frozen=True)
class Predictions:
    """The scores of a manifest's clips, in its order."""

    scores: npt.NDArray[np.float32]  # (n, N) probabilities
    targets: npt.NDArray[np.float32]  # (n, N) of 0 and 1


class NotFinite(UserError):
    """A model's scores are NaN or infinite, for example because the training diverged."""


def require_finite(scores: npt.NDArray[np.floating], keys: pa.ChunkedArray, of: str) -> None:
    """Raise NotFinite when any score (n, N) is NaN or infinite, with the number of clips and the first one's key.

    of: what produced the scores, or the file that contains them.
    """
    bad = np.flatnonzero(~np.isfinite(scores).all(axis=1))
    if len(bad):
        raise NotFinite(
            f"{of}: the scores of {len(bad)} of {len(scores)} clips are not finite, the first is {keys[int(bad[0])]}; "
            "the training diverged: take an earlier checkpoint's model, or train again with a lower optim.lr"
        )


def evaluation_batches(manifest: Manifest, pad_samples: int = 0) -> list[tuple[int, npt.NDArray[np.int64]]]:
    """Micro-batches of clips that pad to the same length, as (samples, rows), determined by the manifest alone.

    Each clip is therefore scored at its own full length on any worker; one shorter than `pad_samples` is padded to it.
    """
    padded = padded_samples(np.maximum(manifest.samples, pad_samples))
    order = np.argsort(padded, kind="stable")
    bounds = np.flatnonzero(np.diff(padded[order])) + 1
    return [
        (int(padded[group[0]]), group[start : start + MICRO_BATCH])
        for group in np.split(order, bounds)
        for start in range(0, len(group), MICRO_BATCH)
    ]


def score(
    model: AudioModel,
    manifest: Manifest,
    workers: Workers,
    *,
    loader_threads: int,
    pad_samples: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
    slow: SlowReads | None = None,
) -> Predictions | None:
    """Score full-length clips with the model. Rank 0 gets the predictions, the other workers None.

    pad_samples: the length that shorter clips are zero-padded to. progress: called with the number of clips done and
    their total, estimated from this worker's share. slow: counts the clips that this worker read from S3 the slow way.
    Raises UserError for a clip that can't be read or decoded, and NotFinite on rank 0.
    """
    batches = evaluation_batches(manifest, pad_samples)
    mine = batches[workers.rank :: workers.world_size]  # interleaved, because they are sorted by length
    crops = [loader.whole_clips(manifest, rows, length) for length, rows in mine]
    total = sum(len(rows) for _, rows in mine)
    stats = ReadStats(slow=slow or SlowReads())
    with closing(loader.Loader(manifest, crops, threads=loader_threads, stats=stats)) as loaded:
        scores = _scores(model, manifest.info.task, manifest.keys, loaded, total, workers, progress)
    return None if scores is None else Predictions(scores, manifest.targets(np.arange(len(manifest))))


def score_stream(
    model: AudioModel,
    task: Task,
    manifest: Manifest,
    workers: Workers,
    *,
    threads: int,
    pad_samples: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> npt.NDArray[np.float32] | None:
    """The scores of full-length clips as in `score`, (n, N), in one pass over their tars, ignoring their labels.

    Which clips share a micro-batch depends on the number of workers. In evaluation a clip's scores do not depend on the
    rest of its batch, except for the order in which floats are summed. Raises what `score` raises.
    """
    total = len(worker_rows(manifest, workers.rank, workers.world_size))
    with (
        closing(stream_clips(manifest, workers.rank, workers.world_size)) as clips,
        closing(decode_clips(manifest, clips, threads, MICRO_BATCH, pad_samples)) as batches,
    ):
        return _scores(model, task, manifest.keys, batches, total, workers, progress)


@torch.inference_mode()
def _scores(
    model: AudioModel,
    task: Task,
    keys: pa.ChunkedArray,
    batches: Iterable[loader.Batch[loader.Crops]],
    total: int,
    workers: Workers,
    progress: Callable[[int, int], None],
) -> npt.NDArray[np.float32] | None:
    """On rank 0 the scores of all clips, by row. `batches` contain this worker's share of `total` clips.

    keys: of all clips. Raises NotFinite.
    """
    was_training = model.training
    model.eval()
    log_mel = LogMel(model.front_end).to(workers.device)
    rows = np.zeros(total, np.int64)
    scores = np.zeros((total, model.num_classes), np.float32)
    done = 0
    for batch in batches:
        logits = model(log_mel(batch.pcm.to(workers.device).float() / 32768)).float()
        probabilities = probabilities_of(logits, task)
        end = done + len(probabilities)
        rows[done:end], scores[done:end] = batch.crops.rows, probabilities.cpu().numpy()
        done = end
        progress(done * len(keys) // total, len(keys))
    model.train(was_training)
    parts = workers.gather((rows, scores))
    if not workers.is_rank_zero:
        return None
    all_scores = np.full((len(keys), model.num_classes), np.nan, np.float32)
    for part_rows, part_scores in parts:
        all_scores[part_rows] = part_scores
    require_finite(all_scores, keys, "the model")
    return all_scores


def probabilities_of(logits: torch.Tensor, task: Task) -> torch.Tensor:
    """The probabilities for a model's logits (B, N), by sigmoid or softmax; NaN where a logit is not finite."""
    probabilities = logits.sigmoid() if task == "tagging" else logits.softmax(dim=1)
    return probabilities.where(logits.isfinite(), torch.nan)


def summarise(predictions: Predictions, task: Task) -> dict[str, float]:
    """The few figures that summarise an evaluation."""
    if task == "tagging":
        tagging = tagging_metrics(predictions.scores, predictions.targets)
        return {"mAP": tagging.mean_ap, "mAUC": tagging.mean_auc, "d_prime": tagging.d_prime}
    return {"accuracy": classification_metrics(predictions.scores, predictions.targets).accuracy}


def detail(predictions: Predictions, manifest: Manifest, listed: int) -> dict[str, Any]:
    """All metrics, also per class, and what they were measured on.

    listed: the number of source rows in the evaluated list, including those that could not be packed.
    """
    info = manifest.info
    result: dict[str, Any] = {
        "task": info.task,
        **summarise(predictions, info.task),
        "clips": len(manifest),
        "listed": listed,
        "coverage": len(manifest) / listed,
        "list_hash": list_hash(manifest.keys),
    }
    positives = predictions.targets.sum(axis=0).astype(int).tolist()
    if info.task == "tagging":
        tagging = tagging_metrics(predictions.scores, predictions.targets)
        # What scores that do not depend on the clips would reach: each class's share of positives.
        result["chance_mAP"] = float(np.mean([p / len(manifest) for p in positives if p]))
        result["left_out"] = [info.label_names[c] for c in tagging.left_out]
        columns = {"ap": tagging.ap, "auc": tagging.auc}
    else:
        classification = classification_metrics(predictions.scores, predictions.targets)
        result["chance_accuracy"] = max(positives) / len(manifest)
        result["confusion"] = classification.confusion.tolist()
        columns = {"accuracy": classification.class_accuracy}
    result["per_class"] = [
        {"id": id_, "name": name, "positives": positives[c], **{k: float(v[c]) for k, v in columns.items()}}
        for c, (id_, name) in enumerate(zip(info.label_ids, info.label_names, strict=True))
    ]
    return result


class _ClassMetrics(strict_json.Record):
    id: str
    name: str
    positives: strict_json.Count
    ap: strict_json.Number | None = None
    auc: strict_json.Number | None = None
    accuracy: strict_json.Number | None = None


class _NotInSet(strict_json.Record):
    file: str
    count: strict_json.Count
    examples: list[str]


class _Selection(strict_json.Record):
    """The result of `erann_dist.data.sources.selection`."""

    shards: str
    split: str | None = None
    fold: list[strict_json.Count] | None = None
    keys: str | None = None
    without: str | None = None
    not_in_set: list[_NotInSet] = Field(default_factory=list)


class _Summary(strict_json.Record):
    """The result of `summarise`."""

    mAP: strict_json.Number | None = None
    mAUC: strict_json.Number | None = None
    d_prime: strict_json.Number | None = None
    accuracy: strict_json.Number | None = None


class _OtherLabels(strict_json.Record):
    key: str
    ours: list[str]
    theirs: list[str]


class _Common(strict_json.Record):
    """The result of `erann_dist.train.common_clips.common_detail`."""

    file: str
    clips: strict_json.Count
    only_ours: strict_json.Count
    only_theirs: strict_json.Count
    list_hash: str
    ours: _Summary
    theirs: _Summary
    labels_differ: strict_json.Count
    labels_example: _OtherLabels | None = None


class _Detail(_Summary):
    """The result of `detail`."""

    task: Task
    clips: strict_json.Count
    listed: strict_json.Count
    coverage: strict_json.Number
    list_hash: str
    selection: _Selection | None = None  # these two: of erann evaluate
    common: _Common | None = None
    chance_mAP: strict_json.Number | None = None
    chance_accuracy: strict_json.Number | None = None
    left_out: list[str] = Field(default_factory=list)
    confusion: list[list[strict_json.Count]] | None = None
    per_class: list[_ClassMetrics] = Field(min_length=1)

    @model_validator(mode="after")
    def _complete(self) -> "_Detail":
        metric, of_class = ("mAP", "ap") if self.task == "tagging" else ("accuracy", "accuracy")
        if metric not in self.model_fields_set or any(of_class not in each.model_fields_set for each in self.per_class):
            raise ValueError(f"missing {metric} or a class's {of_class}")
        lengths = {len(self.confusion or []), *map(len, self.confusion or [])}
        if self.task == "classification" and lengths != {len(self.per_class)}:
            raise ValueError(f"the confusion matrix is not one of {len(self.per_class)} classes")
        return self


def read_detail(data: bytes) -> dict[str, Any]:
    """The result of `detail`, read from a metrics.json. Raises ValueError, in one line, for anything else."""
    return strict_json.validate(_Detail, data).model_dump(exclude_unset=True)


def write_predictions(file: BinaryIO, predictions: Predictions, manifest: Manifest) -> None:
    """One row per clip: key, scores (list of float, label order), targets (list of label indices)."""
    targets = [np.flatnonzero(row).astype(np.int16) for row in predictions.targets]
    columns = {"targets": pa.array(targets, pa.list_(pa.int16()))}
    write_scores(file, manifest.keys, predictions.scores, manifest.info.label_ids, columns)


def read_predictions(file: BinaryIO, where: str = "predictions.parquet") -> tuple[list[str], list[str], Predictions]:
    """Read what write_predictions wrote: keys, label ids, predictions. Raises UserError, which begins with `where`."""
    advice = "evaluate the model again to write it again"
    table = strict_parquet.read(file, where, PREDICTIONS_SCHEMA, PREDICTIONS_SCHEMA.names, advice)
    try:
        labels = (table.schema.metadata or {})[b"labels"].decode().split("\n")
    except (KeyError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: damaged, its metadata has no labels; {advice}") from error
    scores, targets = (table[name].combine_chunks() for name in ("scores", "targets"))
    indices, counts = targets.flatten().to_numpy(), targets.value_lengths().to_numpy()
    if (scores.value_lengths().to_numpy() != len(labels)).any() or (indices >= len(labels)).any():
        raise UserError(f"{where}: damaged, its scores or targets are not those of its {len(labels)} labels; {advice}")
    found = scores.flatten().to_numpy().reshape(len(table), len(labels))
    require_finite(found, table["key"], where)
    one_hot = np.zeros(found.shape, np.float32)
    one_hot[np.repeat(np.arange(len(table)), counts), indices] = 1
    return table["key"].to_pylist(), labels, Predictions(found, one_hot)


def write_scores(
    file: BinaryIO,
    keys: pa.ChunkedArray,
    scores: npt.NDArray[np.float32],
    label_ids: list[str],
    columns: dict[str, pa.Array] | None = None,
) -> None:
    """One row per clip: key, scores (list of float, in the order of the labels in the metadata), and other columns."""
    table = pa.table({"key": keys, "scores": pa.array(list(scores), pa.list_(pa.float32())), **(columns or {})})
    pq.write_table(table.replace_schema_metadata({"labels": "\n".join(label_ids)}), file)
