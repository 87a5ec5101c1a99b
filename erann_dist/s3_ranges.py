"""Ranged reads of S3 objects from many threads: Arrow's client, which reads without Python's lock, and s3fs behind it.

Arrow's client asks once, with the credentials, region and server that s3fs found. Whatever it can't read is read again
by S3Folder.read_range, which waits, tries again, checks that the object is the same, and says what is wrong.
"""

import functools
import os
import threading
from typing import Any

import pyarrow as pa
import pyarrow.fs

from erann_dist.s3 import S3Folder, connection

CONNECT_S = 10.0
REQUEST_S = 20.0


class S3Object:
    """One object, for ranged reads from any number of threads. Nothing is asked before the first."""

    def __init__(self, folder: S3Folder, name: str) -> None:
        self._folder = folder
        self._name = name
        self._lock = threading.Lock()
        self._size_and_version: tuple[int, str] | None = None
        self._file: pa.NativeFile | None = None

    @property
    def size(self) -> int:
        """Its bytes. Raises UserError, FileNotFoundError."""
        return self._known()[0]

    def read(self, start: int, size: int) -> bytes:
        """Bytes start .. start + size, no fewer. Raises UserError, FileNotFoundError."""
        self._known()
        try:
            data: bytes = self._opened().read_at(size, start)
            if len(data) == size:
                return data
        except OSError:
            with self._lock:
                self._file = None
            _client.cache_clear()  # the credentials may have expired
        return self.read_carefully(start, size)

    def read_carefully(self, start: int, size: int) -> bytes:
        """The same, slower, with patience, and checked to be of the object that was there at first."""
        return self._folder.read_range(self._name, start, size, self._known()[1])

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _known(self) -> tuple[int, str]:
        with self._lock:
            if self._size_and_version is None:
                self._size_and_version = self._folder.size_and_version(self._name)
            return self._size_and_version

    def _opened(self) -> pa.NativeFile:
        with self._lock:
            if self._file is None:
                path = f"{self._folder.url.removeprefix('s3://')}/{self._name}"
                self._file = _client(self._folder.endpoint, os.getpid()).open_input_file(path)
            return self._file


@functools.cache
def _client(endpoint: str | None, process: int) -> pyarrow.fs.S3FileSystem:
    server, region, credentials = connection(endpoint)
    at: dict[str, Any] = {}
    if not (server.hostname or "").endswith(".amazonaws.com"):
        at = {"endpoint_override": server.netloc, "scheme": server.scheme}
    return pyarrow.fs.S3FileSystem(
        access_key=credentials.access_key,
        secret_key=credentials.secret_key,
        session_token=credentials.token,
        region=region,
        connect_timeout=CONNECT_S,
        request_timeout=REQUEST_S,
        retry_strategy=pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=1),
        **at,
    )
