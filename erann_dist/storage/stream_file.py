"""Pieces of bytes that come one after the other, as a file that is read from front to back."""

import io
from collections.abc import Generator
from typing import Any, BinaryIO

_BUFFER = 1 << 18


class _Pieces(io.RawIOBase):
    def __init__(self, pieces: Generator[bytes, None, None], name: str) -> None:
        self._pieces = pieces
        self._rest = memoryview(b"")
        self._error: Exception | None = None
        self.name = name  # what a message shows of the file

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        if not self._rest:
            self._rest = memoryview(self._next())
        count = min(len(into), len(self._rest))
        into[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    def close(self) -> None:
        self._pieces.close()
        super().close()

    def _next(self) -> bytes:
        if self._error:  # of a generator that has failed, Python says that it is at its end
            raise self._error
        try:
            return next(self._pieces, b"")
        except Exception as error:
            self._error = error
            raise


def sequential_file(pieces: Generator[bytes, None, None], name: str) -> BinaryIO:
    """The pieces, none of them empty, as a file that is only read and can't seek. Closing it closes the generator.

    What the generator raises is raised by each read from there on.
    """
    return io.BufferedReader(_Pieces(pieces, name), _BUFFER)
