"""Copies a shard set to a folder on a disk: a tar gets its name once it is checked; an interrupted copy is resumed.

While a set is being copied, its folder contains `.stage/` with the set's tables, which identify the set that the tars
belong to. They are moved to the folder when all tars are there, the manifest last, because a folder with a manifest is
a finished set.
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

# Some are transferred while others are checked. They share the bandwidth, and an S3 transfer below 1 MB/s is aborted.
TARS_AT_ONCE = 4
_TABLES = (REPORT, SHARDS, MANIFEST)
_UNFINISHED = ".stage"
_REFRESH_SECONDS = 0.5


@dataclass(frozen=True)
class Staging:
    """A shard set that is being copied, and its missing tars."""

    source: Folder
    target: LocalFolder
    tables: LocalFolder  # the target itself when the copy is finished
    tars: list[dict[str, Any]]  # rows of shards.parquet
    missing: list[dict[str, Any]]  # tars that are not there, or have another size

    @property
    def is_finished(self) -> bool:
        return self.tables == self.target and not self.missing

    @property
    def bytes(self) -> int:
        """The total size of the missing tars."""
        return sum(tar["size"] for tar in self.missing)


@contextmanager
def staging(source: Folder, target: LocalFolder) -> Iterator[Staging]:
    """Prepare the target for the set in the source, and keep other processes from copying into it meanwhile.

    An existing tar of the right size was checked before it got its name. Raises UsageError when the target is inside
    the source or contains anything else; UserError when the set is damaged, when the disk has no space for the missing
    tars, and when another process is copying into the target.
    """
    if isinstance(source, LocalFolder) and Path(target.url).resolve().is_relative_to(Path(source.url).resolve()):
        raise UsageError(f"{target}: is inside {source}, which is to be copied; choose another folder")
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
                "free some space there or choose another folder"
            )
        yield plan


def copy(plan: Staging, on_progress: Callable[[int], None]) -> None:
    """Copy the missing tars; on_progress gets the number of bytes copied so far.

    An exception, also one from on_progress, stops all copies and leaves only complete tars. Raises UserError when a tar
    can't be read or written, or is not what was packed.
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
    """A copy is no longer needed, because another one failed or the user stopped the command."""


def _copy_tar(plan: Staging, tar: dict[str, Any], on_progress: Callable[[int], None]) -> None:
    source, name = plan.source, tar["name"]
    try:
        with plan.target.writing(name) as file:
            for _ in range(2):  # a second time, in case a bit flipped in the transfer
                source.fetch(name, file, on_progress)
                if sha256(file) == tar["sha256"]:
                    return
            raise UserError(f"{source}/{name}: its bytes are not those that were packed (sha256); {_fix(source)}")
    except OSError as error:  # of either disk; an error of a write to a full disk names no file
        raise UserError(
            f"{source}/{name} could not be copied to {plan.target}: {error.strerror or error}; "
            "fix that and run the same command again to resume"
        ) from error


@contextmanager
def _locked(folder: LocalFolder) -> Iterator[None]:
    """Lock the folder, created if necessary, for this process. The lock is on the folder itself and leaves no file."""
    os.makedirs(folder.url, exist_ok=True)
    directory = os.open(folder.url, os.O_RDONLY)
    try:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{folder}: another process is copying a shard set into it; wait for it to end") from error
        yield
    finally:
        os.close(directory)


def _tables(source: Folder, target: LocalFolder, wanted: str) -> LocalFolder:
    """The folder with the target's checked tables (see Staging). They are fetched if the target has no tar yet.

    Files that killed processes left are removed, when they are known to belong to this set.
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
        raise UsageError(f"{target}: exists and is not a shard set; choose another folder")
    info, clips = read_manifest(tables)
    if info.content_hash != wanted:
        raise UsageError(f"{target}: contains another shard set than {source}; choose another folder or remove it")
    if content_hash(clips) != wanted:
        raise UserError(
            f"{tables}/{MANIFEST}, copied from {source}: its rows are not those that were packed (content hash); "
            f"{_fix(source)}"
        )
    if was_begun:
        target.discard_unfinished()
    if tables == target:
        shutil.rmtree(unfinished.url, ignore_errors=True)  # left by a process that was killed while removing it
    return tables


def _require_tars(source: Folder, tars: list[dict[str, Any]]) -> None:
    """Raise UserError unless the source has these tars, with the sizes in the table."""
    sizes = source.sizes()
    for tar in tars:
        name, size = tar["name"], sizes.get(tar["name"])
        if size is None:
            raise UserError(f"{source}/{name}: missing; {_fix(source)}")
        if size != tar["size"]:
            raise UserError(f"{source}/{name}: {size} bytes where {SHARDS} has {tar['size']}; {_fix(source)}")


def _fix(source: Folder) -> str:
    return f"find the damage with erann verify {source}, fix it with erann repair {source}"
