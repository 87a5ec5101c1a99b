"""`erann inspect`: what is in a download, found without writing or decoding, and what packing would find."""

import json
import os
import shlex
import zipfile
from pathlib import Path
from typing import Any

import pytest

from erann_dist.errors import UsageError
from jobs.shard_sets.inspect import inspect, inspected_page
from shards.sources.audioset import read_audioset
from shards.sources.files import find_audio
from tests.shards.test_audioset import touch, write
from tests.shards.test_sources import sound_bytes, tar_of, write_sounds


def kinds(result: dict[str, Any]) -> dict[str, tuple[str, int]]:
    return {each["suffix"]: (each["kind"], each["files"]) for each in result["kinds"]}


@pytest.mark.parametrize(
    ("name", "data_set", "clips", "command"),
    [
        ("esc10", "esc50", 400, "erann pack esc50 --root {} --esc10 --out shard-sets/esc10"),
        ("urbansound8k", "urbansound8k", 180, "erann pack urbansound8k --root {} --out shard-sets/urbansound8k"),
        ("ravdess", "ravdess", 240, "erann pack ravdess --root {} --out shard-sets/ravdess"),
    ],
)
def test_the_real_data_sets_are_recognised(real_data: Path, name: str, data_set: str, clips: int, command: str) -> None:
    result = inspect(real_data / name)
    (found,) = result["recognised"]
    assert (found["data_set"], found["packable"], found["problem"]) == (data_set, clips, None)
    assert result["command"] == command.format(shlex.quote(str(real_data / name)))
    assert len(result["sample"]) == 20
    assert json.loads(json.dumps(result)) == result


def test_a_zip_of_a_data_set_is_recognised(real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = real_data / "esc10"
    with zipfile.ZipFile(tmp_path / "ESC-50-master.zip", "w") as archive:
        for path in [root / "meta" / "esc50.csv", *sorted((root / "audio").iterdir())[:8]]:
            archive.write(path, f"ESC-50-master/{path.relative_to(root)}")
    result = inspect(tmp_path)
    assert [each["data_set"] for each in result["recognised"]] == ["esc50"]
    assert result["command"].startswith(f"erann pack esc50 --root {tmp_path}")
    inspected_page(result)
    assert "8 clips of 10 classes can be packed" in capsys.readouterr().out


def test_formats_come_from_headers(real_data: Path) -> None:
    sample = inspect(real_data / "formats")["sample"]
    found = {each["format"] for each in sample}
    assert {"wav pcm_16 8000 Hz stereo", "aac 44100 Hz mono", "opus 48000 Hz mono"} <= found
    assert len({os.path.splitext(each["file"])[1] for each in sample}) >= 10  # spread over kinds
    assert all((each["format"] is None) == (each["problem"] is not None) for each in sample)


def test_files_by_kind(tmp_path: Path) -> None:
    root = tmp_path / "in"
    write_sounds(root, "dog/a.wav", "dog/b.WAV")
    touch(root, "x.mp3", "list.csv.gz", "data/train-0.parquet", "all.tar.zst", "README", ".hidden.wav", "._x/y.wav")
    os.mkfifo(root / "pipe.wav")
    (root / "gone.flac").symlink_to("nowhere")
    (root / "loop").symlink_to(root)
    (root / "round").symlink_to("round")
    before = sorted(tmp_path.rglob("*"))
    result = inspect(root)
    assert sorted(tmp_path.rglob("*")) == before
    assert kinds(result) == {
        ".wav": ("sound", 2), ".mp3": ("sound", 1), ".csv.gz": ("list", 1), ".parquet": ("Parquet", 1),
        ".tar.zst": ("archive", 1), "": ("other", 1),
    }  # fmt: skip
    assert (result["files"], result["hidden"], result["not_plain"]) == (7, 2, 3)
    size = (root / "dog/a.wav").stat().st_size
    assert result["bytes"] == 2 * size
    assert result["kinds"][0]["bytes"] == 2 * size


def test_it_counts_the_sound_files_that_packing_finds(real_data: Path) -> None:
    for name in ("formats", "esc10", "urbansound8k"):
        sounds = sum(each["files"] for each in inspect(real_data / name)["kinds"] if each["kind"] == "sound")
        assert sounds == len(find_audio(real_data / name).table)


def test_matching_with_a_segment_list(tmp_path: Path) -> None:
    """The figures are those of the source that packing reads."""
    touch(tmp_path / "audio", "Yabc-_efghi1.wav", "Zbc-_efghi2_30.flac", *(f"other{i}.wav" for i in range(4)))
    lines = [f'{ytid}, 30.000, 40.000, "/m/09x0r"' for ytid in ("abc-_efghi1", "Zbc-_efghi2", "gonegonegon")]
    segments = write(tmp_path / "eval_segments.csv", *lines)
    result = inspect(tmp_path / "audio", segments)
    (found,) = result["recognised"]
    counts = read_audioset(segments, tmp_path / "audio").files
    assert counts is not None
    assert found["files"] == vars(counts)
    assert (counts.found, counts.matched, counts.unmatched, counts.examples) == (
        6, 2, 4, ["other0.wav", "other1.wav", "other2.wav"],
    )  # fmt: skip
    assert (counts.listed, counts.with_file, counts.without_file) == (3, 2, 1)
    assert found["reasons"] == {"missing": 1}
    assert "names tried: ID_START_END" in found["notes"][-1]
    audio = shlex.quote(str(tmp_path / "audio"))
    assert result["command"] == (
        f"erann pack audioset --segments {shlex.quote(str(segments))} --audio {audio} --out shard-sets/audioset/eval"
    )
    malformed = write(tmp_path / "bad.csv", "abc, 1.0")
    assert "bad.csv:4: not a segment" in inspect(tmp_path / "audio", malformed)["recognised"][0]["problem"]


def test_audioset_is_known_by_its_ids(tmp_path: Path) -> None:
    touch(tmp_path, "aBc-_efghi1.wav", "Ybbc-_eFghi2_30000_40000.wav", "A title [zXc-_efghi3].m4a", "x.wav")
    (found,) = inspect(tmp_path)["recognised"]
    assert (found["data_set"], found["packable"]) == ("audioset", None)
    touch(tmp_path / "lists", "eval_segments.csv")
    assert f"--segments {tmp_path}/lists/eval_segments.csv" in inspect(tmp_path)["command"]


def test_archives_are_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tar_of(tmp_path / "b00.tar", {f"dog/{i}.wav": sound_bytes(0.1, rate=16_000) for i in range(5)})
    touch(tmp_path, "x.rar", "b01.tar")
    result = inspect(tmp_path)
    tar, rar = result["archives"]
    assert (tar["file"], tar["files"], tar["clips"], tar["examples"]) == (
        "b00.tar", 2, 5, ["dog/0.wav", "dog/1.wav", "dog/2.wav"],
    )  # fmt: skip
    assert "x.rar: neither a folder" in rar["problem"]
    assert [each["format"] for each in result["sample"]] == ["wav pcm_16 16000 Hz mono"] * 3
    inspected_page(result)
    shown = capsys.readouterr().out
    assert "b00.tar: 5 clips: dog/0.wav, dog/1.wav, dog/2.wav, …" in shown
    assert kinds(inspect(tmp_path / "b00.tar")) == {".tar": ("archive", 1)}


def test_folders_of_classes_and_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sounds(tmp_path / "mine", "train/dog/a.wav", "test/dog/b.wav")
    result = inspect(tmp_path / "mine")
    assert (result["recognised"][0]["data_set"], result["recognised"][0]["packable"]) == ("folder", 2)
    inspected_page(result)
    shown = capsys.readouterr().out
    assert "splits by name" in shown
    assert f"next: erann pack folder --root {tmp_path}/mine --out shard-sets/folder" in shown
    write_sounds(tmp_path / "flat", "a.wav")
    result = inspect(tmp_path / "flat")
    assert result["command"] is None
    assert "no sub-folder with sound" in result["recognised"][0]["problem"]
    (tmp_path / "empty").mkdir()
    inspected_page(inspect(tmp_path / "empty"))
    assert "nothing here that erann pack reads" in capsys.readouterr().out
    for arguments in ((tmp_path / "no",), (tmp_path, tmp_path / "no.csv")):
        with pytest.raises(UsageError, match="no such f"):
            inspect(*arguments)


def test_names_that_are_not_utf_8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sounds(tmp_path, "dog/a.wav")
    os.rename(tmp_path / "dog/a.wav", os.fsencode(tmp_path) + b"/dog/caf\xe9\x1b.wav")
    result = inspect(tmp_path)
    assert result["sample"][0]["file"] == "dog/caf\\xe9\x1b.wav"
    inspected_page(result)
    assert "\x1b" not in capsys.readouterr().out
    json.dumps(result).encode()
