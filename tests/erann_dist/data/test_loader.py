import gc
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from erann_dist.data.loader import BadClips, Crops, Loader, random_crops, whole_clips
from erann_dist.data.manifest import concatenate, load_manifest
from erann_dist.errors import UserError
from shards.sources.audioset import read_audioset
from tests.conftest import copy_tree, pack_here, write_tone_set


def whole_files(shards: Path) -> list[np.ndarray]:
    """Each clip's samples by soundfile, through Python's own tarfile."""
    import io
    import tarfile

    manifest = load_manifest(shards)
    found = {}
    for path in map(str, manifest.tars):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".flac"):
                    data = tar.extractfile(member).read()
                    found[member.name.removesuffix(".flac")] = soundfile.read(io.BytesIO(data), dtype="int16")[0]
    return [found[key] for key in manifest.keys.to_pylist()]


def test_wav_shards_give_the_same_crops(tone_shards: Path, tmp_path: Path) -> None:
    wav = pack_here(read_audioset(*write_tone_set(tmp_path, 40)), tmp_path / "wav", codec="wav")
    rows = np.arange(40)
    crops = [
        next(Loader(m, [random_crops(m, rows, rows, 7, 30_000)], threads=2, ahead_bytes=1 << 20)).pcm
        for m in (load_manifest(tone_shards), load_manifest(wav))
    ]
    assert torch.equal(crops[0], crops[1])


def test_crops_are_the_clips_samples_in_order(tone_shards: Path) -> None:
    manifest, files = load_manifest(tone_shards), whole_files(tone_shards)
    rng = np.random.default_rng(0)
    requests = []
    for start in range(0, 120, 6):
        positions = np.arange(start, start + 6)
        requests.append(random_crops(manifest, rng.integers(len(manifest), size=6), positions, 5, 50_000))
    batches = list(Loader(manifest, requests, threads=3, ahead_bytes=1 << 20))
    assert [b.crops for b in batches] == requests
    for batch in batches:
        for row, start, count, pcm in zip(
            batch.crops.rows, batch.crops.starts, batch.crops.counts, batch.pcm, strict=True
        ):
            assert np.array_equal(pcm[:count], files[row][start : start + count])
            assert not pcm[count:].any()


def test_crop_starts_are_spread_and_keyed(tone_shards: Path) -> None:
    manifest = load_manifest(tone_shards)
    rows = np.zeros(500, np.int64)
    crops = random_crops(manifest, rows, np.arange(500), 1, 22_050)
    again = random_crops(manifest, rows[:3], np.array([4, 499, 0]), 1, 22_050)
    assert crops.starts[[4, 499, 0]].tolist() == again.starts.tolist()
    last = manifest.samples[0] - 22_050
    assert crops.starts.min() >= 0
    assert crops.starts.max() <= last
    assert abs(crops.starts.mean() - last / 2) < last / 10
    longer = random_crops(manifest, rows, np.arange(500), 1, 10**7)
    assert set(longer.starts.tolist()) == {0}
    assert set(longer.counts.tolist()) == {manifest.samples[0]}


def test_a_damaged_clip_is_named_and_ends_the_load(tone_shards: Path, tmp_path: Path) -> None:
    shards = copy_tree(tone_shards, tmp_path / "shards")
    manifest = load_manifest(shards)
    path = Path(str(manifest.tars[manifest.shards[11]]))
    data = bytearray(path.read_bytes())
    data[int(manifest.offsets[11]) + 500] ^= 1
    path.write_bytes(data)
    requests = [whole_clips(manifest, np.array([row]), 70_000) for row in range(40)]
    threads_before = set(threading.enumerate())
    batches = Loader(manifest, requests, threads=2, ahead_bytes=1 << 20)
    assert [next(batches).crops.rows[0] for _ in range(11)] == list(range(11))
    with pytest.raises(UserError, match=rf"{path.name}: clip {manifest.keys[11]} is damaged"):
        next(batches)
    assert set(threading.enumerate()) <= threads_before  # threads of other tests may end in the meantime


def test_a_shard_cut_short_is_named(tone_shards: Path, tmp_path: Path) -> None:
    shards = copy_tree(tone_shards, tmp_path / "shards")
    manifest = load_manifest(shards)
    path = Path(str(manifest.tars[0]))
    path.write_bytes(path.read_bytes()[:50_000])
    rows = np.flatnonzero(manifest.shards == 0)
    with pytest.raises(UserError, match=f"{path.name}: has 50000 bytes, not the .* truncated or replaced"):
        list(Loader(manifest, [Crops(rows, rows * 0, rows * 0 + 1, 10, None)], threads=2, ahead_bytes=1 << 20))


def test_a_missing_shard_is_named(tone_shards: Path, tmp_path: Path) -> None:
    shards = copy_tree(tone_shards, tmp_path / "shards")
    manifest = load_manifest(shards)
    Path(str(manifest.tars[0])).unlink()
    rows = np.flatnonzero(manifest.shards == 0)
    with pytest.raises(UserError, match=f"{manifest.tars[0].name}: No such file"):
        list(Loader(manifest, [whole_clips(manifest, rows, 70_000)], threads=2, ahead_bytes=1 << 20))


def test_stopping_early_leaves_no_thread_and_no_open_file(tone_shards: Path) -> None:
    manifest = load_manifest(tone_shards)
    gc.collect()  # what other tests' exceptions hold
    threads_before, files_before = set(threading.enumerate()), len(list(Path("/proc/self/fd").iterdir()))
    batches = Loader(
        manifest,
        (whole_clips(manifest, np.array([r % 40]), 70_000) for r in range(10**6)),
        threads=3,
        ahead_bytes=1 << 20,
    )
    next(batches)
    assert set(threading.enumerate()) - threads_before
    batches.close()
    assert set(threading.enumerate()) <= threads_before
    assert len(list(Path("/proc/self/fd").iterdir())) <= files_before


def damage(shards: Path, rows: list[int]) -> None:
    manifest = load_manifest(shards)
    for row in rows:
        path = Path(str(manifest.tars[manifest.shards[row]]))
        data = bytearray(path.read_bytes())
        data[int(manifest.offsets[row]) + 500] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize("threads", [1, 4])
def test_bad_clips_are_replaced_by_a_function_of_the_position(tone_shards: Path, tmp_path: Path, threads: int) -> None:
    shards = copy_tree(tone_shards, tmp_path / "shards")
    damage(shards, [3, 11, 12])
    manifest, files = load_manifest(shards), whole_files(tone_shards)

    def substitute(position: int, attempt: int) -> Crops:
        # The first substitute of every other position is bad itself.
        row = np.array([11 if attempt == 0 and position % 2 else (position + attempt) % 3])
        return random_crops(manifest, row, np.array([position]), 5, 30_000)

    bad_clips = BadClips(3)
    positions = np.arange(80).reshape(8, 10)
    crops = [random_crops(manifest, block % 40, block, 5, 30_000) for block in positions]
    batches = list(Loader(manifest, crops, threads=threads, bad_clips=bad_clips, substitute=substitute))
    assert bad_clips.found.keys() == {manifest.keys[row].as_py() for row in (3, 11, 12)}
    for block, batch in zip(positions, batches, strict=True):
        drawn = block % 40
        attempts = np.where(np.isin(drawn, [3, 11, 12]), block % 2, -1)
        expected = np.where(attempts < 0, drawn, (block + attempts) % 3)
        assert batch.crops.rows.tolist() == expected.tolist()
        again = random_crops(manifest, expected, block, 5, 30_000)
        for i, (row, start, count) in enumerate(zip(expected, again.starts, again.counts, strict=True)):
            assert np.array_equal(batch.pcm[i, :count], files[row][start : start + count])


def test_one_bad_clip_too_many(tone_shards: Path, tmp_path: Path) -> None:
    shards = copy_tree(tone_shards, tmp_path / "shards")
    damage(shards, [3, 11, 12])
    manifest = load_manifest(shards)
    block = np.arange(40)
    crops = [random_crops(manifest, block, block, 5, 30_000)]

    def substitute(position: int, attempt: int) -> Crops:
        return random_crops(manifest, np.array([0]), np.array([position]), 5, 30_000)

    with pytest.raises(UserError, match=r"clip \w+ is damaged; .* bad clip number 3, data.max_bad_clips is 2"):
        list(Loader(manifest, crops, threads=1, bad_clips=BadClips(2), substitute=substitute))


def test_a_bad_clips_namesake_in_another_set_is_sound(tone_shards: Path, tmp_path: Path) -> None:
    """Whichever of the two is read first."""
    shards = copy_tree(tone_shards, tmp_path / "shards")
    damage(shards, [3])
    both = concatenate([load_manifest(shards), load_manifest(tone_shards)])
    assert both.keys[3] == both.keys[43]

    def substitute(position: int, attempt: int) -> Crops:
        return random_crops(both, np.array([20]), np.array([position]), 5, 30_000)

    for rows in ([3, 43, 3], [43, 3, 43]):
        crops = [random_crops(both, np.array([row]), np.array([p]), 5, 30_000) for p, row in enumerate(rows)]
        bad_clips = BadClips(1)
        batches = list(Loader(both, crops, threads=1, bad_clips=bad_clips, substitute=substitute))
        assert [int(batch.crops.rows[0]) for batch in batches] == [20 if row == 3 else row for row in rows]
        assert len(bad_clips.found) == 1


def test_a_shard_that_is_another_of_the_same_size_is_never_data(tone_shards: Path, tmp_path: Path) -> None:
    shards = copy_tree(tone_shards, tmp_path / "shards")
    manifest = load_manifest(shards)
    path = Path(str(manifest.tars[0]))
    path.write_bytes(os.urandom(path.stat().st_size))
    rows = np.flatnonzero(manifest.shards == 0)[:1]
    with pytest.raises(UserError, match=rf"^{path}: clip {manifest.keys[rows[0]]} is damaged; check .* erann verify"):
        list(Loader(manifest, [whole_clips(manifest, rows, 70_000)], threads=2))


def test_a_shard_that_is_cut_while_it_is_read(tone_shards: Path, tmp_path: Path) -> None:
    shards = copy_tree(tone_shards, tmp_path / "shards")
    manifest = load_manifest(shards)
    last = int(np.argmax(manifest.offsets))
    path = Path(str(manifest.tars[manifest.shards[last]]))
    rows = np.flatnonzero(manifest.shards == manifest.shards[last])
    batches = Loader(
        manifest,
        [whole_clips(manifest, rows[:1], 70_000)] * 2 + [whole_clips(manifest, np.array([last]), 70_000)],
        threads=1,
        ahead_bytes=1,
    )
    next(batches)
    os.truncate(path, int(manifest.offsets[last]) + 100)
    with pytest.raises(UserError, match=rf"{path.name}: clip {manifest.keys[last]} is truncated"):
        list(batches)


def test_a_shard_that_is_replaced_while_it_is_read_is_read_on(tone_shards: Path, tmp_path: Path) -> None:
    shards = copy_tree(tone_shards, tmp_path / "shards")
    manifest, files = load_manifest(shards), whole_files(tone_shards)
    rows = np.flatnonzero(manifest.shards == 0)
    batches = Loader(
        manifest, [whole_clips(manifest, rows[i : i + 1], 70_000) for i in range(8)], threads=1, ahead_bytes=1
    )
    found = [next(batches)]
    path = Path(str(manifest.tars[0]))
    (tmp_path / "new").write_bytes(bytes(100))
    (tmp_path / "new").replace(path)
    for row, batch in zip(rows, found + list(batches), strict=True):
        assert np.array_equal(batch.pcm[0, : len(files[row])], files[row])


def test_too_many_bad_clips_of_all_workers_are_named() -> None:
    bad_clips = BadClips(2, {"a": "a is bad"})
    bad_clips.unite([{"a": "a is bad"}, {"b": "b is bad"}])
    assert set(bad_clips.found) == {"a", "b"}
    with pytest.raises(UserError, match="^3 clips are bad, data.max_bad_clips is 2: a, b, c$"):
        bad_clips.unite([{"c": "c is bad"}])
