"""Where a command writes: checked before its work begins, and held against a second command."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from erann_dist.errors import UsageError, UserError
from erann_dist.folder import Folder, LocalFolder


def check_output(file: Path) -> None:
    """Raise UsageError when the file is a folder, UserError when it can't be written there."""
    if file.is_dir():
        raise UsageError(f"{file}: is a folder; give the file to write")
    path = file.absolute()
    there = next(each for each in (path, *path.parents) if each.exists())
    if there != path and not there.is_dir():
        raise UserError(f"{file}: can't be written, {there} is not a folder")
    if not os.access(there, os.W_OK if there == path else os.W_OK | os.X_OK):
        raise UserError(f"{file}: can't be written, {there} is read-only for this user")


@contextmanager
def exclusive(lock: Path, busy: str, *, keep: bool = False) -> Iterator[None]:
    """Hold a lock, a file that is made for it, for this command. Raises UserError `busy` when another one has it.

    keep: whether the file stays afterwards. On a file system without locks nothing is held.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(file.fileno()).st_nlink:  # its holder has just ended, and removed it
                raise BlockingIOError
        except BlockingIOError as error:
            raise UserError(busy) from error
        except OSError:
            pass  # a file system without locks
        try:
            yield
        finally:
            if not keep:
                lock.unlink(missing_ok=True)


@contextmanager
def packing_into(folder: Folder) -> Iterator[None]:
    """Hold a folder on a disk for packing. In S3, two that pack the same rows write the same bytes.

    The lock lies beside the folder, in which only a shard set's own files may be. Raises UserError.
    """
    if not isinstance(folder, LocalFolder):
        yield
        return
    path = Path(folder.url).absolute()
    with exclusive(path.with_name(f".{path.name}.packing"), f"{folder}: is being packed by another process"):
        yield
