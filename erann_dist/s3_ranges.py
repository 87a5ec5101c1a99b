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
from botocore.exceptions import BotoCoreError  # type: ignore[import-untyped]

from erann_dist.errors import UserError
from erann_dist.s3 import S3Folder, connection
from erann_dist.storage import S3_REQUESTS

CONNECT_S = 10.0
REQUEST_S = 20.0


class S3Object:
    """One object, for ranged reads from any number of threads. Nothing is asked before the first."""

    def __init__(self, folder: S3Folder, name: str, stop: threading.Event) -> None:
        """stop: when it is set, nothing is tried again."""
        self._folder = folder
        self._stop = stop
        self._name = name
        self._lock = threading.Lock()
        self._size_and_version: tuple[int, str] | UserError | FileNotFoundError | None = None
        self._file: pa.NativeFile | None = None
        self._client: pyarrow.fs.S3FileSystem | None = None  # that opened it

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
        except (OSError, BotoCoreError):
            self._file = None
            _renew(self._folder.endpoint, self._client)
        return self.read_carefully(start, size)

    def read_carefully(self, start: int, size: int) -> bytes:
        """The same, slower, with patience, and checked to be of the object that was there at first."""
        return self._folder.read_range(self._name, start, size, self._known()[1], self._stop)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _known(self) -> tuple[int, str]:
        with self._lock:
            if self._size_and_version is None:
                try:
                    self._size_and_version = self._folder.size_and_version(self._name, self._stop)
                except (UserError, FileNotFoundError) as error:
                    self._size_and_version = error  # after all its patience; the other threads need not wait again
            if isinstance(self._size_and_version, Exception):
                raise self._size_and_version
            return self._size_and_version

    def _opened(self) -> pa.NativeFile:
        """Not under the lock: where nothing answers, all threads would wait one after the other."""
        file = self._file
        if file is None:
            self._client = _client(self._folder.endpoint, os.getpid())
            path = f"{self._folder.url.removeprefix('s3://')}/{self._name}"
            file = self._file = self._client.open_input_file(path)
        return file


def _renew(endpoint: str | None, failed: pyarrow.fs.S3FileSystem | None) -> None:
    """The next client is a new one, with new credentials, unless another thread has seen to that."""
    with _renewing:
        if failed is None or _client(endpoint, os.getpid()) is failed:
            _client.cache_clear()


_renewing = threading.Lock()


@functools.cache
def _client(endpoint: str | None, process: int) -> pyarrow.fs.S3FileSystem:
    # Arrow keeps as many connections as it has such threads when a client is made, 25 if they are fewer.
    pa.set_io_thread_count(max(S3_REQUESTS, pa.io_thread_count()))
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
