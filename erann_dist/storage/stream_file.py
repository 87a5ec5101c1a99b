"""A generator of bytes as a file for sequential reading."""

import io
from collections.abc import Generator
from typing import Any, BinaryIO

_BUFFER = 1 << 18


class _Pieces(io.RawIOBase):
    def __init__(self, pieces: Generator[bytes, None, None], name: str) -> None:
        self._pieces = pieces
        self._rest = memoryview(b"")
        self._error: Exception | None = None
        self.name = name  # shown in messages

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
        if self._error:  # to Python, a generator that has failed is at its end
            raise self._error
        try:
            return next(self._pieces, b"")
        except Exception as error:
            self._error = error
            raise


def sequential_file(pieces: Generator[bytes, None, None], name: str) -> BinaryIO:
    """The pieces, none of them empty, as a read-only file that can't seek. Closing it closes the generator.

    An exception of the generator is raised by that read and all later ones.
    """
    return io.BufferedReader(_Pieces(pieces, name), _BUFFER)
