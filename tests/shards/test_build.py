"""Shards read back by Python's tarfile and by webdataset, packed twice, stopped and gone on with."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import soundfile
import webdataset

from erann_dist.data.manifest import (
    MANIFEST,
    REPORT,
    SHARDS,
    content_hash,
    load_manifest,
    read_info,
    read_manifest,
)
from erann_dist.errors import UserError
from erann_dist.storage.folder import LocalFolder
from shards import build
from shards.build import Plan, Progress, build_shard
from shards.clip import REASONS, Packing
from shards.repair import packing_of, repair_tasks
from shards.sources.audioset import read_audioset
from shards.sources.folder import read_folder
from shards.sources.rows import Source, SourceRow, rows_table
from shards.verify import verify
from tests.conftest import pack_here, write_tone_set

RATE = 44_100


def source_of(*rows: SourceRow) -> Source:
    return Source("test", "classification", ["a", "b"], ["A", "B"], rows_table(rows), [])


def row(path: Path | None, key: str = "k") -> SourceRow:
    place = os.fsencode(path) if path else None
    return SourceRow(key, [1], place, path.name if path else key, reason=None if path else "missing")


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def test_manifest_points_at_exactly_the_flac_bytes(tone_shards: Path) -> None:
    rows = pq.read_table(tone_shards / MANIFEST).to_pylist()
    names = pq.read_table(tone_shards / SHARDS)["name"].to_pylist()
    members = {}
    for name in names:
        with tarfile.open(tone_shards / name) as tar:
            for member in tar:
                members[member.name] = tar.extractfile(member).read()
                assert (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "")
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
        assert row["format"] == "wav pcm_16 44100 Hz mono"
        description = json.loads(members[f"{row['key']}.json"])
        assert description["labels"] == [f"/m/{c:03d}" for c in row["labels"]]


def test_webdataset_reads_the_shards(tone_shards: Path) -> None:
    manifest = load_manifest(tone_shards)
    dataset = webdataset.WebDataset([str(tar) for tar in manifest.tars], shardshuffle=False)
    samples = list(dataset)
    assert [s["__key__"] for s in samples] == manifest.keys.to_pylist()
    assert [zlib.crc32(s["flac"]) for s in samples] == manifest.crc32s.tolist()


def test_packing_twice_gives_the_same_bytes(tone_shards: Path, tmp_path: Path) -> None:
    again = pack_here(read_audioset(*write_tone_set(tmp_path, 40)), tmp_path / "shards")
    assert digests(again) == digests(tone_shards)
    assert set(digests(again)) == {f"audioset-{i:06d}.tar" for i in range(5)} | {MANIFEST, SHARDS, REPORT}
    assert load_manifest(again).info.content_hash == load_manifest(tone_shards).info.content_hash


def test_clips_are_dealt_to_shards_at_random_and_all_of_them(tmp_path: Path) -> None:
    source = source_of(*(row(tmp_path / "a.wav", f"{i:04d}") for i in range(1000)))
    plan = Plan(source, Packing(clips_per_shard=64), LocalFolder(str(tmp_path)))
    dealt = [plan.task(shard).rows["key"].to_pylist() for shard in range(plan.num_shards)]
    assert sorted(key for keys in dealt for key in keys) == [f"{i:04d}" for i in range(1000)]
    assert [len(keys) for keys in dealt] == [64] * 15 + [40]
    # A shard is a fair sample: the mean index of its rows is near the middle.
    assert all(300 < np.mean([int(key) for key in keys]) < 700 for keys in dealt)
    plan = Plan(source, Packing(clips_per_shard=64, order="source"), LocalFolder(str(tmp_path)))
    assert plan.task(2).rows["key"].to_pylist() == [f"{i:04d}" for i in range(128, 192)]


def test_the_plan_knows_its_rows_and_options_but_not_where_the_files_are(tmp_path: Path) -> None:
    rows = [row(tmp_path / "a.wav", "1"), row(None, "2")]
    folder = LocalFolder("x")
    digest = Plan(source_of(*rows), Packing(), folder).digest
    elsewhere = [row(tmp_path / "elsewhere" / "a.wav", "1"), row(None, "2")]
    assert Plan(source_of(*elsewhere), Packing(), folder).digest == digest
    others = [
        Plan(source_of(rows[0]), Packing(), folder),
        Plan(source_of(*reversed(rows)), Packing(), folder),
        Plan(source_of(row(tmp_path / "b.wav", "1"), rows[1]), Packing(), folder),
        Plan(source_of(rows[0], row(tmp_path / "2.wav", "2")), Packing(), folder),
        Plan(source_of(*rows), Packing(codec="wav"), folder),
        Plan(source_of(*rows), Packing(clips_per_shard=7), folder),
    ]
    assert len({digest, *(plan.digest for plan in others)}) == len(others) + 1


def test_the_content_hash_is_of_the_rows(tone_shards: Path) -> None:
    table = pq.read_table(tone_shards / MANIFEST)
    chunked = table.slice(0, 7).combine_chunks(), table.slice(7, 20), table.slice(27)
    assert content_hash(type(table).from_batches([b for part in chunked for b in part.to_batches()])) == content_hash(
        table
    )
    swapped = table.take([1, 0, *range(2, 40)])
    assert content_hash(swapped) != content_hash(table)
    for name in ("key", "labels", "split", "fold", "peak", "size"):
        values = table[name].to_pylist()
        values[3] = None if values[3] is not None else {"fold": 1}[name]
        column = pa.array(values, table.schema.field(name).type)
        changed = table.set_column(table.column_names.index(name), name, column)
        assert content_hash(changed) != content_hash(table), name


def test_wav_shards(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "x.flac", np.sin(np.arange(RATE)) * 0.5, RATE)
    folder = pack_here(source_of(row(tmp_path / "x.flac")), tmp_path / "shards", codec="wav")
    manifest = load_manifest(folder)
    data = Path(str(manifest.tars[0])).read_bytes()[manifest.offsets[0] :][: manifest.sizes[0]]
    pcm, _ = soundfile.read(io.BytesIO(data), dtype="int16")
    np.testing.assert_array_equal(pcm, soundfile.read(tmp_path / "x.flac", dtype="int16")[0])
    assert (manifest.info.codec, data[:4]) == ("wav", b"RIFF")


def test_rows_are_packed_or_reported(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "good.wav", np.full(1000, 0.5), 16_000)
    soundfile.write(tmp_path / "nothing.wav", np.zeros(0), 16_000)
    (tmp_path / "text.flac").write_bytes(b"<html>403</html>" * 50)
    (tmp_path / "empty.mp3").touch()
    rows = [row(tmp_path / name, name) for name in ("good.wav", "nothing.wav", "text.flac", "empty.mp3", "gone.wav")]
    folder = pack_here(source_of(*rows, row(None, "never")), tmp_path / "shards")
    manifest = load_manifest(folder)
    report = pq.read_table(folder / REPORT).to_pylist()
    assert manifest.keys.to_pylist() == ["good.wav"]
    assert {r["key"]: r["reason"] for r in report} == {
        "nothing.wav": "empty",
        "text.flac": "unreadable",
        "empty.mp3": "empty",
        "gone.wav": "missing",
        "never": "missing",
    }
    assert all(r["labels"] == [1] for r in report)
    assert manifest.samples.tolist() == [round(1000 * RATE / 16_000)]


def test_when_nothing_can_be_packed_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"0 of 1 row could be packed: missing"):
        pack_here(source_of(row(None)), tmp_path / "shards")
    assert not (tmp_path / "shards").exists()


def test_real_formats_are_packed_or_reported(real_data: Path, tmp_path: Path) -> None:
    """The collection of odd and faulty files: nothing is lost, and what a second decoder reads has the same length."""
    root = real_data / "formats"
    source = read_folder(root)
    folder = pack_here(source, tmp_path / "shards", clips_per_shard=20)
    report = pq.read_table(folder / REPORT).to_pylist()
    clips = pq.read_table(folder / MANIFEST).to_pylist()
    assert len(clips) + len(report) == len(source.rows) == 75
    assert {r["reason"] for r in report} <= set(REASONS)
    assert {Path(clip["source"]).suffix for clip in clips} >= set(
        ".wav .flac .mp3 .opus .m4a .webm .mp4 .ogg .aac".split()
    )
    compared = 0
    for clip in clips:
        try:
            with soundfile.SoundFile(root / clip["source"]) as file:
                # Here libsndfile believes a header that is wrong: FLAC test file 05.
                if "wrong total number of samples" in clip["source"] or file.frames > 1 << 40:
                    continue
                seconds = sum(len(block) for block in file.blocks(1 << 16)) / file.samplerate
        except soundfile.LibsndfileError:
            continue  # not one for libsndfile
        compared += 1
        # In blocks, libsndfile reads into the padding that an MP3 encoder adds at the end, which FFmpeg cuts off.
        tolerance = 0.06 if clip["source"].endswith(".mp3") else 1e-3
        assert clip["samples"] / RATE == pytest.approx(seconds, abs=tolerance), clip["source"]
    assert compared > 35


def test_progress_is_told(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "x.wav", np.sin(np.arange(RATE)) * 0.5, RATE)
    (tmp_path / "empty.wav").touch()
    rows = [row(tmp_path / "x.wav", "1"), row(tmp_path / "empty.wav", "2"), row(None, "3")]
    plan = Plan(source_of(*rows), Packing(), LocalFolder(str(tmp_path / "s")))
    told: list[Progress] = []
    result = build.build_shard(plan.task(0), told.append)
    size = pc.sum(result.outcomes["size"]).as_py()
    assert told[-1] == Progress(2, size, 1) == build.progress_of(result)
    assert [progress.rows for progress in told] == [1, 2]


def test_an_interrupted_packing_goes_on(tone_shards: Path, tmp_path: Path) -> None:
    source = read_audioset(*write_tone_set(tmp_path, 40))
    plan = Plan(source, Packing(clips_per_shard=8), LocalFolder(str(tmp_path / "shards")))
    assert build.start(plan)
    for shard in (0, 3):
        build.keep(plan.task(shard), build.build_shard(plan.task(shard)))
    (tmp_path / "shards" / "audioset-000002.tar.0123456789abcdef.part").write_bytes(b"cut in the middle")
    with pytest.raises(UserError, match="no shard set here"):
        load_manifest(tmp_path / "shards")
    (tmp_path / "shards" / ".pack" / "0123456789abcdef").mkdir()
    (tmp_path / "shards" / ".pack" / "0123456789abcdef" / "000001.parquet").write_bytes(b"of another plan")
    assert build.start(plan)
    assert build.finished(plan) == {0, 3}
    for shard in (1, 2, 4):
        build.keep(plan.task(shard), build.build_shard(plan.task(shard)))
    build.finish(plan)
    assert digests(tmp_path / "shards") == digests(tone_shards)
    assert not build.start(plan)


def test_sigkill_at_any_moment_costs_nothing(tone_shards: Path, tmp_path: Path) -> None:
    """Real processes that pack, killed again and again at odd moments; the last one is let go to its end."""
    set_, folder = tmp_path / "set", tmp_path / "shards"
    write_tone_set(set_, 40)
    script = f"""
from pathlib import Path
from erann_dist.storage.folder import LocalFolder
from shards import build
from shards.clip import Packing
from shards.repair import packing_of
from shards.sources.audioset import read_audioset
root = Path({str(set_)!r})
source = read_audioset(root / "tone_segments.csv", root / "audio", root / "classes.csv")
plan = build.Plan(source, Packing(clips_per_shard=8), LocalFolder({str(folder)!r}))
if build.start(plan):
    print("ready", flush=True)
    for shard in range(plan.num_shards):
        if shard not in build.finished(plan):
            build.keep(plan.task(shard), build.build_shard(plan.task(shard)))
    build.finish(plan)
"""
    kills = 0
    for pause in (0.0, 0.05, 0.15, 0.3, 0.5, 0.7, 0.9, 1.2):
        process = subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
        )
        process.stdout.read(6)
        time.sleep(pause)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        tars = {path.name: path.read_bytes() for path in folder.glob("*.tar")}
        assert all(data == (tone_shards / name).read_bytes() for name, data in tars.items())
    assert kills >= 3
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, cwd=Path(__file__).parents[2])
    assert digests(folder) == digests(tone_shards)


def test_folders_that_hold_something_else_are_refused(tone_shards: Path, tmp_path: Path) -> None:
    def plan(folder: Path, key: str = "k") -> Plan:
        return Plan(source_of(row(None, key)), Packing(), LocalFolder(str(folder)))

    with pytest.raises(UserError, match="contains another shard set"):
        build.start(plan(tone_shards))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="exists and is not a shard set"):
        build.start(plan(tmp_path / "mine"))
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["letter.txt"]
    assert build.start(plan(tmp_path / "new"))
    with pytest.raises(UserError, match="another, unfinished shard set"):
        build.start(plan(tmp_path / "new", "other"))


def test_a_kill_before_the_plan_is_written(tmp_path: Path) -> None:
    plan = Plan(source_of(row(None)), Packing(), LocalFolder(str(tmp_path / "shards")))
    (tmp_path / "shards" / ".pack").mkdir(parents=True)
    (tmp_path / "shards" / ".pack" / "plan.0123456789abcdef.part").write_bytes(b"cut")
    assert build.start(plan)


def test_a_set_is_not_packed_by_two_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soundfile.write(tmp_path / "x.wav", np.sin(np.arange(RATE)) * 0.5, RATE)
    plan = Plan(source_of(row(tmp_path / "x.wav")), Packing(), LocalFolder(str(tmp_path / "shards")))
    build.start(plan)
    build.keep(plan.task(0), build.build_shard(plan.task(0)))
    monkeypatch.setattr("shards.build.versions", lambda: {"av": "1", "soundfile": "2", "soxr": "3"})
    with pytest.raises(UserError, match=r"test-000000\.tar: was packed with other library versions .*pip install av=="):
        build.kept(plan, [0])


def test_what_else_lies_there_stays_when_nothing_could_be_packed(tmp_path: Path) -> None:
    (tmp_path / "empty.wav").touch()
    plan = Plan(source_of(row(tmp_path / "empty.wav")), Packing(), LocalFolder(str(tmp_path / "shards")))
    build.start(plan)
    (tmp_path / "shards" / "letter.txt").write_text("dear")
    build.keep(plan.task(0), build.build_shard(plan.task(0)))
    with pytest.raises(UserError, match="0 of 1 row could"):
        build.finish(plan)
    assert [p.name for p in (tmp_path / "shards").iterdir()] == ["letter.txt"]


def test_rows_without_a_file_take_no_place_in_a_shard(tmp_path: Path) -> None:
    """Most of AudioSet's list has no file on a disk that holds a part of it: the tars are as many as the clips need."""
    soundfile.write(tmp_path / "x.wav", np.sin(np.arange(RATE)) * 0.5, RATE)
    there = [row(tmp_path / "x.wav", f"there{i}") for i in range(3)]
    source = source_of(*(row(None, f"gone{i}") for i in range(50)), *there)
    folder = pack_here(source, tmp_path / "set", clips_per_shard=2)
    assert sorted(path.name for path in folder.glob("*.tar")) == ["test-000000.tar", "test-000001.tar"]
    report = pq.read_table(folder / REPORT).to_pylist()
    assert {row["key"]: row["reason"] for row in report} == {f"gone{i}": "missing" for i in range(50)}
    assert sorted(load_manifest(folder).keys.to_pylist()) == [f"there{i}" for i in range(3)]


def test_a_set_that_was_packed_before_options_had_assign(tmp_path: Path) -> None:
    """Its rows without a file had places in the shards; it is known as packed, and can be repaired."""
    soundfile.write(tmp_path / "x.wav", np.sin(np.arange(RATE)) * 0.5, RATE)
    source = source_of(*(row(None, f"gone{i}") for i in range(5)), row(tmp_path / "x.wav", "there"))
    folder = LocalFolder(str(pack_here(source, tmp_path / "set", clips_per_shard=2, assign="all")))
    assert len(list((tmp_path / "set").glob("*.tar"))) == 3
    plan = Plan(source, Packing(clips_per_shard=2), folder)
    info = read_info(folder)
    added = ("assign", "channels", "min_intact")
    older = {name: value for name, value in info.packing.items() if name not in added}
    older_info = replace(info, packing=older, source_hash=plan._digest(older))
    assert plan.is_of(older_info)
    assert not plan.is_of(info)
    assert packing_of(folder, older_info) == Packing(clips_per_shard=2, assign="all", min_intact=0.0)
    assert not Plan(source, Packing(clips_per_shard=2, channels="left"), folder).is_of(older_info)


def test_a_set_whose_manifest_lacks_the_columns_added_since(tmp_path: Path) -> None:
    """It is read with nulls there, and has the hash that it had."""
    for name in ("a", "b"):
        soundfile.write(tmp_path / f"{name}.wav", np.sin(np.arange(RATE)) * 0.5, RATE)
    rows = [row(tmp_path / f"{name}.wav", name) for name in ("a", "b")]
    folder = pack_here(source_of(*rows), tmp_path / "set")
    table = pq.read_table(folder / MANIFEST)
    older = table.drop_columns(["lost", "channel_peak"])
    pq.write_table(older, folder / MANIFEST)
    info, clips = read_manifest(LocalFolder(str(folder)))
    assert content_hash(older) == content_hash(clips) == info.content_hash
    assert clips["lost"].null_count == 2
    assert not [problem for _, problems in verify(LocalFolder(str(folder))) for problem in problems]
    damaged = clips.set_column(clips.column_names.index("lost"), "lost", pa.array([None, 0.5], pa.float32()))
    assert content_hash(damaged) != info.content_hash


def test_damage_is_in_the_manifest_and_repair_leaves_out_what_was_left_out(tmp_path: Path) -> None:
    """An older version could not decode b: its set is rebuilt without b."""
    for name in ("a", "b", "c"):
        soundfile.write(tmp_path / f"{name}.wav", np.sin(np.arange(RATE)) * 0.5, RATE)
    data = (tmp_path / "a.wav").read_bytes()
    (tmp_path / "a.wav").write_bytes(data[: len(data) // 2])
    good = (tmp_path / "b.wav").read_bytes()
    (tmp_path / "b.wav").write_bytes(b"not sound")
    source = source_of(*(row(tmp_path / f"{name}.wav", name) for name in ("a", "b", "c")))
    folder = pack_here(source, tmp_path / "set")
    _, clips = read_manifest(LocalFolder(str(folder)), ["key", "lost"])
    lost = dict(zip(clips["key"].to_pylist(), clips["lost"].to_pylist(), strict=True))
    assert lost == {"a": pytest.approx(0.5, abs=0.01), "c": None}
    (tmp_path / "b.wav").write_bytes(good)
    (task,) = repair_tasks(LocalFolder(str(folder)), source, [0])
    result = build_shard(task)
    reasons = dict(zip(result.outcomes["key"].to_pylist(), result.outcomes["reason"].to_pylist(), strict=True))
    assert reasons == {"a": None, "b": "unreadable", "c": None}
