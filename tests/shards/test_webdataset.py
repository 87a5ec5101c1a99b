"""WebDataset tars that others made, packed as they are: codecs, rates, patterns, labels in JSON, gzip, damage."""

import csv
import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from erann_dist.data.audio import load
from erann_dist.data.manifest import REPORT, load_manifest, read_info, read_table
from erann_dist.errors import UsageError, UserError
from erann_dist.storage.folder import LocalFolder
from shards.build import Plan, build_shard
from shards.clip import Packing
from shards.repair import repair_tasks
from shards.sources import tars
from shards.sources.class_lists import read_class_list
from shards.sources.data_sets import Options, read_source
from shards.sources.rows import Source
from shards.sources.samples import parse_fields
from shards.sources.tars import expand_braces, find_tars
from shards.sources.webdataset import read_webdataset
from tests.conftest import pack_here
from tests.shards.test_verify import foreign_tar, problems, sound

TAGS = parse_fields("json:tag")


def about(*tags: str, **more: object) -> bytes:
    """As in LAION's sets."""
    return json.dumps({"text": [f"the sound of {tag}" for tag in tags], "tag": list(tags), **more}).encode()


def encoded(path: Path, suffix: str, rate: int) -> bytes:
    """A real clip in another codec."""
    samples = load(path, rate).samples
    buffer = io.BytesIO()
    kinds = {"flac": ("FLAC", None), "mp3": ("MP3", None), "ogg": ("OGG", "VORBIS"), "opus": ("OGG", "OPUS")}
    if suffix in kinds:
        kind, subtype = kinds[suffix]
        soundfile.write(buffer, samples, rate, format=kind, subtype=subtype)
        return buffer.getvalue()
    with av.open(buffer, "w", format={"m4a": "mp4", "webm": "webm"}[suffix]) as out:
        stream = out.add_stream({"m4a": "aac", "webm": "libopus"}[suffix], rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        frame.sample_rate = rate
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            out.mux(packet)
    return buffer.getvalue()


def rows_of(source: Source, *columns: str) -> list[tuple[object, ...]]:
    return [tuple(row[name] for name in columns) for row in source.rows.to_pylist()]


def test_laions_layout_with_real_sound(real_data: Path, tmp_path: Path) -> None:
    """Each clip in another codec and rate; numbers start again in each tar."""
    with (real_data / "esc10" / "meta" / "esc10.csv").open() as file:
        lines = list(csv.DictReader(file))[::57][:6]
    kinds = [("flac", 48_000), ("mp3", 44_100), ("ogg", 44_100), ("opus", 48_000), ("m4a", 48_000), ("webm", 48_000)]
    seconds = []
    for tar in range(2):
        members: dict[str, bytes] = {}
        for number, (line, (suffix, rate)) in enumerate(zip(lines[tar * 3 :], kinds[tar * 3 :][:3], strict=False)):
            path = real_data / "esc10" / "audio" / line["filename"]
            members[f"{number}.{suffix}"] = encoded(path, suffix, rate)
            tags = [line["category"]] + ["animal"] * (line["category"] in ("dog", "rooster"))
            members[f"{number}.json"] = about(*tags, original_data={"fold": int(line["fold"])})
            seconds.append(soundfile.info(path).duration)
        foreign_tar(tmp_path / "audio" / f"{tar:03d}.tar", members)
    fields = parse_fields("json:tag", None, "json:original_data.fold")
    source = read_webdataset(str(tmp_path / "audio" / "{000..001}.tar"), fields)
    assert rows_of(source, "key", "reason") == [(f"00{tar}%2F{n}", None) for tar in range(2) for n in range(3)]
    folder = pack_here(source, tmp_path / "shards")
    assert problems(folder) == []
    manifest = load_manifest(folder)
    info = read_info(LocalFolder(str(folder)))
    assert (info.name, info.task, info.sample_rate) == ("webdataset", source.task, 44_100)
    table = {row["key"]: row for row in read_table(LocalFolder(str(folder)), "manifest.parquet").to_pylist()}
    assert len(manifest) == 6
    for i, (line, length) in enumerate(zip(lines, seconds, strict=True)):
        row = table[f"00{i // 3}%2F{i % 3}"]
        assert row["source"] == f"00{i // 3}.tar/{i % 3}.{kinds[i][0]}"
        assert line["category"] in [info.label_ids[label] for label in row["labels"]]
        assert row["fold"] == int(line["fold"])
        assert row["samples"] / 44_100 == pytest.approx(length, abs=0.1)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Two tars, one of them in a folder of its own."""
    foreign_tar(
        tmp_path / "audio" / "0.tar",
        {"a.flac": sound(0.1, 48_000), "a.json": about("dog"), "b.wav": sound(0.2, kind="WAV"), "b.json": about("cat")},
    )
    foreign_tar(
        tmp_path / "audio" / "more" / "1.tar",
        {"c.flac": sound(0.3, channels=2), "c.json": about("dog", split="eval"), "c.txt": b"a caption"},
    )
    return tmp_path / "audio"


def test_what_is_unusable_is_a_row_with_a_reason(small: Path, tmp_path: Path) -> None:
    foreign_tar(
        small / "2.tar",
        {
            "none.flac": sound(0.1),
            "notag.flac": sound(0.1),
            "notag.json": json.dumps({"text": "x"}).encode(),
            "empty.flac": b"",
            "empty.json": about("cat"),
            "broken.flac": sound(0.1)[:50],
            "broken.json": about("cat"),
            "alone.json": about("cat"),
            "a.flac": sound(0.1, 48_000),
            "a.json": about("dog"),
            "README.md": b"hello",
        },
    )
    source = read_webdataset(str(small), TAGS)
    assert source.task == "classification"
    assert {name: (reason, detail) for name, reason, detail in rows_of(source, "source", "reason", "detail")} == {
        "0.tar/a.flac": (None, None),
        "0.tar/b.wav": (None, None),
        "2.tar/none.flac": ("wrong label", "no json next to it"),
        "2.tar/notag.flac": ("wrong label", "its json has no tag; its keys are text"),
        "2.tar/empty.flac": (None, None),
        "2.tar/broken.flac": (None, None),
        "2.tar/alone": ("missing", "no sound next to its annotations"),
        "2.tar/a.flac": ("duplicate", "0.tar/a.flac has the same key"),
        "2.tar/README": ("missing", "no sound next to its annotations"),
        "more/1.tar/c.flac": (None, None),
    }
    folder = pack_here(source, tmp_path / "shards")
    report = read_table(LocalFolder(str(folder)), REPORT)
    reasons = dict(zip(report["key"].to_pylist(), report["reason"].to_pylist(), strict=True))
    assert (reasons["empty"], reasons["broken"], len(report)) == ("empty", "unreadable", 7)
    assert load_manifest(folder).keys.to_pylist().count("a") == 1
    assert any("10 samples in 3 tars, 2 without sound" in note for note in source.notes)


def test_a_broken_copy_hides_no_good_one(tmp_path: Path) -> None:
    """The first sample of a name has no label in the class list, the second has."""
    foreign_tar(tmp_path / "0.tar", {"a.flac": sound(0.1), "a.cls": b"cow", "b.flac": sound(0.1), "b.cls": b"dog"})
    (tmp_path / "classes.txt").write_text("dog\n")
    foreign_tar(tmp_path / "1.tar", {"a.flac": sound(0.2), "a.cls": b"dog"})
    source = read_webdataset(str(tmp_path), parse_fields("cls"), tmp_path / "classes.txt")
    assert rows_of(source, "key", "reason") == [("0%2Fa", "wrong label"), ("b", None), ("1%2Fa", None)]


def test_a_set_is_repaired_from_the_tars(small: Path, tmp_path: Path) -> None:
    source = read_webdataset(str(small), TAGS)
    folder = LocalFolder(str(pack_here(source, tmp_path / "shards", clips_per_shard=2)))
    tar = Path(folder.url) / "webdataset-000001.tar"
    before = tar.read_bytes()
    tar.write_bytes(before[:5000])
    (found,) = problems(tmp_path / "shards")
    assert "webdataset-000001.tar: truncated" in found
    (task,) = repair_tasks(folder, read_source("webdataset", Options(tars=str(small), labels=Path("json:tag"))), [1])
    build_shard(task)
    assert tar.read_bytes() == before
    with pytest.raises(UserError, match="was packed from another source"):
        repair_tasks(folder, read_webdataset(str(small / "more"), TAGS), [1])


def test_where_the_tars_are_does_not_change_the_set(small: Path, tmp_path: Path) -> None:
    def digest(pattern: Path) -> str:
        return Plan(read_webdataset(str(pattern), TAGS), Packing(), LocalFolder("any")).digest

    before = digest(small)
    assert digest(small / "{0,more/1}.tar") == before
    assert digest(small / "**" / "*.tar") == before
    assert digest(small / "0.tar") != before
    small.rename(tmp_path / "moved")
    assert digest(tmp_path / "moved") == before


def test_gzipped_tars_are_unpacked_first(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = pack_here(read_webdataset(str(small), TAGS), tmp_path / "plain")
    for tar in small.rglob("*.tar"):
        tar.with_suffix(".tar.gz").write_bytes(gzip.compress(tar.read_bytes()))
        tar.unlink()
    # One with the wrong suffix.
    (small / "0.tar.gz").rename(small / "0.tar")
    source = read_webdataset(str(small), TAGS)
    packed = pack_here(source, tmp_path / "packed")
    assert (packed / "webdataset-000000.tar").stat().st_size >= (plain / "webdataset-000000.tar").stat().st_size
    crcs = [dict(zip(m.keys.to_pylist(), m.crc32s.tolist(), strict=True)) for m in map(load_manifest, (plain, packed))]
    assert crcs[0] == crcs[1]
    assert "more/1.tar.gz/c.flac" in source.rows["source"].to_pylist()

    cut = small / "more" / "1.tar.gz"
    cut.write_bytes(cut.read_bytes()[:-2000])
    assert "1.tar.gz: damaged after its" in " ".join(read_webdataset(str(small), TAGS).notes)
    monkeypatch.setattr(tars, "_FREE_BYTES", 10**18)
    with pytest.raises(UserError, match=r"tar: not enough space to unpack it to .*; set TMPDIR"):
        read_webdataset(str(small), TAGS)


def test_unpacked_tars_are_removed(small: Path, tmp_path: Path) -> None:
    (small / "0.tar.gz").write_bytes(gzip.compress((small / "0.tar").read_bytes()))
    script = f"""
import tempfile
from shards.sources.samples import Fields
from shards.sources.tars import find_tars, open_tar
file, path = open_tar(find_tars({str(small / "0.tar.gz")!r})[0])
assert open(path, "rb").read() == file.read() == open({str(small / "0.tar")!r}, "rb").read()
assert path.startswith(tempfile.gettempdir().encode())
"""
    (tmp_path / "tmp").mkdir()
    subprocess.run([sys.executable, "-c", script], env=os.environ | {"TMPDIR": str(tmp_path / "tmp")}, check=True)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_damaged_tars_are_named(small: Path) -> None:
    tar = small / "0.tar"
    data = tar.read_bytes()
    tar.write_bytes(data[: data.index(b"b.wav") + 600])
    source = read_webdataset(str(small), TAGS)
    assert f"{tar}: damaged after its 2 readable samples" in source.notes[0]
    assert rows_of(source, "key", "reason")[0] == ("a", None)
    for other in (b"", b"text" * 500):
        tar.write_bytes(other)
        with pytest.raises(UserError, match=r"no sound file in 1 tars; .*0\.tar: damaged after its 0"):
            read_webdataset(str(tar), TAGS)


def test_members_are_never_links(tmp_path: Path) -> None:
    foreign_tar(tmp_path / "0.tar", {"a.flac": sound(0.1), "a.cls": b"x"})
    with tarfile.open(tmp_path / "0.tar", "a") as tar:
        for name, kind in (("b.flac", tarfile.SYMTYPE), ("c.flac", tarfile.LNKTYPE), ("a.json", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.flac"
            tar.addfile(info)
    source = read_webdataset(str(tmp_path), parse_fields())
    assert rows_of(source, "key", "reason") == [("a", None), ("b", "unreadable"), ("c", "unreadable")]


def test_captions_are_refused_before_anything_starts(tmp_path: Path) -> None:
    members = {}
    for i in range(120):
        members |= {f"{i}.flac": b"-", f"{i}.txt": f"caption {i}".encode(), f"{i}.json": about(f"{i % 3}")}
    foreign_tar(tmp_path / "0.tar", members)
    with pytest.raises(UserError, match="120 different labels in 120 clips.*captions.*--labels json:KEY.*--classes"):
        read_webdataset(str(tmp_path), parse_fields())
    assert len(read_webdataset(str(tmp_path), TAGS).label_ids) == 3


def test_a_class_list(small: Path, tmp_path: Path) -> None:
    lines = tmp_path / "classes.txt"
    lines.write_bytes("\ufeffdog\r\nBee, wasp, etc.\r\ncat\r\n".encode())
    assert read_class_list(lines).names == ["dog", "Bee, wasp, etc.", "cat"]
    source = read_webdataset(str(small), TAGS, lines)
    assert rows_of(source, "labels") == [([0],), ([2],), ([0],)]
    audiosets = tmp_path / "classes.csv"
    audiosets.write_text('index,mid,display_name\n0,/m/1,cat\n1,/m/2,"Bee, wasp, etc."\n')
    source = read_webdataset(str(small), TAGS, audiosets)
    assert source.label_ids == ["/m/1", "/m/2"]
    assert rows_of(source, "labels", "detail") == [
        ([], "dog is not in the class list"),
        ([0], None),
        ([], "dog is not in the class list"),
    ]


def test_one_line_for_each_mistake(small: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    foreign_tar(tmp_path / "silent.tar", {"a.json": about("x")})
    for pattern, message in (
        (tmp_path / "empty", r"empty: no \.tar or \.tar\.gz or \.tgz"),
        (small / "{0,5}.tar", r"no \.tar .* file at .*5\.tar"),
        (small / "x*.tar", "no .tar"),
        (small / "{0..99999999}.tar", "names more than 100,000 tars"),
        (small / "{{0..999},}{0..999}{0..999}.tar", "names more than 100,000 tars"),
    ):
        with pytest.raises(UsageError, match=message):
            read_webdataset(str(pattern), TAGS)
    with pytest.raises(UsageError, match="in S3 and others are not"):
        find_tars(f"{{s3://b/x.tar,{small}/0.tar}}")
    with pytest.raises(UserError, match="no sound file in 1 tars"):
        read_webdataset(str(tmp_path / "silent.tar"), TAGS)
    with pytest.raises(
        UserError, match=r"no clip has a label \(a\.flac: its json has no tags; its keys are text, tag\)"
    ):
        read_webdataset(str(small), parse_fields("json:tags"))
    with pytest.raises(UserError, match="no clip has a fold at --fold json:folds"):
        read_webdataset(str(small), parse_fields("json:tag", None, "json:folds"))
    with pytest.raises(UsageError, match="s3://bucket/prefix, not https://"):
        find_tars("https://host/{0..3}.tar")
    with pytest.raises(UsageError, match="credentials do not belong in a URL") as refused:
        find_tars("s3://me:secret@bucket/0.tar")
    assert "secret" not in str(refused.value)
    (small / "more" / "2.tar.zst").touch()
    for pattern in (small, small / "more" / "2.tar.zst"):
        with pytest.raises(UsageError, match=r"2\.tar\.zst: only \.tar, \.tar\.gz, \.tgz files can be read"):
            read_webdataset(str(pattern), TAGS)
    with pytest.raises(UsageError, match="webdataset needs --tars"):
        read_source("webdataset", Options())
    with pytest.raises(UsageError, match="--fold json: not a place in a sample"):
        read_source("webdataset", Options(tars=str(small), fold="json"))


def test_progress(small: Path) -> None:
    shown: list[str] = []
    read_webdataset(str(small), TAGS, on_progress=shown.append)
    assert shown == ["reading tar 1 of 2, 2 samples", "reading tar 2 of 2, 3 samples"]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.sampled_from(["a", "x-", "/", "{}", "{x}"]),
            st.tuples(st.integers(0, 20), st.integers(0, 20), st.booleans()).map(
                lambda r: f"{{{r[0]:0{3 * r[2]}d}..{r[1]:0{3 * r[2]}d}}}"
            ),
            st.lists(st.sampled_from(["a", "b", "07", "{1..3}"]), min_size=2, max_size=3).map(
                lambda choices: "{" + ",".join(choices) + "}"
            ),
        ),
        max_size=3,
    ).map("".join)
)
def test_braces_are_those_of_the_library(pattern: str) -> None:
    from braceexpand import braceexpand

    assert set(expand_braces(pattern)) == set(braceexpand(pattern))
    if "," not in pattern:
        assert expand_braces(pattern) == list(dict.fromkeys(braceexpand(pattern)))


def test_steps_and_order() -> None:
    assert expand_braces("{00..10..5}/{b,a}") == ["00/b", "00/a", "05/b", "05/a", "10/b", "10/a"]
    assert expand_braces("{3..1}") == ["3", "2", "1"]


def test_levels_survive(tmp_path: Path) -> None:
    """The right member is packed under each key, from anywhere in a tar."""
    levels = {f"{i}": round(0.1 + i / 20, 2) for i in range(8)}
    members: dict[str, bytes] = {}
    for key, level in levels.items():
        buffer = io.BytesIO()
        soundfile.write(buffer, np.full(4410, level), 44_100, format="WAV")
        members |= {
            f"x.y/{key}.v1.wav": buffer.getvalue(),
            f"x.y/{key}.v1.cls": b"even" if int(key) % 2 == 0 else b"odd",
        }
    foreign_tar(tmp_path / "0.tar", members)
    folder = pack_here(read_webdataset(str(tmp_path / "0.tar"), parse_fields()), tmp_path / "shards")
    with tarfile.open(folder / "webdataset-000000.tar") as tar:
        for key, level in levels.items():
            name = f"x%2Ey%2F{key}%2Ev1"
            assert soundfile.read(io.BytesIO(tar.extractfile(f"{name}.flac").read()))[0].mean() == pytest.approx(
                level, abs=1e-3
            )
            described = json.loads(tar.extractfile(f"{name}.json").read())
            assert described["labels"] == [["even", "odd"][int(key) % 2]]
