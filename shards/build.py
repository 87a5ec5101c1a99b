"""From rows to a shard set: a plan, shards built one by one by pure tasks, and the tables at the end.

While a set is being packed its folder holds `.pack/`: the plan's hash and the finished shards' rows. So an interrupted
packing goes on where it was, and a folder with a manifest is a finished set.
"""

import hashlib
import importlib.metadata
import json
import shutil
import tarfile
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import webdataset

from erann_dist.audio import RESAMPLER, DecodeError, decode, encode_flac, resample, to_pcm16
from erann_dist.errors import UserError
from erann_dist.features import SAMPLE_RATE
from erann_dist.keyed import SHARD_DEAL, keyed_hash, permute
from erann_dist.manifest import (
    MANIFEST,
    REPORT_SCHEMA,
    SHARD_SCHEMA,
    SetInfo,
    clip_table,
    content_hash,
    load_manifest,
    write_shard_set_tables,
)
from erann_dist.storage import write_text
from shards.sources.rows import Source, SourceRow

CLIPS_PER_SHARD = 2500
_DEAL_SEED = 0
_WHOLE_RECORDING_SECONDS = 1.0  # a file that is longer than its segment by more is the whole recording


@dataclass(frozen=True)
class ShardTask:
    """All that building one shard needs."""

    shard: int
    path: Path  # of the tar
    rows: list[SourceRow]
    label_ids: list[str]


@dataclass(frozen=True)
class ShardResult:
    """What came of it: manifest rows, report rows, and the tar's row in shards.parquet."""

    clips: list[dict[str, Any]]
    report: list[dict[str, Any]]
    shard: dict[str, Any]


class Rejected(Exception):
    """A row that can't be packed. Arguments: the reason in one word, the detail."""


def plan(source: Source, folder: Path, clips_per_shard: int = CLIPS_PER_SHARD) -> list[ShardTask]:
    """Deal the rows to shards by a seeded shuffle, before anything is decoded: any shard is a fair sample."""
    count = len(source.rows)
    order = permute(np.arange(count), count, keyed_hash(_DEAL_SEED, SHARD_DEAL))
    return [
        ShardTask(
            shard=shard,
            path=folder / f"{source.name}-{shard:06d}.tar",
            rows=[source.rows[i] for i in order[start : start + clips_per_shard]],
            label_ids=source.label_ids,
        )
        for shard, start in enumerate(range(0, count, clips_per_shard))
    ]


def build_shard(task: ShardTask) -> ShardResult:
    """Decode, encode and write one shard. It appears under its name when it is whole. Same rows: same bytes."""
    part = task.path.with_suffix(".tar.part")
    clips, report = [], []
    with webdataset.TarWriter(str(part), mtime=0) as tar:
        for row in task.rows:
            try:
                pcm, peak = load_clip(row)
            except Rejected as rejection:
                reason, detail = rejection.args
                place = {"split": row.split, "fold": row.fold}
                report.append({"key": row.key, "source": row.source, "reason": reason, "detail": detail, **place})
                continue
            flac = encode_flac(pcm)
            description = {
                "key": row.key,
                "labels": [task.label_ids[i] for i in row.labels],
                "source": row.source,
                "samples": len(pcm),
                "sample_rate": SAMPLE_RATE,
            }
            tar.write({"__key__": row.key, "flac": flac, "json": json.dumps(description).encode()})
            clips.append(
                {
                    "key": row.key,
                    "labels": list(row.labels),
                    "split": row.split,
                    "fold": row.fold,
                    "shard": task.shard,
                    "size": len(flac),
                    "samples": len(pcm),
                    "peak": peak,
                    "crc32": zlib.crc32(flac),
                    "source": row.source,
                }
            )
    with tarfile.open(part) as tar:
        offsets = {member.name: member.offset_data for member in tar}
    for clip in clips:
        clip["offset"] = offsets[f"{clip['key']}.flac"]
    with part.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    shard = {
        "shard": task.shard,
        "name": task.path.name,
        "size": part.stat().st_size,
        "clips": len(clips),
        "sha256": digest,
    }
    part.replace(task.path)
    return ShardResult(clips, report, shard)


def load_clip(row: SourceRow) -> tuple[npt.NDArray[np.int16], float]:
    """The row's sound as 16-bit mono at 44.1 kHz, and its peak before clipping. Raises Rejected.

    A file that is longer than the row's segment by more than a second is taken for the whole recording, of which the
    segment is cut out; else for the segment itself, of which no more than the segment's length is kept. Nothing is
    padded.
    """
    if row.path is None:
        raise Rejected("missing", "no file of that name")
    try:
        sound = decode(row.path)
    except DecodeError as error:
        raise Rejected("undecodable", str(error)) from error
    samples = resample(sound)
    if row.segment:
        start, end = row.segment
        whole = sound.seconds > end - start + _WHOLE_RECORDING_SECONDS
        first = round(start * SAMPLE_RATE) if whole else 0
        samples = samples[first : first + round((end - start) * SAMPLE_RATE)]
    if not len(samples):
        raise Rejected("empty", f"{sound.seconds:.2f} s of sound, none of it in the segment")
    if not np.isfinite(samples).all():
        raise Rejected("undecodable", "not finite")
    return to_pcm16(samples), float(np.abs(samples).max())


def source_hash(source: Source, clips_per_shard: int) -> str:
    """What decides the set's content, apart from the files' bytes and the versions."""
    digest = hashlib.sha256(json.dumps([source.name, source.label_ids, SAMPLE_RATE, clips_per_shard]).encode())
    for row in source.rows:
        found = row.path is not None
        digest.update(json.dumps([row.key, row.labels, row.source, found, row.split, row.fold, row.segment]).encode())
    return digest.hexdigest()


def start(folder: Path, digest: str) -> bool:
    """Make the folder ready for packing what `digest` stands for; False when that is already there, finished.

    Raises UserError when the folder holds another set, finished or not, or anything else.
    """
    if (folder / MANIFEST).exists():
        if load_manifest(folder).info.source_hash == digest:
            return False
        raise UserError(f"{folder}: holds another shard set; choose another --out or remove it")
    plan_file = folder / ".pack" / "plan"
    if plan_file.exists():
        if plan_file.read_text() != digest:
            raise UserError(f"{folder}: holds another shard set, not finished; choose another --out or remove it")
        return True
    if folder.exists() and (not folder.is_dir() or any(path.name != ".pack" for path in folder.iterdir())):
        raise UserError(f"{folder}: is there and is no shard set; choose another --out")
    plan_file.parent.mkdir(parents=True, exist_ok=True)
    write_text(plan_file, digest)
    return True


def finished_result(task: ShardTask) -> ShardResult | None:
    """The result of a shard that an interrupted packing left finished."""
    file = _result_file(task)
    return ShardResult(**json.loads(file.read_text())) if file.exists() else None


def keep_result(task: ShardTask, result: ShardResult) -> None:
    """Note a finished shard."""
    write_text(_result_file(task), json.dumps(asdict(result)))


def _result_file(task: ShardTask) -> Path:
    return task.path.parent / ".pack" / f"{task.shard:06d}.json"


def finish(folder: Path, source: Source, results: list[ShardResult], digest: str) -> SetInfo:
    """Write the tables: the folder is a shard set. Raises UserError, and clears the folder, when no clip got in."""
    clips = clip_table([row for result in results for row in result.clips])
    report = [row for result in results for row in result.report]
    if not len(clips):
        shutil.rmtree(folder)
        reasons = sorted({f"{row['reason']} ({row['detail']})" for row in report})
        raise UserError(f"none of the {len(report)} rows could be packed: {'; '.join(reasons[:3])}")
    info = SetInfo(
        name=source.name,
        task=source.task,
        label_ids=source.label_ids,
        label_names=source.label_names,
        sample_rate=SAMPLE_RATE,
        codec="flac",
        resampler=RESAMPLER,
        versions={name: importlib.metadata.version(name) for name in ("av", "soxr", "soundfile", "webdataset")},
        source_hash=digest,
        content_hash=content_hash(clips),
    )
    shards = pa.Table.from_pylist([result.shard for result in results], SHARD_SCHEMA)
    write_shard_set_tables(folder, info, clips, shards, pa.Table.from_pylist(report, REPORT_SCHEMA))
    shutil.rmtree(folder / ".pack")
    return info
