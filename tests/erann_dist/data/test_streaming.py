"""One pass over the tars: each clip once over all workers, with its bytes; what is damaged is one clear line."""

import io
import tarfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from erann_dist.data.clip_reader import BadClip
from erann_dist.data.manifest import MANIFEST, Manifest, concatenate, load_manifest
from erann_dist.data.streaming import decode_clips, register_s3_opener, stream_clips
from erann_dist.errors import UsageError, UserError
from erann_dist.storage.folder import LocalFolder
from shards.index import index
from shards.sources.audioset import read_audioset
from tests.conftest import copy_tree, pack_here, write_tone_set
from tests.shards.test_verify import change_table, sound

CLIPS = 10


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same ten clips in 1, 2, … 5 tars."""
    root = tmp_path_factory.mktemp("sets")
    source = read_audioset(*write_tone_set(root, CLIPS, seconds=0.2))
    return [pack_here(source, root / f"{tars}", clips_per_shard=-(-CLIPS // tars)) for tars in (1, 2, 3, 4, 5)]


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tars as others make them, indexed: long names that are not ASCII, folders, other members, twins, WAV."""
    folder = tmp_path_factory.mktemp("foreign")

    def wav(samples: int) -> bytes:
        return sound(samples / 44_100, kind="WAV", subtype="PCM_16")

    long = "Bäume/" * 30 + "eine Straße, ".replace(" ", "_") * 12
    write_tar(
        folder / "a.tar",
        [
            ("README", b"no sample"),
            ("Hund/Bellen 1.wav", wav(300)),
            ("Hund/Bellen 1.cls", b"1"),
            (f"{long}1.wav", wav(301)),
            (f"{long}1.cls", b"2"),
            ("__meta__/x.wav", wav(302)),
            ("__meta__/x.cls", b"1"),
            ("twice.wav", b"not the one that can be used"),
            ("twice.wav", wav(305)),
            ("twice.cls", b"1"),
            ("other.flac", sound(0.01)),
            ("other.cls", b"1"),
            ("picture.seg.jpg", bytes(3000)),
            (f"{long}2.WAV", wav(303)),
            (f"{long}2.cls", b"2"),
            ("nolabel.wav", wav(304)),
            ("same.wav", wav(304)),
            ("same.cls", b"1"),
        ],
        tarfile.PAX_FORMAT,
    )
    members = [
        (f"{long}{i}.{kind}", wav(400 + i) if kind == "wav" else b"2") for i in (3, 4) for kind in ("cls", "wav")
    ]
    write_tar(folder / "b.tar", [*members, ("last", b"no sample")], tarfile.GNU_FORMAT)
    list(index(LocalFolder(str(folder)), None))
    return folder


def write_tar(path: Path, members: list[tuple[str, bytes]], form: int) -> None:
    with tarfile.open(path, "w", format=form, pax_headers={"comment": "for all"}) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def true_clips(manifest: Manifest) -> dict[int, bytes]:
    """Row -> bytes, by offset with Python's tarfile."""
    members: dict[tuple[int, int], bytes] = {}
    for number, path in enumerate(manifest.tars):
        with tarfile.open(str(path)) as tar:
            members |= {(number, m.offset_data): tar.extractfile(m).read() for m in tar if m.isreg() and m.size}
    places = zip(manifest.shards.tolist(), manifest.offsets.tolist(), strict=True)
    return {row: members[place] for row, place in enumerate(places)}


def streamed(manifest: Manifest, workers: int = 1) -> list[list[tuple[int, bytes]]]:
    """What each worker gets."""
    return [[(clip.row, clip.data) for clip in stream_clips(manifest, rank, workers)] for rank in range(workers)]


def assert_each_once(manifest: Manifest, workers: int) -> None:
    parts = streamed(manifest, workers)
    clips = [clip for part in parts for clip in part]
    rows = [row for row, _ in clips]
    assert rows == np.lexsort((manifest.offsets, manifest.shards)).tolist()  # every row once, in the tars' order
    assert dict(clips) == true_clips(manifest)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


@settings(max_examples=40, deadline=None)
@given(data=st.data(), tars=st.integers(1, 5), workers=st.integers(1, 12))
def test_each_clip_once_over_all_workers(sets: list[Path], data: st.DataObject, tars: int, workers: int) -> None:
    manifest = load_manifest(sets[tars - 1])
    if data.draw(st.booleans()):
        manifest = concatenate([manifest, load_manifest(sets[data.draw(st.integers(0, 4))])])
    keep = data.draw(st.lists(st.booleans(), min_size=len(manifest), max_size=len(manifest)))
    assert_each_once(manifest.select(np.array(keep)), workers)


@pytest.mark.parametrize("workers", [1, 2, 3, 5, 12])
def test_tars_made_by_others(foreign: Path, workers: int) -> None:
    manifest = load_manifest(foreign)
    assert len(manifest) == 8
    assert {"Hund%2FBellen%201", "__meta__%2Fx", "twice", "same"} <= set(manifest.keys.to_pylist())
    assert_each_once(manifest, workers)
    for row in range(len(manifest)):
        assert_each_once(manifest.select(np.arange(len(manifest)) == row), 2)


def test_the_order_of_the_manifest_does_not_matter(sets: list[Path], tmp_path: Path) -> None:
    folder = copy_tree(sets[2], tmp_path / "turned")
    table = pq.read_table(folder / MANIFEST)
    pq.write_table(table.take(np.random.default_rng(0).permutation(CLIPS)), folder / MANIFEST)
    assert_each_once(load_manifest(folder), 3)


def test_the_pages_example_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = tmp_path / "shard-sets" / "esc10"
    shards.mkdir(parents=True)
    about = [(f"{fold}-a", f'{{"label": "dog", "fold": {fold}}}'.encode()) for fold in (4, 5, 5, 5)]
    clips = [(f"{name}{i}", text, sound(0.1 + i / 10)) for i, (name, text) in enumerate(about)]
    members = [m for name, text, flac in clips for m in ((f"{name}.flac", flac), (f"{name}.json", text))]
    write_tar(shards / "esc10-000000.tar", members, tarfile.GNU_FORMAT)
    list(index(LocalFolder(str(shards)), None))
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[3] / "docs" / "guide" / "trained-model.md").read_text()
    exec(page.partition("## One pass over a set")[2].split("```python\n")[1].split("```")[0], {})
    assert {p.name: p.read_bytes() for p in tmp_path.glob("*.flac")} == {f"{n}.flac": flac for n, _, flac in clips[1:]}


def test_only_the_workers_part_of_a_tar_is_read(sets: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = load_manifest(sets[0])
    asked: list[tuple[int, int]] = []
    stream = LocalFolder.stream

    def watched(self: LocalFolder, name: str, start: int = 0, end: int | None = None) -> object:
        asked.append((start, end))
        return stream(self, name, start, end)

    monkeypatch.setattr(LocalFolder, "stream", watched)
    streamed(manifest, 4)
    assert len(asked) == 4
    assert all(after >= end > start for (start, end), (after, _) in pairwise(asked))
    assert all(after - end < 512 for (_, end), (after, _) in pairwise(asked))


def failure(manifest: Manifest, workers: int = 1) -> tuple[int, str]:
    """How many clips came, and the one line after them."""
    came: list[int] = []
    with pytest.raises(UserError) as error:
        came.extend(clip.row for rank in range(workers) for clip in stream_clips(manifest, rank, workers))
    line = str(error.value)
    assert "\n" not in line
    return len(came), line


def test_a_truncated_tar_is_an_error_iff_a_clip_is_lost(sets: list[Path], tmp_path: Path) -> None:
    folder = copy_tree(sets[1], tmp_path / "cut")
    manifest = load_manifest(folder)
    tar = folder / Path(manifest.tars[0].name)
    whole = tar.read_bytes()
    with tarfile.open(tar) as opened:
        members = opened.getmembers()
        blocks = {m.offset for m in members} | {m.offset_data for m in members} | {opened.offset}
    ends = (manifest.offsets + manifest.sizes)[manifest.shards == 0]
    cuts = blocks | {int(end) + d for end in ends for d in (-1, 0, 1)} | {b + d for b in blocks for d in (-1, 1)}
    cuts |= {0, 1, 511, 512, 5000, len(whole) - 1, len(whole) - 512, len(whole) - 1024, len(whole)}
    for cut in sorted(cuts - {-1}):
        tar.write_bytes(whole[:cut])
        left = int((ends <= cut).sum())
        if left == len(ends):
            assert sum(map(len, streamed(manifest, 3))) == CLIPS
            continue
        count, line = failure(manifest)
        assert count == left
        key = manifest.keys[np.flatnonzero(manifest.shards == 0)[left]]
        assert line == f"{tar}: clip {key} is damaged or missing; check the set with erann verify {folder}"
        failure(manifest, 3)


def test_a_damaged_clip(sets: list[Path], tmp_path: Path) -> None:
    folder = copy_tree(sets[2], tmp_path / "damaged")
    manifest = load_manifest(folder)
    row = int(np.flatnonzero(manifest.shards == 1)[2])
    tar = Path(str(manifest.tars[1]))
    data = bytearray(tar.read_bytes())
    header = int(manifest.offsets[row]) - 512
    for place in (int(manifest.offsets[row]) + 99, header, header + 125, header + 150):
        damaged = bytearray(data)
        damaged[place] ^= 1
        tar.write_bytes(damaged)
        for workers in (1, 4):
            _, line = failure(manifest, workers)
            assert f"{tar}: clip {manifest.keys[row]} is damaged or missing; check the set with erann verify" in line
    tar.write_bytes(b"nothing like a tar" * 1000)
    assert f"{tar}: clip " in failure(manifest)[1]
    tar.unlink()
    assert f"{tar}: No such file or directory" in failure(manifest)[1]


def test_decoded_in_batches_of_one_length(tone_shards: Path) -> None:
    manifest = load_manifest(tone_shards)
    reader = {clip.row: clip.data for clip in stream_clips(manifest)}
    rows = []
    for batch in decode_clips(manifest, stream_clips(manifest), threads=2, micro_batch=4):
        rows += batch.crops.rows.tolist()
        assert 1 <= len(batch.pcm) <= 4
        for row, pcm in zip(batch.crops.rows, batch.pcm.numpy(), strict=True):
            expected, _ = soundfile.read(io.BytesIO(reader[row]), dtype="int16")
            assert np.array_equal(pcm[: len(expected)], expected)
            assert not pcm[len(expected) :].any()
            assert 0 <= len(pcm) - len(expected) < 22_050
    assert rows == list(reader)


def test_a_clip_that_does_not_decode(sets: list[Path], tmp_path: Path) -> None:
    folder = copy_tree(sets[0], tmp_path / "long")
    change_table(folder / MANIFEST, {"samples": 44_100})
    manifest = load_manifest(folder)
    with pytest.raises(BadClip, match=f"clip {manifest.keys[7]} does not decode: ends after"):
        list(decode_clips(manifest, stream_clips(manifest), threads=2, micro_batch=4))


@pytest.mark.parametrize(("start", "end"), [(0, None), (5, 17), (0, 0), (3, 10**9), (10**9, None)])
def test_a_stream_is_the_part_of_the_file(tmp_path: Path, start: int, end: int | None) -> None:
    data = bytes(range(256)) * 20_000
    (tmp_path / "x").write_bytes(data)
    with LocalFolder(str(tmp_path)).stream("x", start, end) as file:
        assert not file.seekable()
        first = file.read(7)
        assert first + file.read() == data[start:end]
        assert file.read(1) == b""
    assert file.closed


def test_no_stream_of_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        LocalFolder(str(tmp_path)).stream("x")


def test_s3_is_opened_for_webdataset_to_read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(webdataset.gopen_schemes, "s3", raising=False)
    register_s3_opener()
    with pytest.raises(UsageError, match="s3://bucket/x.tar: opened for reading only"):
        webdataset.gopen("s3://bucket/x.tar", "wb")
