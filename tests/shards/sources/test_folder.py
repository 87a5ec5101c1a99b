"""The user's own sound files: lists in many forms, and folders as classes and splits."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from erann_dist.data.manifest import MAX_LABELS, SetInfo
from erann_dist.errors import UsageError, UserError
from erann_dist.storage.folder import LocalFolder
from shards import build
from shards.clip import Packing
from shards.sources.class_lists import read_class_list
from shards.sources.data_sets import Options, read_source
from shards.sources.folder import parse_columns, split_labels
from shards.sources.rows import Source
from tests.shards.test_audioset import touch
from tests.shards.test_sources import sound_bytes, tar_of, write_sounds


def read(root: Path, labels: Path | None = None, **options: Any) -> Source:
    return read_source("folder", Options(root=root, labels=labels, **options))


def names_of(source: Source) -> dict[str, list[str]]:
    """The labels of the rows that can be packed, by key."""
    rows = source.rows.to_pylist()
    return {row["key"]: [source.label_names[i] for i in row["labels"]] for row in rows if row["reason"] is None}


def reasons(source: Source) -> dict[str, tuple[str, str]]:
    return {row["source"]: (row["reason"], row["detail"]) for row in source.rows.to_pylist() if row["reason"]}


def splits(source: Source) -> dict[str, str | None]:
    return {row["key"]: row["split"] for row in source.rows.to_pylist() if row["reason"] is None}


@pytest.mark.parametrize(
    ("text", "separator", "labels"),
    [
        ("Dog", None, ["Dog"]),
        (" rain, dog;dog ,", None, ["dog", "rain"]),
        ('"Bee, wasp, etc.",Dog', None, ["Bee, wasp, etc.", "Dog"]),
        ('Dog; "Bee, wasp, etc." ', None, ["Bee, wasp, etc.", "Dog"]),
        ('"say ""hi"", twice",b', ",", ['say "hi", twice', "b"][::-1]),
        ("a;b,c", ",", ["a;b", "c"]),
        ("a, b|c", "|", ["a, b", "c"]),
        ("dog cat", " ", ["cat", "dog"]),
        ('12" vinyl,"quoted" start', None, ['"quoted" start', '12" vinyl']),  # quotes that enclose no label
        ('"open, dog', None, ['"open', "dog"]),
        ("", None, []),
        ("dog\n", None, ["dog"]),
        ('dog\n cat\n,"rain\n"\n', None, ["dog\n cat", "rain"]),
    ],
)
def test_labels_in_a_field(text: str, separator: str | None, labels: list[str]) -> None:
    assert split_labels(text, separator) == labels


def test_a_list_with_its_own_columns_classes_and_names_without_suffix(tmp_path: Path) -> None:
    """FSD50K's own files, read as somebody's list."""
    touch(tmp_path / "audio", "64760.wav", "16399.wav", "7.wav", "v1.2.wav", "rest.wav")
    (tmp_path / "vocabulary.csv").write_text("0,Rain,/m/3\n1,Bark,/m/2\n2,Accelerating,/m/1\n")
    (tmp_path / "dev.csv").write_text(
        'fname,labels,mids,split\n64760,"Bark,Accelerating","/m/2,/m/1",train\n16399,Bark,/m/2,val\n'
        "7,Moo,/m/9,train\nv1.2,Rain,/m/3,val\n8,Rain,/m/3,val\n"
    )
    options = {"columns": "path=fname,labels=labels,split=split", "suffix": ".wav"}
    source = read(tmp_path / "audio", tmp_path / "dev.csv", classes=tmp_path / "vocabulary.csv", **options)
    assert (source.task, source.label_ids) == ("tagging", ["/m/3", "/m/2", "/m/1"])
    assert names_of(source) == {"64760": ["Bark", "Accelerating"], "16399": ["Bark"], "v1%2E2": ["Rain"]}
    assert splits(source) == {"64760": "train", "16399": "val", "v1%2E2": "val"}
    assert reasons(source) == {
        "7.wav": ("wrong label", "Moo is not in vocabulary.csv"),
        "8.wav": ("missing", "no such file"),
    }
    by_mid = read(tmp_path / "audio", tmp_path / "dev.csv", classes=tmp_path / "vocabulary.csv",
                  columns="path=fname,labels=mids", suffix=".wav")  # fmt: skip
    assert names_of(by_mid) == names_of(source)
    assert source.notes == [
        f"{tmp_path}/audio: 5 sound files found, 4 matched, 1 unmatched: rest.wav",
        f"{tmp_path}/audio: 5 clips listed, 4 with a file, 1 without",
    ]


def test_a_list_without_header(tmp_path: Path) -> None:
    """VGGSound's form; some of its labels contain commas."""
    touch(tmp_path, "a.mp4", "b.mp4")
    listed = tmp_path.parent / f"{tmp_path.name}.csv"
    listed.write_text('a,30,"people marching",train\nb,0,"race car, auto racing",test\n')
    source = read(tmp_path, listed, columns="path=0,labels=2,split=3", suffix="mp4")
    assert names_of(source) == {"a": ["people marching"], "b": ["auto racing", "race car"]}
    source = read(tmp_path, listed, columns="path=0,label=2,split=3", suffix=".mp4")
    assert names_of(source) == {"a": ["people marching"], "b": ["race car, auto racing"]}
    assert (source.task, splits(source)) == ("classification", {"a": "train", "b": "test"})
    assert "--suffix .wav adds what is missing" in read(tmp_path, listed, columns="path=0,label=2").notes[-1]


@pytest.mark.parametrize(
    "columns", ["", "path=a", "labels=a", "path", "path=,labels=b", "name=a,labels=b", "path=a,path=b,labels=c",
                "path=a,labels=b,label=c", "path=a,labels=2"],
)  # fmt: skip
def test_columns_that_can_not_be(columns: str) -> None:
    with pytest.raises(UsageError, match=f"--columns {columns}: "):
        parse_columns(columns)


def test_options_that_do_not_fit(tmp_path: Path) -> None:
    touch(tmp_path, "dog/a.wav")
    for option in ({"columns": "path=a,label=b"}, {"label_separator": "|"}, {"suffix": ".wav"}):
        with pytest.raises(UsageError, match="are for a list; give it with --labels"):
            read(tmp_path, **option)
    (tmp_path / "mine.csv").write_text("fname,tags\na,b\n")
    with pytest.raises(UsageError, match="--label-separator: is empty"):
        read(tmp_path, tmp_path / "mine.csv", label_separator="")
    with pytest.raises(UserError, match=r"mine.csv:1: no column file; the required columns are file, tags"):
        read(tmp_path, tmp_path / "mine.csv", columns="path=file,labels=tags")
    with pytest.raises(UserError, match=r"mine.csv:1: no column path; the required columns are path, labels"):
        read(tmp_path, tmp_path / "mine.csv")


def test_the_hubs_audiofolder(tmp_path: Path) -> None:
    touch(tmp_path, "train/x.wav", "test/y.wav", "extra.wav", "train/.z.wav")
    (tmp_path / "metadata.csv").write_text('file_name,label\ntrain/x.wav,"dog, barking"\ntest/y.wav,cat\n')
    source = read(tmp_path)
    assert names_of(source) == {"train%2Fx": ["dog, barking"], "test%2Fy": ["cat"]}
    assert splits(source) == {"train%2Fx": "train", "test%2Fy": "test"}
    assert source.notes == [
        f"{tmp_path}: 3 sound files found, 2 matched, 1 unmatched: extra.wav",
        f"{tmp_path}: 2 clips listed, 2 with a file, 0 without",
        f"{tmp_path}: left out: 1 hidden (sound files and folders that begin with a dot)",
        f"{tmp_path}: skipped, not sound files by their names: 1 .csv",
    ]
    (tmp_path / "metadata.csv").write_text("file_name,transcription\ntrain/x.wav,hello\n")
    touch(tmp_path, "train/dog/x.wav", "test/cat/y.wav")
    source = read(tmp_path)
    assert source.label_ids == ["cat", "dog"]
    assert source.notes[0].startswith(f"{tmp_path}/metadata.csv: not used, as it has no columns file_name and label")


def test_a_list_may_name_clips_in_archives_and_files_elsewhere(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    tar_of(root / "a.tar", {"one.wav": sound_bytes(0.1), "two.wav": sound_bytes(0.2)})
    write_sounds(tmp_path, "outside.wav")
    (tmp_path / "mine.csv").write_text("path,labels\na.tar/one.wav,dog\n../outside.wav,cat\na.tar/three.wav,cat\n")
    source = read(root, tmp_path / "mine.csv")
    assert names_of(source) == {"a%2Etar%2Fone": ["dog"], "%2E%2E%2Foutside": ["cat"]}
    first = source.rows.to_pylist()[0]
    assert (first["path"], first["size"]) == (str(root / "a.tar").encode(), len(sound_bytes(0.1)))
    assert reasons(source) == {"a.tar/three.wav": ("missing", "no such file")}
    assert source.notes[0] == f"{root}: 2 sound files found, 1 matched, 1 unmatched: a.tar/two.wav"


def test_folders_named_as_splits(tmp_path: Path) -> None:
    touch(tmp_path, "Train/dog/a.wav", "Train/cat/deep/b.wav", "test/dog/a.wav", "test/stray.wav", "top.wav")
    source = read(tmp_path)
    assert source.label_ids == ["cat", "dog"]
    assert names_of(source) == {
        "Train%2Fdog%2Fa": ["dog"],
        "Train%2Fcat%2Fdeep%2Fb": ["cat"],
        "test%2Fdog%2Fa": ["dog"],
    }
    assert splits(source) == {"Train%2Fdog%2Fa": "Train", "Train%2Fcat%2Fdeep%2Fb": "Train", "test%2Fdog%2Fa": "test"}
    assert reasons(source) == dict.fromkeys(
        ("test/stray.wav", "top.wav"), ("wrong label", "is not in a class's folder")
    )
    (note,) = source.notes
    assert note.startswith(f"{tmp_path}: Train, test: splits by name, their sub-folders are the classes")
    before = read(tmp_path, labels_from_folders="all")
    assert (before.label_ids, before.notes) == (["Train", "test"], [])
    assert set(splits(before).values()) == {None}


def test_folders_that_are_classes_in_spite_of_their_names(tmp_path: Path) -> None:
    touch(tmp_path, "train/a.wav", "siren/b.wav", "rain/deep/c.wav")  # ESC-50 has a class train
    source = read(tmp_path)
    assert source.label_ids == ["rain", "siren", "train"]
    assert source.notes == [f"{tmp_path}: train: a class, as other folders are next to it"]


def test_splits_next_to_other_folders(tmp_path: Path) -> None:
    touch(tmp_path, "train/dog/a.wav", "dev/dog/b.wav", "docs/c.wav")
    source = read(tmp_path)
    assert names_of(source) == {"train%2Fdog%2Fa": ["dog"], "dev%2Fdog%2Fb": ["dog"]}
    assert reasons(source) == {"docs/c.wav": ("wrong label", "is not in a class's folder")}


def test_splits_without_classes(tmp_path: Path) -> None:
    touch(tmp_path, "train/a.wav", "test/b.wav")
    with pytest.raises(UserError, match="test, train: splits by name, without sub-folders.*--labels-from-folders all"):
        read(tmp_path)


def test_speech_commands(tmp_path: Path) -> None:
    touch(tmp_path, "yes/a.wav", "yes/b.wav", "no/a.wav", "no/c.wav", "_background_noise_/pink.wav", ".git/x.wav")
    (tmp_path / "validation_list.txt").write_text("yes/b.wav\nno/gone.wav\n")
    source = read(tmp_path)
    assert set(splits(source).values()) == {None}  # one list alone says nothing
    (tmp_path / "testing_list.txt").write_bytes(b"no/c.wav\r\n")
    source = read(tmp_path)
    assert source.label_ids == ["no", "yes"]
    assert splits(source) == {"yes%2Fa": "train", "yes%2Fb": "val", "no%2Fa": "train", "no%2Fc": "test"}
    assert source.notes == [
        f"{tmp_path}: validation_list.txt and testing_list.txt give the splits: 1 clip in val, 1 clip in test, the "
        "others in train; no file for 1 of their names",
        f"{tmp_path}: left out: 1 sound file in _background_noise_",
        f"{tmp_path}: left out: 1 hidden (sound files and folders that begin with a dot)",
        f"{tmp_path}: skipped, not sound files by their names: 2 .txt",
    ]
    assert source.files is not None
    assert (source.files.found, source.files.matched, source.files.examples) == (5, 4, ["_background_noise_/pink.wav"])
    before = read(tmp_path, labels_from_folders="all")
    assert before.label_ids == ["_background_noise_", "no", "yes"]
    assert set(splits(before).values()) == {None}


def test_folders_in_the_order_of_a_class_list(tmp_path: Path) -> None:
    touch(tmp_path / "set", "cat/a.wav", "dog/a.wav", "cow/a.wav")
    (tmp_path / "classes.txt").write_text("dog\n\ncat\n")
    source = read(tmp_path / "set", classes=tmp_path / "classes.txt")
    assert source.label_ids == ["dog", "cat"]
    assert names_of(source) == {"cat%2Fa": ["cat"], "dog%2Fa": ["dog"]}
    assert reasons(source) == {"cow/a.wav": ("wrong label", "cow is not in classes.txt")}


def test_a_set_of_a_split_tree_packed_before_is_known_with_the_option(tmp_path: Path) -> None:
    """Its rows, and so its hash, are those that an older version made of the same tree."""
    write_sounds(tmp_path / "in", "train/dog/a.wav", "test/dog/b.wav")
    source = read(tmp_path / "in", labels_from_folders="all")
    digest = "e24395c0498c8a0b94d053a527beafc9c9aebbe890385a7c1eebe089375d7a6f"
    assert is_known(source, digest)
    assert not is_known(read(tmp_path / "in"), digest)
    write_sounds(tmp_path / "sets", "dog/a.wav", "dog/b.wav", "cat/a.wav", "stray.wav")
    digest = "c0acc85d4f92e272037d0842c69c45220d6ae7c766900b6fcfb23ffd005dcd3b"
    assert is_known(read(tmp_path / "sets"), digest)


def test_a_listed_set_packed_before_is_known(tmp_path: Path) -> None:
    write_sounds(tmp_path / "in", "a.wav", "b.wav", "sub/c.wav", "rest.wav")
    (tmp_path / "mine.csv").write_text(LISTED_BEFORE)
    assert is_known(
        read(tmp_path / "in", tmp_path / "mine.csv"), "0088c737bb92deb0304d6e9e6a35cd68ecd0c7a8981d6fd3b9dfda91c02a61d1"
    )


LISTED_BEFORE = """path,labels,split,fold
a.wav,"dog, rain",train,1
./b.wav,dog;dog,test,2
sub/c.wav,12" vinyl,,
gone.wav,cat,,
b.wav,,,
a.flac,cat,,
"""


def is_known(source: Source, digest: str) -> bool:
    """Whether the source is that of a set with this hash and the default options."""
    options = {"sample_rate": 44_100, "codec": "flac", "clips_per_shard": 2500, "order": "shuffled",
               "min_seconds": 0.02, "skip_silent": False, "assign": "present"}  # fmt: skip
    ids, names = source.label_ids, source.label_names
    info = SetInfo("folder", source.task, ids, names, 44_100, "flac", {}, {}, options, digest, "")
    return build.Plan(source, Packing(), LocalFolder("anywhere")).is_of(info)


@pytest.mark.parametrize(
    ("name", "text", "ids", "names"),
    [
        ("c.txt", "Bee, wasp, etc.\n\nDog\n", ["Bee, wasp, etc.", "Dog"], ["Bee, wasp, etc.", "Dog"]),
        ("c.csv", '"Bee, wasp, etc."\nDog\n', ["Bee, wasp, etc.", "Dog"], ["Bee, wasp, etc.", "Dog"]),
        ("c.csv", "label\ndog\ncat\n", ["dog", "cat"], ["dog", "cat"]),
        ("c.csv", "0,dog\n1,cat\n", ["dog", "cat"], ["dog", "cat"]),
        ("c.csv", "name;id\ndog;5\ncat;6\n", ["dog", "cat"], ["dog", "cat"]),
        ("c.csv", "0,Dog_bark,/m/1\n1,Rain,/t/dd2\n", ["/m/1", "/t/dd2"], ["Dog_bark", "Rain"]),
        ("c.csv", 'index,mid,display_name\n0,/m/1,"Dog, bark"\n', ["/m/1"], ["Dog, bark"]),
    ],
)
def test_class_lists(tmp_path: Path, name: str, text: str, ids: list[str], names: list[str]) -> None:
    (tmp_path / name).write_text(text)
    found = read_class_list(tmp_path / name)
    assert (found.ids, found.names) == (ids, names)


def test_audiosets_own_class_list(real_data: Path) -> None:
    found = read_class_list(real_data / "audioset" / "class_labels_indices.csv")
    assert (len(found.ids), found.ids[0], found.names[1]) == (527, "/m/09x0r", "Male speech, man speaking")
    assert found.index()["Speech"] == found.index()["/m/09x0r"] == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "lists no class"), ("label\n", "lists no class"), ("dog\ndog\n", "lists the class 'dog' 2 times"),
     ("id,label\n0,dog\n1\n", "class 1 has no name")],
)  # fmt: skip
def test_class_lists_that_can_not_be(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.csv").write_text(text)
    with pytest.raises(UserError, match=f"c.csv: {message}"):
        read_class_list(tmp_path / "c.csv")


def test_a_million_labels_are_one_line(tmp_path: Path) -> None:
    touch(tmp_path, "dog/a.wav")
    (tmp_path / "mine.csv").write_text("path,labels\n" + "".join(f"{i}.wav,label{i}\n" for i in range(MAX_LABELS + 1)))
    with pytest.raises(UserError, match=r"mine.csv: 32,769 labels, a shard set can have 32,768"):
        read(tmp_path, tmp_path / "mine.csv")
    (tmp_path / "classes.txt").write_text("".join(f"{i}\n" for i in range(10**6)))
    with pytest.raises(UserError, match=r"classes.txt: 1,000,000 labels"):
        read(tmp_path, classes=tmp_path / "classes.txt")
    (tmp_path / "mine.csv").write_text('path,labels\na.wav,"' + ",".join(map(str, range(10**6))) + '"\n')
    with pytest.raises(UserError, match=r"mine.csv:2: field larger than field limit"):
        read(tmp_path, tmp_path / "mine.csv")


def test_the_real_esc10_list_as_ones_own(real_data: Path) -> None:
    root = real_data / "esc10"
    options = {"columns": "path=filename,label=category,fold=fold"}
    source = read(root / "audio", root / "meta" / "esc10.csv", **options)
    assert (source.task, len(source.label_ids), len(names_of(source))) == ("classification", 10, 400)
    assert Counter(source.rows["fold"].to_pylist()) == dict.fromkeys(range(1, 6), 80)
