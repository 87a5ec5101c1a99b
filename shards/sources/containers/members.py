"""What all kinds of archives share: a member's place, what counts as sound in it, and a part of a file as a file."""

import io
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, NamedTuple

from erann_dist.data.audio import SUFFIXES, DecodeError

ARCHIVE_SUFFIXES = (".tar", ".zip", ".parquet", ".h5", ".hdf5", ".hdf")
_BUFFER = 1 << 18


class Member(NamedTuple):
    """A clip in an archive. Its name is never used as a path."""

    name: bytes  # in the archive; the sound file's own name after the last slash
    offset: int  # where it is: a byte or a row
    size: int | None = None  # of the sound, in bytes, where that is known without reading it
    group: int | None = None  # members with the same number are read together; None: on its own


class Damaged(Exception):
    """An archive that can't be read, or not to its end. The message says what is wrong and what to do."""


def is_sound(name: str, archives: Counter[str]) -> bool:
    """Whether a member is a sound file by its name. An archive inside the archive is counted by its suffix."""
    base = name.rpartition("/")[2]
    suffix = os.path.splitext(base)[1].lower()
    if suffix in ARCHIVE_SUFFIXES:
        archives[suffix] += 1
    return suffix in SUFFIXES and not base.startswith(".")


def note_archives(archives: Counter[str], notes: list[str]) -> None:
    """Note the archives inside an archive, which are not opened."""
    if archives:
        kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in archives.items())
        notes.append(f"contains archives, which are not opened ({kinds}); unpack it to have them packed")


class _Section(io.RawIOBase):
    """Part of a file, read-only."""

    def __init__(self, file: IO[bytes], start: int, size: int) -> None:
        self._file, self._start, self._size, self._at = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self._size - self._at))
        self._file.seek(self._start + self._at)
        data = self._file.read(wanted)
        if len(data) < wanted:
            raise OSError("the archive ends before the clip does")
        buffer[:wanted] = data
        self._at += wanted
        return wanted


def section(file: IO[bytes], start: int, size: int) -> IO[bytes]:
    """`size` bytes of an open file, from byte `start`, as a file. Raises OSError on reading past the file's end."""
    return io.BufferedReader(_Section(file, start, size), _BUFFER)


@contextmanager
def opened(path: bytes) -> Iterator[IO[bytes]]:
    """An archive, open for reading. Raises DecodeError when it can't be opened; errors of the body pass."""
    try:
        file = open(path, "rb")  # noqa: SIM115 - only this error is the archive's
    except OSError as error:
        raise DecodeError(error.strerror or str(error)) from error
    with file:
        yield file
