import gzip
from pathlib import Path

import numpy as np
import pytest
import soundfile

from erann_dist.errors import UsageError, UserError
from shards.sources.audioset import CLASSES, read_audioset, read_classes
from shards.sources.rows import find_audio, safe_key

HEADER = "# Segments csv created\n# num_ytids=1\n# YTID, start_seconds, end_seconds, positive_labels\n"


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
    ],
)
def test_usual_names_are_found(tmp_path: Path, name: str) -> None:
    touch(tmp_path / "audio", name, "unrelated.wav", "abc-_efghi1.json", "abc-_efghi1.txt")
    segments = write(tmp_path / "eval_segments.csv", 'abc-_efghi1, 30.000, 40.000, "/m/09x0r,/t/dd00088"')
    (row,) = read_audioset(segments, tmp_path / "audio").rows
    assert row.path == tmp_path / "audio" / name
    assert row.source == name
    assert (row.key, row.split, row.segment) == ("abc-_efghi1_30000", "eval", (30.0, 40.0))
    assert row.labels == (0, 451)


def test_the_most_specific_name_wins(tmp_path: Path) -> None:
    touch(tmp_path / "audio", "-abcdefghij.wav", "-abcdefghij_30000_40000.wav", "-abcdefghij_30.wav")
    segments = write(
        tmp_path / "s.csv", '-abcdefghij, 30.000, 40.000, "/m/09x0r"', '-abcdefghij, 50.000, 60.000, "/m/09x0r"'
    )
    rows = read_audioset(segments, tmp_path / "audio").rows
    assert [row.source for row in rows] == ["-abcdefghij_30000_40000.wav", "-abcdefghij.wav"]


def test_odd_video_ids_make_safe_keys(tmp_path: Path) -> None:
    touch(tmp_path / "audio", "x.wav")
    (row,) = read_audioset(write(tmp_path / "s.csv", 'a.b/c, 0.000, 10.000, "/m/09x0r"'), tmp_path / "audio").rows
    assert row.key == "a%2Eb%2Fc_0"


def test_files_that_are_not_there_stay_rows(tmp_path: Path) -> None:
    touch(tmp_path / "audio", "abcdefghijk_31.wav")
    segments = write(tmp_path / "s.csv", 'abcdefghijk, 30.000, 40.000, "/m/09x0r"')
    (row,) = read_audioset(segments, tmp_path / "audio").rows
    assert row.path is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("abcdefghijk, 30.000, 40.000", "s.csv:4: not a segment"),
        ('abcdefghijk, thirty, 40.000, "/m/09x0r"', "s.csv:4: not a segment"),
        ('abcdefghijk, 40.000, 30.000, "/m/09x0r"', "s.csv:4: no segment of a video .*from 40 to 30 s"),
        (', 30.000, 40.000, "/m/09x0r"', "s.csv:4: no segment of a video .YTID ''"),
        ('abcdefghijk, 0, inf, "/m/09x0r"', "s.csv:4: no segment of a video .*from 0 to inf s"),
        ('abcdefghijk, 30.000, 40.000, "/m/nothing"', "s.csv:4: unknown MID '/m/nothing'"),
        ('abcdefghijk, 30.000, 40.000, "/m/09x0r', "s.csv:4: unexpected end of data"),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    touch(tmp_path / "audio", "x.wav")
    with pytest.raises(UserError, match=message):
        read_audioset(write(tmp_path / "s.csv", line), tmp_path / "audio")


def test_a_segment_listed_twice_is_named(tmp_path: Path) -> None:
    touch(tmp_path / "audio", "x.wav")
    line = 'abcdefghijk, 30.000, 40.000, "/m/09x0r"'
    with pytest.raises(UserError, match="s.csv:5: the segment abcdefghijk at 30 s is listed twice"):
        read_audioset(write(tmp_path / "s.csv", line, line), tmp_path / "audio")


def test_missing_things_are_named(tmp_path: Path) -> None:
    segments = write(tmp_path / "s.csv", 'abcdefghijk, 30.000, 40.000, "/m/09x0r"')
    with pytest.raises(UsageError, match="audio: no such folder"):
        read_audioset(segments, tmp_path / "audio")
    (tmp_path / "audio").mkdir()
    with pytest.raises(UserError, match="audio: no audio file"):
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
    with pytest.raises(UserError, match="bad.csv:2: not a class; wanted: 0,MID,display name"):
        read_classes(tmp_path / "bad.csv")


def test_class_list_is_audiosets(real_data: Path) -> None:
    assert CLASSES.read_bytes() == (real_data / "audioset" / "class_labels_indices.csv").read_bytes()
    ids, names = read_classes(CLASSES)
    assert len(ids) == len(set(ids)) == 527
    assert (ids[0], names[0], names[1]) == ("/m/09x0r", "Speech", "Male speech, man speaking")


@pytest.mark.parametrize(
    ("name", "count"), [("balanced_train", 22_160), ("eval", 20_371), ("unbalanced_train", 2_041_789)]
)
def test_the_real_lists(real_data: Path, tmp_path: Path, name: str, count: int) -> None:
    touch(tmp_path, "x.wav")
    (path,) = (real_data / "audioset").glob(f"{name}_segments.csv*")
    source = read_audioset(path, tmp_path)
    assert len(source.rows) == count
    assert {row.split for row in source.rows} == {name}
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        first = next(line for line in file if not line.startswith("#")).split(", ")
    assert source.rows[0].key == f"{first[0]}_{round(float(first[1]) * 1000)}"


@pytest.mark.parametrize(
    ("name", "key"), [("1-100032-A-0", "1-100032-A-0"), ("a b.c", "a%20b%2Ec"), ("é/%", "%C3%A9%2F%25")]
)
def test_keys_are_safe_in_tars(name: str, key: str) -> None:
    assert safe_key(name) == key


def test_find_audio_is_ordered(tmp_path: Path) -> None:
    touch(tmp_path, "b/x.wav", "a/x.flac", "x.mp3", "x.jpg")
    assert find_audio(tmp_path) == {"x": ["x.mp3", "a/x.flac", "b/x.wav"]}


def test_esc10_is_the_official_subset(real_data: Path) -> None:
    from shards.sources.esc50 import read_esc50

    source = read_esc50(real_data / "esc10", esc10=True)
    assert (len(source.rows), len(source.label_ids), source.task) == (400, 10, "classification")
    assert all(row.path for row in source.rows)
    labels = np.array([row.labels[0] for row in source.rows])
    folds = np.array([row.fold for row in source.rows])
    assert {(f, c): int(((folds == f) & (labels == c)).sum()) for f in range(1, 6) for c in range(10)} == {
        (f, c): 8 for f in range(1, 6) for c in range(10)
    }
    assert source.label_ids[0] == "dog"
    whole = read_esc50(real_data / "esc10")
    assert (len(whole.rows), len(whole.label_ids), sum(row.path is None for row in whole.rows)) == (2000, 50, 1600)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("filename,fold\na.wav,1\n", "esc50.csv:1: the columns"),
        ("filename,fold,target,category,esc10\na.wav,x,1,dog,True\n", "esc50.csv:2: not a clip"),
        ("filename,fold,target,category,esc10\na.wav,1,1,dog,True\nb.wav,1\n", "esc50.csv:3: not a clip"),
        ("filename,fold,target,category,esc10\na.wav,1,1,dog,yes\n", "esc50.csv:2: not a clip"),
        (
            "filename,fold,target,category,esc10\na.wav,1,1,dog,True\na.ogg,1,1,dog,True\n",
            "esc50.csv:3: a is listed twice",
        ),
        ("filename,fold,target,category,esc10\n", "esc50.csv: lists no clip"),
    ],
)
def test_malformed_esc50_list(tmp_path: Path, text: str, message: str) -> None:
    from shards.sources.esc50 import read_esc50

    with pytest.raises(UsageError, match="esc50.csv: no such file"):
        read_esc50(tmp_path)
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "esc50.csv").write_text(text)
    (tmp_path / "audio").mkdir()
    soundfile.write(tmp_path / "audio" / "a.wav", np.zeros(10), 44_100)
    with pytest.raises(UserError, match=message):
        read_esc50(tmp_path)
