"""Files named by the user: read at once, or a one-line error. A pipe would block a command for ever."""

import stat
from pathlib import Path

from erann_dist.errors import UsageError


def require_plain_file(path: Path, max_bytes: int | None = None) -> None:
    """Raise UsageError, naming the path, unless it is a plain file of at most max_bytes bytes."""
    try:
        status = path.stat()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:  # a NUL character
        raise UsageError(f"{str(path)!r}: not a file's name ({error})") from error
    if stat.S_ISDIR(status.st_mode):
        raise UsageError(f"{path}: is a folder; a file is needed")
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"{path}: is a pipe or a device; save its content to a file and give that")
    if max_bytes is not None and status.st_size > max_bytes:
        raise UsageError(f"{path}: has {status.st_size:,} bytes, more than {max_bytes:,}; is it the right file?")


def read_plain_file(path: Path, max_bytes: int) -> bytes:
    """The whole content. Raises UsageError as require_plain_file does, and when the file can't be read."""
    require_plain_file(path, max_bytes)
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
