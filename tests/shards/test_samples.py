"""Which members of a tar are a sample, which labels it has, and how its key becomes unique."""

import io
import json
import tarfile
from pathlib import Path

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys, tar_file_iterator

from erann_dist.errors import UsageError, UserError
from shards.sources.class_lists import ClassList
from shards.sources.samples import Fields, Sample, label_space, parse_fields, read_samples, unique_names


def tar_of(*members: tuple[str, bytes]) -> io.BytesIO:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    file.seek(0)
    return file


def samples_of(*members: tuple[str, bytes], fields: Fields | None = None, number: int = 0) -> list[Sample]:
    found, damage = read_samples(tar_of(*members), number, fields or Fields())
    assert damage == ""
    return found


def labels_of(*members: tuple[str, bytes], fields: Fields | None = None) -> list[tuple[str, tuple[str, ...]]]:
    return [(sample.name, sample.labels) for sample in samples_of(*members, fields=fields)]


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        # A second sound and a second annotation begin a second sample.
        ("a.flac a.cls=dog a.flac a.cls=cat", "a:dog a:cat"),
        ("a.cls=dog a.flac a.cls=cat a.flac", "a:dog a:cat"),
        ("a.flac a.cls=dog b.flac b.cls=cow a.flac a.cls=cat", "a:dog b:cow a:cat"),
        ("a.flac a.cls=dog b.flac b.cls=cow a.flac", "a:dog b:cow a:"),
        ("a.flac b.flac a.cls=dog b.cls=cat", "a:dog b:cat"),
        ("a.flac a.wav a.cls=dog", "a:dog a:dog"),
        ("a.flac a.cls=dog a.cls=cat", "a:dog a:cat"),
        # Keys with dots.
        ("clip.v1.flac clip.v1.cls=dog clip.v2.flac clip.v2.cls=cat", "clip.v1:dog clip.v2:cat"),
        ("Mr. A.flac Mr. A.cls=dog Mr. B.cls=cat", "Mr. A:dog Mr. B:cat"),
        ("1.audio.flac 1.cls=dog", "1.audio:dog"),
        ("1.left.flac 1.right.flac 1.cls=dog", "1.left:dog 1.right:dog"),
        ("1.left.flac 1.left.cls=cat 1.right.flac 1.cls=dog", "1.left:cat 1.right:dog"),
        ("1.flac 1.cls=dog 1.v2.flac", "1:dog 1.v2:"),
        ("a.b/1.flac a.b/1.cls=dog a.c/1.flac a.c/1.cls=cat", "a.b/1:dog a.c/1:cat"),
        # What is no sound, label or sample.
        ("1.flac 1.meta.cls=dog 1.cls=cat", "1:cat"),
        ("1.flac 1.cls=dog 1.jpg 1.seg.jpg 1", "1:dog"),
        ("1.jpg 1.seg.jpg 2.cls=dog", "2:dog 1:"),
        ("._1.flac .flac d/.flac 1.flac 1.cls=dog", "1:dog"),
        ("./1.FLAC ./1.CLS=dog", "1:dog"),
    ],
)
def test_which_members_are_a_sample(members: str, expected: str) -> None:
    names = [part.partition("=") for part in members.replace("Mr. ", "Mr._").split()]
    found = labels_of(*((name.replace("_", " ") if "Mr" in name else name, text.encode()) for name, _, text in names))
    assert " ".join(f"{name}:{','.join(labels)}" for name, labels in found) == expected


NAMES = st.text("ab1-_ é", min_size=1, max_size=6).filter(lambda name: name.strip() == name)


@settings(max_examples=40, deadline=None)
@given(
    clips=st.dictionaries(
        st.tuples(st.sampled_from(["", "x/", "x.y/z/"]), NAMES), st.sampled_from(["flac", "mp3", "OGG"]), min_size=1
    ),
    data=st.data(),
)
def test_webdataset_groups_the_same_members(clips: dict[tuple[str, str], str], data: st.DataObject) -> None:
    """Without dots in the keys, both rules are one. The library pairs members that follow each other."""
    members = []
    for (folder, name), suffix in clips.items():
        text = json.dumps({"tag": data.draw(st.lists(st.sampled_from("pqr")))}).encode()
        own = [(f"{folder}{name}.{suffix}", b"sound"), (f"{folder}{name}.json", text), (f"{folder}{name}.seg.jpg", b"")]
        members += data.draw(st.permutations(own))
    theirs = {}
    files = (file | {"__url__": "x.tar"} for file in tar_file_iterator(tar_of(*members), skip_meta=None))
    for sample in group_by_keys(files):
        theirs[sample["__key__"]] = tuple(sorted(set(json.loads(sample["json"])["tag"])))
    ours = labels_of(*members, fields=parse_fields("json:tag"))
    assert ours == list(theirs.items())


def test_what_the_library_writes(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "x.tar")) as writer:
        writer.write({"__key__": "x/1", "flac": b"s", "cls": 10})
        writer.write({"__key__": "x/2", "audio.flac": b"s", "meta.json": {"about": {"tags": ["p", "q"]}}})
    with (tmp_path / "x.tar").open("rb") as file:
        named = [(s.name, s.labels, bool(s.sound)) for s in read_samples(file, 0, Fields())[0]]
        assert named == [("x/1", ("10",), True), ("x/2.audio", (), True), ("x/2.meta", (), False)]
        file.seek(0)
        found, _ = read_samples(file, 0, parse_fields("meta.json:about.tags"))
    assert [(s.name, s.labels) for s in found] == [("x/1", ()), ("x/2.audio", ("p", "q"))]


ABOUT = {"tag": ["b", "a", "b", None, " "], "meta": {"tags": "x", "n": 7}, "meta.tags": ["dotted"], "empty": []}
ABOUT |= {"list": [{"name": "p"}, {"name": "q"}], "object": {"a": 1}, "fold": 3, "split": "train"}


@pytest.mark.parametrize(
    ("place", "labels", "problem"),
    [
        ("json:tag", "a b", ""),
        ("json:meta.n", "7", ""),
        ("json:meta.tags", "dotted", ""),
        ("json:list.name", "p q", ""),
        ("json:tags", "", "its json has no tags; its keys are tag, meta, meta.tags, empty, list, object, fold, split"),
        ("json:empty", "", "its json has no empty; its keys are"),
        ("json:object", "", "object in its json is an object, not a label"),
        ("cls", "", "no cls next to it"),
        ("other.json:tag", "", "no other.json next to it"),
    ],
)
def test_labels_at_a_path(place: str, labels: str, problem: str) -> None:
    (sample,) = samples_of(("1.flac", b""), ("1.json", json.dumps(ABOUT).encode()), fields=parse_fields(place))
    assert sample.labels == tuple(labels.split())
    assert sample.problem.startswith(problem)
    assert bool(sample.problem) == bool(problem)
    assert (sample.split, sample.fold) == ("train", 3)


def test_split_and_fold_are_elsewhere() -> None:
    about = json.dumps({"tag": "x", "original_data": {"split": "dev", "fold": "05"}}).encode()
    fields = parse_fields("json:tag", "json:original_data.split", "json:original_data.fold")
    (sample,) = samples_of(("1.flac", b""), ("1.json", about), fields=fields)
    assert (sample.split, sample.fold) == ("dev", 5)
    for fold in ("128", "-1", "x", "1.5", "²"):
        (sample,) = samples_of(("1.flac", b""), ("1.json", json.dumps({"label": "x", "fold": fold}).encode()))
        assert sample.fold is None


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_encodings_and_line_ends(encoding: str) -> None:
    text = "Hündin\r\nBärin\r\n".encode(encoding)
    assert labels_of(("1.flac", b""), ("1.cls", text)) == [("1", ("Bärin", "Hündin"))]
    about = json.dumps({"label": "Hündin"}, ensure_ascii=False).encode(encoding)
    assert labels_of(("1.flac", b""), ("1.json", about)) == [("1", ("Hündin",))]


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("1.cls", b"caf\xe9", "its cls is not text in UTF-8 or UTF-16"),
        ("1.cls", b"", "no label"),
        ("1.cls", "\ufeff".encode(), "no label"),
        ("1.json", b"{", "its json is not JSON"),
        ("1.json", b"", "its json is not JSON"),
        ("1.json", b"[3]", "no label"),
        ("1.json", b'{"text": "x"}', "its json has no labels or label; its keys are text"),
        ("1.json", b" " * 1_000_001, "its json has more than 1,000,000 bytes"),
    ],
)
def test_why_there_is_no_label(name: str, data: bytes, problem: str) -> None:
    (sample,) = samples_of(("1.flac", b""), (name, data))
    assert (sample.labels, sample.problem) == ((), problem)


@pytest.mark.parametrize("place", ["json", "json:", "tag:x", "cls:x", ":tag", "a/b", "flac", "x.wav", "é é"])
def test_no_place_of_labels(place: str) -> None:
    with pytest.raises(UsageError, match="--labels .*expected: json:KEY"):
        parse_fields(place)


def test_a_damaged_tar_gives_what_comes_before() -> None:
    data = tar_of(("1.flac", b"s"), ("1.cls", b"dog"), ("2.flac", bytes(5000)), ("2.cls", b"cat")).getvalue()
    end = data.index(b"2.cls")
    damaged = bytearray(data)
    damaged[end + 150] ^= 1  # a header's checksum
    for cut in (data[:end], data[: end + 100], bytes(damaged), data[:4000]):
        found, damage = read_samples(io.BytesIO(cut), 0, Fields())
        assert found[0].labels == ("dog",)
        assert damage
    assert read_samples(io.BytesIO(b"text" * 500), 0, Fields())[1]


def names_of(*tars: tuple[str, tuple[tuple[str, bytes], ...]]) -> list[str]:
    samples = [each for number, (_, members) in enumerate(tars) for each in samples_of(*members, number=number)]
    return unique_names(samples, [name for name, _ in tars])


def test_equal_names_become_unique() -> None:
    dog, cat = ("1.cls", b"dog"), ("1.cls", b"cat")
    long, short = ("1.flac", b"long"), ("1.flac", b"s")
    # Only what differs is another sample: in another tar it gets the tar's name, in the same one a number.
    assert names_of(("train/0", (long, dog)), ("eval/0", (short, dog))) == ["train/0/1", "eval/0/1"]
    assert names_of(("train/0", (long, dog)), ("eval/0", (long, cat))) == ["train/0/1", "eval/0/1"]
    assert names_of(("train/0", (long, dog)), ("eval/0", (long, dog))) == ["1", "1"]
    assert names_of(("0", (long, dog, short, cat, long, dog))) == ["1", "1#2", "1"]
    assert names_of(("0", (short, long, dog))) == ["1", "1"]  # two sounds for one annotation are copies
    assert names_of(("0", (long, dog, short, cat)), ("1", (short, dog))) == ["0/1", "0/1#2", "1/1"]
    # A name that is taken is not given again.
    assert names_of(("0", (long, dog)), ("1", (short, cat, ("0/1.flac", b"x")))) == ["0/1#2", "1/1", "0/1"]
    # Labels without a sound change nobody's name.
    assert names_of(("0", (long, dog)), ("1", (cat,))) == ["1", "1"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["a", "b", "0/a", "a#2"]), st.sampled_from("xy"))))
def test_names_are_unique_but_for_the_same_sample(made: list[tuple[int, str, str]]) -> None:
    made = sorted(made, key=lambda each: each[0])
    samples = [samples_of((f"{n}.flac", b""), (f"{n}.cls", label.encode()), number=tar)[0] for tar, n, label in made]
    names = unique_names(samples, ["0", "1", "2"])
    content = [(sample.name, sample.labels) for sample in samples]
    assert len(set(names)) == len(set(content))
    assert len(set(zip(names, content, strict=True))) == len(set(content))


def clips(*labels: tuple[str, ...]) -> list[Sample]:
    return [
        samples_of((f"{i}.flac", b""), (f"{i}.cls", "\n".join(texts).encode()))[0] for i, texts in enumerate(labels)
    ]


def test_captions_are_no_classes() -> None:
    captions = clips(*((f"a dog barks {i} times",) for i in range(101)))
    with pytest.raises(
        UserError, match=r"x: 101 different labels in 101 clips, such as 'a dog barks 0 times': captions"
    ):
        label_space("x", captions, None)
    assert len(label_space("x", captions[:100], None).ids) == 100  # too few to know
    ids = [f"a dog barks {i} times" for i in range(101)]
    assert label_space("x", captions, ClassList("", ids, ids)).ids == ids
    # Many rare tags are not captions, when clips also share some.
    rare = clips(*((f"tag {i}", f"tag {i} too", ("Music", "Speech")[i % 2]) for i in range(200)))
    assert len(label_space("x", rare, None).ids) == 402
    # Nor are ten classes of ten clips each, next to some that occur once.
    assert len(label_space("x", clips(*((f"{i if i < 50 else i % 10}",) for i in range(150))), None).ids) == 50


def test_the_order_of_labels() -> None:
    found = label_space("x", clips(("10",), ("9",), ("dog",), ("Cat",)), None)
    assert found.ids == ["9", "10", "Cat", "dog"]
    given_ = label_space("x", clips(("Dog",), ("/m/2",)), ClassList("", ["/m/1", "/m/2"], ["Dog", "Cat"]))
    assert [given_.place[name] for name in ("/m/1", "Dog", "/m/2", "Cat")] == [0, 0, 1, 1]
    assert given_.unknown(("Dog", "Cow")) == "Cow"
    with pytest.raises(
        UserError, match=r"x: no clip has a label \(0\.flac: no label\); give their place with --labels"
    ):
        label_space("x", samples_of(("0.flac", b"")), None)
