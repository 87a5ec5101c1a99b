"""A manifest for existing WebDataset tars, written without repacking them."""

import io
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from erann_dist.data.audio import SUFFIXES, DecodeError, measure
from erann_dist.data.manifest import (
    CLIP_SCHEMA,
    MANIFEST,
    MAX_LABELS,
    REPORT_SCHEMA,
    SHARD_SCHEMA,
    SetInfo,
    Task,
    content_hash,
    require_printable,
    write_shard_set_tables,
)
from erann_dist.errors import UserError
from erann_dist.formats import strict_json
from erann_dist.storage.folder import Folder
from shards.build import sha256
from shards.sources.containers.tar import require_end
from shards.sources.rows import safe_key

_CODECS = ("flac", "wav")
_MAX_TEXT_BYTES = 1_000_000  # of a clip's labels


@dataclass
class _Sample:
    """The members of a tar that share a key, as WebDataset pairs them."""

    key: str
    sound: dict[str, Any] = field(default_factory=dict)  # offset, size, samples, rate, codec, crc32; or reason, detail
    annotations: dict[str, dict[str, Any]] = field(default_factory=dict)  # by json, cls, txt: labels, split, fold

    @property
    def about(self) -> dict[str, Any]:
        """The labels, split and fold; json takes precedence over cls, and cls over txt."""
        found = self.annotations
        return found.get("txt", {}) | found.get("cls", {}) | found.get("json", {})


def index(folder: Folder, classes: tuple[list[str], list[str]] | None = None) -> Iterator[str]:
    """Read every tar below the folder in full, yielding each name, then write the three tables.

    A sample is `KEY.flac` or `KEY.wav` (mono, 16 bits, all of one format and rate) with its labels in `KEY.json`
    ("labels", a list, or "label"; optionally "split" and "fold"), or in `KEY.cls` or `KEY.txt` (one label).
    `classes` are label ids and names in order; without them the labels found are used, sorted. Unusable samples go into
    the report. Raises UserError when there is already a manifest, no tar, or no usable sample.
    """
    if folder.exists(MANIFEST):
        raise UserError(f"{folder}: has a manifest already; remove {MANIFEST} to index the tars again")
    tars = [name for name in folder.sizes() if name.endswith(".tar")]
    if not tars:
        raise UserError(f"{folder}: no tar in it or below it")
    samples: list[tuple[int, _Sample]] = []
    shards = []
    for number, name in enumerate(tars):
        yield name
        with folder.reading(name) as file:
            try:
                found = _samples(file)
            except tarfile.TarError as error:
                raise UserError(
                    f"{folder}/{name}: not a whole tar ({error}); fetch it again or move it away"
                ) from error
            samples += [(number, sample) for sample in found]
            shards.append({"shard": number, "name": name, "size": file.seek(0, io.SEEK_END), "sha256": sha256(file)})
    _write(folder, classes, samples, shards)


def _write(
    folder: Folder,
    classes: tuple[list[str], list[str]] | None,
    samples: list[tuple[int, _Sample]],
    shards: list[dict[str, Any]],
) -> None:
    kinds = Counter((s.sound["codec"], s.sound["rate"]) for _, s in samples if "samples" in s.sound)
    if not kinds:
        raise UserError(f"{folder}: no mono 16-bit FLAC or WAV in its tars; pack the clips with erann pack")
    kind = codec, rate = kinds.most_common(1)[0][0]
    names = {name for _, sample in samples for name in sample.about.get("labels", ())}
    label_ids, label_names = classes or ([*sorted(names, key=_natural)],) * 2
    require_printable(str(folder), [*label_ids, *label_names])
    if len(label_ids) > MAX_LABELS:
        raise UserError(f"{folder}: {len(label_ids):,} labels, and a manifest has at most {MAX_LABELS:,}")
    place = {label: i for i, label in enumerate(label_ids)}
    clips: list[dict[str, Any]] = []
    report: list[dict[str, Any]] = []
    counts = [0] * len(shards)
    seen: set[str] = set()
    for number, sample in samples:
        rejected = _rejection(sample, kind, place, seen)
        about: dict[str, Any] = {
            "key": sample.key,
            "labels": sorted({place[name] for name in sample.about.get("labels", ()) if name in place}),
            "split": sample.about.get("split"),
            "fold": sample.about.get("fold"),
            "source": f"{shards[number]['name']}/{sample.key}",
        }
        if rejected:
            report.append(about | {"reason": rejected[0], "detail": rejected[1]})
            continue
        seen.add(sample.key)
        counts[number] += 1
        clips.append(about | sample.sound | {"shard": number})
    if not clips:
        reasons = sorted({f"{row['reason']} ({row['detail']})" for row in report})
        raise UserError(f"{folder}: none of the {len(report)} samples can be used: {'; '.join(reasons[:3])}")
    task: Task = "classification" if all(len(clip["labels"]) == 1 for clip in clips) else "tagging"
    table = pa.Table.from_pylist(clips, CLIP_SCHEMA)
    info = SetInfo(
        name="indexed",
        task=task,
        label_ids=label_ids,
        label_names=label_names,
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


def _rejection(sample: _Sample, kind: tuple[str, int], place: dict[str, int], seen: set[str]) -> tuple[str, str] | None:
    """Why a sample can't be used: reason and detail."""
    sound, labels = sample.sound, sample.about.get("labels", [])
    if not sound:
        return "missing", "no sound next to its labels"
    if "reason" in sound:
        return sound["reason"], sound["detail"]
    if (sound["codec"], sound["rate"]) != kind:
        return "unreadable", f"{sound['codec']} at {sound['rate']} Hz, where most are {kind[0]} at {kind[1]} Hz"
    if not labels:
        return "wrong label", "no label"
    if unknown := [name for name in labels if name not in place]:
        return "wrong label", f"{unknown[0]} is not in the class list"
    if sample.key in seen:
        return "duplicate", "an earlier sample has this key"
    return None


def _samples(file: BinaryIO) -> list[_Sample]:
    """The samples of a tar, in order. Raises tarfile.TarError."""
    file.seek(0)
    samples: dict[str, _Sample] = {}
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            folder, _, base = member.name.rpartition("/")
            stem, _, kind = base.partition(".")
            if member.isdir() or not stem:
                continue
            # A second sound with the same key is a sample of its own: WebDataset would fail on it, here it is reported.
            name = f"{folder}/{stem}" if folder else stem
            kind = kind.lower()
            sample = samples.setdefault(name, _Sample(safe_key(name)))
            if f".{kind}" in SUFFIXES:
                if sample.sound:
                    sample = samples.setdefault(f"{name}\0{member.offset}", _Sample(sample.key, {}, sample.annotations))
                sample.sound = _sound(tar, member, kind)
            elif kind in ("json", "cls", "txt") and _is_plain(member) and member.size <= _MAX_TEXT_BYTES:
                content = tar.extractfile(member)
                assert content  # None only for members that are not regular files
                sample.annotations[kind] = _about(content.read(), kind)
        require_end(tar)
    return list(samples.values())


def _sound(tar: tarfile.TarFile, member: tarfile.TarInfo, kind: str) -> dict[str, Any]:
    if kind not in _CODECS:
        return {"reason": "unreadable", "detail": f"{kind}: only mono 16-bit FLAC and WAV can be used as they are"}
    if not _is_plain(member):
        return {"reason": "unreadable", "detail": "a link or a sparse file, not a plain one"}
    if member.size > np.iinfo(np.int32).max:
        return {"reason": "unreadable", "detail": "more than 2 GiB"}
    content = tar.extractfile(member)
    assert content  # None only for members that are not regular files
    data = content.read()
    try:
        samples, rate = measure(io.BytesIO(data))
    except DecodeError as error:
        return {"reason": "unreadable", "detail": str(error)}
    if not samples:
        return {"reason": "empty", "detail": "no samples"}
    return {
        "offset": member.offset_data,
        "size": member.size,
        "samples": samples,
        "rate": rate,
        "codec": kind,
        "crc32": zlib.crc32(data),
    }


def _is_plain(member: tarfile.TarInfo) -> bool:
    """Whether it is a regular file and not sparse: of a few bytes in the tar, a sparse file may yield terabytes."""
    return member.isreg() and not member.issparse()


def _about(data: bytes, kind: str) -> dict[str, Any]:
    """Labels, as text, and split and fold if present."""
    text = data.decode(errors="replace").strip()
    if kind != "json":
        return {"labels": [text]} if text else {}
    try:
        content = strict_json.loads(data)
    except ValueError:
        return {}
    if not isinstance(content, dict):
        return {}
    labels = content.get("labels", content.get("label"))
    names = [str(name) for name in (labels if isinstance(labels, list) else [labels]) if name is not None]
    found: dict[str, Any] = {"labels": names} if names else {}
    if isinstance(content.get("split"), str):
        found["split"] = content["split"]
    if content.get("fold") in range(128) and content["fold"] is not True and content["fold"] is not False:
        found["fold"] = int(content["fold"])
    return found


def _natural(label: str) -> tuple[bool, int, str]:
    """A sort key: numbers by value, before words."""
    is_number = label.isdecimal() and len(label) <= 1000
    return (not is_number, int(label) if is_number else 0, label)
