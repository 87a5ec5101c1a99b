"""Statistics of a shard set: coverage, classes, durations, formats, repeats, recordings in more than one fold."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from erann_dist.data.manifest import FILE_COUNTS, REPORT, SHARDS, SetInfo, list_hash, read_manifest, read_table
from erann_dist.formats import strict_json
from erann_dist.models.mel_config import ERANN_MEL
from erann_dist.storage.folder import Folder
from shards.sources.data_sets import find_data_set

EXAMPLES = 16_000_000  # the AudioSet recipe's
EXAMPLES_ORIGIN = "500,000 iterations, our default for a number that the paper leaves out, of its batch of 32"
OVERLOADED = 1.0  # of full scale: a clip with a higher peak was clipped when it was packed
NEAR_SILENCE = 1e-4  # -80 dB of full scale
LEAST_RATE = round(2 * ERANN_MEL.f_max)  # Hz; a source with a lower rate leaves the upper mel bins empty
_RATE = re.compile(r"\b([0-9]{1,9}) Hz")  # in the manifest's column `format`
CONDITION = ["lost", "channel_peak"]
_BINS = 20  # of the histogram, approximately


def statistics(folder: Folder, examples: int = EXAMPLES) -> dict[str, Any]:
    """The statistics of a shard set, ready for JSON.

    examples: how many clips balanced sampling draws, for the repeats. Listed clips are the packed ones and those of the
    report, without duplicates; for an indexed set no list is known, and figures relative to it are None. Raises
    UserError when there is no shard set or it can't be read.
    """
    info, clips = read_manifest(folder, ["key", "labels", "split", "fold", "samples", "peak", "format", *CONDITION])
    tars = read_table(folder, SHARDS, ["size"])
    report = read_table(folder, REPORT)
    files = _file_counts(folder, report)
    report = report.replace_schema_metadata()
    indexed = not info.packing
    absent = report.filter(pc.not_equal(report["reason"], "duplicate"))  # a duplicate is not one more clip
    samples = clips["samples"].to_numpy()
    hash_ = list_hash(clips["key"])
    row, label = _labels(clips)
    counts = np.bincount(label, minlength=len(info.label_ids))
    return {
        "shards": str(folder),
        "name": info.name,
        "task": info.task,
        "sample_rate": info.sample_rate,
        "codec": info.codec,
        "indexed": indexed,
        "tars": len(tars),
        "clips": len(clips),
        "hours": _hours(samples.sum(), info),
        "bytes": pc.sum(tars["size"]).as_py(),
        "versions": info.versions,
        "content_hash": info.content_hash,
        "source_hash": info.source_hash,
        "list_hash": hash_,
        "files": files,
        "coverage": {
            **_share(len(clips), None if indexed else len(clips) + len(absent)),
            "duplicates": len(report) - len(absent),
            "absent_without_class": int(np.sum(_label_counts(absent) == 0)),
            "splits": _groups(clips, absent, "split", indexed, hash_),
            "folds": _groups(clips, absent, "fold", indexed, hash_),
        },
        "per_class": _classes(info, counts, absent, _hours_per_class(info, samples, row, label), examples),
        "without_clips": [name for name, count in zip(info.label_names, counts, strict=True) if not count],
        "durations": _durations(samples, info.sample_rate),
        "formats": None if indexed else _formats(clips["format"]),
        "low_rate": low_rate(info, clips["format"]),
        "peaks": None if indexed else _peaks(clips["peak"].to_numpy()),
        "condition": None if indexed else condition(clips),
        "reasons": _reasons(report, len(clips) + len(report)),
        "balanced": _balanced(counts, row, label, len(clips), examples),
        "recordings": _recordings(info.name, pa.concat_tables([t.select(["key", "fold"]) for t in (clips, report)])),
    }


class _FileCounts(strict_json.Record):
    """shards.sources.rows.FileCounts, as a report's metadata has it."""

    found: strict_json.Count
    matched: strict_json.Count
    unmatched: strict_json.Count
    examples: list[str]
    listed: strict_json.Count | None
    with_file: strict_json.Count | None
    without_file: strict_json.Count | None


def _file_counts(folder: Folder, report: pa.Table) -> dict[str, Any] | None:
    """What packing found; None for sets of older versions, and for indexed ones."""
    text = (report.schema.metadata or {}).get(FILE_COUNTS.encode())
    if text is None:
        return None
    where = f"{folder}/{REPORT}: {FILE_COUNTS}"
    return strict_json.read(_FileCounts, text, where, "restore it, or pack the set again").model_dump()


def condition(clips: pa.Table) -> dict[str, Any]:
    """How many clips (with the columns CONDITION) were damaged in the source, how many seconds they lack, and how many
    have channels that cancel each other in their mean."""
    damaged, lost = clips["lost"].drop_null(), pc.sum(clips["lost"]).as_py()
    return {
        "damaged": len(damaged),
        "seconds_lost": round(lost or 0.0, 3),
        "opposite_phase": len(clips) - clips["channel_peak"].null_count,
    }


def shared_recordings(name: str, keys: Iterable[str], folds: Iterable[int | None]) -> dict[str, list[int]]:
    """The recordings, or actors, whose clips are in two folds or more, with these folds.

    name: of a shard set. keys, folds: of the official list's clips, whether or not they could be packed.
    """
    kind_and_recording = _recordings_of(name)
    found = _folds_of_recordings(kind_and_recording[1], keys, folds) if kind_and_recording else {}
    return {recording: sorted(folds) for recording, folds in sorted(found.items()) if len(folds) > 1}


def _recordings_of(name: str) -> tuple[str, Callable[[str], str]] | None:
    found = find_data_set(name)
    return found[0].recordings if found else None


def _folds_of_recordings(
    recording: Callable[[str], str], keys: Iterable[str], folds: Iterable[int | None]
) -> dict[str, set[int]]:
    found = defaultdict(set)
    for key, fold in zip(keys, folds, strict=True):
        if fold is not None and "-" in key:  # lists may contain the user's own files, with other names
            found[recording(key)].add(fold)
    return found


def _recordings(name: str, rows: pa.Table) -> dict[str, Any] | None:
    known = _recordings_of(name)
    if known is None:
        return None
    kind, recording = known
    keys, folds = rows["key"].to_pylist(), rows["fold"].to_pylist()
    return {
        "kind": kind,
        "count": len(_folds_of_recordings(recording, keys, folds)),
        "shared": shared_recordings(name, keys, folds),
    }


def _labels(clips: pa.Table) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int16]]:
    """A (row, label) pair for each label of each clip."""
    lists = clips["labels"].combine_chunks()
    return np.repeat(np.arange(len(lists)), _label_counts(clips)), lists.flatten().to_numpy()


def _label_counts(rows: pa.Table) -> npt.NDArray[np.int32]:
    return pc.list_value_length(rows["labels"]).to_numpy()


def _hours(samples: float, info: SetInfo) -> float:
    return float(samples) / info.sample_rate / 3600


def _hours_per_class(
    info: SetInfo, samples: npt.NDArray[np.int64], row: npt.NDArray[np.int64], label: npt.NDArray[np.int16]
) -> list[float]:
    sums = np.bincount(label, weights=samples[row], minlength=len(info.label_ids))
    return [_hours(class_sum, info) for class_sum in sums]


def _share(packed: int, listed: int | None) -> dict[str, Any]:
    return {"packed": packed, "listed": listed, "share": packed / listed if listed else None}


def _groups(clips: pa.Table, absent: pa.Table, column: str, indexed: bool, whole_hash: str) -> list[dict[str, Any]]:
    """The coverage of each split or fold, and the list hash of an evaluation on it alone; empty if there are none."""
    packed, missing = _value_counts(clips[column]), _value_counts(absent[column])
    values = sorted(packed.keys() | missing.keys(), key=lambda value: (value is None, value))
    if values == [None]:
        return []
    groups = []
    for value in values:
        count = packed.get(value, 0)
        here = pc.is_null(clips[column]) if value is None else pc.equal(clips[column], value)
        groups.append(
            {
                column: value,
                **_share(count, None if indexed else count + missing.get(value, 0)),
                "list_hash": whole_hash if count == len(clips) else list_hash(clips["key"].filter(here)),
            }
        )
    return groups


def _value_counts(column: pa.ChunkedArray) -> dict[Any, int]:
    return {pair["values"]: pair["counts"] for pair in pc.value_counts(column).to_pylist()}


def _classes(
    info: SetInfo, counts: npt.NDArray[np.int64], absent: pa.Table, hours: list[float], examples: int
) -> list[dict[str, Any]]:
    missing = np.bincount(absent["labels"].combine_chunks().flatten().to_numpy(), minlength=len(counts))
    draws = _draws_per_class(counts, examples)
    return [
        {
            "id": info.label_ids[c],
            "name": info.label_names[c],
            **_share(count, count + int(missing[c]) if info.packing else None),
            "hours": hours[c],
            "repeats": draws / count if count else None,
        }
        for c, count in enumerate(counts.tolist())
    ]


def _draws_per_class(counts: npt.NDArray[np.int64], examples: int) -> float:
    """Every round of balanced sampling visits each class with clips once."""
    classes = np.count_nonzero(counts)
    return examples / classes if classes else 0.0


def _balanced(
    counts: npt.NDArray[np.int64],
    row: npt.NDArray[np.int64],
    label: npt.NDArray[np.int16],
    clips: int,
    examples: int,
) -> dict[str, Any]:
    draws = _draws_per_class(counts, examples)
    # A clip is drawn through each of its labels as often as that class's list is repeated.
    visits = np.bincount(row, weights=draws / counts[label], minlength=clips)
    return {
        "examples": examples,
        "classes": int(np.count_nonzero(counts)),
        "draws_per_class": draws,
        "visits": {"min": float(visits.min()), "median": float(np.median(visits)), "max": float(visits.max())},
    }


def _durations(samples: npt.NDArray[np.int64], rate: int) -> dict[str, Any]:
    """Quartiles in seconds, and a histogram: counts[i] clips from edges[i] to edges[i + 1], and how many are longer."""
    quartiles = np.quantile(samples, [0, 0.25, 0.5, 0.75, 1]) / rate
    common = float(np.quantile(samples, 0.99)) / rate
    width = _round_number(common / _BINS)
    edges = np.round(width * np.arange(math.floor(common / width) + 2), 6)
    bounds = np.round(edges * rate, 3)
    within = samples[samples < bounds[-1]]
    counts, _ = np.histogram(within, bounds)
    return {
        **dict(zip(("min", "q1", "median", "q3", "max"), quartiles.tolist(), strict=True)),
        "histogram": {
            "edges": edges.tolist(),
            "counts": counts.tolist(),
            "longer": len(samples) - len(within),
        },
    }


def _round_number(value: float) -> float:
    """The value rounded up to one of …, 0.1, 0.2, 0.5, 1, 2, 5, …"""
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value)


def _formats(column: pa.ChunkedArray) -> list[dict[str, Any]]:
    found = sorted(_value_counts(column.fill_null("unknown")).items(), key=lambda pair: (-pair[1], pair[0]))
    return [{"format": name, "clips": count, "share": count / len(column)} for name, count in found]


def low_rate(info: SetInfo, formats: pa.ChunkedArray) -> dict[str, Any] | None:
    """How many clips come from sources below LEAST_RATE, and their rates: {clips, share, least_rate, rates}.

    formats: the manifest's column. None for an indexed set, whose sources are not known, and for one that is below that
    rate itself. A source that was upsampled before does not show in its header and is not found.
    """
    if not info.packing or info.sample_rate < LEAST_RATE:
        return None
    rates: Counter[int] = Counter()
    for name, count in _value_counts(formats.drop_null()).items():
        rate = max(map(int, _RATE.findall(name)), default=LEAST_RATE)  # of a file that changes its rate, the highest
        if rate < LEAST_RATE:
            rates[rate] += count
    return {
        "clips": rates.total(),
        "share": rates.total() / len(formats),
        "least_rate": LEAST_RATE,
        "rates": [{"rate": rate, "clips": count} for rate, count in sorted(rates.items())],
    }


def _peaks(peaks: npt.NDArray[np.float32]) -> dict[str, int]:
    return {"overloaded": int(np.sum(peaks > OVERLOADED)), "near_silence": int(np.sum(peaks < NEAR_SILENCE))}


def _reasons(report: pa.Table, rows: int) -> list[dict[str, Any]]:
    """Why rows are not in the set, the commonest reason first, each with its first row."""
    found = sorted(_value_counts(report["reason"]).items(), key=lambda pair: (-pair[1], pair[0]))
    examples = report.select(["key", "source", "detail"])
    return [
        {
            "reason": reason,
            "count": count,
            "share": count / rows,
            "example": examples.slice(pc.index(report["reason"], reason).as_py(), 1).to_pylist()[0],
        }
        for reason, count in found
    ]
