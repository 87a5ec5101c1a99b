"""A manifest for existing WebDataset tars, written without repacking them."""

import io
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from erann_dist.data.audio import DecodeError, measure
from erann_dist.data.manifest import (
    CLIP_SCHEMA,
    MANIFEST,
    REPORT_SCHEMA,
    SHARD_SCHEMA,
    SetInfo,
    Task,
    content_hash,
    require_printable,
    write_shard_set_tables,
)
from erann_dist.errors import UserError
from erann_dist.storage.folder import Folder
from shards.build import sha256
from shards.sources.class_lists import ClassList
from shards.sources.containers import COMPRESSED_TARS
from shards.sources.rows import safe_key
from shards.sources.samples import Fields, LabelSpace, Member, Sample, label_space, read_samples, unique_names

_CODECS = ("flac", "wav")
_GZIP = b"\x1f\x8b"  # the first bytes of a gzipped file
_USUAL_FIELDS = Fields()


def index(folder: Folder, classes: ClassList | None = None, fields: Fields = _USUAL_FIELDS) -> Iterator[str]:
    """Read every tar below the folder in full, yielding each name, then write the three tables.

    A sample is `KEY.flac` or `KEY.wav` (mono, 16 bits, all of one format and rate) with its labels where `fields` says:
    by default in `KEY.json` ("labels", a list, or "label"; optionally "split" and "fold"), or in `KEY.cls` or `KEY.txt`
    (one label per line). shards/sources/samples.py describes which members belong together, and which keys they get.
    `classes` are label ids and names in order; without them the labels found are used, sorted. Unusable samples go into
    the report. Raises UserError when there is already a manifest, no tar, a compressed tar, no usable sample, or
    captions in place of labels.
    """
    if folder.exists(MANIFEST):
        raise UserError(f"{folder}: has a manifest already; remove {MANIFEST} to index the tars again")
    names = list(folder.sizes())
    tars = [name for name in names if name.endswith(".tar")]
    if packed := [name for name in names if name.endswith(COMPRESSED_TARS)]:
        raise _compressed(f"{folder}/{packed[0]}", len(packed))
    if not tars:
        raise UserError(f"{folder}: no tar in it or below it")
    samples: list[Sample] = []
    sounds: list[dict[str, Any]] = []  # of each sample: see _measured
    shards = []
    for number, name in enumerate(tars):
        yield name
        with folder.reading(name) as file:
            if file.read(2) == _GZIP:
                raise _compressed(f"{folder}/{name}", 1)
            file.seek(0)
            found, damage = read_samples(file, number, fields)
            if damage:
                raise UserError(f"{folder}/{name}: not a whole tar ({damage}); fetch it again or move it away")
            samples += found
            sounds += (_measured(file, sample.sound) if sample.sound else {} for sample in found)
            shards.append({"shard": number, "name": name, "size": file.seek(0, io.SEEK_END), "sha256": sha256(file)})
    _write(folder, classes, samples, sounds, shards)


def _compressed(tar: str, count: int) -> UserError:
    others = f" (and {count - 1:,} more)" * (count > 1)
    return UserError(
        f"{tar}{others}: is compressed, and clips can't be read from the middle of it",
        "unpack it with gunzip or the like, or repack the clips with erann pack webdataset",
    )


def _write(
    folder: Folder,
    classes: ClassList | None,
    samples: list[Sample],
    sounds: list[dict[str, Any]],
    shards: list[dict[str, Any]],
) -> None:
    kinds = Counter((sound["codec"], sound["rate"]) for sound in sounds if "samples" in sound)
    if not kinds:
        raise UserError(
            f"{folder}: no mono 16-bit FLAC or WAV in its tars", "repack the clips with erann pack webdataset"
        )
    kind = codec, rate = kinds.most_common(1)[0][0]
    space = label_space(str(folder), samples, classes)
    require_printable(str(folder), [*space.ids, *space.names])
    clips: list[dict[str, Any]] = []
    report: list[dict[str, Any]] = []
    counts = [0] * len(shards)
    seen: set[str] = set()
    names = unique_names(samples, [shard["name"].removesuffix(".tar") for shard in shards])
    for sample, name, sound in zip(samples, names, sounds, strict=True):
        key = safe_key(name)
        rejected = _rejection(sample, sound, kind, space) or _duplicate(key, seen)
        about: dict[str, Any] = {
            "key": key,
            "labels": sorted({space.place[label] for label in sample.labels if label in space.place}),
            "split": sample.split,
            "fold": sample.fold,
            "source": f"{shards[sample.tar]['name']}/{safe_key(sample.name)}",
        }
        if rejected:
            report.append(about | {"reason": rejected[0], "detail": rejected[1]})
            continue
        seen.add(key)
        counts[sample.tar] += 1
        clips.append(about | sound | {"shard": sample.tar})
    if not clips:
        reasons = sorted({f"{row['reason']} ({row['detail']})" for row in report})
        raise UserError(f"{folder}: none of the {len(report)} samples can be used: {'; '.join(reasons[:3])}")
    task: Task = "classification" if all(len(clip["labels"]) == 1 for clip in clips) else "tagging"
    table = pa.Table.from_pylist(clips, CLIP_SCHEMA)
    info = SetInfo(
        name="indexed",
        task=task,
        label_ids=space.ids,
        label_names=space.names,
        sample_rate=rate,
        codec=codec,
        resampler={},
        versions={},
        packing={},
        source_hash="",
        content_hash=content_hash(table),
    )
    listed = [shard | {"clips": count} for shard, count in zip(shards, counts, strict=True)]
    tables = table, pa.Table.from_pylist(listed, SHARD_SCHEMA), pa.Table.from_pylist(report, REPORT_SCHEMA)
    write_shard_set_tables(folder, info, *tables)


def _rejection(
    sample: Sample, sound: dict[str, Any], kind: tuple[str, int], space: LabelSpace
) -> tuple[str, str] | None:
    """Why a sample can't be used: reason and detail."""
    if not sound:
        return "missing", "no sound next to its annotations"
    if "reason" in sound:
        return sound["reason"], sound["detail"]
    if (sound["codec"], sound["rate"]) != kind:
        return "unreadable", f"{sound['codec']} at {sound['rate']} Hz, where most are {kind[0]} at {kind[1]} Hz"
    if not sample.labels:
        return "wrong label", sample.problem
    if (unknown := space.unknown(sample.labels)) is not None:
        return "wrong label", f"{unknown} is not in the class list"
    return None


def _duplicate(key: str, seen: set[str]) -> tuple[str, str] | None:
    return ("duplicate", "an earlier sample has this key") if key in seen else None


def _measured(file: BinaryIO, sound: Member) -> dict[str, Any]:
    """A sound file's offset, size, samples, rate, codec and crc32; or the reason why it can't be used, and a detail."""
    if sound.suffix not in _CODECS:
        return {"reason": "unreadable", "detail": f"{sound.suffix}: only mono 16-bit FLAC and WAV can be used in place"}
    if not sound.plain:
        return {"reason": "unreadable", "detail": "a link or a sparse file, not a plain one"}
    if sound.size > np.iinfo(np.int32).max:
        return {"reason": "unreadable", "detail": "more than 2 GiB"}
    file.seek(sound.offset)
    data = file.read(sound.size)
    try:
        samples, rate = measure(io.BytesIO(data))
    except DecodeError as error:
        return {"reason": "unreadable", "detail": str(error)}
    if not samples:
        return {"reason": "empty", "detail": "no samples"}
    return {
        "offset": sound.offset,
        "size": sound.size,
        "samples": samples,
        "rate": rate,
        "codec": sound.suffix,
        "crc32": zlib.crc32(data),
    }
