"""A copied set is the set, byte for byte, however often its copying was stopped; and nothing else is touched."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import pyarrow.parquet as pq
import pytest

from erann_dist.data.manifest import MANIFEST, REPORT, SHARDS
from erann_dist.errors import UsageError, UserError
from erann_dist.storage import folder as folders
from erann_dist.storage.folder import LocalFolder
from shards import stage
from shards.sources.audioset import read_audioset
from shards.stage import Staging, copy, staging
from tests.conftest import copy_tree, pack_here, write_tone_set
from tests.shards.test_verify import change_table, flip, problems

TARS = [f"audioset-{number:06d}.tar" for number in range(5)]
STATE = [f".stage/{name}" for name in (MANIFEST, REPORT, SHARDS)]


@dataclass(frozen=True)
class Watched(LocalFolder):
    """A source that notes which tars are fetched, and lets a test meddle with each."""

    meddle: Callable[[str, BinaryIO], None] = lambda name, file: None
    fetched: list[str] = field(default_factory=list)

    def fetch(self, name: str, file: BinaryIO, on_progress: Callable[[int], None] = lambda done: None) -> None:
        super().fetch(name, file, on_progress)
        if name.endswith(".tar"):
            self.fetched.append(name)
            self.meddle(name, file)


def run(source: Path | LocalFolder, target: Path, on_progress: Callable[[int], None] = lambda done: None) -> Staging:
    source = source if isinstance(source, LocalFolder) else LocalFolder(str(source))
    with staging(source, LocalFolder(str(target))) as plan:
        copy(plan, on_progress)
    return plan


def refusal(source: Path | LocalFolder, target: Path, kind: type[UserError] = UserError) -> str:
    """The one line with which it fails."""
    with pytest.raises(kind) as error:
        run(source, target)
    assert type(error.value) is kind
    assert "\n" not in str(error.value)
    return str(error.value)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file in and below the folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


class Failure(Exception):
    pass


def fail_from(name: str) -> Callable[[str, BinaryIO], None]:
    """No tar of this name or a later one comes."""

    def meddle(fetched: str, file: BinaryIO) -> None:
        if fetched >= name:
            raise Failure

    return meddle


@pytest.fixture
def stopped(tone_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A target with the first three of five tars."""
    with monkeypatch.context() as patch:
        patch.setattr(stage, "TARS_AT_ONCE", 1)
        with pytest.raises(Failure):
            run(Watched(str(tone_shards), fail_from(TARS[3])), tmp_path / "copy")
    assert sorted(contents(tmp_path / "copy")) == [*STATE, *TARS[:3]]
    return tmp_path / "copy"


def test_a_copy_is_the_set(tone_shards: Path, tmp_path: Path) -> None:
    told: list[int] = []
    target = tmp_path / "not" / "yet"
    plan = run(tone_shards, target, told.append)
    assert len(plan.missing) == len(plan.tars) == 5
    assert told[-1] == plan.bytes == sum((tone_shards / name).stat().st_size for name in TARS)
    assert contents(target) == contents(tone_shards)
    assert problems(target) == []

    before = times(target)
    source = Watched(str(tone_shards))
    again = run(source, target)
    assert again.is_finished
    assert (again.bytes, source.fetched) == (0, [])
    assert times(target) == before


def test_the_manifest_comes_last(tone_shards: Path, tmp_path: Path) -> None:
    written: list[str] = []

    class Target(LocalFolder):
        def writing(self, name: str) -> AbstractContextManager[BinaryIO]:
            written.append(name)
            return super().writing(name)

    with staging(LocalFolder(str(tone_shards)), Target(str(tmp_path / "copy"))) as plan:
        copy(plan, lambda done: None)
    assert sorted(written[:5]) == TARS
    assert written[5:] == [REPORT, SHARDS, MANIFEST]


def test_a_stopped_copy_goes_on(tone_shards: Path, stopped: Path) -> None:
    before = times(stopped)
    source = Watched(str(tone_shards))
    plan = run(source, stopped)
    assert [tar["name"] for tar in plan.missing] == sorted(source.fetched) == TARS[3:]
    assert contents(stopped) == contents(tone_shards)
    assert {name: times(stopped)[name] for name in TARS[:3]} == {name: before[name] for name in TARS[:3]}


def test_a_copy_that_was_stopped_before_its_tables_goes_on(tone_shards: Path, tmp_path: Path) -> None:
    """At each point between the last tar and the end."""
    for number, steps in enumerate([[], [REPORT], [REPORT, SHARDS], [REPORT, SHARDS, MANIFEST]]):
        target = copy_tree(tone_shards, tmp_path / str(number))
        (target / ".stage").mkdir()
        for name in (REPORT, SHARDS, MANIFEST):
            shutil.copy(tone_shards / name, target / ".stage" / name)
            if name not in steps:
                (target / name).unlink()
        source = Watched(str(tone_shards))
        run(source, target)
        assert source.fetched == []
        assert contents(target) == contents(tone_shards)
        assert not (target / ".stage").exists()


def test_ctrl_c_ends_all_copies_at_once(tone_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "_BLOCK", 4096)
    monkeypatch.setattr(stage, "_REFRESH_SECONDS", 0.05)

    begun: list[str] = []

    class Slow(LocalFolder):
        def fetch(self, name: str, file: BinaryIO, on_progress: Callable[[int], None] = lambda done: None) -> None:
            begun.append(name)

            def wait(done: int) -> None:
                time.sleep(0.2 if name.endswith(".tar") else 0)
                on_progress(done)

            super().fetch(name, file, wait)

    def interrupt(done: int) -> None:
        raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run(Slow(str(tone_shards)), tmp_path / "copy", interrupt)
    assert time.monotonic() - began < 10  # a tar takes more than half a minute
    assert TARS[4] not in begun
    assert sorted(contents(tmp_path / "copy")) == STATE
    run(tone_shards, tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(tone_shards)


@pytest.mark.parametrize("change", [b"", b"short"], ids=["gone", "short"])
def test_a_tar_of_another_size_is_copied_anew(tone_shards: Path, stopped: Path, change: bytes) -> None:
    for name, missing in ((TARS[1], [TARS[1], *TARS[3:]]), (TARS[4], [TARS[4]])):  # unfinished, then finished
        (stopped / name).write_bytes(change) if change else (stopped / name).unlink(missing_ok=True)
        source = Watched(str(tone_shards))
        run(source, stopped)
        assert sorted(source.fetched) == missing
        assert contents(stopped) == contents(tone_shards)


def test_a_damaged_tar_is_not_taken(tone_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "TARS_AT_ONCE", 1)  # tars come in order
    shards = copy_tree(tone_shards, tmp_path / "shards")
    flip(shards / TARS[2], 5000)
    source = Watched(str(shards))
    assert refusal(source, tmp_path / "copy") == (
        f"{shards}/{TARS[2]}: its bytes are not those that were packed (sha256); "
        f"find the damage with erann verify {shards}, fix it with erann repair {shards}"
    )
    assert source.fetched.count(TARS[2]) == 2
    left = contents(tmp_path / "copy")
    assert left.keys() >= {*STATE, *TARS[:2]}
    assert not [name for name in left if TARS[2] in name or name.endswith(".part")]
    flip(shards / TARS[2], 5000)
    run(shards, tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(tone_shards)


def test_a_bit_that_flips_on_the_way_is_fetched_again(tone_shards: Path, tmp_path: Path) -> None:
    def flip_once(name: str, file: BinaryIO) -> None:
        if name == TARS[2] and source.fetched.count(name) == 1:
            file.seek(5000)
            byte = file.read(1)[0]
            file.seek(5000)
            file.write(bytes([byte ^ 1]))

    source = Watched(str(tone_shards), flip_once)
    run(source, tmp_path / "copy")
    assert source.fetched.count(TARS[2]) == 2
    assert contents(tmp_path / "copy") == contents(tone_shards)


def test_a_source_that_is_not_what_its_tables_say(tone_shards: Path, tmp_path: Path) -> None:
    shards = copy_tree(tone_shards, tmp_path / "shards")
    target = tmp_path / "copy"
    (shards / TARS[2]).write_bytes(b"cut")
    assert f"{shards}/{TARS[2]}: 3 bytes where shards.parquet has " in refusal(shards, target)
    (shards / TARS[2]).unlink()
    assert f"{shards}/{TARS[2]}: missing; find the damage with erann verify" in refusal(shards, target)
    table = pq.read_table(shards / MANIFEST)
    pq.write_table(table.take([1, 0, *range(2, 40)]), shards / MANIFEST)
    assert f"copied from {shards}: its rows are not those that were packed" in refusal(shards, target)
    assert sorted(contents(target)) == STATE
    run(tone_shards, target)
    assert contents(target) == contents(tone_shards)


@pytest.mark.parametrize("absolute", [False, True])
def test_a_tar_whose_name_leads_out_of_the_folder(tone_shards: Path, tmp_path: Path, absolute: bool) -> None:
    """As a key in a bucket can."""
    shards = copy_tree(tone_shards, tmp_path / "shards")
    name = str(tmp_path / "out.tar") if absolute else "../out.tar"
    change_table(shards / SHARDS, {"name": name}, row=2)
    (shards / TARS[2]).rename(tmp_path / "out.tar")

    class Bucket(LocalFolder):
        def sizes(self, prefix: str = "") -> dict[str, int]:
            return super().sizes(prefix) | {name: (tmp_path / "out.tar").stat().st_size}

    before = (tmp_path / "out.tar").stat().st_mtime_ns
    assert f"{name!r} is not the name of a tar in the set's folder" in refusal(Bucket(str(shards)), tmp_path / "copy")
    assert (tmp_path / "out.tar").stat().st_mtime_ns == before


def test_another_folders_content_is_left_alone(tone_shards: Path, stopped: Path, tmp_path: Path) -> None:
    other = pack_here(read_audioset(*write_tone_set(tmp_path / "other", 40, classes=2)), tmp_path / "others")
    for name, message in (("others", "contains another shard set than"), ("stranger", "exists and is not a shard set")):
        target = tmp_path / name
        if name == "stranger":
            target.mkdir()
            (target / "movie.mp4").write_bytes(b"mine")
            (target / "download.part").write_bytes(b"mine too")
        before = contents(target)
        assert message in refusal(tone_shards, target, UsageError)
        assert contents(target) == before

    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "movie.part").write_bytes(b"mine")
    run(tone_shards, tmp_path / "downloads")
    assert contents(tmp_path / "downloads") == contents(tone_shards) | {"movie.part": b"mine"}

    before = contents(stopped)
    assert "contains another shard set than" in refusal(other, stopped, UsageError)
    assert contents(stopped) == before
    for name in TARS[:3]:
        (stopped / name).unlink()
    run(other, stopped)  # of the first set only tables were there
    assert contents(stopped) == contents(other)


def test_a_target_that_lies_in_the_source(tone_shards: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tone_shards)
    before = contents(tone_shards)
    for target in (tone_shards, tone_shards / "copy", tmp_path / "link"):
        assert "is inside" in refusal(tone_shards, target, UsageError)
    assert contents(tone_shards) == before


def test_room_is_needed_for_what_is_missing(
    tone_shards: Path, stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = sum((tone_shards / name).stat().st_size for name in TARS[3:])
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, missing - 1))
    before = contents(stopped)
    assert f"copy: {missing:,} bytes are needed and {missing - 1:,} are free" in refusal(tone_shards, stopped)
    assert contents(stopped) == before
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, missing))
    run(tone_shards, stopped)
    assert contents(stopped) == contents(tone_shards)


def test_a_disk_that_is_full_on_the_way(tone_shards: Path, tmp_path: Path) -> None:
    def fill_up(name: str, file: BinaryIO) -> None:
        if name == TARS[3]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    line = refusal(Watched(str(tone_shards), fill_up), tmp_path / "copy")
    assert f"{TARS[3]} could not be copied to {tmp_path}/copy: No space left on device; " in line
    assert TARS[3] not in contents(tmp_path / "copy")
    assert not list((tmp_path / "copy").glob("*.part"))
    run(tone_shards, tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(tone_shards)


HANGING = """
import sys, time
from dataclasses import dataclass
from erann_dist.storage.folder import LocalFolder
from shards import stage

@dataclass(frozen=True)
class Hanging(LocalFolder):
    def fetch(self, name, file, on_progress=lambda done: None):
        super().fetch(name, file, on_progress)
        if name == "audioset-000003.tar":
            file.truncate(100_000)
            print("half", flush=True)
            time.sleep(600)

stage.TARS_AT_ONCE = 1
with stage.staging(Hanging(sys.argv[1]), LocalFolder(sys.argv[2])) as plan:
    stage.copy(plan, lambda done: None)
"""


def test_two_processes_and_one_that_is_killed(tone_shards: Path, tmp_path: Path) -> None:
    target = tmp_path / "copy"
    command = [sys.executable, "-c", HANGING, str(tone_shards), str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as other:
        assert other.stdout
        try:
            assert other.stdout.readline() == "half\n"
            before = contents(target)
            assert "copy: another process is copying a shard set into it" in refusal(tone_shards, target)
            assert contents(target) == before
        finally:
            other.send_signal(signal.SIGKILL)
    names = sorted(contents(target))
    assert names[:-1] == [*STATE, *TARS[:3]]
    assert names[-1].startswith(TARS[3])
    assert names[-1].endswith(".part")
    source = Watched(str(tone_shards))
    run(source, target)
    assert sorted(source.fetched) == TARS[3:]
    assert contents(target) == contents(tone_shards)
    assert not (target / ".stage").exists()
