"""Where a command writes: checked before its work begins, and held against a second command."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from erann_dist.errors import UsageError, UserError
from erann_dist.storage.folder import Folder, LocalFolder


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
def exclusive(place: Path, busy: str) -> Iterator[None]:
    """Hold a folder, or a file that is made for it, for this command. Raises UserError `busy` when another one has it.

    On a file system without locks nothing is held.
    """
    how = os.O_RDONLY if place.is_dir() else os.O_WRONLY | os.O_CREAT
    descriptor = os.open(place, how | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UserError(busy) from error
    except OSError:
        pass  # a file system without locks
    try:
        yield
    finally:
        os.close(descriptor)


@contextmanager
def packing_into(folder: Folder) -> Iterator[None]:
    """Hold a folder on a disk for packing. In S3, two commands that pack the same rows write the same bytes.

    The folder is made for it, and removed when it is empty at the end. Raises UserError.
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
            with suppress(OSError):  # something is in it
                path.rmdir()
