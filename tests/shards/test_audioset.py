import gzip
import io
import os
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest
import soundfile

from erann_dist.errors import UsageError, UserError
from shards.clip import Packing, pack_clip
from shards.sources.audioset import CLASSES, read_audioset, read_classes
from shards.sources.rows import SourceRow

HEADER = "# Segments csv created\n# num_ytids=1\n# YTID, start_seconds, end_seconds, positive_labels\n"


def rows(segments: Path, audio: Path) -> list[SourceRow]:
    return [SourceRow(**fields) for fields in read_audioset(segments, audio).rows.to_pylist()]


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def write(path: Path, *lines: str) -> Path:
    path.write_text(HEADER + "".join(f"{line}\n" for line in lines))
    return path


@pytest.mark.parametrize(
    "name",
    [
        "abc-_efghi1.wav",
        "Yabc-_efghi1.flac",
        "abc-_efghi1_30.mp3",
        "abc-_efghi1_30.000.ogg",
        "abc-_efghi1_30_40.m4a",
        "abc-_efghi1_30.000_40.000.opus",
        "abc-_efghi1_30000_40000.webm",
        "deep/er/abc-_efghi1.WAV",
        "Speech/abc-_efghi1_30.0-40.0.ogg",
        "Speech/abc-_efghi1-30.000-40.000.wav",
        "abc-_efghi1_30000.wav",
        "Yabc-_efghi1_30000.wav",
        "Yabc-_efghi1_30.000.wav",
        "id_abc-_efghi1.wav",
        "abc-_efghi1_out.wav",
        "A title [abc-_efghi1].webm",
        "Caf\u00e9-abc-_efghi1.m4a",
        "abc-_efghi1.f140.m4a",
        "A title [abc-_efghi1].f140.m4a",
    ],
)
def test_usual_names_are_found(tmp_path: Path, name: str) -> None:
    touch(tmp_path / "audio", name, "unrelated.wav", "abc-_efghi1.json", "abc-_efghi1.txt")
    segments = write(tmp_path / "eval_segments.csv", 'abc-_efghi1, 30.000, 40.000, "/m/09x0r,/t/dd00088"')
    (row,) = rows(segments, tmp_path / "audio")
    assert row.path == os.fsencode(tmp_path / "audio" / name)
    assert row.source == name
    assert (row.key, row.split) == ("abc-_efghi1_30000", "eval")
    # A name with times is of a file that holds the segment alone.
    assert (row.start, row.end) == ((0.0, 10.0) if "30" in name else (30.0, 40.0))
    assert row.labels == [0, 451]
    assert row.reason is None


def test_the_most_specific_name_wins(tmp_path: Path) -> None:
    touch(tmp_path / "audio", "-abcdefghij.wav", "-abcdefghij_30000_40000.wav", "-abcdefghij_30.wav")
    segments = write(
        tmp_path / "s.csv", '-abcdefghij, 30.000, 40.000, "/m/09x0r"', '-abcdefghij, 50.000, 60.000, "/m/09x0r"'
    )
    assert [row.source for row in rows(segments, tmp_path / "audio")] == [
        "-abcdefghij_30000_40000.wav",
        "-abcdefghij.wav",
    ]


def test_odd_video_ids_make_safe_keys(tmp_path: Path) -> None:
    touch(tmp_path / "audio", "x.wav")
    (row,) = rows(write(tmp_path / "s.csv", 'a.b/c, 0.000, 10.000, "/m/09x0r"'), tmp_path / "audio")
    assert row.key == "a%2Eb%2Fc_0"


def test_files_that_are_not_there_stay_rows(tmp_path: Path) -> None:
    touch(tmp_path / "audio", "abcdefghijk_31.wav")
    segments = write(tmp_path / "s.csv", 'abcdefghijk, 30.000, 40.000, "/m/09x0r"')
    (row,) = rows(segments, tmp_path / "audio")
    assert (row.path, row.reason, row.source) == (None, "missing", "abcdefghijk")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("abcdefghijk, 30.000, 40.000", "s.csv:4: not a segment"),
        ('abcdefghijk, thirty, 40.000, "/m/09x0r"', "s.csv:4: not a segment"),
        ('abcdefghijk, 40.000, 30.000, "/m/09x0r"', "s.csv:4: not a segment of a video .*from 40 to 30 s"),
        (', 30.000, 40.000, "/m/09x0r"', "s.csv:4: not a segment of a video .YTID ''"),
        ('abcdefghijk, 0, inf, "/m/09x0r"', "s.csv:4: not a segment of a video .*from 0 to inf s"),
        ('abcdefghijk, 30.000, 40.000, "/m/09x0r', "s.csv:4: unexpected end of data"),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    touch(tmp_path / "audio", "x.wav")
    with pytest.raises(UserError, match=message):
        read_audioset(write(tmp_path / "s.csv", line), tmp_path / "audio")


def test_a_label_that_is_no_class_is_reported(tmp_path: Path) -> None:
    touch(tmp_path / "audio", "abcdefghijk.wav")
    line = 'abcdefghijk, 30.000, 40.000, "/m/09x0r,/m/nothing,/m/none"'
    (row,) = rows(write(tmp_path / "s.csv", line), tmp_path / "audio")
    assert (row.reason, row.detail) == ("wrong label", "/m/nothing is not in audioset_classes.csv")
    assert row.labels == [0]


def test_a_segment_listed_twice_and_a_second_file_are_reported(tmp_path: Path) -> None:
    touch(tmp_path / "audio", "abcdefghijk.mp3", "abcdefghijk.wav", "deep/abcdefghijk.ogg", "mnopqrstuvw.ogg")
    line = 'abcdefghijk, 30.000, 40.000, "/m/09x0r"'
    found = rows(write(tmp_path / "s.csv", line, line), tmp_path / "audio")
    # The lossless file is taken; each other one is a row of the report.
    assert [(row.source, row.reason) for row in found] == [
        ("abcdefghijk.wav", None),
        ("abcdefghijk.wav", "duplicate"),
        ("abcdefghijk.mp3", "duplicate"),
        ("deep/abcdefghijk.ogg", "duplicate"),
    ]
    assert {row.key for row in found} == {"abcdefghijk_30000"}
    assert found[2].detail == "abcdefghijk.wav comes first and has the same key"


def test_missing_things_are_named(tmp_path: Path) -> None:
    segments = write(tmp_path / "s.csv", 'abcdefghijk, 30.000, 40.000, "/m/09x0r"')
    with pytest.raises(UsageError, match="audio: no such audio folder"):
        read_audioset(segments, tmp_path / "audio")
    (tmp_path / "audio").mkdir()
    with pytest.raises(UserError, match="audio: no sound file"):
        read_audioset(segments, tmp_path / "audio")
    touch(tmp_path / "audio", "x.wav")
    with pytest.raises(UsageError, match="none.csv: no such file"):
        read_audioset(tmp_path / "none.csv", tmp_path / "audio")
    with pytest.raises(UserError, match="empty.csv: lists no segment"):
        read_audioset(write(tmp_path / "empty.csv"), tmp_path / "audio")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="binary.csv: not a text file"):
        read_audioset(tmp_path / "binary.csv", tmp_path / "audio")
    (tmp_path / "bad.csv").write_text("index,mid,display_name\n1,/m/x,X\n")
    with pytest.raises(UserError, match="bad.csv:2: not a class; expected: 0,MID,display name"):
        read_classes(tmp_path / "bad.csv")


def test_class_list_is_audiosets(real_data: Path) -> None:
    assert CLASSES.read_bytes() == (real_data / "audioset" / "class_labels_indices.csv").read_bytes()
    ids, names = read_classes(CLASSES)
    assert len(ids) == len(set(ids)) == 527
    assert (ids[0], names[0], names[1]) == ("/m/09x0r", "Speech", "Male speech, man speaking")


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("balanced_train", 22_160),
        ("eval", 20_371),
        pytest.param("unbalanced_train", 2_041_789, marks=pytest.mark.slow),
    ],
)
def test_the_real_lists(real_data: Path, tmp_path: Path, name: str, count: int) -> None:
    touch(tmp_path, "x.wav")
    (path,) = (real_data / "audioset").glob(f"{name}_segments.csv*")
    source = read_audioset(path, tmp_path)
    assert len(source.rows) == count
    assert pc.unique(source.rows["split"]).to_pylist() == [name]
    assert pc.unique(source.rows["reason"]).to_pylist() == ["missing"]
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        first = next(line for line in file if not line.startswith("#")).split(", ")
    assert source.rows["key"][0].as_py() == f"{first[0]}_{round(float(first[1]) * 1000)}"
    assert len(pc.unique(source.rows["key"])) == count


@pytest.mark.parametrize(("seconds", "name"), [(14.0, "abc-_efghi1_5_15.wav"), (12.4, "abc-_efghi1_30_40.wav")])
def test_a_name_with_times_is_no_whole_recording(tmp_path: Path, seconds: float, name: str) -> None:
    """Although it is longer than its segment by more than a second: the first 10 s are the segment."""
    start = int(name.split("_")[2])
    ramp = np.linspace(-0.9, 0.9, round(seconds * 44_100))
    (tmp_path / "audio").mkdir()
    soundfile.write(tmp_path / "audio" / name, ramp, 44_100)
    segments = write(tmp_path / "eval_segments.csv", f'abc-_efghi1, {start}.000, {start + 10}.000, "/m/09x0r"')
    (row,) = rows(segments, tmp_path / "audio")
    packed = io.BytesIO()
    pack_clip(row, Packing(), packed)
    packed.seek(0)
    np.testing.assert_allclose(soundfile.read(packed)[0], ramp[: 10 * 44_100], atol=1e-4)
