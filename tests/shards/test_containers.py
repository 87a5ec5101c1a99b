"""Clips in archives: zips, Parquet files of the Hub, HDF5 packs; damaged archives; several files for one clip."""

import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from erann_dist.data.audio import DecodeError
from erann_dist.data.manifest import MANIFEST, REPORT
from erann_dist.errors import UsageError, UserError
from erann_dist.storage.folder import LocalFolder
from shards.build import Plan
from shards.clip import Packing, Rejected, pack_clip
from shards.repair import packing_of, repair_tasks
from shards.sources.audioset import read_audioset
from shards.sources.containers import COMPRESSED_TARS, CONTAINERS, parquet
from shards.sources.containers import zip as zips
from shards.sources.esc50 import read_esc50
from shards.sources.files import find_audio
from shards.sources.folder import read_folder
from shards.sources.fsd50k import read_fsd50k
from shards.sources.ravdess import read_ravdess
from shards.sources.rows import SourceRow
from shards.sources.urbansound8k import read_urbansound8k
from tests.conftest import pack_here
from tests.shards.test_audioset import touch, write
from tests.shards.test_sources import ESC50, packable, rows_of, sound_bytes, tar_of

IDS = [f"abcdefgh{i:03d}" for i in range(100)]
SOUND = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
US8K = "slice_file_name,fsID,start,end,salience,fold,classID,class\n100-3-0-0.wav,100,0,1,1,1,3,dog_bark\n"


def segments(path: Path, ids: Iterable[str], start: int = 30) -> Path:
    return write(path, *(f'{ytid}, {start}.000, {start + 10}.000, "/m/09x0r"' for ytid in ids))


def zip_of(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def parquet_of(path: Path, sounds: dict[str, bytes | None], rows_per_group: int = 4, **columns: list[Any]) -> Path:
    """As `datasets` writes it: the file's own name in audio.path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    audio = pa.array([{"bytes": data, "path": name} for name, data in sounds.items()], SOUND)
    pq.write_table(pa.table({"audio": audio, **columns}), path, row_group_size=rows_per_group)
    return path


def hub_audioset(path: Path, ids: list[str], sound: Callable[[int], bytes | None], rows_per_group: int = 4) -> Path:
    sounds = {f"{ytid}.flac": sound(i) for i, ytid in enumerate(ids)}
    labels = [["/m/09x0r"]] * len(ids)
    return parquet_of(path, sounds, rows_per_group, video_id=ids, labels=labels, human_labels=[["Speech"]] * len(ids))


def peaks(folder: Path) -> dict[str, float]:
    """The clips' peaks by key: each made-up sound has its own level."""
    return {clip["key"]: round(clip["peak"], 2) for clip in pq.read_table(folder / MANIFEST).to_pylist()}


def report(folder: Path) -> list[tuple[str, str, str]]:
    return [(r["source"], r["reason"], r["detail"]) for r in pq.read_table(folder / REPORT).to_pylist()]


def level(i: int, more: int = 0) -> bytes:
    return sound_bytes((i + more + 1) / 100, 0.1, kind="FLAC")


# --- Parquet


def test_audioset_from_the_hub(tmp_path: Path) -> None:
    for split, ids in (("bal_train", IDS[:20]), ("eval", IDS[20:30])):
        hub_audioset(tmp_path / "hub" / "data" / split / "00.parquet", ids, partial(level, IDS.index(ids[0])))
    source = read_audioset(segments(tmp_path / "balanced_train_segments.csv", IDS[:20]), tmp_path / "hub")
    assert {row.source for row in rows_of(source)} == {f"data/bal_train/00.parquet/{ytid}.flac" for ytid in IDS[:20]}
    assert "30 sound files found, 20 matched, 10 unmatched" in source.notes[0]
    assert peaks(pack_here(source, tmp_path / "shards")) == {
        f"{ytid}_30000": (i + 1) / 100 for i, ytid in enumerate(IDS[:20])
    }


def test_rows_of_a_row_group_stay_together_in_a_shuffled_set(tmp_path: Path) -> None:
    """So that a shard reads its own row groups once; which groups is at random, and the same wherever the files are."""
    orders = []
    for place in ("here", "there"):
        for part in range(5):
            hub_audioset(tmp_path / place / f"{part}.parquet", IDS[part * 20 : part * 20 + 20], lambda i: b"x", 4)
        source = read_audioset(segments(tmp_path / "s.csv", IDS), tmp_path / place)
        plan = Plan(source, Packing(clips_per_shard=20), LocalFolder("unused"))
        tasks = [plan.task(shard).rows for shard in range(plan.num_shards)]
        orders.append([key for rows in tasks for key in rows["key"].to_pylist()])
        groups = [[(row["path"], row["group"]) for row in rows.to_pylist()] for rows in tasks]
        assert all(len(set(group)) == 5 for group in groups)  # whole row groups
        assert all(len({path for path, _ in group}) > 1 for group in groups)  # from several files
        digests = plan.digest
    assert orders[0] == orders[1] != sorted(orders[0])
    assert sorted(orders[0]) == [f"{ytid}_30000" for ytid in IDS]
    hub_audioset(tmp_path / "there" / "0.parquet", IDS[:20], lambda i: b"x", 7)
    source = read_audioset(segments(tmp_path / "s.csv", IDS), tmp_path / "there")
    assert Plan(source, Packing(clips_per_shard=20), LocalFolder("unused")).digest != digests  # another assignment


def test_a_row_group_is_read_once_for_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = os.fsencode(hub_audioset(tmp_path / "x.parquet", IDS[:12], level, rows_per_group=6))
    passes = []
    read = pq.ParquetFile.iter_batches
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda *a, **k: passes.append(k["row_groups"]) or read(*a, **k))

    def peak(row: int) -> float:
        with parquet.open_member(path, row, None) as file:
            return round(float(soundfile.read(file)[0].max()), 2)

    assert [peak(row) for row in (1, 1, 4, 7, 11)] == [0.02, 0.02, 0.05, 0.08, 0.12]
    assert passes == [[0], [1]]
    assert peak(0) == 0.01  # back: a new pass
    with pytest.raises(DecodeError, match="no row 12"):
        peak(12)


def test_planning_reads_no_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_audioset(tmp_path / "x.parquet", IDS, lambda i: b"x" * 10_000)
    columns = []
    read = pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda *a, **k: columns.append(k["columns"]) or read(*a, **k))
    assert len(find_audio(tmp_path).table) == 100
    assert columns == [["video_id", "audio.path"]] * 25


def test_esc50_urbansound8k_and_ravdess_from_the_hub(real_data: Path, tmp_path: Path) -> None:
    """The labels and folds are the official ones: those of the same clips with the data sets' own lists."""
    esc10 = sorted((real_data / "esc10").rglob("*.ogg"))[::40]
    official = {row.key: row for row in rows_of(read_esc50(real_data / "esc10", esc10=True))}
    names = [f"{path.stem}.wav" for path in esc10]
    of = [official[path.stem] for path in esc10]
    categories = [read_esc50(real_data / "esc10", esc10=True).label_ids[row.labels[0]] for row in of]
    parquet_of(
        tmp_path / "esc50" / "data" / "train-00000-of-00001.parquet",
        {path.name: path.read_bytes() for path in esc10},
        filename=names,
        fold=[row.fold for row in of],
        target=[int(path.stem.split("-")[-1]) for path in esc10],
        category=categories,
        esc10=[True] * len(of),
        src_file=[int(path.stem.split("-")[1]) for path in esc10],
        take=[path.stem.split("-")[2] for path in esc10],
    )
    found = read_esc50(tmp_path / "esc50", esc10=True)
    assert {row.key: (found.label_ids[row.labels[0]], row.fold, row.reason) for row in rows_of(found)} == {
        row.key: (category, row.fold, None) for row, category in zip(of, categories, strict=True)
    }
    assert len(peaks(pack_here(found, tmp_path / "packed"))) == len(of)

    us8k = [row for row in rows_of(read_urbansound8k(real_data / "urbansound8k")) if row.path][::30]
    labels = read_urbansound8k(real_data / "urbansound8k").label_ids
    parquet_of(
        tmp_path / "us8k" / "x.parquet",
        {f"{row.key}.wav": Path(os.fsdecode(row.path)).read_bytes() for row in us8k},
        slice_file_name=[f"{row.key}.wav" for row in us8k],
        fold=[row.fold for row in us8k],
        classID=[row.labels[0] for row in us8k],
        **{"class": [labels[row.labels[0]] for row in us8k]},
    )
    found = read_urbansound8k(tmp_path / "us8k")
    assert {(r.key, r.fold, *r.labels, r.reason) for r in rows_of(found)} == {
        (r.key, r.fold, *r.labels, None) for r in us8k
    }

    ravdess = rows_of(read_ravdess(real_data / "ravdess"))[::60]
    sounds = {f"{row.key}.wav": Path(os.fsdecode(row.path)).read_bytes() for row in ravdess}
    parquet_of(tmp_path / "ravdess" / "x.parquet", sounds, emotion=["happy"] * len(sounds))
    found = read_ravdess(tmp_path / "ravdess")
    assert {(r.key, r.fold, *r.labels, r.reason) for r in rows_of(found)} == {
        (r.key, r.fold, *r.labels, None) for r in ravdess
    }


def test_bad_parquet(tmp_path: Path) -> None:
    audio = tmp_path / "audio"
    good = hub_audioset(audio / "good.parquet", IDS[:8], lambda i: None if i == 2 else level(i))
    hub_audioset(audio / "torn.parquet", IDS[8:16], lambda i: os.urandom(3000) + level(i) * 100, rows_per_group=4)
    torn = bytearray((audio / "torn.parquet").read_bytes())
    middle = len(torn) // 4
    torn[middle - 1000 : middle + 1000] = bytes(2000)  # in the first row group's sound
    (audio / "torn.parquet").write_bytes(torn)
    (audio / "cut.parquet").write_bytes(good.read_bytes()[:-100])
    pq.write_table(pa.table({"video_id": IDS[:3]}), audio / "list.parquet")
    source = read_audioset(segments(tmp_path / "s.csv", IDS[:12]), audio)
    assert [note.partition(": ")[2].split(" ")[0] for note in source.notes[:2]] == ["damaged", "has"]
    assert all("\n" not in note for note in source.notes)
    folder = pack_here(source, tmp_path / "shards")
    assert peaks(folder).keys() == {f"{ytid}_30000" for i, ytid in enumerate(IDS[:8]) if i != 2}
    reasons = {source.rpartition("/")[2]: reason for source, reason, _ in report(folder)}
    assert reasons == {"abcdefgh002.flac": "empty"} | {f"{ytid}.flac": "unreadable" for ytid in IDS[8:12]}
    (audio / "good.parquet").unlink(), (audio / "torn.parquet").unlink(), (audio / "cut.parquet").unlink()
    with pytest.raises(UserError, match=r"no sound file .*list\.parquet: has no column of sound") as error:
        read_audioset(segments(tmp_path / "s.csv", IDS[:12]), audio)
    assert error.value.exit_code == 1


# --- zip


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_clips_in_zips_are_packed_without_unpacking(tmp_path: Path, method: int) -> None:
    members = {f"audio/{ytid}.wav": sound_bytes((i + 1) / 100, 0.1) for i, ytid in enumerate(IDS[:3])}
    evil = {f"../../{IDS[3]}.wav": sound_bytes(0.5, 0.1), f"win\\{IDS[4]}.wav": sound_bytes(0.6, 0.1)}
    path = zip_of(
        tmp_path / "audio" / "a.zip", members | evil | {f"__MACOSX/._{IDS[0]}.wav": b"x", "list.txt": b""}, method
    )
    with zipfile.ZipFile(path, "a", method) as archive, archive.open(f"{IDS[5]}.wav", "w", force_zip64=True) as member:
        member.write(sound_bytes(0.7, 0.1))
    before = sorted(tmp_path.rglob("*"))
    for given in (tmp_path / "audio", path):
        source = read_audioset(segments(tmp_path / "s.csv", IDS[:6]), given)
        folder = pack_here(source, tmp_path / f"shards-{given.name}")
        assert list(dict(sorted(peaks(folder).items())).values()) == [0.01, 0.02, 0.03, 0.5, 0.6, 0.7]
    kept = [p for p in sorted(tmp_path.rglob("*")) if not str(p.relative_to(tmp_path)).startswith(("shards", "s.csv"))]
    assert kept == before  # nothing was written where a member's name points


class _Pipe(io.RawIOBase):
    """A file that can't seek: sizes and CRCs then follow the data in a zip."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return self._file.write(data)

    def close(self) -> None:
        self._file.close()


def test_a_zip_that_was_written_to_a_pipe(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with _Pipe(path) as pipe, zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("dog/a.wav", sound_bytes(0.3, 0.1))
    assert list(peaks(pack_here(read_folder(path), tmp_path / "shards")).values()) == [0.3]
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(b"PK\x07\x08") + 4] ^= 1  # its CRC
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="not the checksum"):
        pack_here(read_folder(path), tmp_path / "again")


def test_bad_zips(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    sound = sound_bytes(0.3, 0.1)
    with zipfile.ZipFile(tmp_path / "in" / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("dog/good.wav", "dog/huge.wav", "dog/more.wav", "dog/secret.wav"):
            archive.writestr(name, sound)
        archive.writestr("dog/old.wav", sound, zipfile.ZIP_BZIP2)
        archive.writestr("dog/inner.tar", b"")
        archive.getinfo("dog/huge.wav").file_size = 10 << 40
        archive.getinfo("dog/more.wav").file_size = 100
        archive.getinfo("dog/secret.wav").flag_bits |= 1
    source = read_folder(tmp_path / "in" / "x.zip")
    assert [note.partition("x.zip: ")[2].split(";")[0] for note in source.notes] == [
        "1 sound files are encrypted and can't be used",
        "1 sound files are compressed by bzip2 and can't be used, only stored and deflated ones can",
        "contains archives, which are not opened (1 .tar)",
    ]
    folder = pack_here(source, tmp_path / "shards")
    assert list(peaks(folder)) == ["dog%2Fgood"]
    details = {name: detail for name, reason, detail in report(folder) if reason == "unreadable"}
    assert "unpacks to 10,995,116,277,760 bytes" in details["dog/huge.wav"]
    assert "not the size" in details["dog/more.wav"]
    (tmp_path / "in" / "x.zip").write_bytes((tmp_path / "in" / "x.zip").read_bytes()[:-40])
    with pytest.raises(UserError, match=r"no sound file .*x\.zip: damaged .*; fetch it again"):
        read_folder(tmp_path / "in")
    touch(tmp_path, "in/x.z01")
    with pytest.raises(UserError, match="split archive; join the parts: zip -s 0 x.zip"):
        read_folder(tmp_path / "in")


def test_a_deflated_member_that_is_damaged(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).bytes(100_000)
    path = zip_of(tmp_path / "x.zip", {"a.wav": noise})
    data = bytearray(path.read_bytes())
    for place, byte in ((50_000, data[50_000] ^ 8), (0, 0)):
        damaged = bytearray(data)
        damaged[place] = byte
        path.write_bytes(damaged)
        with pytest.raises(DecodeError), zips.open_member(os.fsencode(path), 0, len(noise)):
            pass


def test_data_sets_in_zips(tmp_path: Path) -> None:
    sound = sound_bytes(0.3, 0.1)
    esc50 = {"ESC-50-master/meta/esc50.csv": ESC50.encode(), "__MACOSX/meta/._esc50.csv": b"\xff"}
    path = zip_of(
        tmp_path / "e" / "ESC-50.zip", esc50 | {f"ESC-50-master/audio/1-{i + 1}-A-{i}.wav": sound for i in (0, 1)}
    )
    for root in (path, path.parent):
        assert packable(read_esc50(root)).keys() == {"1-1-A-0", "1-2-A-1"}
    path = zip_of(
        tmp_path / "u.zip", {"US/metadata/UrbanSound8K.csv": US8K.encode(), "US/audio/fold1/100-3-0-0.wav": sound}
    )
    assert list(packable(read_urbansound8k(path))) == ["100-3-0-0"]
    path = zip_of(tmp_path / "r.zip", {"Actor_01/03-01-05-01-01-01-01.wav": sound})
    assert list(packable(read_ravdess(path))) == ["03-01-05-01-01-01-01"]
    truth = {"vocabulary.csv": b"0,Bark,/m/2\n", "eval.csv": b"fname,labels,mids\n37199,Bark,/m/2\n"}
    zip_of(tmp_path / "f" / "truth.zip", {f"FSD50K.ground_truth/{name}": data for name, data in truth.items()})
    zip_of(tmp_path / "f" / "eval.zip", {"FSD50K.eval_audio/37199.wav": sound})
    assert packable(read_fsd50k(tmp_path / "f")) == {"37199": "eval.zip/FSD50K.eval_audio/37199.wav"}
    zip_of(tmp_path / "bad.zip", {"esc50.csv": b"filename,fold\na.wav,1\n", "a.wav": sound})
    with pytest.raises(UserError, match=r"bad\.zip/esc50\.csv:1: no column target"):
        read_esc50(tmp_path / "bad.zip")
    with pytest.raises(UsageError, match="no esc50.csv in it"):
        read_esc50(tmp_path / "r.zip")


def test_a_list_next_to_a_zip_of_its_clips(tmp_path: Path) -> None:
    touch(tmp_path, "meta/esc50.csv")
    (tmp_path / "meta" / "esc50.csv").write_text(ESC50)
    zip_of(tmp_path / "audio.zip", {f"audio/1-{i + 1}-A-{i}.wav": sound_bytes(0.3, 0.1) for i in (0, 1)})
    assert packable(read_esc50(tmp_path)).keys() == {"1-1-A-0", "1-2-A-1"}


# --- HDF5


def test_packs_of_mp3(tmp_path: Path, real_data: Path) -> None:
    """PaSST's and EfficientAT's."""
    sound = next((real_data / "formats").rglob("*.mp3")).read_bytes()
    for suffix in ("hdf", "h5", "hdf5"):
        with h5py.File(tmp_path / f"balanced_{suffix}_mp3.{suffix}", "w") as pack:
            ids = [f"Y{suffix:_<8}{i:03d}.mp3".encode() for i in range(3)]
            pack["audio_name"] = np.array(ids, dtype="S20")
            mp3 = pack.create_dataset("mp3", (3,), h5py.vlen_dtype(np.uint8))
            mp3[0], mp3[1] = np.frombuffer(sound, np.uint8), np.frombuffer(sound, np.uint8)
            pack["target"] = np.packbits(np.zeros((3, 527), bool), axis=1)
    ids = [f"{suffix:_<8}{i:03d}" for suffix in ("hdf", "h5", "hdf5") for i in range(3)]
    folder = pack_here(read_audioset(segments(tmp_path / "s.csv", ids, 0), tmp_path), tmp_path / "shards")
    clips = pq.read_table(folder / MANIFEST).to_pylist()
    assert {clip["key"] for clip in clips} == {f"{ytid}_0" for ytid in ids if not ytid.endswith("2")}
    assert all(clip["format"].startswith("mp3") and clip["peak"] > 0.01 for clip in clips)
    assert {detail for _, reason, detail in report(folder) if reason == "empty"} == {"0 bytes"}


def panns_pack(
    path: Path, waveform: Any, names: tuple[bytes, ...] = (b"Yabcdefghijk.wav",), rate: int | None = 32_000
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as pack:
        pack["audio_name"] = np.array(names, dtype="S20")
        pack["waveform"] = waveform
        if rate:
            pack.attrs["sample_rate"] = rate
    return path


@pytest.mark.parametrize("dtype", ["int16", "float32", "float64"])
def test_waveforms_are_scaled_by_their_type(tmp_path: Path, dtype: str) -> None:
    wave = np.sin(np.arange(32_000) / 20)[None] * 0.5
    panns_pack(tmp_path / "x.h5", (wave * 32768 if dtype == "int16" else wave).astype(dtype))
    source = read_audioset(segments(tmp_path / "s.csv", ["abcdefghijk"]), tmp_path)
    assert list(peaks(pack_here(source, tmp_path / "shards")).values()) == [0.5]


def test_bad_packs_are_warnings_where_others_are_good(tmp_path: Path) -> None:
    wave = np.zeros((1, 32_000), np.int16)
    audio = tmp_path / "audio"
    panns_pack(audio / "good.h5", wave)
    cut = panns_pack(audio / "cut.h5", wave)
    cut.write_bytes(cut.read_bytes()[:-20_000])
    panns_pack(audio / "int32.h5", wave.astype(np.int32))
    panns_pack(audio / "rate.h5", wave, rate=None)
    panns_pack(audio / "names.h5", wave, (b"a.wav", b"b.wav"))
    (audio / "text.h5").write_text("text")
    with h5py.File(audio / "other.h5", "w") as pack:
        pack["x"] = wave
    found = find_audio(audio)
    assert found.table["name"].to_pylist() == [b"good.h5/Yabcdefghijk.wav"]
    notes = {warning.partition(": ")[0].rpartition("/")[2]: warning.partition(": ")[2] for warning in found.warnings}
    assert {name: note.split(" ")[0] for name, note in notes.items()} == {
        "cut.h5": "not", "int32.h5": "its", "names.h5": "2", "other.h5": "not", "rate.h5": "has", "text.h5": "not"
    }  # fmt: skip
    assert "truncated" in notes["cut.h5"]
    assert "int32, where int16 or float32 is needed" in notes["int32.h5"]


# --- archives that can't be used


@pytest.mark.parametrize("suffix", COMPRESSED_TARS)
def test_compressed_tars_are_named_with_what_to_do(tmp_path: Path, suffix: str) -> None:
    touch(tmp_path, f"b{suffix}", f"c{suffix}")
    advice = rf"2 compressed tars \(b{suffix}, c{suffix}\); .*: tar -xf b{suffix}".replace(".", r"\.").replace(
        r"\.*", ".*"
    )
    with pytest.raises(UserError, match=advice) as error:
        find_audio(tmp_path)
    assert error.value.exit_code == 1
    touch(tmp_path, "a.wav")
    assert len(find_audio(tmp_path).warnings) == 1
    with pytest.raises(UsageError, match=rf"neither a folder nor an archive of clips .*tar -xf b{suffix}"):
        find_audio(tmp_path / f"b{suffix}")


def test_a_tar_in_a_tar_is_noted(tmp_path: Path) -> None:
    tar_of(tmp_path / "x.tar", {"in/inner.tar": b"", "in/more.zip": b"", "a.wav": sound_bytes(0.3, 0.1)})
    (warning,) = find_audio(tmp_path).warnings
    assert warning.startswith(f"{tmp_path}/x.tar: contains archives, which are not opened (1 .tar, 1 .zip)")


@pytest.mark.parametrize("suffix", sorted(CONTAINERS))
def test_a_damaged_archive_costs_only_itself(tmp_path: Path, suffix: str) -> None:
    """Empty, not of its kind, or of zeros; next to a good file, and alone."""
    for name, data in (("empty", b""), ("text", b"<html>404</html>" * 100), ("zeros", bytes(10_240))):
        (tmp_path / f"{name}{suffix}").write_bytes(data)
    expected = 2 if suffix == ".tar" else 3  # zeros are a tar without members
    with pytest.raises(UserError, match="no sound file"):
        find_audio(tmp_path)
    touch(tmp_path, "a.wav")
    found = find_audio(tmp_path)
    assert found.table["name"].to_pylist() == [b"a.wav"]
    assert len(found.warnings) == expected
    assert all("\n" not in warning for warning in found.warnings)


def test_two_archives_with_one_id(tmp_path: Path) -> None:
    (tmp_path / "audio").mkdir()
    tar_of(tmp_path / "audio" / "a.tar", {f"{IDS[0]}.wav": level(9)})
    zip_of(tmp_path / "audio" / "b.zip", {f"{IDS[0]}.wav": level(19) + bytes(9)})
    hub_audioset(tmp_path / "audio" / "c.parquet", IDS[:1], level)
    folder = pack_here(read_audioset(segments(tmp_path / "s.csv", IDS[:1]), tmp_path / "audio"), tmp_path / "shards")
    assert len(peaks(folder)) == 1
    assert [reason for _, reason, _ in report(folder)] == ["duplicate", "duplicate"]


# --- several files for one clip


def make_broken(folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"RIFF" + os.urandom(2000))


@pytest.mark.parametrize("broken", ["dangling", "noise", "folder", "film"])
def test_a_broken_file_hides_no_good_one(tmp_path: Path, broken: str) -> None:
    audio = tmp_path / "audio"
    audio.mkdir()
    ytid = IDS[0]
    if broken == "dangling":
        (audio / f"{ytid}.flac").symlink_to("nowhere")
    elif broken == "folder":
        (audio / f"{ytid}.flac").mkdir()
    else:
        make_broken(audio, f"{ytid}.flac")
    make_broken(audio, f"{ytid}.aac")
    soundfile.write(audio / f"{ytid}.ogg", np.full(4410, 0.3), 44_100)
    make_broken(audio, f"{ytid}.webm")
    source = read_audioset(segments(tmp_path / "s.csv", [ytid, IDS[1]]), audio)
    folder = pack_here(source, tmp_path / "shards")
    (clip,) = pq.read_table(folder / MANIFEST).to_pylist()
    assert clip["source"] == f"{ytid}.ogg"
    with tarfile.open(folder / "audioset-000000.tar") as tar:
        member = tar.extractfile(f"{ytid}_30000.json")
        assert member
        assert json.load(member)["source"] == f"{ytid}.ogg"
    reasons = {name: reason for name, reason, _ in report(folder)}
    first = "duplicate" if broken == "dangling" else "unreadable"  # a link that leads nowhere is tried last
    assert reasons == {
        f"{ytid}.flac": first,
        f"{ytid}.aac": "unreadable",
        f"{ytid}.webm": "duplicate",
        IDS[1]: "missing",
    }
    assert len(source.rows) == 1 + len(report(folder))  # rows in = packed + reported


def test_when_all_files_are_broken_each_is_named(tmp_path: Path) -> None:
    for name in ("a.wav", "a.aac", "a.webm"):
        make_broken(tmp_path / "in" / "dog", name)
    soundfile.write(tmp_path / "in" / "dog" / "b.wav", np.full(4410, 0.3), 44_100)
    folder = pack_here(read_folder(tmp_path / "in"), tmp_path / "shards")
    assert {name: reason for name, reason, _ in report(folder)} == {
        f"dog/a.{suffix}": "unreadable" for suffix in ("wav", "aac", "webm")
    }


def test_files_with_other_labels_are_no_candidates(tmp_path: Path) -> None:
    from shards.sources.folder import read_listed_folder

    make_broken(tmp_path, "a.wav")
    soundfile.write(tmp_path / "a.flac", np.full(4410, 0.3), 44_100)
    (tmp_path / "x.csv").write_text("path,labels\na.wav,dog\na.flac,cat\na.wav,dog\n")
    source = read_listed_folder(tmp_path, tmp_path / "x.csv")
    assert [row.candidates for row in rows_of(source)] == [None, None, None]
    (tmp_path / "x.csv").write_text("path,labels\na.wav,dog\na.wav,dog\na.flac,dog\n")
    (first, *others) = rows_of(read_listed_folder(tmp_path, tmp_path / "x.csv"))
    assert [file["source"] for file in first.candidates] == ["a.flac"]
    assert [row.candidates for row in others] == [None, None]


def test_a_file_that_ends_the_decoder_hides_no_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from shards import packer

    deaths = iter([True, True, False])
    monkeypatch.setattr(packer, "_PATIENCE_SECONDS", 60.0)
    send = packer._Process.__iter__

    def messages(self: Any) -> Any:
        if next(deaths, False):
            self.end = "the file ended the decoder: SIGSEGV"
            return iter(())
        return send(self)

    monkeypatch.setattr(packer._Process, "__iter__", messages)
    soundfile.write(tmp_path / "b.wav", np.full(4410, 0.3), 44_100)
    good = {"path": os.fsencode(tmp_path / "b.wav"), "offset": None, "size": None, "source": "b.wav"}
    row = SourceRow("k", [0], os.fsencode(tmp_path / "a.wav"), "a.wav", candidates=[good])
    with (tmp_path / "x.tar").open("w+b") as file:
        (outcome,) = packer.pack_rows(file, packer.RowsToPack([row], ["l"], Packing()))
    assert (outcome["source"], [other["source"] for other in outcome["others"]]) == ("b.wav", ["a.wav"])
    assert outcome["others"][0]["detail"] == "the file ended the decoder: SIGSEGV"


def sound_file(folder: Path, name: str, seconds: float) -> None:
    """Sound whose level in each second is the second's number, from 1, in hundredths."""
    folder.mkdir(parents=True, exist_ok=True)
    soundfile.write(folder / name, np.repeat(np.arange(1, 1 + round(seconds)) / 100, 1000), 1000)


@pytest.mark.parametrize(
    ("seconds", "packed"),
    [(10, {0: 0.1}), (45, {0: 0.1, 30: 0.4}), (33, {0: 0.1, 30: 0.33})],
)
def test_a_file_that_two_segments_share_is_the_whole_recording(
    tmp_path: Path, seconds: float, packed: dict[int, float]
) -> None:
    ytid = IDS[0]
    sound_file(tmp_path / "audio", f"{ytid}.wav", seconds)
    line = '{}, {}.000, {}.000, "/m/09x0r"'
    path = write(tmp_path / "s.csv", line.format(ytid, 0, 10), line.format(ytid, 30, 40))
    folder = pack_here(read_audioset(path, tmp_path / "audio"), tmp_path / "shards", sample_rate=1000)
    assert peaks(folder) == {f"{ytid}_{start * 1000}": peak for start, peak in packed.items()}
    assert [(reason, detail) for _, reason, detail in report(folder)] == [
        (
            "empty",
            f"ends after {seconds:.2f} s, before the segment from 30 to 40 s; several segments share this file: name "
            "each by its times",
        )
    ] * (2 - len(packed))
    # The same file is the segment where it is the only one in the list, once or twice.
    for lines in ([line.format(ytid, 30, 40)], [line.format(ytid, 30, 40)] * 2):
        (row, *_) = rows_of(read_audioset(write(tmp_path / "one.csv", *lines), tmp_path / "audio"))
        assert not row.shared


def test_a_name_with_times_is_not_shared(tmp_path: Path) -> None:
    ytid = IDS[0]
    for name in (f"{ytid}_30_40.wav", f"{ytid}.wav"):
        sound_file(tmp_path / "audio", name, 10)
    line = '{}, {}.000, {}.000, "/m/09x0r"'
    path = write(tmp_path / "s.csv", line.format(ytid, 0, 10), line.format(ytid, 30, 40))
    found = rows_of(read_audioset(path, tmp_path / "audio"))
    assert [(row.source, row.shared) for row in found] == [(f"{ytid}.wav", False), (f"{ytid}_30_40.wav", False)]


def test_older_sets_are_known_and_repaired_as_they_were_packed(tmp_path: Path) -> None:
    """Their options do not say which files are tried: a broken file costs the clip, and a shared one is in twice."""
    audio = tmp_path / "audio"
    make_broken(audio, f"{IDS[0]}.wav")
    soundfile.write(audio / f"{IDS[0]}.ogg", np.full(4410, 0.3), 44_100)
    sound_file(audio, f"{IDS[1]}.wav", 10)
    line = '{}, {}.000, {}.000, "/m/09x0r"'
    path = write(tmp_path / "s.csv", *(line.format(ytid, start, start + 10) for ytid in IDS[:2] for start in (0, 30)))
    source = read_audioset(path, audio)
    folder = pack_here(source, tmp_path / "shards", tries="first", shared="segment")
    table = pq.read_table(folder / MANIFEST)
    metadata = {
        key: value.replace(b', "tries": "first", "shared": "segment"', b"")
        for key, value in table.schema.metadata.items()
    }
    assert metadata != table.schema.metadata
    old = Packing(clips_per_shard=8, tries="first", shared="segment")
    options = {name: v for name, v in vars(old).items() if name not in ("tries", "shared")}
    digest = Plan(source, Packing(clips_per_shard=8), LocalFolder(str(folder)))._digest(options)
    recorded = Plan(source, old, LocalFolder(str(folder))).digest
    metadata = {key: value.replace(recorded.encode(), digest.encode()) for key, value in metadata.items()}
    pq.write_table(table.replace_schema_metadata(metadata), folder / MANIFEST)
    from erann_dist.data.manifest import read_info
    from shards import build

    local = LocalFolder(str(folder))
    info = read_info(local)
    assert Plan(source, Packing(clips_per_shard=8), local).is_of(info)
    assert packing_of(local, info) == old
    before = (folder / "audioset-000000.tar").read_bytes()
    (task,) = repair_tasks(local, source, [0])
    build.build_shard(task)
    assert (folder / "audioset-000000.tar").read_bytes() == before
    assert peaks(folder).keys() == {f"{IDS[1]}_0", f"{IDS[1]}_30000"}


def test_a_full_disk_blames_no_clip_in_an_archive(tmp_path: Path) -> None:
    tar_of(tmp_path / "x.tar", {"dog/a.wav": sound_bytes(0.3)})
    (row,) = rows_of(read_folder(tmp_path / "x.tar"))
    with Path("/dev/full").open("r+b", buffering=0) as full, pytest.raises(OSError, match="No space"):
        pack_clip(row, Packing(), _Unseekable(full))


class _Unseekable:
    """/dev/full as a file of the size that was written."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def seek(self, *_: int) -> int:
        return 0

    def truncate(self) -> int:
        return 0

    def write(self, data: Any) -> int:
        return int(self._file.write(data))


def test_a_tar_that_was_cut_since_it_was_planned(tmp_path: Path) -> None:
    tar = tar_of(tmp_path / "x.tar", {"dog/a.mp3": bytes(5000)})
    (row,) = rows_of(read_folder(tar))
    tar.write_bytes(tar.read_bytes()[:3000])
    with pytest.raises(Rejected, match="the archive ends before the clip does"):
        pack_clip(row, Packing(), io.BytesIO())
