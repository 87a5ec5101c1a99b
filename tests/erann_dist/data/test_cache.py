"""The node's clip cache: right or a miss, whatever is cut, spoiled or full."""

import os
import random
from pathlib import Path

import pytest

from erann_dist.data import cache as cache_module
from erann_dist.data.cache import ClipCache, ClipId
from erann_dist.errors import UsageError

SET, OTHER_SET = f"{1:064x}", f"{2**255:064x}"
MB = 1 << 20


def clip(row: int, set_hash: str = SET) -> tuple[ClipId, bytes]:
    """A clip of some 40 KB that can be told from all others."""
    data = random.Random(f"{set_hash}-{row}").randbytes(40_000 + row % 97)
    return ClipId(set_hash, row, "flac", len(data)), data


def fill(folder: Path, rows: range, max_bytes: int = 64 * MB, set_hash: str = SET) -> ClipCache:
    cache = ClipCache(folder, max_bytes)
    for row in rows:
        cache.put(*clip(row, set_hash))
    return cache


def hits(cache: ClipCache, rows: range, set_hash: str = SET) -> int:
    """How many are there; what is there is right."""
    found = 0
    for row in rows:
        id_, data = clip(row, set_hash)
        kept = memoryview(bytearray(id_.size))
        if cache.get(id_, kept):
            assert kept == data
            found += 1
    return found


def test_what_was_put_is_got_by_everyone(tmp_path: Path) -> None:
    writer = fill(tmp_path, range(50))
    reader = ClipCache(tmp_path, 64 * MB)
    assert hits(writer, range(60)) == hits(reader, range(60)) == 50
    reader.close()
    writer.close()
    assert hits(ClipCache(tmp_path, 64 * MB), range(60)) == 50


def test_sets_and_forms_are_kept_apart(tmp_path: Path) -> None:
    cache = fill(tmp_path, range(10))
    assert hits(cache, range(10), OTHER_SET) == 0
    _, data = clip(3)
    for other in (ClipId(SET, 3, "pcm", len(data)), ClipId(SET, 3, "flac", len(data) + 1)):
        assert not cache.get(other, memoryview(bytearray(other.size)))
    fill(tmp_path, range(10), set_hash=OTHER_SET).close()
    assert hits(cache, range(10)) == hits(cache, range(10), OTHER_SET) == 10


def test_it_never_grows_beyond_its_size(tmp_path: Path) -> None:
    caches = [ClipCache(tmp_path, 2 * MB) for _ in range(3)]
    for row in range(120):
        caches[row % 3].put(*clip(row))
        assert sum(path.stat().st_size for path in tmp_path.glob("slab-*")) <= 2 * MB
    assert all("full" in str(each.problem) for each in caches)
    assert 20 < hits(caches[0], range(120)) < 52


def test_a_slab_is_taken_on_by_the_next_process(tmp_path: Path) -> None:
    fill(tmp_path, range(10), 64 * MB).close()
    fill(tmp_path, range(10, 20), 64 * MB).close()
    assert [path.name for path in tmp_path.glob("slab-*")] == ["slab-00000"]
    assert hits(ClipCache(tmp_path, 64 * MB), range(20)) == 20


@pytest.mark.parametrize("seed", range(20))
def test_damaged_and_cut_files_are_misses(tmp_path: Path, seed: int) -> None:
    fill(tmp_path, range(30)).close()
    rng = random.Random(seed)
    for path in tmp_path.iterdir():
        data = bytearray(path.read_bytes())
        for _ in range(rng.randrange(1, 40)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data[: rng.randrange(len(data))] if seed % 2 else data)
    names = {path.name for path in tmp_path.iterdir()}
    cache = ClipCache(tmp_path, 64 * MB)
    assert hits(cache, range(30)) < 30
    assert {path.name for path in tmp_path.iterdir()} == names
    for row in range(30):
        cache.put(*clip(row))
    assert hits(cache, range(30)) == 30


def test_files_cut_while_they_are_in_use(tmp_path: Path) -> None:
    cache = fill(tmp_path, range(30))
    for path in tmp_path.iterdir():
        os.truncate(path, path.stat().st_size // 2)
    assert 5 < hits(cache, range(30)) < 20


def test_a_full_disk_ends_the_filling_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = fill(tmp_path, range(10))

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module.os, "pwritev", full)
    cache.put(*clip(10))
    assert "No space left on device" in str(cache.problem)
    assert hits(cache, range(20)) == 10


def test_a_clip_larger_than_a_slab_is_not_kept_and_the_others_are(tmp_path: Path) -> None:
    cache = fill(tmp_path, range(10), 16 * MB)
    cache.put(ClipId(SET, 10, "flac", 2 * MB), bytes(2 * MB))
    assert "max_bytes is too small for a clip of 2097184 bytes" in str(cache.problem)
    for row in range(10, 20):
        cache.put(*clip(row))
    assert hits(cache, range(20)) == 20


def test_what_can_not_be_read_is_a_miss(tmp_path: Path) -> None:
    """An index that leads to no slab, and a slab that is a folder."""
    fill(tmp_path, range(3)).close()
    (tmp_path / "slab-00000").unlink()
    assert hits(ClipCache(tmp_path, 64 * MB), range(3)) == 0
    (tmp_path / "slab-00000").mkdir()
    cache = fill(tmp_path, range(3))
    assert hits(cache, range(3)) == 0
    assert "no more clips are cached (Is a directory)" in str(cache.problem)


def test_a_folder_that_can_not_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="file/cache: no cache can be kept here"):
        ClipCache(tmp_path / "file" / "cache", MB)
