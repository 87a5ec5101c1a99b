"""The clips in mapped memory are those that were read, and the file is there as long as someone uses it."""

import fcntl
import os
import tempfile
import threading
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from erann_dist.data.manifest import Manifest
from erann_dist.data.shared_clips import shared_clips
from erann_dist.data.sources import load_sources
from erann_dist.errors import UsageError, UserError
from erann_dist.recipe import DataSource
from tests.conftest import copy_tree


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def files(tmp_path: Path) -> list[str]:
    return sorted(path.suffix for path in tmp_path.glob(f"erann-{os.getuid()}-*"))


def assert_equal(a: Manifest, b: Manifest) -> None:
    for field in fields(Manifest):
        x, y = getattr(a, field.name), getattr(b, field.name)
        assert np.array_equal(x, y) if isinstance(x, np.ndarray) else x == y, field.name


def test_they_are_what_load_sources_gives(tone_shards: Path, tmp_path: Path) -> None:
    other = copy_tree(tone_shards, tmp_path / "other")
    keys = load_sources([DataSource(url=str(other))]).keys.to_pylist()
    (tmp_path / "without").write_text("\n".join(keys[::3]))
    sources = [DataSource(url=str(tone_shards)), DataSource(url=str(other), without=str(tmp_path / "without"))]
    with shared_clips(sources) as first, shared_clips(sources) as second:
        assert len(first) == 40 + 40 - len(keys[::3])
        assert_equal(first, load_sources(sources))
        assert_equal(second, first)
        assert not first.offsets.flags.owndata
        assert files(tmp_path) == [".arrow", ".lock"]
    assert files(tmp_path) == []


def test_the_last_one_removes_the_file(tone_shards: Path, tmp_path: Path) -> None:
    sources = [DataSource(url=str(tone_shards))]
    with shared_clips(sources) as first:
        with shared_clips(sources):
            pass
        assert ".arrow" in files(tmp_path)
        assert len(first) == 40
    assert files(tmp_path) == []


def test_the_file_is_not_removed_under_one_who_is_about_to_use_it(tone_shards: Path, tmp_path: Path) -> None:
    context = shared_clips([DataSource(url=str(tone_shards))])
    context.__enter__()
    (lock_path,) = tmp_path.glob("*.lock")
    with lock_path.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another worker has seen that the file is there
        leaving = threading.Thread(target=context.__exit__, args=(None, None, None))
        leaving.start()
        leaving.join(0.2)
        assert files(tmp_path) == [".arrow", ".lock"]
    leaving.join()
    assert files(tmp_path) == []


def test_a_lock_that_was_removed_while_it_was_waited_for_is_no_lock(tone_shards: Path, tmp_path: Path) -> None:
    sources = [DataSource(url=str(tone_shards))]

    def come_and_go() -> None:
        with shared_clips(sources):
            pass

    with shared_clips(sources):
        (lock_path,) = tmp_path.glob("*.lock")
        with lock_path.open() as removed:
            fcntl.flock(removed, fcntl.LOCK_EX)
            waiting = threading.Thread(target=come_and_go)
            waiting.start()
            waiting.join(0.1)
            lock_path.unlink()
            with lock_path.open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                removed.close()
                waiting.join(0.2)
                assert waiting.is_alive()  # for the lock that is there now
        waiting.join()


def test_a_file_that_was_left_is_not_another_sets(tone_shards: Path, tmp_path: Path) -> None:
    shards = copy_tree(tone_shards, tmp_path / "shards")
    context = shared_clips([DataSource(url=str(shards))])
    context.__enter__()  # and is killed
    manifest = shards / "manifest.parquet"
    manifest.write_bytes(manifest.read_bytes())
    (tmp_path / "one").write_text(load_sources([DataSource(url=str(shards))]).keys[5].as_py())
    for source in (DataSource(url=str(shards), keys=str(tmp_path / "one")), DataSource(url=str(shards))):
        with shared_clips([source]) as clips:
            assert_equal(clips, load_sources([source]))
    context.__exit__(None, None, None)


def test_what_is_missing_is_said(tmp_path: Path, tone_shards: Path) -> None:
    with pytest.raises(UsageError, match="nowhere: no such folder"), shared_clips([DataSource(url="nowhere")]):
        pass
    source = DataSource(url=str(tone_shards), keys=str(tmp_path / "list"))
    with pytest.raises(UsageError, match="list: No such file"), shared_clips([source]):
        pass
    (tmp_path / "list").mkdir()
    with pytest.raises(UsageError, match="list: is a folder"), shared_clips([source]):
        pass
    (tmp_path / "list").rmdir()
    (tmp_path / "list").write_text("nothing\nof\nit")
    with pytest.raises(UsageError, match="none of its 3 keys"), shared_clips([source]):
        pass
    assert ".arrow" not in files(tmp_path)


def test_a_file_that_a_power_cut_left_empty_is_written_anew(tone_shards: Path, tmp_path: Path) -> None:
    sources = [DataSource(url=str(tone_shards))]
    with shared_clips(sources):
        (path,) = tmp_path.glob("*.arrow")
    for rest in (b"", b"not Arrow's"):
        path.write_bytes(rest)
        with shared_clips(sources) as clips:
            assert_equal(clips, load_sources(sources))
    assert files(tmp_path) == []


def test_other_users_can_neither_read_the_files_nor_put_links_in_their_place(tone_shards: Path, tmp_path: Path) -> None:
    sources = [DataSource(url=str(tone_shards))]
    with shared_clips(sources):
        there = {path.suffix: path for path in tmp_path.glob(f"erann-{os.getuid()}-*")}
        assert {path.stat().st_mode & 0o777 for path in there.values()} == {0o600}
    for path in (there[".arrow"], there[".lock"], there[".arrow"].with_suffix(".part")):
        mine = tmp_path / "mine"
        mine.write_text("mine")
        path.symlink_to(mine)
        with pytest.raises(UserError, match="another user's file is in the way; remove it"), shared_clips(sources):
            pass
        assert mine.read_text() == "mine"
        path.unlink()
        there[".lock"].unlink(missing_ok=True)


def test_another_users_file_is_not_read(tone_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources, me = [DataSource(url=str(tone_shards))], os.getuid()
    with shared_clips(sources), monkeypatch.context() as patch:
        patch.setattr(os, "getuid", lambda: me + 1)
        for path in tmp_path.glob(f"erann-{me}-*"):
            path.rename(str(path).replace(f"erann-{me}-", f"erann-{me + 1}-"))
        with pytest.raises(UserError, match="another user's file is in the way"), shared_clips(sources):
            pass
