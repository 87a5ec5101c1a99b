"""The data sets as they lie on disk: folds, labels, official counts, archives, odd folders."""

import csv
import io
import os
import tarfile
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import pytest
import soundfile

from erann_dist.errors import UsageError, UserError
from shards.sources import esc50, ravdess, urbansound8k
from shards.sources.audioset import read_audioset
from shards.sources.files import find_audio
from shards.sources.folder import read_folder, read_listed_folder
from shards.sources.fsd50k import read_fsd50k
from shards.sources.rows import Source, SourceRow, safe_key
from tests.conftest import pack_here
from tests.shards.test_audioset import touch, write


def rows_of(source: Source) -> list[SourceRow]:
    return [SourceRow(**fields) for fields in source.rows.to_pylist()]


def reasons(source: Source) -> dict[str, str | None]:
    return {row.source: row.reason for row in rows_of(source)}


@pytest.mark.parametrize(
    ("name", "key"),
    [("1-100032-A-0", "1-100032-A-0"), ("a b.c", "a%20b%2Ec"), ("é/%", "%C3%A9%2F%25"), (b"caf\xe9", "caf%E9")],
)
def test_keys_are_safe_in_tars(name: str | bytes, key: str) -> None:
    assert safe_key(name) == key


def test_files_are_found_lossless_first_then_by_name(tmp_path: Path) -> None:
    touch(tmp_path, "b/x.wav", "a/x.flac", "x.mp3", "x.jpg", ".x.wav", "notes", "b/._y.wav", "b/y.OGG")
    found = find_audio(tmp_path)
    assert found.table["name"].to_pylist() == [b"a/x.flac", b"b/x.wav", b"b/y.OGG", b"x.mp3"]
    assert found.table["stem"].to_pylist() == [b"x", b"x", b"y", b"x"]
    assert found.passed_over == {".jpg": 1, "hidden": 2, "none": 1}


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    touch(tmp_path / "elsewhere", "x.wav")
    (tmp_path / "audio").mkdir()
    (tmp_path / "audio" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path / "audio")
    (tmp_path / "audio" / "round").symlink_to("round")
    assert find_audio(tmp_path / "audio").table["name"].to_pylist() == [b"linked/x.wav"]


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sound_bytes(level: float, seconds: float = 1.0, rate: int = 44_100, kind: str = "WAV") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.full(round(rate * seconds), level), rate, format=kind)
    return buffer.getvalue()


def test_clips_in_tars_are_packed_without_unpacking(tmp_path: Path) -> None:
    (tmp_path / "audio").mkdir()
    members = {
        "audio/bal/abcdefghijk.flac": sound_bytes(0.25, kind="FLAC"),
        "../../etc/evilevilev1.wav": sound_bytes(0.5),
    }
    tar_of(tmp_path / "audio" / "bal00.tar", members | {"list.txt": b"hello"})
    lines = [f'{ytid}, 0.000, 10.000, "/m/09x0r"' for ytid in ("abcdefghijk", "evilevilev1", "gonegonegon")]
    source = read_audioset(write(tmp_path / "eval_segments.csv", *lines), tmp_path / "audio")
    assert [(row.source, row.reason) for row in rows_of(source)] == [
        ("bal00.tar/audio/bal/abcdefghijk.flac", None),
        ("bal00.tar/../../etc/evilevilev1.wav", None),
        ("gonegonegon", "missing"),
    ]
    before = sorted(path for path in tmp_path.rglob("*"))
    folder = pack_here(source, tmp_path / "shards")
    after = [path for path in sorted(tmp_path.rglob("*")) if folder not in (path, *path.parents)]
    assert after == before  # nothing was written where a member's name points
    with tarfile.open(folder / "audioset-000000.tar") as tar:
        levels = {
            m.name: soundfile.read(io.BytesIO(tar.extractfile(m).read()))[0] for m in tar if m.name.endswith("flac")
        }
    assert {name: level.mean() for name, level in levels.items()} == {
        "abcdefghijk_0.flac": pytest.approx(0.25, abs=1e-4),
        "evilevilev1_0.flac": pytest.approx(0.5, abs=1e-4),
    }


def test_a_damaged_tar_is_named_and_what_can_be_read_is_used(tmp_path: Path) -> None:
    tar = tar_of(tmp_path / "x.tar", {f"{i}.wav": sound_bytes(0.1) for i in range(3)})
    whole = tar.read_bytes()
    second = whole.index(b"1.wav")
    damaged = bytearray(whole)
    damaged[whole.index(b"2.wav") + 150] ^= 1  # its header's checksum: tarfile takes it for the end
    for data, names in (
        (whole[:100_000], [b"x.tar/0.wav", b"x.tar/1.wav"]),
        (whole[:second], [b"x.tar/0.wav"]),  # cut before a header
        (bytes(damaged), [b"x.tar/0.wav", b"x.tar/1.wav"]),
    ):
        tar.write_bytes(data)
        found = find_audio(tmp_path)
        assert found.table["name"].to_pylist() == names
        assert f"x.tar: damaged after its {len(names)} readable clips" in found.warnings[0]
    tar.write_bytes(whole)
    assert find_audio(tmp_path).warnings == []


def test_panns_packs_are_read(tmp_path: Path) -> None:
    waveform = (np.sin(np.arange(2 * 32_000)) * 8000).astype(np.int16).reshape(2, -1)
    with h5py.File(tmp_path / "balanced_train.h5", "w") as pack:
        pack["audio_name"] = np.array([b"Yabcdefghijk.wav", b"Y-bcdefghijk.wav"], dtype="S20")
        pack["waveform"] = waveform
        pack.attrs["sample_rate"] = np.int32(32_000)
    lines = [f'{ytid}, 30.000, 40.000, "/m/09x0r"' for ytid in ("-bcdefghijk", "abcdefghijk")]
    source = read_audioset(write(tmp_path / "s.csv", *lines), tmp_path)
    assert [row.source for row in rows_of(source)] == [
        f"balanced_train.h5/{n}" for n in ("Y-bcdefghijk.wav", "Yabcdefghijk.wav")
    ]
    folder = pack_here(source, tmp_path / "shards", sample_rate=32_000)
    with tarfile.open(folder / "audioset-000000.tar") as tar:
        for key, expected in (("abcdefghijk_30000", waveform[0]), ("-bcdefghijk_30000", waveform[1])):
            pcm, rate = soundfile.read(io.BytesIO(tar.extractfile(f"{key}.flac").read()), dtype="int16")
            assert rate == 32_000
            np.testing.assert_array_equal(pcm, expected)


def test_esc10_is_the_official_subset(real_data: Path) -> None:
    source = esc50.read_esc50(real_data / "esc10", esc10=True)
    assert (len(source.rows), len(source.label_ids), source.task) == (400, 10, "classification")
    assert set(reasons(source).values()) == {None}
    counts = Counter((row.fold, row.labels[0]) for row in rows_of(source))
    assert counts == {(fold, label): 8 for fold in range(1, 6) for label in range(10)}
    assert source.label_ids[0] == "dog"
    whole = esc50.read_esc50(real_data / "esc10")
    assert (len(whole.rows), len(whole.label_ids), sum(row.reason == "missing" for row in rows_of(whole))) == (
        2000,
        50,
        1600,
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("filename,fold\na.wav,1\n", "esc50.csv:1: no column target"),
        ("filename,fold,target,category,esc10\na.wav,x,1,dog,True\n", "esc50.csv:2: 'x' is not a fold"),
        (
            "filename,fold,target,category,esc10\na.wav,1,1,dog,True\nb.wav,1\n",
            "esc50.csv:3: 2 fields where the header has 5",
        ),
        ("filename,fold,target,category,esc10\na.wav,1,1,dog,yes\n", "esc50.csv:2: 'yes' under esc10"),
        ("filename,fold,target,category,esc10\n", "esc50.csv: lists no clip"),
    ],
)
def test_malformed_esc50_list(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match="no esc50.csv in it or below it"):
        esc50.read_esc50(tmp_path)
    touch(tmp_path, "meta/esc50.csv", "audio/a.wav")
    (tmp_path / "meta" / "esc50.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        esc50.read_esc50(tmp_path)


def test_urbansound8k_has_its_folds_and_labels(real_data: Path) -> None:
    root = real_data / "urbansound8k"
    source = urbansound8k.read_urbansound8k(root)
    with (root / "metadata" / "UrbanSound8K.csv").open(newline="") as file:
        listed = {line["slice_file_name"][:-4]: line for line in csv.DictReader(file)}
    assert len(source.rows) == len(listed) == 180
    for row in rows_of(source):
        line = listed[row.key]
        assert (row.fold, source.label_ids[row.labels[0]]) == (int(line["fold"]), line["class"])
        assert row.source == f"fold{row.fold}/{row.key}.wav"
        assert (row.start, row.end, row.reason) == (None, None, None)


def test_urbansound8k_whole_list(real_data: Path, tmp_path: Path) -> None:
    touch(tmp_path, "metadata/UrbanSound8K.csv", "audio/fold1/x.wav")
    text = (real_data / "urbansound8k" / "metadata" / "UrbanSound8K-full.csv").read_text()
    (tmp_path / "metadata" / "UrbanSound8K.csv").write_text(
        text.replace("100263-2-0-117.wav,100263,58.5,62.5,1,5,2,", "100263-2-0-117.wav,100263,58.5,62.5,1,5,3,")
    )
    source = urbansound8k.read_urbansound8k(tmp_path)
    assert Counter(reasons(source).values()) == {"missing": 8731, "wrong label": 1}
    assert Counter(row.fold for row in rows_of(source)).keys() == set(range(1, 11))
    assert source.label_ids[3] == "dog_bark"


def test_a_ravdess_actor_is_in_one_fold_and_both_sexes_in_each(real_data: Path) -> None:
    source = ravdess.read_ravdess(real_data / "ravdess")
    assert len(source.rows) == 240
    folds: dict[int, set[int]] = {}
    for row in rows_of(source):
        assert row.reason is None
        assert row.source == f"Actor_{row.key[-2:]}/{row.key}.wav"
        assert row.labels == [int(row.key.split("-")[2]) - 1]
        folds.setdefault(int(row.key[-2:]), set()).add(row.fold)
    assert folds == {1: {1}, 2: {1}, 5: {3}, 20: {2}}


def test_ravdess_names_that_are_no_speech_are_reported(tmp_path: Path) -> None:
    names = [f"03-01-{e:02d}-01-01-01-{a:02d}.wav" for e in range(1, 9) for a in range(1, 25)]
    touch(tmp_path, *names, "03-02-01-01-01-01-01.wav", "03-01-09-01-01-01-01.wav", "hello.wav", "again/" + names[0])
    source = ravdess.read_ravdess(tmp_path)
    odd = {row.source: (row.reason, row.detail) for row in rows_of(source) if row.reason}
    assert odd == {
        "03-02-01-01-01-01-01.wav": ("wrong label", "song, not speech"),
        "03-01-09-01-01-01-01.wav": ("wrong label", "emotion 09"),
        "hello.wav": ("wrong label", "not a RAVDESS file name"),
        f"again/{names[0]}": ("duplicate", f"{names[0]} comes first and has the same key"),
    }
    actors: dict[int, set[int]] = {}
    for row in rows_of(source):
        if row.reason is None:
            actors.setdefault(row.fold, set()).add(int(row.key[-2:]))
    assert {fold: len(members) for fold, members in actors.items()} == {1: 6, 2: 6, 3: 6, 4: 6}
    assert all(len({a % 2 for a in members}) == 2 for members in actors.values())
    assert sum(len(members) for members in actors.values()) == 24


def test_sub_folders_are_classes(tmp_path: Path) -> None:
    touch(tmp_path, "dog/a.wav", "dog/deep/a.wav", "cat/b.mp3", "cat/b.wav", "stray.wav", "dog/read.me")
    source = read_folder(tmp_path)
    assert source.label_ids == ["cat", "dog"]
    assert {(row.key, row.source): (row.labels, row.reason) for row in rows_of(source)} == {
        ("cat%2Fb", "cat/b.wav"): ([0], None),
        ("cat%2Fb", "cat/b.mp3"): ([0], "duplicate"),
        ("dog%2Fa", "dog/a.wav"): ([1], None),
        ("dog%2Fdeep%2Fa", "dog/deep/a.wav"): ([1], None),
        ("stray%2Ewav", "stray.wav"): ([], "wrong label"),
    }
    assert source.notes == [f"{tmp_path}: skipped, not sound files by their names: 1 .me"]
    with pytest.raises(UserError, match="no sub-folder with sound"):
        read_folder(tmp_path / "cat")


def test_a_list_gives_labels_splits_and_folds(tmp_path: Path) -> None:
    touch(tmp_path, "a.wav", "b.wav")
    labels = tmp_path / "mine.csv"
    labels.write_text(
        'path,labels,split,fold\na.wav,"dog, rain",train,1\nb.wav,dog;dog,test,2\nc.wav,cat,,\nb.wav,,,\na.flac,cat,,\n'
    )
    source = read_listed_folder(tmp_path, labels)
    assert (source.task, source.label_ids) == ("tagging", ["cat", "dog", "rain"])
    assert [(row.key, row.labels, row.split, row.fold, row.reason) for row in rows_of(source)] == [
        ("a", [1, 2], "train", 1, None),
        ("b", [1], "test", 2, None),
        ("c", [0], None, None, "missing"),
        ("b", [], None, None, "duplicate"),
        ("a", [0], None, None, "duplicate"),
    ]
    assert rows_of(source)[0].path == os.fsencode(tmp_path / "a.wav")
    touch(tmp_path, "#1 hit.wav")
    labels.write_text("\ufeffpath,labels\na.wav,dog\n#1 hit.wav,cat\n")
    assert [row.reason for row in rows_of(read_listed_folder(tmp_path, labels))] == [None, None]
    labels.write_text("path,labels\na.wav,dog\nb.wav,cat\n")
    assert read_listed_folder(tmp_path, labels).task == "classification"
    labels.write_text("path,labels,fold\na.wav,dog,first\n")
    with pytest.raises(UserError, match="mine.csv:2: 'first' is not a fold; a number from 0 to 127"):
        read_listed_folder(tmp_path, labels)
    labels.write_text("file,labels\na.wav,dog\n")
    with pytest.raises(UserError, match="mine.csv:1: no column path"):
        read_listed_folder(tmp_path, labels)


def write_sounds(folder: Path, *names: str, rate: int = 44_100, seconds: float = 0.1) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / name, np.zeros(round(rate * seconds), np.float32), rate)


def packable(source: Source) -> dict[str, str]:
    """The rows that can be packed: key -> file."""
    return {row.key: row.source for row in rows_of(source) if row.reason is None}


ESC50 = "filename,fold,target,category,esc10\n1-1-A-0.wav,1,0,dog,True\n1-2-A-1.wav,2,1,rooster,True\n"


@pytest.mark.parametrize(
    ("folder", "list_", "sound"),
    [
        ("", "meta/esc50.csv", "audio/"),
        ("downloads/", "ESC-50-master/meta/esc50.csv", "ESC-50-master/audio/"),  # the folder that it was unpacked into
        ("", "esc50.csv", "audio/audio/"),  # Kaggle's
    ],
)
def test_esc50_as_people_have_it(tmp_path: Path, folder: str, list_: str, sound: str) -> None:
    root = tmp_path / folder if folder else tmp_path
    write_sounds(root / sound, "1-1-A-0.wav", "1-2-A-1.wav")
    (root / list_).parent.mkdir(parents=True, exist_ok=True)
    (root / list_).write_text(ESC50)
    assert list(packable(esc50.read_esc50(root))) == ["1-1-A-0", "1-2-A-1"]


def test_of_copies_at_several_rates_the_best_is_taken(tmp_path: Path) -> None:
    """ESC-50 on Kaggle has audio/16000 next to audio/44100; and an empty file hides none that holds sound."""
    for rate in (16_000, 44_100):
        write_sounds(tmp_path / "audio" / str(rate), "1-1-A-0.wav", "1-2-A-1.wav", rate=rate)
    touch(tmp_path, "audio/00/1-1-A-0.wav")
    (tmp_path / "esc50.csv").write_text(ESC50)
    source = esc50.read_esc50(tmp_path)
    assert packable(source) == {"1-1-A-0": "44100/1-1-A-0.wav", "1-2-A-1": "44100/1-2-A-1.wav"}
    others = {row.source for row in rows_of(source) if row.reason == "duplicate"}
    assert others == {"16000/1-1-A-0.wav", "16000/1-2-A-1.wav", "00/1-1-A-0.wav"}


@pytest.mark.parametrize(
    ("list_", "sound"), [("metadata", "audio/fold1"), (".", "fold1"), ("US8K/metadata", "US8K/audio")]
)
def test_urbansound8k_as_people_have_it(tmp_path: Path, list_: str, sound: str) -> None:
    write_sounds(tmp_path / sound, "100-3-0-0.wav")
    (tmp_path / list_).mkdir(parents=True, exist_ok=True)
    text = "slice_file_name,fsID,start,end,salience,fold,classID,class\n100-3-0-0.wav,100,0,1,1,1,3,dog_bark\n"
    (tmp_path / list_ / "UrbanSound8K.csv").write_text(text)
    assert list(packable(urbansound8k.read_urbansound8k(tmp_path))) == ["100-3-0-0"]


def test_a_ravdess_utterance_is_packed_once(tmp_path: Path) -> None:
    """As sound where that is there, else from the film; the film alone, and actors who are none, are reported."""
    names = ["03-01-05-01-01-01-01", "01-01-05-01-01-01-01", "02-01-05-01-01-01-01", "01-01-06-01-01-01-02"]
    touch(tmp_path, *(f"Actor/{name}.mp4" for name in names), "03-01-05-01-01-01-25.wav", "03-01-05-01-01-01-00.wav")
    found = {row.key: row.reason for row in rows_of(ravdess.read_ravdess(tmp_path))}
    assert found == {
        "03-01-05-01-01-01-01": None,
        "01-01-05-01-01-01-01": "duplicate",
        "02-01-05-01-01-01-01": "wrong label",
        "01-01-06-01-01-01-02": None,
        "03-01-05-01-01-01-25": "wrong label",
        "03-01-05-01-01-01-00": "wrong label",
    }


def test_fsd50k(tmp_path: Path) -> None:
    truth = tmp_path / "FSD50K.ground_truth"
    truth.mkdir()
    (truth / "vocabulary.csv").write_text("0,Accelerating,/m/1\n1,Bark,/m/2\n2,Rain_and_thunder,/m/3\n")
    (truth / "dev.csv").write_text(
        'fname,labels,mids,split\n64760,"Bark,Accelerating","/m/2,/m/1",train\n16399,Bark,/m/2,val\n7,Moo,/m/9,train\n'
    )
    (truth / "eval.csv").write_text("fname,labels,mids\n37199,Rain_and_thunder,/m/3\n5,Bark,/m/2\n")
    write_sounds(tmp_path / "FSD50K.dev_audio", "64760.wav", "16399.wav", "7.wav", "9.wav")
    write_sounds(tmp_path / "FSD50K.eval_audio", "37199.wav")
    source = read_fsd50k(tmp_path)
    assert (source.task, source.label_ids) == ("tagging", ["/m/1", "/m/2", "/m/3"])
    assert source.label_names[2] == "Rain and thunder"
    assert {row.key: (row.labels, row.split, row.reason) for row in rows_of(source)} == {
        "64760": ([0, 1], "train", None),
        "16399": ([1], "val", None),
        "7": ([], "train", "wrong label"),
        "37199": ([2], "eval", None),
        "5": ([1], "eval", "missing"),
    }
    assert source.notes[:2] == [
        f"{tmp_path}: 5 sound files found, 4 matched, 1 unmatched: FSD50K.dev_audio/9.wav",
        f"{tmp_path}: 5 clips listed, 4 with a file, 1 without",
    ]


def test_what_matches_nothing_is_noted(tmp_path: Path) -> None:
    write_sounds(tmp_path / "audio", "1-1-A-0.wav", *(f"other{i}.wav" for i in range(5)))
    touch(tmp_path, "audio/rest.7z", "audio/more.rar", "audio/some.rar")
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "esc50.csv").write_text(ESC50)
    assert esc50.read_esc50(tmp_path).notes == [
        f"{tmp_path}/audio: 6 sound files found, 1 matched, 5 unmatched: other0.wav, other1.wav, other2.wav, …",
        f"{tmp_path}/audio: 2 clips listed, 1 with a file, 1 without",
        f"{tmp_path}/audio: skipped, not sound files by their names: 1 .7z, 2 .rar",
    ]


@pytest.mark.parametrize("text", ["0,Bark,/m/2\n2,Rain,/m/3\n", "index,name,mid\n0,Bark,/m/2\n", "0,Bark\n"])
def test_fsd50ks_classes_are_read_whole(tmp_path: Path, text: str) -> None:
    (tmp_path / "vocabulary.csv").write_text(text)
    with pytest.raises(UserError, match=r"vocabulary.csv:\d: not a class; expected: \d,name,MID"):
        read_fsd50k(tmp_path)
