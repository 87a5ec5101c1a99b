"""Samples in WebDataset tars that others made, of any codec and rate, with labels in annotations next to the sound.

The layout of LAION's audio sets and open_clip is `1.flac` with `1.json`, whose keys are `text` (captions), `tag` (a
list of labels) and `original_data`: github.com/LAION-AI/audio-dataset, data_preprocess/README.md.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from erann_dist.data.manifest import Task
from erann_dist.errors import UserError
from shards.sources.class_lists import read_class_list
from shards.sources.rows import Source, SourceRow, printable, rows_table, safe_key
from shards.sources.samples import Fields, LabelSpace, Sample, label_space, read_samples, unique_names
from shards.sources.tars import FoundTar, find_tars, open_tar

_TARS_AT_ONCE = 8  # most of the time is spent waiting for the disk or for S3


def read_webdataset(
    pattern: str,
    fields: Fields,
    classes: Path | None = None,
    endpoint: str | None = None,
    on_progress: Callable[[str], None] = lambda text: None,
) -> Source:
    """The samples of the tars that a pattern names, as find_tars does. Only headers and annotations are read.

    Samples without a label or without sound, and duplicates, are rows with a reason. If every usable clip has one
    label, the task is classification, otherwise tagging. Raises UsageError; UserError when no clip has a label, and
    when the labels are captions.
    """
    tars = find_tars(pattern, endpoint)
    locations: list[bytes] = []
    samples: list[Sample] = []
    notes = []
    for tar, (found, location, damage) in zip(tars, _read_all(tars, fields), strict=True):
        locations.append(location)
        samples += found
        if damage:
            notes.append(f"{tar}: damaged after its {len(found):,} readable samples ({damage}); fetch it again")
        on_progress(f"reading tar {len(locations):,} of {len(tars):,}, {len(samples):,} samples")
    if not any(sample.sound for sample in samples):
        raise UserError(f"{pattern}: no sound file in {len(tars):,} tars" + "".join(f"; {note}" for note in notes[:1]))
    for name in ("split", "fold"):
        place = getattr(fields, name)
        if place != getattr(Fields(), name) and all(getattr(sample, name) is None for sample in samples):
            raise UserError(f"{pattern}: no clip has a {name} at --{name} {place}")
    space = label_space(pattern, samples, read_class_list(classes) if classes else None)
    names = unique_names(samples, [tar.stem for tar in tars])
    rows = _without_duplicates(rows_table(_rows(samples, names, tars, locations, space)))
    usable = rows.filter(pc.is_null(rows["reason"]))
    single = pc.all(pc.equal(pc.list_value_length(usable["labels"]), 1), min_count=0).as_py()
    task: Task = "classification" if single else "tagging"
    return Source("webdataset", task, space.ids, space.names, rows, [*notes, *_notes(pattern, tars, samples, names)])


def _read_all(tars: list[FoundTar], fields: Fields) -> Iterator[tuple[list[Sample], bytes, str]]:
    """Each tar's samples, the location of its members, and its damage."""

    def read(number: int) -> tuple[list[Sample], bytes, str]:
        file, location = open_tar(tars[number])
        with file:
            samples, damage = read_samples(file, number, fields)
        return samples, location, damage

    pool = ThreadPoolExecutor(_TARS_AT_ONCE)
    try:
        yield from pool.map(read, range(len(tars)))
    finally:
        pool.shutdown(cancel_futures=True)  # after an error the other tars are not read


def _rows(
    samples: list[Sample], names: list[str], tars: list[FoundTar], locations: list[bytes], space: LabelSpace
) -> Iterator[SourceRow]:
    for sample, name in zip(samples, names, strict=True):
        tar = printable(os.fsencode(tars[sample.tar].name))
        reason, detail = _rejection(sample, space)
        sound = sample.sound
        yield SourceRow(
            key=safe_key(name),
            labels=sorted({space.place[label] for label in sample.labels if label in space.place}),
            path=locations[sample.tar] if sound else None,
            source=f"{tar}/{sample.shown_name}",
            offset=sound.offset if sound else None,
            size=sound.size if sound else None,
            split=sample.split,
            fold=sample.fold,
            reason=reason,
            detail=detail,
        )


def _rejection(sample: Sample, space: LabelSpace) -> tuple[str, str] | tuple[None, None]:
    """Why a sample can't be packed, as far as that is known before decoding: reason and detail."""
    if not sample.sound:
        return "missing", "no sound next to its annotations"
    if not sample.sound.plain:
        return "unreadable", "a link or a sparse file, not a plain one"
    if not sample.labels:
        return "wrong label", sample.problem
    if (unknown := space.unknown(sample.labels)) is not None:
        return "wrong label", f"{unknown} is not in the class list"
    return None, None


def _without_duplicates(rows: pa.Table) -> pa.Table:
    """The rows; those with the key of a usable row, other than the first such row, are reported as duplicates."""
    usable = rows["key"].filter(pc.is_null(rows["reason"])).combine_chunks()
    position = pa.array(range(len(rows)), pa.int64()).filter(pc.is_null(rows["reason"]).combine_chunks())
    first = position.take(pc.index_in(rows["key"].combine_chunks(), value_set=usable))
    again = pc.and_(pc.is_valid(first), pc.not_equal(first, pa.array(range(len(rows)), pa.int64()))).fill_null(False)
    if not pc.any(again).as_py():
        return rows
    before = pc.binary_join_element_wise(rows["source"].take(first), "has the same key", " ")
    for name, values in (("reason", "duplicate"), ("detail", before)):
        column = pc.if_else(again, values, rows[name])
        rows = rows.set_column(rows.schema.get_field_index(name), rows.schema.field(name), column)
    return rows


def _notes(pattern: str, tars: list[FoundTar], samples: list[Sample], names: list[str]) -> list[str]:
    silent = sum(sample.sound is None for sample in samples)
    notes = [
        f"{pattern}: {len(samples):,} samples in {len(tars):,} tars" + f", {silent:,} without sound" * bool(silent)
    ]
    renamed = [i for i, (sample, name) in enumerate(zip(samples, names, strict=True)) if sample.name != name]
    if renamed:
        example = safe_key(names[renamed[0]])
        notes.append(f"{pattern}: {len(renamed):,} samples share their name with others; their keys are like {example}")
    return notes
