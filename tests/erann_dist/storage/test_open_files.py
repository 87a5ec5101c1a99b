"""Files that are kept open: a bounded number, and none closed while it is in use."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from erann_dist.data.cache import ClipCache, ClipId
from erann_dist.data.loader import Loader, random_crops
from erann_dist.data.manifest import Manifest, load_manifest
from erann_dist.storage import open_files
from erann_dist.storage.open_files import OpenFile, OpenFiles
from shards.sources.audioset import read_audioset
from tests.conftest import pack_here, write_tone_set


def open_below(folder: Path) -> int:
    """How many files in a folder this process has open."""
    links = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            links.append(os.readlink(link))
        except FileNotFoundError:  # the folder's own
            continue
    return sum(Path(link).is_relative_to(folder) for link in links)


def numbered_files(folder: Path, number: int) -> list[Path]:
    paths = [folder / str(i) for i in range(number)]
    for path in paths:
        path.write_text(path.name)
    return paths


def test_those_used_last_stay_open(tmp_path: Path) -> None:
    paths, opened = numbered_files(tmp_path, 10), list[Path]()
    files = OpenFiles[Path](most=3)

    def read(path: Path) -> str:
        def open_it() -> OpenFile:
            opened.append(path)
            return OpenFile(path, os.O_RDONLY)

        return os.pread(files.get(path, open_it).descriptor, 10, 0).decode()

    for path in (*paths, paths[8], paths[9], paths[7], paths[0], paths[7]):
        assert read(path) == path.name
        assert open_below(tmp_path) <= 3
    assert opened == [*paths, paths[0]]
    files.close()
    assert open_below(tmp_path) == 0


def test_a_file_in_use_is_not_closed(tmp_path: Path) -> None:
    first, *others = numbered_files(tmp_path, 10)
    files = OpenFiles[Path](most=2)
    used = files.get(first, lambda: OpenFile(first, os.O_RDONLY))
    for path in others:
        files.get(path, lambda path=path: OpenFile(path, os.O_RDONLY))
    files.close()
    assert os.pread(used.descriptor, 10, 0) == b"0"
    used.close()
    used.close()
    assert open_below(tmp_path) == 0


@pytest.fixture(scope="module")
def many_tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("many")
    return pack_here(read_audioset(*write_tone_set(root, 20, seconds=0.5)), root / "shards", clips_per_shard=1)


def samples(clips: Manifest, cache: ClipCache | None = None) -> tuple[torch.Tensor, int]:
    """Of each clip twice, and the most files of the set that were open at once."""
    rows = np.tile(np.arange(len(clips)), 2)
    crops = [random_crops(clips, part, part, 0, 8000) for part in np.split(rows, 10)]
    most, found = 0, []
    for batch in Loader(clips, crops, threads=4, ahead_bytes=1, cache=cache):
        most = max(most, open_below(Path(str(clips.tars[0].folder))))
        found.append(batch.pcm)
    return torch.stack(found), most


def test_a_set_of_more_tars_than_files_may_be_open(many_tars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clips = load_manifest(many_tars)
    expected, most = samples(clips)
    assert most == len(clips.tars) == 20
    monkeypatch.setattr(open_files, "_MOST", 5)
    found, most = samples(clips)
    assert torch.equal(found, expected)
    assert most <= 5 + 4  # those that the threads are reading


def test_a_cache_of_more_slabs_than_files_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_files, "_MOST", 3)
    cache = ClipCache(tmp_path / "cache", 16_000)  # slabs of 1,000 bytes
    clips = [ClipId(f"{1:064x}", row, "flac", 700) for row in range(12)]
    for clip in clips:
        cache.put(clip, bytes([clip.row]) * clip.size)
        assert open_below(tmp_path) <= 3 + 1
    data = memoryview(bytearray(700))
    for clip in clips:
        assert cache.get(clip, data)
        assert bytes(data) == bytes([clip.row]) * 700
    # The slab that is written stays this process's.
    other = ClipCache(tmp_path / "cache", 16_000)
    other.put(ClipId(f"{2:064x}", 0, "flac", 200), bytes(200))
    assert (tmp_path / "cache/slab-00011").stat().st_size <= 1000
    cache.close()
    other.close()
    assert open_below(tmp_path) == 0


def test_the_number_follows_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    for allowed, most in ((1024, 128), (64, 16), (1 << 20, 4096)):
        monkeypatch.setattr(open_files, "allowed_files", lambda allowed=allowed: allowed)
        assert OpenFiles[int]()._most == most
