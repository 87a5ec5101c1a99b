"""Statistics of a shard set against values computed by hand, and the official folds against the real lists."""

import csv
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from erann_dist.data.manifest import (
    CLIP_SCHEMA,
    REPORT_SCHEMA,
    SHARD_SCHEMA,
    SetInfo,
    list_hash,
    load_manifest,
    write_shard_set_tables,
)
from erann_dist.data.sampling import BalancedSampler, class_lists
from erann_dist.errors import UserError
from erann_dist.storage.folder import open_folder
from erann_dist.train import evaluation
from jobs.terminal.show import condition_lines
from shards.sources.audioset import read_audioset
from shards.sources.ravdess import read_ravdess
from shards.statistics import shared_recordings, statistics
from tests.conftest import pack_here
from tests.shards.test_audioset import write

CLIPS = [
    {"key": "k1", "labels": [0], "split": "train", "fold": 1, "samples": 100, "peak": 0.5, "format": "mp3 stereo"},
    {"key": "k3", "labels": [0, 1], "split": "eval", "fold": 2, "samples": 300, "peak": 1.0, "format": "mp3 stereo"},
    {"key": "k2", "labels": [0, 1], "split": "train", "fold": 1, "samples": 200, "peak": 1.5, "format": "flac mono"},
    {"key": "k4", "labels": [0, 2], "split": "eval", "fold": None, "samples": 400, "peak": 5e-5, "format": "aac mono"},
]
REPORT = [
    {"key": "m1", "labels": [1], "split": "train", "fold": 1, "reason": "missing", "source": "m", "detail": "no file"},
    {"key": "x", "labels": [], "split": "eval", "fold": 2, "reason": "wrong label", "source": "x", "detail": "odd"},
    {"key": "m2", "labels": [3], "split": "eval", "fold": 2, "reason": "missing", "source": "n", "detail": "no file"},
    {"key": "k1", "labels": [0], "split": "train", "fold": 1, "reason": "duplicate", "source": "k", "detail": "again"},
]
HOURS = 1 / 360_000  # of a sample at 100 Hz


def write_set(root: Path, clips: list[dict[str, Any]], report: list[dict[str, Any]], **facts: Any) -> str:
    """A set of two tars, of which there are only the tables; 100 Hz, classes A, B, C, D, or as the facts say."""
    info = {
        "name": "tones",
        "task": "tagging",
        "label_ids": list("abcd"),
        "label_names": list("ABCD"),
        "sample_rate": 100,
        "codec": "flac",
        "resampler": {},
        "versions": {"av": "17.0"},
        "packing": {"codec": "flac"},
        "source_hash": "5" * 64,
        "content_hash": "c" * 64,
    }
    tars = [{"shard": i, "name": f"{i}.tar", "size": 1000, "clips": 1, "sha256": ""} for i in range(2)]
    write_shard_set_tables(
        open_folder(str(root)),
        SetInfo(**{**info, **facts}),
        pa.Table.from_pylist([{"shard": 0, "offset": 0, "size": 1, "crc32": 0, **clip} for clip in clips], CLIP_SCHEMA),
        pa.Table.from_pylist(tars, SHARD_SCHEMA),
        pa.Table.from_pylist(report, REPORT_SCHEMA),
    )
    return str(root)


def stats_of(root: Path, clips: list[dict[str, Any]], report: list[dict[str, Any]], **facts: Any) -> dict[str, Any]:
    return statistics(open_folder(write_set(root, clips, report, **facts)), examples=1200)


def test_the_files_found_and_the_clips_listed(tmp_path: Path) -> None:
    """They are those of the source, through packing; sets of older versions do not have them."""
    audio = tmp_path / "audio"
    for name in ("abcdefghijk.wav", "other.wav"):
        audio.mkdir(exist_ok=True)
        soundfile.write(audio / name, np.zeros(4410), 44_100)
    lines = (f'{ytid}, 0.000, 10.000, "/m/09x0r"' for ytid in ("abcdefghijk", "gonegonegon"))
    source = read_audioset(write(tmp_path / "eval_segments.csv", *lines), audio)
    folder = open_folder(str(pack_here(source, tmp_path / "shards")))
    assert statistics(folder)["files"] == {
        "found": 2, "matched": 1, "unmatched": 1, "examples": ["other.wav"], "listed": 2, "with_file": 1,
        "without_file": 1,
    }  # fmt: skip
    assert stats_of(tmp_path / "older", CLIPS, REPORT)["files"] is None
    path = tmp_path / "shards" / "report.parquet"
    for text in ('{"found": -1}', "[", '{"found": 1}'):
        pq.write_table(pq.read_table(path).replace_schema_metadata({"files": text}), path)
        with pytest.raises(UserError, match=r"report.parquet: files: damaged"):
            statistics(folder)


def sha256(*keys: str) -> str:
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return stats_of(tmp_path_factory.mktemp("small"), CLIPS, REPORT)


def test_the_set(small: dict[str, Any]) -> None:
    facts = {"name": "tones", "task": "tagging", "sample_rate": 100, "codec": "flac", "tars": 2, "clips": 4}
    assert facts.items() <= small.items()
    assert small["hours"] == pytest.approx(1000 * HOURS)
    assert small["bytes"] == 2000
    assert small["versions"] == {"av": "17.0"}
    assert small["content_hash"] == "c" * 64
    assert small["source_hash"] == "5" * 64


def test_coverage_counts_no_duplicate_as_listed(small: dict[str, Any]) -> None:
    coverage = small["coverage"]
    assert (coverage["packed"], coverage["listed"], coverage["share"]) == (4, 7, 4 / 7)
    assert coverage["duplicates"] == 1
    assert coverage["absent_without_class"] == 1
    assert coverage["splits"] == [
        {"split": "eval", "packed": 2, "listed": 4, "share": 0.5, "list_hash": sha256("k3", "k4")},
        {"split": "train", "packed": 2, "listed": 3, "share": 2 / 3, "list_hash": sha256("k1", "k2")},
    ]
    assert coverage["folds"] == [
        {"fold": 1, "packed": 2, "listed": 3, "share": 2 / 3, "list_hash": sha256("k1", "k2")},
        {"fold": 2, "packed": 1, "listed": 3, "share": 1 / 3, "list_hash": sha256("k3")},
        {"fold": None, "packed": 1, "listed": 1, "share": 1, "list_hash": sha256("k4")},
    ]


def test_a_fold_of_which_nothing_got_in(tmp_path: Path) -> None:
    folds = stats_of(tmp_path, CLIPS[:1], [{**REPORT[0], "fold": 0}])["coverage"]["folds"]
    assert folds == [
        {"fold": 0, "packed": 0, "listed": 1, "share": 0, "list_hash": sha256()},
        {"fold": 1, "packed": 1, "listed": 1, "share": 1, "list_hash": sha256("k1")},
    ]


def test_classes(small: dict[str, Any]) -> None:
    columns = ("name", "packed", "listed", "share", "repeats")
    assert [tuple(c[column] for column in columns) for c in small["per_class"]] == [
        ("A", 4, 4, 1, 100),
        ("B", 2, 3, 2 / 3, 200),
        ("C", 1, 1, 1, 400),
        ("D", 0, 1, 0, None),
    ]
    assert [c["hours"] for c in small["per_class"]] == pytest.approx([1000 * HOURS, 500 * HOURS, 400 * HOURS, 0])
    assert small["without_clips"] == ["D"]


def test_repeats_are_what_the_sampler_draws(small: dict[str, Any], tmp_path: Path) -> None:
    assert small["balanced"] == {
        "examples": 1200,
        "classes": 3,
        "draws_per_class": 400,
        "visits": {"min": 100, "median": 300, "max": 500},
    }
    manifest = load_manifest(write_set(tmp_path, CLIPS, REPORT))
    sampler = BalancedSampler(class_lists(manifest.label_values, manifest.label_offsets, 4), seed=1)
    assert np.bincount(sampler.draw(np.arange(1200))).tolist() == [100, 300, 300, 500]


def test_durations(small: dict[str, Any]) -> None:
    durations = small["durations"]
    assert [durations[key] for key in ("min", "q1", "median", "q3", "max")] == [1, 1.75, 2.5, 3.25, 4]
    histogram = durations["histogram"]
    assert histogram["edges"] == [round(0.2 * i, 1) for i in range(21)]
    assert {i: count for i, count in enumerate(histogram["counts"]) if count} == {5: 1, 10: 1, 15: 1}
    assert histogram["longer"] == 1  # 4 s is where the last bin ends


def test_one_long_clip_does_not_squeeze_the_others(tmp_path: Path) -> None:
    clips = [{**CLIPS[0], "key": str(i), "samples": 1000} for i in range(200)]
    histogram = stats_of(tmp_path, [{**CLIPS[0], "samples": 360_000}, *clips], [])["durations"]["histogram"]
    assert histogram["edges"][-2:] == [10, 10.5]
    assert histogram["counts"][-1] == 200
    assert histogram["longer"] == 1


def test_sources_with_a_low_rate_are_counted(tmp_path: Path) -> None:
    """28 kHz is twice the 14 kHz at which ERANN's mel range ends."""
    formats = ["mp3float 16000 Hz stereo", "wav pcm_16 22050 Hz mono", "flac 27999 Hz mono", "flac 28000 Hz mono"]
    formats += ["aac 16000 Hz mono + aac 44100 Hz mono", "no rate", f"{'9' * 5000} Hz", "pcm 16000 Hz mono", None]
    clips = [{**CLIPS[0], "key": f"k{i}", "format": format_} for i, format_ in enumerate(formats)]
    result = statistics(open_folder(write_set(tmp_path / "low", clips, [], sample_rate=44_100)))["low_rate"]
    rates = [{"rate": 16_000, "clips": 2}, {"rate": 22_050, "clips": 1}, {"rate": 27_999, "clips": 1}]
    assert result == {"clips": 4, "share": 4 / 9, "least_rate": 28_000, "rates": rates}
    for name, facts in (("indexed", {"packing": {}, "sample_rate": 44_100}), ("resampled", {"sample_rate": 16_000})):
        assert statistics(open_folder(write_set(tmp_path / name, clips, [], **facts)))["low_rate"] is None


def test_formats_and_peaks(small: dict[str, Any]) -> None:
    assert small["formats"] == [
        {"format": "mp3 stereo", "clips": 2, "share": 0.5},
        {"format": "aac mono", "clips": 1, "share": 0.25},
        {"format": "flac mono", "clips": 1, "share": 0.25},
    ]
    assert small["peaks"] == {"overloaded": 1, "near_silence": 1}
    assert small["condition"] == {"damaged": 0, "seconds_lost": 0.0, "opposite_phase": 0}


def test_damaged_clips_and_channels_that_cancel_each_other(tmp_path: Path) -> None:
    facts: list[dict[str, Any]] = [{"lost": 0.25}, {"lost": 1.5, "channel_peak": 0.5}, {}, {}]
    clips = [clip | more for clip, more in zip(CLIPS, facts, strict=True)]
    found = stats_of(tmp_path, clips, REPORT)["condition"]
    assert found == {"damaged": 2, "seconds_lost": 1.75, "opposite_phase": 1}
    assert condition_lines(found) == [
        "2 clips with a damaged source: 1.75 s are missing (the manifest's column lost)",
        "1 clip nearly silent, as the source's channels are in opposite phase (column channel_peak); "
        "pack with --channels loudest to keep one of them",
    ]


def test_reasons_with_the_first_row_of_each(small: dict[str, Any]) -> None:
    assert small["reasons"] == [
        {
            "reason": "missing",
            "count": 2,
            "share": 0.25,
            "example": {"key": "m1", "source": "m", "detail": "no file"},
        },
        {
            "reason": "duplicate",
            "count": 1,
            "share": 0.125,
            "example": {"key": "k1", "source": "k", "detail": "again"},
        },
        {
            "reason": "wrong label",
            "count": 1,
            "share": 0.125,
            "example": {"key": "x", "source": "x", "detail": "odd"},
        },
    ]


def test_an_indexed_set_has_no_list_to_be_measured_against(tmp_path: Path) -> None:
    clips = [{**clip, "peak": None, "format": None} for clip in CLIPS]
    result = stats_of(tmp_path, clips, [], packing={}, versions={})
    assert result["indexed"]
    assert result["formats"] is result["peaks"] is result["condition"] is None
    coverage = result["coverage"]
    for part in (coverage, *coverage["splits"], *coverage["folds"], *result["per_class"]):
        assert part["listed"] is part["share"] is None
    assert [part["packed"] for part in coverage["splits"]] == [2, 2]
    assert result["reasons"] == []


def test_the_hash_is_that_of_an_evaluation(small: dict[str, Any], tmp_path: Path) -> None:
    manifest = load_manifest(write_set(tmp_path, CLIPS, REPORT))
    rng = np.random.default_rng(0)

    def evaluated(keep: np.ndarray) -> str:
        part = manifest.select(keep)
        rows = np.arange(len(part))
        predictions = evaluation.Predictions(rng.random((len(part), 4), dtype=np.float32), part.targets(rows))
        return evaluation.detail(predictions, part, listed=7)["list_hash"]

    assert small["list_hash"] == evaluated(manifest.folds > -2) == sha256("k1", "k2", "k3", "k4")
    assert small["coverage"]["folds"][0]["list_hash"] == evaluated(manifest.folds == 1)


@given(st.lists(st.text("AZaz09_-%", max_size=6)), st.integers(0, 5))
def test_the_hash_is_that_of_the_sorted_keys(keys: list[str], cut: int) -> None:
    column = pa.chunked_array([keys[:cut], keys[cut:]], pa.string())
    assert list_hash(column) == sha256(*sorted(keys))


ROWS = st.fixed_dictionaries(
    {
        "labels": st.lists(st.integers(0, 3), unique=True, max_size=3).map(sorted),
        "split": st.sampled_from(["train", "eval", None]),
        "fold": st.sampled_from([None, 1, 2, 10]),
        "samples": st.integers(1, 10**7),
        "reason": st.sampled_from([None, None, "missing", "empty", "duplicate"]),
    }
)


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(ROWS, max_size=30))
def test_parts_add_up_to_the_whole(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> None:
    rows = [{**row, "key": f"{i}", "peak": 0.1, "format": "f", "source": "s"} for i, row in enumerate([*rows, *CLIPS])]
    clips = [row for row in rows if not row.get("reason")]
    report = [row for row in rows if row.get("reason")]
    listed = [row for row in rows if row.get("reason") != "duplicate"]
    result = stats_of(tmp_path_factory.mktemp("set"), clips, report)
    coverage = result["coverage"]
    assert (coverage["packed"], coverage["listed"]) == (len(clips), len(listed))
    assert coverage["packed"] + sum(r["count"] for r in result["reasons"]) == len(rows)
    for parts in (coverage["splits"], coverage["folds"]):
        assert sum(part["packed"] for part in parts) == len(clips)
        assert sum(part["listed"] for part in parts) == len(listed)
    assert sum(c["packed"] for c in result["per_class"]) == sum(len(row["labels"]) for row in clips)
    assert sum(c["listed"] for c in result["per_class"]) == sum(len(row["labels"]) for row in listed)
    histogram = result["durations"]["histogram"]
    assert sum(histogram["counts"]) + histogram["longer"] == len(clips)
    assert len(histogram["edges"]) == len(histogram["counts"]) + 1 <= 23
    assert sum(c["packed"] * c["repeats"] for c in result["per_class"] if c["packed"]) == pytest.approx(1200)


def lines(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def stems(rows: list[dict[str, str]], column: str) -> list[str]:
    return [row[column].rsplit(".", 1)[0] for row in rows]


def folds(rows: list[dict[str, str]]) -> list[int]:
    return [int(row["fold"]) for row in rows]


def test_recordings_in_two_folds_of_esc50(real_data: Path) -> None:
    rows = lines(real_data / "esc10" / "meta" / "esc50.csv")
    assert len(rows) == 2000
    shared = shared_recordings("esc50", stems(rows, "filename"), folds(rows))
    assert shared == {
        recording: sorted({int(row["fold"]) for row in rows if row["src_file"] == recording})
        for recording in ("131943", "134049", "209698", "234879")
    }
    assert all(len(found) == 2 for found in shared.values())
    ten = [row for row in rows if row["esc10"] == "True"]
    assert len(ten) == 400
    assert shared_recordings("esc10", stems(ten, "filename"), folds(ten)) == {}


def test_recordings_in_two_folds_of_urbansound8k(real_data: Path) -> None:
    rows = lines(real_data / "urbansound8k" / "metadata" / "UrbanSound8K-full.csv")
    assert len(rows) == 8732
    shared = shared_recordings("urbansound8k", stems(rows, "slice_file_name"), folds(rows))
    assert shared == {
        recording: sorted({int(row["fold"]) for row in rows if row["fsID"] == recording})
        for recording in ("106905", "132016", "176638", "180937", "77751")
    }
    assert all(len(found) == 2 for found in shared.values())


def test_no_actor_of_ravdess_is_in_two_folds(real_data: Path) -> None:
    rows = read_ravdess(real_data / "ravdess").rows
    assert shared_recordings("ravdess", rows["key"].to_pylist(), rows["fold"].to_pylist()) == {}
    two = ["03-01-01-01-01-01-07", "03-01-02-01-01-01-07", "03-01-02-01-01-01-08"]
    assert shared_recordings("ravdess", two, [3, 1, 4]) == {"actor 07": [1, 3]}


def test_recordings_count_clips_that_did_not_get_in(tmp_path: Path) -> None:
    clips = [{**CLIPS[0], "key": "2-77-A-0", "fold": 2}, {**CLIPS[0], "key": "1-5-A-0"}]
    absent = [{**REPORT[0], "key": "3-77-B-0", "fold": 3}, {**REPORT[0], "key": "mine", "fold": 3}]
    absent.append({**REPORT[0], "key": "x-5-y", "fold": None})
    result = stats_of(tmp_path, clips, absent, name="esc50")
    assert result["recordings"] == {"kind": "Freesound recording", "count": 2, "shared": {"77": [2, 3]}}


def test_other_sets_have_no_recordings(small: dict[str, Any]) -> None:
    assert small["recordings"] is None
