"""Ranged reads of S3 objects from many threads, with Arrow's client, which reads without the GIL, and s3fs as fallback.

Arrow's client sends a request once, with the same settings as s3fs (s3_clients.py). What it can't read is read again by
S3Folder.read_range, which waits, retries, checks that the object is the same, and reports errors.
"""

import functools
import os
import re
import threading
import time
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.fs
from botocore.exceptions import BotoCoreError
from fsspec.asyn import FSTimeoutError

from erann_dist.errors import UserError
from erann_dist.storage.s3 import S3Folder, connection
from erann_dist.storage.s3_clients import Connection, Stamp, arrow_client, credentials_stamp
from erann_dist.storage.slow_reads import SlowReads

S3_REQUESTS = 32  # concurrent requests of one worker
CONNECT_S = 10.0
REQUEST_S = 20.0
RENEW_S = 300.0  # after which credentials are looked up again; a role's are renewed long before they expire


class S3Object:
    """One object, for ranged reads from any number of threads. No request is sent before the first read."""

    def __init__(self, folder: S3Folder, name: str, stop: threading.Event, slow: SlowReads | None = None) -> None:
        """stop: when it is set, nothing is retried. slow: counts the reads that Arrow's client could not do."""
        self._folder = folder
        self._stop = stop
        self._name = name
        self._slow = slow or SlowReads()
        self._lock = threading.Lock()
        self._size_and_version: tuple[int, str] | UserError | FileNotFoundError | None = None
        self._open: tuple[pyarrow.fs.S3FileSystem, pa.NativeFile] | None = None  # with the client that opened it

    @property
    def size(self) -> int:
        """Its size in bytes. Raises UserError, FileNotFoundError."""
        return self._require_size_and_version()[0]

    def read(self, start: int, size: int) -> bytes:
        """Bytes start .. start + size, no fewer. Raises UserError, FileNotFoundError."""
        self._require_size_and_version()
        if not self._slow.is_fast_worth_trying():
            self._slow.note_slow()
            return self.read_carefully(start, size)
        client: pyarrow.fs.S3FileSystem | None = None
        why = "fewer bytes than requested"
        try:
            client = _client(self._folder.endpoint, self._bucket)
            data: bytes = self._opened(client).read_at(size, start)
            if len(data) == size:
                self._slow.note(None)
                return data
        except _CantRequest as error:
            why = str(error)
        except (OSError, pa.ArrowException, BotoCoreError, FSTimeoutError) as error:
            why = _reason(error)
            self._open = None
            _forget(self._folder.endpoint, self._bucket, client)
        data = self.read_carefully(start, size)
        self._slow.note(why)  # only now: if s3fs can't read either, S3 itself is unreachable
        return data

    def read_carefully(self, start: int, size: int) -> bytes:
        """The same, but slower, with retries, and with a check that the object has not changed."""
        return self._folder.read_range(self._name, start, size, self._require_size_and_version()[1], self._stop)

    def close(self) -> None:
        if self._open:
            self._open[1].close()

    @property
    def _bucket(self) -> str:
        return self._folder.url.removeprefix("s3://").partition("/")[0]

    def _require_size_and_version(self) -> tuple[int, str]:
        with self._lock:
            if self._size_and_version is None:
                try:
                    self._size_and_version = self._folder.size_and_version(self._name, self._stop)
                except (UserError, FileNotFoundError) as error:
                    self._size_and_version = error  # after all retries; the other threads need not wait again
            if isinstance(self._size_and_version, Exception):
                raise self._size_and_version
            return self._size_and_version

    def _opened(self, client: pyarrow.fs.S3FileSystem) -> pa.NativeFile:
        """Not under the lock: if the server does not respond, all threads would wait one after the other."""
        opened = self._open
        if opened is None or opened[0] is not client:
            path = f"{self._folder.url.removeprefix('s3://')}/{self._name}"
            opened = self._open = client, client.open_input_file(path)
        return opened[1]


class _CantRequest(Exception):
    """Arrow's client can't send requests the way this bucket requires."""


def _reason(error: BaseException) -> str:
    """Arrow's error by its codes; the rest of it may contain the server's response, and so tokens."""
    codes = re.search(r"AWS Error (\w+(?: \(HTTP status \d+\))?) during (\w+)", str(error))
    return f"{codes[1]} during {codes[2]}" if codes else type(error).__name__


@dataclass
class _Kept:
    """A bucket's Arrow client in this process, and when its settings were looked up."""

    client: pyarrow.fs.S3FileSystem
    found_at: float = field(default_factory=time.monotonic)
    stamp: Stamp = field(default_factory=credentials_stamp)

    @property
    def is_current(self) -> bool:
        return time.monotonic() - self.found_at < RENEW_S and self.stamp == credentials_stamp()


_kept: dict[tuple[str | None, str, int], _Kept] = {}
_keeping = threading.Lock()


def _client(endpoint: str | None, bucket: str) -> pyarrow.fs.S3FileSystem:
    key = endpoint, bucket, os.getpid()
    with _keeping:
        kept = _kept.get(key)
        if kept is None or not kept.is_current:
            stamp = credentials_stamp()
            client = _made_of(connection(endpoint, bucket), CONNECT_S, REQUEST_S, os.getpid())
            kept = _kept[key] = _Kept(client, stamp=stamp)
        return kept.client


def _forget(endpoint: str | None, bucket: str, failed: pyarrow.fs.S3FileSystem | None) -> None:
    """Make the next client a new one, with new credentials, unless another thread has already done so."""
    key = endpoint, bucket, os.getpid()
    with _keeping:
        if failed is not None and (kept := _kept.get(key)) and kept.client is failed:
            del _kept[key]
            _made_of.cache_clear()


@functools.lru_cache(maxsize=8)
def _made_of(at: Connection, connect_s: float, request_s: float, process: int) -> pyarrow.fs.S3FileSystem:
    """One client while the settings stay the same: its connections and open files stay in use."""
    if at.requester_pays:
        raise _CantRequest("Arrow's client does not support requester pays")
    # Arrow keeps as many connections as it has I/O threads when a client is made, and at least 25.
    pa.set_io_thread_count(max(S3_REQUESTS, pa.io_thread_count()))
    return arrow_client(at, connect_s, request_s)


def forget_clients() -> None:
    """Make new clients from now on, with the settings in the environment at that time."""
    with _keeping:
        _kept.clear()
        _made_of.cache_clear()
