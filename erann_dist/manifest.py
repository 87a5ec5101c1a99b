"""A shard set's manifest: one row per packed clip, in Parquet, and the facts about the set in its metadata.

A shard set is a folder with `manifest.parquet`, `shards.parquet` (one row per tar), `report.parquet` (one row per
source row that did not get in) and the tars. docs/shards.md describes the columns.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from erann_dist.errors import UsageError, UserError

SCHEMA_VERSION = 1
MANIFEST, SHARDS, REPORT = "manifest.parquet", "shards.parquet", "report.parquet"

CLIP_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("labels", pa.list_(pa.int16())),
        ("split", pa.string()),
        ("fold", pa.int8()),
        ("shard", pa.int32()),
        ("offset", pa.int64()),  # of the FLAC inside its tar, bytes
        ("size", pa.int32()),  # of the FLAC, bytes
        ("samples", pa.int64()),
        ("peak", pa.float32()),  # before clipping to 16 bits: above 1 the source was overloaded
        ("crc32", pa.uint32()),  # of the FLAC
        ("source", pa.string()),
    ]
)
SHARD_SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),
        ("name", pa.string()),
        ("size", pa.int64()),
        ("clips", pa.int32()),
        ("sha256", pa.string()),
    ]
)
REPORT_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("source", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("split", pa.string()),
        ("fold", pa.int8()),
    ]
)

Task = Literal["tagging", "classification"]


@dataclass(frozen=True)
class SetInfo:
    """The facts about a shard set that hold for all of its clips."""

    name: str  # of the source, such as audioset or esc50
    task: Task
    label_ids: list[str]
    label_names: list[str]
    sample_rate: int
    codec: str
    resampler: dict[str, str]
    versions: dict[str, str]  # of what decoded, resampled and encoded
    source_hash: str  # of the source rows and the packing options
    content_hash: str  # of the manifest's rows, not of its Parquet bytes
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class Manifest:
    """The clips of one or several shard sets, in columns; entry i of each is clip i's."""

    info: SetInfo
    shard_paths: list[Path]
    keys: pa.ChunkedArray
    label_values: npt.NDArray[np.int16]  # clip i's labels: label_values[label_offsets[i]:label_offsets[i + 1]]
    label_offsets: npt.NDArray[np.int64]
    splits: pa.ChunkedArray
    folds: npt.NDArray[np.int8]  # -1 for none
    shards: npt.NDArray[np.int32]  # index into shard_paths
    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int32]
    samples: npt.NDArray[np.int64]
    crc32s: npt.NDArray[np.uint32]

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def num_classes(self) -> int:
        return len(self.info.label_ids)

    def targets(self, rows: npt.NDArray[np.integer]) -> npt.NDArray[np.float32]:
        """Multi-hot labels of the rows: (n, N) float32."""
        result = np.zeros((len(rows), self.num_classes), dtype=np.float32)
        for i, row in enumerate(rows):
            result[i, self.label_values[self.label_offsets[row] : self.label_offsets[row + 1]]] = 1
        return result

    def select(self, keep: npt.NDArray[np.bool_]) -> "Manifest":
        """The clips for which keep (n,) is True, in the same order."""
        rows = np.flatnonzero(keep)
        counts = np.diff(self.label_offsets)
        return dataclasses.replace(
            self,
            keys=self.keys.take(pa.array(rows)),
            label_values=self.label_values[np.repeat(keep, counts)],
            label_offsets=np.concatenate([[0], np.cumsum(counts[rows])]).astype(np.int64),
            splits=self.splits.take(pa.array(rows)),
            folds=self.folds[rows],
            shards=self.shards[rows],
            offsets=self.offsets[rows],
            sizes=self.sizes[rows],
            samples=self.samples[rows],
            crc32s=self.crc32s[rows],
        )


def load_manifest(folder: Path) -> Manifest:
    """The manifest of the shard set in a folder. Raises UserError when there is none or it can't be read."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; make a shard set with erann pack")
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder}: no shard set here ({MANIFEST} is missing); make one with erann pack")
    try:
        table = pq.read_table(path)
        names = pq.read_table(folder / SHARDS, columns=["name"])["name"].to_pylist()
        info = SetInfo(**json.loads(table.schema.metadata[b"erann"]))
        table = table.select(CLIP_SCHEMA.names).cast(CLIP_SCHEMA)
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a shard set's manifest ({str(error).splitlines()[0]})") from error
    if info.schema_version != SCHEMA_VERSION:
        raise UserError(f"{path}: schema version {info.schema_version}, this program reads {SCHEMA_VERSION}")
    labels = table["labels"].combine_chunks()
    return Manifest(
        info=info,
        shard_paths=[folder / name for name in names],
        keys=table["key"],
        label_values=labels.flatten().to_numpy(),
        label_offsets=np.concatenate([[0], np.cumsum(labels.value_lengths().to_numpy())]).astype(np.int64),
        splits=table["split"],
        folds=table["fold"].fill_null(-1).to_numpy(),
        shards=table["shard"].to_numpy(),
        offsets=table["offset"].to_numpy(),
        sizes=table["size"].to_numpy(),
        samples=table["samples"].to_numpy(),
        crc32s=table["crc32"].to_numpy(),
    )


def concatenate(manifests: list[Manifest]) -> Manifest:
    """Several sets as one, in the order given. Raises UserError when their labels, task or rate differ."""
    first = manifests[0]
    for other in manifests[1:]:
        require_same_labels(first.info, other.info, str(first.shard_paths[0].parent), str(other.shard_paths[0].parent))
    shard_starts = np.cumsum([0] + [len(m.shard_paths) for m in manifests])
    label_starts = np.cumsum([0] + [len(m.label_values) for m in manifests])
    content = hashlib.sha256("".join(m.info.content_hash for m in manifests).encode()).hexdigest()
    return Manifest(
        info=first.info if len(manifests) == 1 else dataclasses.replace(first.info, content_hash=content),
        shard_paths=[path for m in manifests for path in m.shard_paths],
        keys=pa.chunked_array([c for m in manifests for c in m.keys.chunks], pa.string()),
        label_values=np.concatenate([m.label_values for m in manifests]),
        label_offsets=np.concatenate(
            [[0], *(m.label_offsets[1:] + start for m, start in zip(manifests, label_starts, strict=False))]
        ),
        splits=pa.chunked_array([c for m in manifests for c in m.splits.chunks], pa.string()),
        folds=np.concatenate([m.folds for m in manifests]),
        shards=np.concatenate([m.shards + np.int32(start) for m, start in zip(manifests, shard_starts, strict=False)]),
        offsets=np.concatenate([m.offsets for m in manifests]),
        sizes=np.concatenate([m.sizes for m in manifests]),
        samples=np.concatenate([m.samples for m in manifests]),
        crc32s=np.concatenate([m.crc32s for m in manifests]),
    )


def require_same_labels(a: SetInfo, b: SetInfo, a_name: str, b_name: str) -> None:
    """Raise UserError, naming the first difference, unless both speak of the same labels, task and sample rate."""
    if a.sample_rate != b.sample_rate:
        raise UserError(f"{b_name} holds {b.sample_rate} Hz, {a_name} {a.sample_rate} Hz; pack both at one rate")
    if a.task != b.task:
        raise UserError(f"{b_name} is for {b.task}, {a_name} for {a.task}")
    if a.label_ids != b.label_ids:
        where = "" if len(a.label_ids) != len(b.label_ids) else f", first at index {_first_difference(a, b)}"
        raise UserError(
            f"{b_name} has other labels ({len(b.label_ids)}) than {a_name} ({len(a.label_ids)}){where}; "
            "use sets made from one class list"
        )


def _first_difference(a: SetInfo, b: SetInfo) -> str:
    index = next(i for i, (x, y) in enumerate(zip(a.label_ids, b.label_ids, strict=True)) if x != y)
    return f"{index} ({a.label_ids[index]} and {b.label_ids[index]})"


def content_hash(clips: pa.Table) -> str:
    """SHA-256 of the rows: the same for the same rows, whatever Parquet makes of them."""
    digest = hashlib.sha256()
    for start in range(0, len(clips), 65_536):
        digest.update(json.dumps(clips.slice(start, 65_536).to_pydict()).encode())
    return digest.hexdigest()


def clip_table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, CLIP_SCHEMA)


def write_shard_set_tables(folder: Path, info: SetInfo, clips: pa.Table, shards: pa.Table, report: pa.Table) -> None:
    """Write the three tables; the manifest last and in one move, since a folder with a manifest is a finished set."""
    pq.write_table(report, folder / REPORT)
    pq.write_table(shards, folder / SHARDS)
    part = folder / f"{MANIFEST}.part"
    metadata = json.dumps(dataclasses.asdict(info))
    pq.write_table(clips.replace_schema_metadata({"erann": metadata}), part)
    part.replace(folder / MANIFEST)
