"""What verify sees, what repair rebuilds, what index makes of other people's tars."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import webdataset

from erann_dist.data.manifest import MANIFEST, REPORT, SHARDS, content_hash, load_manifest
from erann_dist.errors import UserError
from erann_dist.storage.folder import LocalFolder
from shards import build
from shards.index import index
from shards.repair import repair_tasks, why_different
from shards.sources.audioset import read_audioset
from shards.sources.class_lists import ClassList
from shards.sources.rows import Source
from shards.verify import verify
from tests.conftest import copy_tree, write_tone_set
from tests.shards.test_build import digests

RATE = 44_100


def problems(shards: Path, quick: bool = False) -> list[str]:
    return [problem.text for _, found in verify(LocalFolder(str(shards)), quick) for problem in found]


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def change_table(path: Path, change: dict[str, object], row: int = 7) -> None:
    """Change a row, and the content hash in the metadata with it, as somebody would who writes tables by hand."""
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[row] |= change
    changed = pa.Table.from_pylist(rows, table.schema)
    if path.name == MANIFEST:
        info = json.loads(table.schema.metadata[b"erann"]) | {
            "content_hash": content_hash(changed.replace_schema_metadata())
        }
        changed = changed.replace_schema_metadata({"erann": json.dumps(info)})
    pq.write_table(changed, path)


@pytest.mark.parametrize("quick", [False, True])
def test_a_sound_set_has_no_problems(tone_shards: Path, quick: bool) -> None:
    assert problems(tone_shards, quick) == []
    assert sum(clips for clips, _ in verify(LocalFolder(str(tone_shards)), quick)) == 40


def test_verify_names_every_kind_of_damage(tone_shards: Path, tmp_path: Path) -> None:
    def damaged(name: str) -> tuple[Path, Path]:
        folder = copy_tree(tone_shards, tmp_path / name)
        return folder, folder / "audioset-000001.tar"

    folder, tar = damaged("cut")
    tar.write_bytes(tar.read_bytes()[:-4000])
    for quick in (False, True):
        (line,) = problems(folder, quick)
        assert "audioset-000001.tar: truncated" in line

    folder, tar = damaged("gone")
    tar.unlink()
    assert problems(folder) == problems(folder, quick=True) == [f"{tar}: missing"]

    folder, tar = damaged("extra")
    (folder / "audioset-000009.tar").write_bytes(tar.read_bytes())
    assert problems(folder, quick=True) == [f"{folder}/audioset-000009.tar: extra, shards.parquet does not list it"]

    folder, tar = damaged("flipped")
    manifest = load_manifest(folder)
    row = int(np.flatnonzero(manifest.shards == 1)[3])
    flip(tar, int(manifest.offsets[row]) + 100)
    assert problems(folder, quick=True) == []
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
    change_table(folder / MANIFEST, {column: {"key": "x", "labels": [2, 0]}.get(column, 77)})
    assert any("audioset-00000" in p for p in problems(folder))


def test_verify_sees_a_changed_table(tone_shards: Path, tmp_path: Path) -> None:
    folder = copy_tree(tone_shards, tmp_path / "shards")
    table = pq.read_table(folder / MANIFEST)
    pq.write_table(table.take([1, 0, *range(2, 40)]), folder / MANIFEST)
    assert any("content hash" in p for p in problems(folder, quick=True))
    change_table(folder / SHARDS, {"clips": 9}, row=2)
    assert any("8 clips in manifest.parquet, 9 in shards.parquet" in p for p in problems(folder, quick=True))
    (folder / SHARDS).write_bytes((folder / SHARDS).read_bytes()[:-50])
    with pytest.raises(UserError, match=r"shards\.parquet: damaged"):
        problems(folder)


def test_verify_decodes_what_the_checksums_call_sound(tone_shards: Path, tmp_path: Path) -> None:
    """A clip that was broken before its checksums were taken: they match, and it does not decode."""
    folder = copy_tree(tone_shards, tmp_path / "shards")
    manifest = load_manifest(folder)
    row = int(np.flatnonzero(manifest.shards == 1)[2])
    tar = folder / "audioset-000001.tar"
    data = bytearray(tar.read_bytes())
    begin, size = int(manifest.offsets[row]), int(manifest.sizes[row])
    data[begin + 1000 : begin + size] = bytes(size - 1000)
    tar.write_bytes(data)
    import hashlib
    import zlib

    change_table(folder / SHARDS, {"sha256": hashlib.sha256(data).hexdigest()}, row=1)
    change_table(folder / MANIFEST, {"crc32": zlib.crc32(data[begin : begin + size])}, row=row)
    (line,) = problems(folder)
    assert f"{manifest.keys[row]}.flac" in line
    assert "is not FLAC" in line or "samples at 44100 Hz, manifest.parquet has" in line


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """What the shared set of tones was packed from, written again."""
    return read_audioset(*write_tone_set(tmp_path / "set", 40))


def rebuild(folder: Path, source: Source) -> list[str]:
    """Repair as the command does, in this process; the names of the rebuilt tars. Raises build.Differs."""
    local = LocalFolder(str(folder))
    shards = sorted({p.shard for _, found in verify(local) for p in found if p.shard is not None})
    tasks = repair_tasks(local, source, shards)
    for task in tasks:
        build.build_shard(task)
    return [task.name for task in tasks]


def test_repair_rebuilds_only_what_is_damaged_to_the_same_bytes(
    tone_shards: Path, source: Source, tmp_path: Path
) -> None:
    folder = copy_tree(tone_shards, tmp_path / "shards")
    untouched = (folder / "audioset-000000.tar").stat().st_mtime_ns
    (folder / "audioset-000001.tar").unlink()
    (folder / "audioset-000003.tar").write_bytes(b"nothing like a tar")
    assert rebuild(folder, source) == ["audioset-000001.tar", "audioset-000003.tar"]
    assert digests(folder) == digests(tone_shards)
    assert (folder / "audioset-000000.tar").stat().st_mtime_ns == untouched
    assert rebuild(folder, source) == []


def test_repair_refuses_another_source(tone_shards: Path, tmp_path: Path) -> None:
    folder = copy_tree(tone_shards, tmp_path / "shards")
    (folder / "audioset-000001.tar").unlink()
    with pytest.raises(
        UserError, match="was packed from another source: audioset-000001.tar would contain other clips"
    ):
        rebuild(folder, read_audioset(*write_tone_set(tmp_path / "other", 24)))
    assert not (folder / "audioset-000001.tar").exists()


def test_repair_says_why_it_can_not(tone_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy_tree(tone_shards, tmp_path / "shards")
    (folder / "audioset-000001.tar").unlink()
    paths = write_tone_set(tmp_path / "set", 40)
    local = LocalFolder(str(folder))
    (task,) = repair_tasks(local, read_audioset(*paths), [1])
    clip = paths[1] / task.rows["source"][0].as_py()

    def reason() -> str:
        (again,) = repair_tasks(local, read_audioset(*paths), [1])
        with pytest.raises(build.Differs) as difference:
            build.build_shard(again)
        assert not (folder / "audioset-000001.tar").exists()
        return why_different(local, again, difference.value.args[0])

    sound, rate = soundfile.read(clip)
    soundfile.write(clip, sound * 0.5, rate)
    assert reason().endswith("can't be rebuilt to the same bytes: source files have changed since it was packed")
    monkeypatch.setattr("shards.repair.versions", lambda: {"av": "1.2.3", "soundfile": "0", "soxr": "0"})
    assert "it was packed with av " in reason()
    assert "pip install av==" in reason()
    clip.unlink()
    assert f"{clip.name} was packed then and is now missing" in reason()


def foreign_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def sound(seconds: float = 1.0, rate: int = RATE, kind: str = "FLAC", channels: int = 1, **options: str) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(
        buffer, np.tile(np.sin(np.arange(round(rate * seconds)))[:, None], channels) * 0.3, rate, format=kind, **options
    )
    return buffer.getvalue()


def test_index_gives_our_own_tars_their_manifest_back(tone_shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tars"
    folder.mkdir()
    for tar in tone_shards.glob("*.tar"):
        (folder / tar.name).write_bytes(tar.read_bytes())
    ids, names = [f"/m/{c:03d}" for c in range(3)], [f"Tone, {c}" for c in range(3)]
    list(index(LocalFolder(str(folder)), ClassList("", ids, names)))
    ours, theirs = pq.read_table(tone_shards / MANIFEST), pq.read_table(folder / MANIFEST)
    for column in ("key", "labels", "split", "fold", "shard", "offset", "size", "samples", "crc32"):
        assert theirs[column].to_pylist() == ours[column].to_pylist(), column
    assert pq.read_table(folder / SHARDS).to_pylist() == pq.read_table(tone_shards / SHARDS).to_pylist()
    assert load_manifest(folder).info.label_ids == ids
    assert problems(folder) == []


def test_index_takes_what_it_can_and_reports_the_rest(tmp_path: Path) -> None:
    """Tars as others write them: by webdataset itself, in folders, with classes instead of JSON, with other things."""
    (tmp_path / "part").mkdir()
    with webdataset.TarWriter(str(tmp_path / "part" / "a.tar")) as writer:
        writer.write({"__key__": "dogs/one", "flac": sound(), "cls": 10})
        writer.write({"__key__": "dogs/two", "flac": sound(0.5), "json": json.dumps({"label": 9, "fold": 3}).encode()})
        writer.write({"__key__": "cats/one", "flac": sound(), "txt": "9"})
        about = json.dumps({"duration": 10, "label": None, "fold": 300}).encode()
        writer.write({"__key__": "cats/two", "cls": 10, "flac": sound(), "json": about})
    foreign_tar(
        tmp_path / "b.tar",
        {
            "stereo.flac": sound(channels=2),
            "stereo.cls": b"9",
            "slow.flac": sound(rate=32_000),
            "slow.cls": b"9",
            "loud.mp3": sound(kind="MP3"),
            "loud.cls": b"9",
            "deep.flac": sound(subtype="PCM_24"),
            "deep.cls": b"9",
            "broken.flac": sound()[:3000],
            "broken.cls": b"9",
            "alone.cls": b"9",
            "nolabel.flac": sound(),
            "dogs/one.flac": sound(),
            "dogs/one.cls": b"10",
            "picture.jpg": b"...",
        },
    )
    list(index(LocalFolder(str(tmp_path)), None))
    manifest = load_manifest(tmp_path)
    report = {r["source"].partition("/")[2]: r["reason"] for r in pq.read_table(tmp_path / REPORT).to_pylist()}
    # b.tar comes before part/a.tar, so that its dogs/one is the first.
    assert manifest.keys.to_pylist() == ["dogs%2Fone", "dogs%2Ftwo", "cats%2Fone", "cats%2Ftwo"]
    assert manifest.shards.tolist() == [0, 1, 1, 1]
    assert manifest.info.label_ids == ["9", "10"]
    assert manifest.label_values.tolist() == [1, 0, 0, 1]
    assert manifest.folds.tolist() == [-1, 3, -1, -1]
    assert (manifest.info.task, manifest.info.sample_rate) == ("classification", RATE)
    assert report == {
        "stereo": "unreadable",
        "slow": "unreadable",
        "loud": "unreadable",
        "deep": "unreadable",
        "broken": "unreadable",
        "alone": "missing",
        "nolabel": "wrong label",
        "a.tar/dogs%2Fone": "duplicate",
        "picture": "missing",
    }
    assert problems(tmp_path) == []
    with pytest.raises(UserError, match="has a manifest already"):
        list(index(LocalFolder(str(tmp_path)), None))


def test_index_of_nothing(tmp_path: Path) -> None:
    folder = LocalFolder(str(tmp_path))
    with pytest.raises(UserError, match="no tar in it"):
        list(index(folder, None))
    foreign_tar(tmp_path / "x.tar", {"a.txt": b"hello"})
    with pytest.raises(UserError, match="no mono 16-bit FLAC or WAV"):
        list(index(folder, None))
    (tmp_path / "x.tar").write_bytes((tmp_path / "x.tar").read_bytes()[:700])
    (tmp_path / "y.tar").write_bytes(b"text" * 500)
    with pytest.raises(UserError, match=r"y\.tar: not a whole tar|x\.tar: not a whole tar"):
        list(index(folder, None))
    assert not (tmp_path / MANIFEST).exists()
