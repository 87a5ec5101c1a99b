"""Checks that a command can write its output before its work starts, and locks it against a second command."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from erann_dist.errors import UsageError, UserError
from erann_dist.storage.folder import Folder, LocalFolder


def check_output(file: Path) -> None:
    """Raise UsageError if the path is a folder, UserError if the file can't be written."""
    if file.is_dir():
        raise UsageError(f"{file}: is a folder; give the file to write")
    path = file.absolute()
    there = next(each for each in (path, *path.parents) if each.exists())
    if there != path and not there.is_dir():
        raise UserError(f"{file}: can't be written: {there} is not a folder")
    if not os.access(there, os.W_OK if there == path else os.W_OK | os.X_OK):
        raise UserError(f"{file}: can't be written: {there} is read-only for this user")


@contextmanager
def exclusive(place: Path, busy: str) -> Iterator[None]:
    """Lock a folder, or a lock file that is created if needed. Raises UserError(busy) if another command holds it.

    On a file system without locks this does nothing.
    """
    how = os.O_RDONLY if place.is_dir() else os.O_WRONLY | os.O_CREAT
    descriptor = os.open(place, how | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UserError(busy) from error
    except OSError:
        pass  # The file system has no locks.
    try:
        yield
    finally:
        os.close(descriptor)


@contextmanager
def packing_into(folder: Folder) -> Iterator[None]:
    """Lock a local folder for packing. In S3, two commands that pack the same rows write the same bytes.

    The folder is created if needed, and removed if it is empty at the end. Raises UserError.
    """
    if not isinstance(folder, LocalFolder):
        yield
        return
    path = Path(folder.url)
    path.mkdir(parents=True, exist_ok=True)
    with exclusive(path, f"{folder}: is being packed by another process"):
        try:
            yield
        finally:
            with suppress(OSError):  # The folder is not empty.
                path.rmdir()
