"""A shard set's manifest: one row per packed clip, in Parquet, and the facts about the set in its metadata.

A shard set is a folder, on a disk or in S3, with `manifest.parquet`, `shards.parquet` (one row per tar),
`report.parquet` (one row per source row that was not packed) and the tars.
docs/reference/shard-sets.md describes the columns.
"""

import dataclasses
import hashlib
import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import ConfigDict, Field

from erann_dist.errors import UsageError, UserError
from erann_dist.formats import strict_json, strict_parquet
from erann_dist.formats.strict_parquet import arrow_file
from erann_dist.storage.folder import Folder, LocalFolder, open_folder

SCHEMA_VERSION = 2
MANIFEST, SHARDS, REPORT = "manifest.parquet", "shards.parquet", "report.parquet"
FILE_COUNTS = "files"  # the report's metadata key for how the files found and the clips listed fit together, as JSON

CLIP_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("labels", pa.list_(pa.int16())),
        ("split", pa.string()),
        ("fold", pa.int8()),
        ("shard", pa.int32()),
        ("offset", pa.int64()),  # of the FLAC (or WAV) inside its tar, bytes
        ("size", pa.int32()),  # of the FLAC, bytes
        ("samples", pa.int64()),
        ("peak", pa.float32()),  # before clipping to 16 bits; above 1 the source was overloaded; null if indexed
        ("crc32", pa.uint32()),  # of the FLAC
        ("source", pa.string()),
        ("format", pa.string()),  # of the source: codec, rate, channels; null if indexed
        ("lost", pa.float32()),  # seconds of the source that are missing or could not be decoded; null if intact
        ("channel_peak", pa.float32()),  # of the source, if its channels cancel each other in their mean; else null
    ]
)
# Older sets lack these; without values they don't count in a set's hash.
_ADDED = frozenset({"lost", "channel_peak"})
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
        ("labels", pa.list_(pa.int16())),
        ("split", pa.string()),
        ("fold", pa.int8()),
    ]
)

# Each table's columns, and those that have no nulls.
_TABLES = {
    MANIFEST: (CLIP_SCHEMA, {"key", "labels", "shard", "offset", "size", "samples", "crc32"}),
    SHARDS: (SHARD_SCHEMA, {"shard", "name", "size", "clips"}),
    REPORT: (REPORT_SCHEMA, {"key", "reason", "labels"}),
}
_ADVICE = "restore it, or pack the set again"

Task = Literal["tagging", "classification"]
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class _Version(strict_json.Record):
    schema_version: strict_json.Scalar


MAX_LABELS = 2**15  # label indices are 16-bit
Labels = Annotated[list[str], Field(min_length=1, max_length=MAX_LABELS)]
SampleRate = Annotated[int, Field(ge=1, le=10**6)]  # Hz


@dataclass(frozen=True)
class SetInfo:
    """The facts about a shard set that apply to all of its clips."""

    __pydantic_config__: ClassVar[ConfigDict] = {**strict_json.STRICT, "extra": "forbid"}

    name: strict_json.Word  # of the source, such as audioset or esc50
    task: Task
    label_ids: Labels
    label_names: Labels
    sample_rate: SampleRate
    codec: strict_json.Word
    resampler: dict[str, strict_json.Word]
    versions: dict[str, strict_json.Word]  # of the libraries that decoded, resampled and encoded
    packing: dict[str, strict_json.Scalar]  # the options: see shards.clip.Packing; empty for an indexed set
    source_hash: str  # of the source rows and the packing options
    content_hash: str  # of the manifest's rows, not of its Parquet bytes
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class Tar:
    """One shard of a set, as the set's tables list it."""

    folder: Folder
    name: str
    size: int  # bytes
    set_hash: str  # content_hash of its set

    def __str__(self) -> str:
        return f"{self.folder}/{self.name}"


@dataclass(frozen=True)
class Manifest:
    """The clips of one or more shard sets, in columns; entry i of each belongs to clip i."""

    info: SetInfo
    tars: list[Tar]
    keys: pa.ChunkedArray
    label_values: npt.NDArray[np.int16]  # clip i's labels: label_values[label_offsets[i]:label_offsets[i + 1]]
    label_offsets: npt.NDArray[np.int32]
    splits: pa.ChunkedArray
    folds: npt.NDArray[np.int8]  # -1 for none
    shards: npt.NDArray[np.int32]  # index into tars
    rows: npt.NDArray[np.int32]  # row in its own set's manifest
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
            label_offsets=np.concatenate([[0], np.cumsum(counts[rows])]).astype(np.int32),
            splits=self.splits.take(pa.array(rows)),
            folds=self.folds[rows],
            shards=self.shards[rows],
            rows=self.rows[rows],
            offsets=self.offsets[rows],
            sizes=self.sizes[rows],
            samples=self.samples[rows],
            crc32s=self.crc32s[rows],
        )


def read_manifest(folder: Folder, columns: list[str] | None = None) -> tuple[SetInfo, pa.Table]:
    """The facts about the shard set in a folder, and columns of its manifest. Raises what read_table raises."""
    table = _read(folder, MANIFEST, columns)
    info = _info(folder, table.schema)
    if "labels" in table.column_names:
        most = pc.max(pc.list_flatten(table["labels"])).as_py()
        if most is not None and most >= len(info.label_ids):
            raise UserError(
                f"{folder}/{MANIFEST}: has labels outside its {len(info.label_ids)} classes; pack the set again"
            )
    return info, table.replace_schema_metadata()


def read_info(folder: Folder) -> SetInfo:
    """The facts about the shard set in a folder. Raises what read_table raises."""
    with _opened(folder, MANIFEST) as file:
        return _info(folder, pq.read_schema(arrow_file(file)))


def read_table(folder: Folder, name: str, columns: list[str] | None = None) -> pa.Table:
    """Columns of one of the set's tables, as declared above, with checked values.

    Raises UsageError when there is no such folder, UserError when the table is missing or can't be read.
    """
    if name != SHARDS:
        return _read(folder, name, columns)
    table = _read(folder, name, None)
    _require_names(folder, table["name"].to_pylist())
    for column in ("shard", "name"):
        if len(pc.unique(table[column])) != len(table):
            raise UserError(f"{folder}/{SHARDS}: has a {column} twice; {_ADVICE}")
    return table if columns is None else table.select(columns)


def _read(folder: Folder, name: str, columns: list[str] | None) -> pa.Table:
    schema, required = _TABLES[name]
    with _opened(folder, name) as file:
        table = strict_parquet.read(file, f"{folder}/{name}", schema, required, _ADVICE, columns, optional=_ADDED)
    if not len(table) and name != REPORT:
        raise UserError(f"{folder}/{name}: has no rows; {_ADVICE}")
    return table


def _require_names(folder: Folder, names: list[str | None]) -> None:
    """Raise UserError unless all are printable names of files in or below the folder."""
    for name in names:
        if name is None or {"", ".", ".."} & set(name.split("/")) or CONTROL.search(name):
            raise UserError(
                f"{folder}/{SHARDS}: {name!r} is not the name of a tar in the set's folder; do not trust the set"
            )


def require_printable(where: str, labels: list[str]) -> None:
    """Raise UserError, naming the first such label, when a label contains control characters: terminals obey them."""
    for label in labels:
        if CONTROL.search(label):
            raise UserError(f"{where}: the label {label!r} contains control characters, which are not allowed")


@contextmanager
def _opened(folder: Folder, name: str) -> Iterator[BinaryIO]:
    if isinstance(folder, LocalFolder) and not Path(folder.url).is_dir():
        raise UsageError(f"{folder}: no such folder; make a shard set with erann pack")
    try:
        with folder.reading(name) as file:
            yield file
    except FileNotFoundError as error:
        raise UserError(f"{folder}: no shard set here ({name} is missing); make one with erann pack") from error
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{folder}/{name}: damaged ({str(error).splitlines()[0]})") from error


def load_manifest(url: str | Path, endpoint: str | None = None) -> Manifest:
    """The manifest of the shard set in a folder. Raises what read_table raises."""
    folder = open_folder(str(url), endpoint)
    info, table = read_manifest(folder)
    tars = read_table(folder, SHARDS).to_pylist()
    if [tar["shard"] for tar in tars] != list(range(len(tars))):
        raise UserError(f"{folder}/{SHARDS}: its shards are not numbered from 0; {_ADVICE}")
    _require_clips_inside_tars(folder, table, tars)
    labels = table["labels"].combine_chunks()
    return Manifest(
        info=info,
        tars=[Tar(folder, tar["name"], tar["size"], info.content_hash) for tar in tars],
        keys=table["key"],
        label_values=labels.flatten().to_numpy(),
        label_offsets=np.concatenate([[0], np.cumsum(labels.value_lengths().to_numpy())]).astype(np.int32),
        splits=table["split"],
        folds=table["fold"].fill_null(-1).to_numpy(),
        shards=table["shard"].to_numpy(),
        rows=np.arange(len(table), dtype=np.int32),
        offsets=table["offset"].to_numpy(),
        sizes=table["size"].to_numpy(),
        samples=table["samples"].to_numpy(),
        crc32s=table["crc32"].to_numpy(),
    )


def _require_clips_inside_tars(folder: Folder, clips: pa.Table, tars: list[dict[str, Any]]) -> None:
    """Raise UserError unless each clip is inside a tar, since readers allocate as much memory as its size states."""
    shards, offsets, sizes = (clips[name].to_numpy() for name in ("shard", "offset", "size"))
    there = (shards >= 0) & (shards < len(tars))
    ends = np.array([*(tar["size"] for tar in tars), 0])[np.where(there, shards, -1)]
    inside = there & (offsets >= 0) & (sizes >= 0) & (sizes <= ends) & (offsets <= ends - sizes)
    if not inside.all():
        key = clips["key"][int(np.argmin(inside))].as_py()
        raise UserError(
            f"{folder}/{MANIFEST}: clip {key!r} is in no tar of {SHARDS}; check it with erann verify {folder}"
        )


def _info(folder: Folder, schema: pa.Schema) -> SetInfo:
    where = f"{folder}/{MANIFEST}"
    try:
        text = (schema.metadata or {})[b"erann"]
        version = strict_json.validate(_Version, text).schema_version
        if version != SCHEMA_VERSION:
            raise UserError(
                f"{where}: schema version {str(version)[:20]}, this program reads {SCHEMA_VERSION}; pack the set again"
            )
        info = strict_json.validate(SetInfo, text)
    except KeyError as error:
        raise UserError(f"{where}: not a shard set's manifest (no metadata); {_ADVICE}") from error
    except ValueError as error:
        raise UserError(f"{where}: not a shard set's manifest ({error}); {_ADVICE}") from error
    require_printable(where, [*info.label_ids, *info.label_names])
    if len(info.label_names) != len(info.label_ids):
        raise UserError(f"{where}: has {len(info.label_ids)} label_ids, but {len(info.label_names)} label_names")
    return info


def concatenate(manifests: list[Manifest]) -> Manifest:
    """Several sets as one, in the order given. Raises UserError when their labels, task or rate differ."""
    first = manifests[0]
    for other in manifests[1:]:
        require_same_labels(first.info, other.info, str(first.tars[0].folder), str(other.tars[0].folder))
    shard_starts = np.cumsum([0] + [len(m.tars) for m in manifests])
    label_starts = np.cumsum([0] + [len(m.label_values) for m in manifests])
    content = hashlib.sha256("".join(m.info.content_hash for m in manifests).encode()).hexdigest()
    return Manifest(
        info=first.info if len(manifests) == 1 else dataclasses.replace(first.info, content_hash=content),
        tars=[tar for m in manifests for tar in m.tars],
        keys=pa.chunked_array([c for m in manifests for c in m.keys.chunks], pa.string()),
        label_values=np.concatenate([m.label_values for m in manifests]),
        label_offsets=np.concatenate(
            [[0], *(m.label_offsets[1:] + start for m, start in zip(manifests, label_starts, strict=False))]
        ).astype(np.int32),
        splits=pa.chunked_array([c for m in manifests for c in m.splits.chunks], pa.string()),
        folds=np.concatenate([m.folds for m in manifests]),
        shards=np.concatenate([m.shards + np.int32(start) for m, start in zip(manifests, shard_starts, strict=False)]),
        rows=np.concatenate([m.rows for m in manifests]),
        offsets=np.concatenate([m.offsets for m in manifests]),
        sizes=np.concatenate([m.sizes for m in manifests]),
        samples=np.concatenate([m.samples for m in manifests]),
        crc32s=np.concatenate([m.crc32s for m in manifests]),
    )


def require_same_labels(a: SetInfo, b: SetInfo, a_name: str, b_name: str) -> None:
    """Raise UserError, naming the first difference, unless both have the same labels, task and sample rate."""
    if a.sample_rate != b.sample_rate:
        raise UserError(f"{b_name} is at {b.sample_rate} Hz, {a_name} at {a.sample_rate} Hz; pack both at one rate")
    if a.task != b.task:
        raise UserError(f"{b_name} is for {b.task}, {a_name} for {a.task}")
    if a.label_ids != b.label_ids:
        where = "" if len(a.label_ids) != len(b.label_ids) else f", first at index {_first_difference(a, b)}"
        raise UserError(
            f"{b_name} has different labels ({len(b.label_ids)}) than {a_name} ({len(a.label_ids)}){where}; "
            "use sets made from one class list"
        )


def _first_difference(a: SetInfo, b: SetInfo) -> str:
    index = next(i for i, (x, y) in enumerate(zip(a.label_ids, b.label_ids, strict=True)) if x != y)
    return f"{index} ({a.label_ids[index]} and {b.label_ids[index]})"


def content_hash(table: pa.Table) -> str:
    """SHA-256 of the rows: the same for the same rows, however Arrow and Parquet represent them."""
    table = table.drop_columns(
        [name for name in _ADDED & {*table.column_names} if table[name].null_count == len(table)]
    )
    digest = hashlib.sha256()
    for start in range(0, len(table), 65_536):
        for name, column in zip(table.column_names, table.slice(start, 65_536).columns, strict=True):
            digest.update(name.encode())
            for data in _canonical(pa.concat_arrays(column.chunks) if column.num_chunks else column.combine_chunks()):
                digest.update(data.tobytes())
    return digest.hexdigest()


def list_hash(keys: pa.ChunkedArray) -> str:
    """SHA-256 of the keys in ascending order, joined by line feeds: the same for the same clips, however packed."""
    digest = hashlib.sha256()
    ordered = keys.take(pc.array_sort_indices(keys)).combine_chunks()
    for start in range(0, len(ordered), 65_536):
        digest.update(("\n" * (start > 0) + "\n".join(ordered.slice(start, 65_536).to_pylist())).encode())
    return digest.hexdigest()


def _canonical(column: pa.Array) -> Iterator[npt.NDArray[Any]]:
    """A column's content as arrays that do not depend on how Arrow stores it: validity, lengths, values."""
    yield column.is_valid().to_numpy(zero_copy_only=False)
    if pa.types.is_list(column.type):
        yield column.value_lengths().fill_null(0).to_numpy().astype("<i4")
        yield from _canonical(column.flatten())
    elif pa.types.is_string(column.type) or pa.types.is_binary(column.type):
        values = column.cast(pa.binary()).drop_null()
        yield pc.binary_length(values).to_numpy().astype("<i4")
        yield np.frombuffer(b"".join(values.to_pylist()), np.uint8)
    else:
        values = column.drop_null().to_numpy(zero_copy_only=False)
        yield values.astype(values.dtype.newbyteorder("<"))


def write_shard_set_tables(folder: Folder, info: SetInfo, clips: pa.Table, shards: pa.Table, report: pa.Table) -> None:
    """Write the three tables, the manifest last: a folder with a manifest is a finished set."""
    tables = {REPORT: report, SHARDS: shards, MANIFEST: clips}
    tables[MANIFEST] = clips.replace_schema_metadata({"erann": json.dumps(dataclasses.asdict(info))})
    for name, table in tables.items():
        buffer = io.BytesIO()
        pq.write_table(table, buffer, write_page_checksum=True)
        folder.write(name, buffer.getvalue())
