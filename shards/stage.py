"""A shard set copied to a folder on a disk: a tar gets its name when it is checked; a copy that was stopped goes on.

While a set is being copied its folder holds `.stage/`: the set's tables. They say whose tars are there, and become the
set's own when all of them are; the manifest is the last, for a folder with a manifest is a finished set.
"""

import fcntl
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from erann_dist.data.manifest import MANIFEST, REPORT, SHARDS, content_hash, read_manifest, read_table
from erann_dist.errors import UsageError, UserError
from erann_dist.storage.folder import Folder, LocalFolder
from shards.build import sha256

# Some are on their way while others are checked. They share the line, and S3 ends what comes at less than 1 MB/s each.
TARS_AT_ONCE = 4
_TABLES = (REPORT, SHARDS, MANIFEST)
_UNFINISHED = ".stage"
_REFRESH_SECONDS = 0.5


@dataclass(frozen=True)
class Staging:
    """A shard set that is copied, and what of it is not there yet."""

    source: Folder
    target: LocalFolder
    tables: LocalFolder  # the target itself when it is finished
    tars: list[dict[str, Any]]  # rows of shards.parquet
    missing: list[dict[str, Any]]  # those that are not there, or of another size

    @property
    def is_finished(self) -> bool:
        return self.tables == self.target and not self.missing

    @property
    def bytes(self) -> int:
        """Of the tars that are to be copied."""
        return sum(tar["size"] for tar in self.missing)


@contextmanager
def staging(source: Folder, target: LocalFolder) -> Iterator[Staging]:
    """Make the target ready for the set in the source, and keep other processes from copying into it meanwhile.

    A tar that is there with its size was checked before it got its name. Raises UsageError when the target lies in the
    source or holds anything else; UserError when the set is damaged, when the disk has no room for what is missing, and
    when another process copies into the target.
    """
    if isinstance(source, LocalFolder) and Path(target.url).resolve().is_relative_to(Path(source.url).resolve()):
        raise UsageError(f"{target}: lies in {source}, which is to be copied; choose another folder")
    wanted = read_manifest(source)[0].content_hash
    with _locked(target):
        tables = _tables(source, target, wanted)
        tars, there = read_table(tables, SHARDS).to_pylist(), target.sizes()
        plan = Staging(source, target, tables, tars, [tar for tar in tars if there.get(tar["name"]) != tar["size"]])
        _require_tars(source, plan.missing)
        free = shutil.disk_usage(target.url).free
        if plan.bytes > free:
            raise UserError(
                f"{target}: {plan.bytes:,} bytes are needed and {free:,} are free on its disk; "
                "make room there or choose another folder"
            )
        yield plan


def copy(plan: Staging, on_progress: Callable[[int], None]) -> None:
    """Copy what is missing; on_progress is told how many bytes of the tars have come.

    An exception, also one that on_progress raises, ends all copies and leaves only whole tars. Raises UserError when a
    tar can't be read or written, or is not what was packed.
    """
    done = dict.fromkeys((tar["name"] for tar in plan.missing), 0)
    stop = threading.Event()

    def copy_tar(tar: dict[str, Any]) -> None:
        def note(bytes_there: int) -> None:
            if stop.is_set():
                raise _Stopped
            done[tar["name"]] = bytes_there

        _copy_tar(plan, tar, note)

    pool = ThreadPoolExecutor(TARS_AT_ONCE)
    try:
        running = {pool.submit(copy_tar, tar) for tar in plan.missing}
        shown = 0
        while running:
            finished, running = wait(running, _REFRESH_SECONDS, FIRST_COMPLETED)
            for each in finished:
                each.result()
            if (now := sum(done.values())) != shown:
                on_progress(shown := now)
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
    if plan.tables != plan.target:
        for name in _TABLES:
            with plan.target.writing(name) as file:
                plan.tables.fetch(name, file)
        shutil.rmtree(plan.tables.url)


class _Stopped(Exception):
    """A copy that is no longer wanted, for another one failed or the user stopped the command."""


def _copy_tar(plan: Staging, tar: dict[str, Any], on_progress: Callable[[int], None]) -> None:
    source, name = plan.source, tar["name"]
    try:
        with plan.target.writing(name) as file:
            for _ in range(2):  # a bit that flipped on the way is right the second time
                source.fetch(name, file, on_progress)
                if sha256(file) == tar["sha256"]:
                    return
            raise UserError(f"{source}/{name}: its bytes are not those that were packed (sha256); {_mend(source)}")
    except OSError as error:  # of either disk; that of a write to a full one names no file
        raise UserError(
            f"{source}/{name} could not be copied to {plan.target}: {error.strerror or error}; "
            "mend that and run the same command again to go on"
        ) from error


@contextmanager
def _locked(folder: LocalFolder) -> Iterator[None]:
    """Hold the folder, made if need be, for this process. The lock is on the folder itself: nothing is left of it."""
    os.makedirs(folder.url, exist_ok=True)
    directory = os.open(folder.url, os.O_RDONLY)
    try:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{folder}: another process is copying a shard set into it; wait for that one") from error
        yield
    finally:
        os.close(directory)


def _tables(source: Folder, target: LocalFolder, wanted: str) -> LocalFolder:
    """Where the target has the tables of the set, checked: see Staging. They are fetched if no tar is there yet.

    What killed processes left is removed, when it is known to be of this set.
    """
    unfinished = LocalFolder(f"{target.url}/{_UNFINISHED}")
    files = target.sizes()
    tables = target if MANIFEST in files else unfinished
    was_begun = tables == target or Path(unfinished.url).is_dir()
    if all(name.startswith(f"{_UNFINISHED}/") for name in files):
        for name in _TABLES:
            with unfinished.writing(name) as file:
                source.fetch(name, file)
    elif not tables.exists(MANIFEST):
        raise UsageError(f"{target}: is there and is no shard set; choose another folder")
    info, clips = read_manifest(tables)
    if info.content_hash != wanted:
        raise UsageError(f"{target}: holds another shard set than {source}; choose another folder or remove it")
    if content_hash(clips) != wanted:
        raise UserError(
            f"{tables}/{MANIFEST}, copied from {source}: its rows are not those that were packed (content hash); "
            f"{_mend(source)}"
        )
    if was_begun:
        target.discard_unfinished()
    if tables == target:
        shutil.rmtree(unfinished.url, ignore_errors=True)  # of a process that was killed while it removed it
    return tables


def _require_tars(source: Folder, tars: list[dict[str, Any]]) -> None:
    """Raise UserError unless the source has these tars, of the size that the table says."""
    there = source.sizes()
    for tar in tars:
        name, size = tar["name"], there.get(tar["name"])
        if size is None:
            raise UserError(f"{source}/{name}: missing; {_mend(source)}")
        if size != tar["size"]:
            raise UserError(f"{source}/{name}: {size} bytes where {SHARDS} says {tar['size']}; {_mend(source)}")


def _mend(source: Folder) -> str:
    return f"see what is damaged with erann verify {source}, mend it with erann repair {source}"
