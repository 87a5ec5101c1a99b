"""A file that is read range by range, such as an S3 object, as a Python file with seek."""

import io
import os
from collections.abc import Callable
from typing import Any, BinaryIO


class _Ranges(io.RawIOBase):
    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        self._read, self._size, self._position = read, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, into: Any) -> int:
        count = min(len(into), max(0, self._size - self._position))
        if count:
            into[:count] = self._read(self._position, count)
            self._position += count
        return count


def ranged_file(read: Callable[[int, int], bytes], size: int, buffer: int) -> BinaryIO:
    """A read-only file of `size` bytes; read(start, count) gives exactly that many of them. What it raises passes.

    buffer: how many bytes a small read asks for.
    """
    return io.BufferedReader(_Ranges(read, size), buffer)
