"""Shards read back by Python's tarfile and by webdataset, and packed twice."""

import hashlib
import io
import json
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import webdataset

from erann_dist.errors import UserError
from erann_dist.manifest import MANIFEST, REPORT, SHARDS, load_manifest
from shards import build
from shards.sources.audioset import read_audioset
from shards.sources.rows import Source, SourceRow
from shards.verify import verify
from tests.conftest import copy_tree, pack_here, write_tone_set

RATE = 44_100


def source_of(*rows: SourceRow) -> Source:
    return Source("test", "classification", ["a", "b"], ["A", "B"], list(rows))


def row(path: Path | None, key: str = "k", segment: tuple[float, float] | None = None) -> SourceRow:
    return SourceRow(key, (1,), path, path.name if path else key, segment=segment)


def problems(shards: Path) -> list[str]:
    return [problem for _, found in verify(shards) for problem in found]


def test_manifest_points_at_exactly_the_flac_bytes(tone_shards: Path) -> None:
    rows = pq.read_table(tone_shards / MANIFEST).to_pylist()
    names = pq.read_table(tone_shards / SHARDS)["name"].to_pylist()
    members = {}
    for name in names:
        with tarfile.open(tone_shards / name) as tar:
            for member in tar:
                members[member.name] = tar.extractfile(member).read()
                assert (member.mtime, member.uid, member.gid) == (0, 0, 0)
    assert len(rows) == 40
    assert set(members) == {f"{row['key']}.{kind}" for row in rows for kind in ("flac", "json")}
    for row in rows:
        data = (tone_shards / names[row["shard"]]).read_bytes()
        flac = data[row["offset"] : row["offset"] + row["size"]]
        assert flac == members[f"{row['key']}.flac"]
        assert zlib.crc32(flac) == row["crc32"]
        samples, rate = soundfile.read(io.BytesIO(flac), dtype="int16")
        assert (rate, len(samples), samples.ndim) == (RATE, row["samples"], 1)
        assert row["peak"] == pytest.approx(np.abs(samples).max() / 32768, abs=1e-4)
        description = json.loads(members[f"{row['key']}.json"])
        assert description["labels"] == [f"/m/{c:03d}" for c in row["labels"]]


def test_webdataset_reads_the_shards(tone_shards: Path) -> None:
    manifest = load_manifest(tone_shards)
    dataset = webdataset.WebDataset([str(p) for p in manifest.shard_paths], shardshuffle=False)
    samples = list(dataset)
    assert [s["__key__"] for s in samples] == manifest.keys.to_pylist()
    assert [zlib.crc32(s["flac"]) for s in samples] == manifest.crc32s.tolist()


def test_packing_twice_gives_the_same_bytes(tone_shards: Path, tmp_path: Path) -> None:
    again = pack_here(read_audioset(*write_tone_set(tmp_path, 40)), tmp_path / "shards")
    first = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in tone_shards.iterdir()}
    second = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in again.iterdir()}
    assert first == second
    assert set(first) == {f"audioset-{i:06d}.tar" for i in range(5)} | {MANIFEST, SHARDS, REPORT}
    assert load_manifest(again).info.content_hash == load_manifest(tone_shards).info.content_hash


def test_clips_are_dealt_to_shards_at_random_and_all_of_them(tmp_path: Path) -> None:
    source = source_of(*(row(None, f"{i:04d}") for i in range(1000)))
    tasks = build.plan(source, tmp_path, 64)
    keys = [r.key for task in tasks for r in task.rows]
    assert sorted(keys) == [f"{i:04d}" for i in range(1000)]
    assert [len(task.rows) for task in tasks] == [64] * 15 + [40]
    # A shard is a fair sample: the mean index of its rows is near the middle.
    assert all(300 < np.mean([int(r.key) for r in task.rows]) < 700 for task in tasks)


def test_rows_are_packed_or_reported(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "good.wav", np.full(1000, 0.5), 16_000)
    soundfile.write(tmp_path / "nothing.wav", np.zeros(0), 16_000)
    (tmp_path / "text.flac").write_bytes(b"<html>403</html>" * 50)
    (tmp_path / "script.wav").write_text("ffconcat version 1.0\nfile good.wav\n")
    (tmp_path / "empty.mp3").touch()
    rows = [row(tmp_path / name, name) for name in ("good.wav", "nothing.wav", "text.flac", "script.wav", "empty.mp3")]
    folder = pack_here(source_of(*rows, row(None, "gone")), tmp_path / "shards")
    manifest = load_manifest(folder)
    report = {r["key"]: r["reason"] for r in pq.read_table(folder / REPORT).to_pylist()}
    assert manifest.keys.to_pylist() == ["good.wav"]
    assert report == {
        "nothing.wav": "undecodable",
        "text.flac": "undecodable",
        "script.wav": "undecodable",
        "empty.mp3": "undecodable",
        "gone": "missing",
    }
    assert manifest.samples.tolist() == [round(1000 * RATE / 16_000)]


def test_when_nothing_can_be_packed_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none of the 1 rows could be packed: missing"):
        pack_here(source_of(row(None)), tmp_path / "shards")
    assert not (tmp_path / "shards").exists()


def test_channels_are_averaged_and_overload_is_clipped(tmp_path: Path) -> None:
    left, right = np.full(RATE, 0.5), np.full(RATE, 0.1)
    soundfile.write(tmp_path / "stereo.wav", np.stack([left, right], 1), RATE, subtype="FLOAT")
    pcm, peak = build.load_clip(row(tmp_path / "stereo.wav"))
    assert np.abs(pcm - 0.3 * 32768).max() <= 1
    assert peak == pytest.approx(0.3)
    soundfile.write(tmp_path / "loud.wav", np.array([1.7, -1.7, 1.0, -1.0] * 100), RATE, subtype="FLOAT")
    pcm, peak = build.load_clip(row(tmp_path / "loud.wav"))
    assert pcm[:4].tolist() == [32767, -32768, 32767, -32768]
    assert peak == pytest.approx(1.7)


@pytest.mark.parametrize("rate", [16_000, 22_050, 32_000, 48_000])
def test_resampling_keeps_pitch_length_and_level(tmp_path: Path, rate: int) -> None:
    t = np.arange(2 * rate) / rate
    soundfile.write(tmp_path / "tone.wav", 0.5 * np.sin(2 * np.pi * 1000 * t), rate, subtype="FLOAT")
    pcm, _ = build.load_clip(row(tmp_path / "tone.wav"))
    assert len(pcm) == 2 * RATE
    expected = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(2 * RATE) / RATE)
    np.testing.assert_allclose(pcm[2000:-2000] / 32768, expected[2000:-2000], atol=1e-3)


def test_segments_are_cut_from_whole_recordings_only(tmp_path: Path) -> None:
    ramp = np.linspace(-0.9, 0.9, 20 * RATE)
    soundfile.write(tmp_path / "whole.wav", ramp, RATE)
    pcm, _ = build.load_clip(row(tmp_path / "whole.wav", segment=(5.0, 15.0)))
    assert len(pcm) == 10 * RATE
    np.testing.assert_allclose(pcm / 32768, ramp[5 * RATE : 15 * RATE], atol=1e-4)
    soundfile.write(tmp_path / "clip.wav", ramp[: int(10.03 * RATE)], RATE)
    pcm, _ = build.load_clip(row(tmp_path / "clip.wav", segment=(5.0, 15.0)))
    np.testing.assert_allclose(pcm / 32768, ramp[: 10 * RATE], atol=1e-4)
    soundfile.write(tmp_path / "short.wav", ramp[: 4 * RATE], RATE)
    pcm, _ = build.load_clip(row(tmp_path / "short.wav", segment=(5.0, 15.0)))
    assert len(pcm) == 4 * RATE
    with pytest.raises(build.Rejected, match="empty"):
        build.load_clip(row(tmp_path / "whole.wav", segment=(30.0, 40.0)))


def test_real_formats_are_packed_or_reported(real_data: Path, tmp_path: Path) -> None:
    """Every file of the collection of odd and faulty ones: no crash, nothing lost, what is packed verifies."""
    from erann_dist.audio import SUFFIXES

    files = sorted(p for p in (real_data / "formats").rglob("*") if p.suffix.lower() in SUFFIXES)
    assert len(files) > 30
    folder = pack_here(source_of(*(row(p, f"{i:03d}") for i, p in enumerate(files))), tmp_path / "shards", 20)
    report = pq.read_table(folder / REPORT).to_pylist()
    manifest = load_manifest(folder)
    assert len(manifest) + len(report) == len(files)
    assert {r["reason"] for r in report} <= {"undecodable", "empty"}
    packed = {files[int(key)].suffix.lower() for key in manifest.keys.to_pylist()}
    assert {".wav", ".flac", ".mp3", ".opus"} <= packed
    assert problems(folder) == []


def test_an_interrupted_packing_goes_on(tone_shards: Path, tmp_path: Path) -> None:
    source = read_audioset(*write_tone_set(tmp_path, 40))
    folder, digest = tmp_path / "shards", build.source_hash(source, 8)
    assert build.start(folder, digest)
    tasks = build.plan(source, folder, 8)
    for task in tasks[:2]:
        build.keep_result(task, build.build_shard(task))
    (folder / "audioset-000002.tar.part").write_bytes(b"cut in the middle")
    with pytest.raises(UserError, match="no shard set here"):
        load_manifest(folder)
    assert build.start(folder, digest)
    found = [build.finished_result(task) for task in tasks]
    assert [f is not None for f in found] == [True, True, False, False, False]
    build.finish(folder, source, [f or build.build_shard(t) for f, t in zip(found, tasks, strict=True)], digest)
    for path in tone_shards.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()
    assert {p.name for p in folder.iterdir()} == {p.name for p in tone_shards.iterdir()}


def test_folders_that_hold_something_else_are_refused(tone_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds another shard set"):
        build.start(tone_shards, "another digest")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="is there and is no shard set"):
        build.start(tmp_path / "mine", "digest")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["letter.txt"]
    assert build.start(tmp_path / "new", "digest")
    with pytest.raises(UserError, match="another shard set, not finished"):
        build.start(tmp_path / "new", "another")
    assert not build.start(tone_shards, load_manifest(tone_shards).info.source_hash)


def test_a_sound_set_has_no_problems(tone_shards: Path) -> None:
    assert problems(tone_shards) == []
    assert sum(clips for clips, _ in verify(tone_shards)) == 40


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_verify_names_every_kind_of_damage(tone_shards: Path, tmp_path: Path) -> None:
    def damaged(name: str) -> tuple[Path, Path]:
        folder = copy_tree(tone_shards, tmp_path / name)
        return folder, folder / "audioset-000001.tar"

    folder, tar = damaged("cut")
    tar.write_bytes(tar.read_bytes()[:-4000])
    assert "audioset-000001.tar: cut short" in problems(folder)[0]

    folder, tar = damaged("gone")
    tar.unlink()
    assert problems(folder) == [f"{tar}: missing"]

    folder, tar = damaged("flipped")
    manifest = load_manifest(folder)
    row = int(np.flatnonzero(manifest.shards == 1)[3])
    flip(tar, int(manifest.offsets[row]) + 100)
    found = problems(folder)
    assert any("its bytes have changed" in p for p in found)
    assert any(f"{manifest.keys[row]}.flac has crc32" in p for p in found)

    folder, tar = damaged("header")
    flip(tar, 0)
    assert any("audioset-000001.tar" in p for p in problems(folder))

    folder, tar = damaged("swapped")
    other = folder / "audioset-000002.tar"
    first, second = tar.read_bytes(), other.read_bytes()
    tar.write_bytes(second)
    other.write_bytes(first)
    assert len(problems(folder)) >= 2


@pytest.mark.parametrize("column", ["key", "offset", "size", "crc32", "labels", "samples"])
def test_verify_sees_a_manifest_that_does_not_match(tone_shards: Path, tmp_path: Path, column: str) -> None:
    folder = copy_tree(tone_shards, tmp_path / "shards")
    table = pq.read_table(folder / MANIFEST)
    rows = table.to_pylist()
    rows[7][column] = {"key": "x", "labels": [2, 0]}.get(column, 77)
    changed = type(table).from_pylist(rows, table.schema)
    pq.write_table(changed, folder / MANIFEST)
    assert any("content hash" in p for p in problems(folder))
    assert len(problems(folder)) >= (1 if column == "samples" else 2)
