"""Ranged reads of S3 objects from many threads: Arrow's client, which reads without Python's lock, and s3fs after it.

Arrow's client asks once, as s3fs would (s3_clients.py). Whatever it can't read is read again by S3Folder.read_range,
which waits, tries again, checks that the object is the same, and reports what is wrong.
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

S3_REQUESTS = 32  # at once, by one worker
CONNECT_S = 10.0
REQUEST_S = 20.0
RENEW_S = 300.0  # after which credentials are asked for again: those of a role are renewed long before they expire


class S3Object:
    """One object, for ranged reads from any number of threads. Nothing is asked before the first."""

    def __init__(self, folder: S3Folder, name: str, stop: threading.Event, slow: SlowReads | None = None) -> None:
        """stop: when it is set, nothing is tried again. slow: counts the reads that Arrow's client could not do."""
        self._folder = folder
        self._stop = stop
        self._name = name
        self._slow = slow or SlowReads()
        self._lock = threading.Lock()
        self._size_and_version: tuple[int, str] | UserError | FileNotFoundError | None = None
        self._open: tuple[pyarrow.fs.S3FileSystem, pa.NativeFile] | None = None  # with the client that opened it

    @property
    def size(self) -> int:
        """Its bytes. Raises UserError, FileNotFoundError."""
        return self._known()[0]

    def read(self, start: int, size: int) -> bytes:
        """Bytes start .. start + size, no fewer. Raises UserError, FileNotFoundError."""
        self._known()
        if not self._slow.is_fast_worth_trying():
            self._slow.note_slow()
            return self.read_carefully(start, size)
        client: pyarrow.fs.S3FileSystem | None = None
        why = "fewer bytes than asked for"
        try:
            client = _client(self._folder.endpoint, self._bucket)
            data: bytes = self._opened(client).read_at(size, start)
            if len(data) == size:
                self._slow.note(None)
                return data
        except _CantAskSo as error:
            why = str(error)
        except (OSError, pa.ArrowException, BotoCoreError, FSTimeoutError) as error:
            why = _reason(error)
            self._open = None
            _forget(self._folder.endpoint, self._bucket, client)
        data = self.read_carefully(start, size)
        self._slow.note(why)  # only now: where s3fs can't read either, S3 itself is away
        return data

    def read_carefully(self, start: int, size: int) -> bytes:
        """The same, slower, with patience, and checked to be of the object that was there at first."""
        return self._folder.read_range(self._name, start, size, self._known()[1], self._stop)

    def close(self) -> None:
        if self._open:
            self._open[1].close()

    @property
    def _bucket(self) -> str:
        return self._folder.url.removeprefix("s3://").partition("/")[0]

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

    def _opened(self, client: pyarrow.fs.S3FileSystem) -> pa.NativeFile:
        """Not under the lock: where nothing answers, all threads would wait one after the other."""
        opened = self._open
        if opened is None or opened[0] is not client:
            path = f"{self._folder.url.removeprefix('s3://')}/{self._name}"
            opened = self._open = client, client.open_input_file(path)
        return opened[1]


class _CantAskSo(Exception):
    """Arrow's client has no way to ask as this bucket wants it."""


def _reason(error: BaseException) -> str:
    """Arrow's error by its codes: the rest of it can hold what the server answered, and so tokens."""
    codes = re.search(r"AWS Error (\w+(?: \(HTTP status \d+\))?) during (\w+)", str(error))
    return f"{codes[1]} during {codes[2]}" if codes else type(error).__name__


@dataclass
class _Kept:
    """A bucket's client of Arrow's in this process, and when what it was made of was found."""

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
    """The next client is a new one, with credentials that are asked for again, unless another thread saw to that."""
    key = endpoint, bucket, os.getpid()
    with _keeping:
        if failed is not None and (kept := _kept.get(key)) and kept.client is failed:
            del _kept[key]
            _made_of.cache_clear()


@functools.lru_cache(maxsize=8)
def _made_of(at: Connection, connect_s: float, request_s: float, process: int) -> pyarrow.fs.S3FileSystem:
    """One client while the facts stay the same: its connections and the files that it opened stay in use."""
    if at.requester_pays:
        raise _CantAskSo("Arrow's client can't send that the requester pays")
    # Arrow keeps as many connections as it has such threads when a client is made, 25 if they are fewer.
    pa.set_io_thread_count(max(S3_REQUESTS, pa.io_thread_count()))
    return arrow_client(at, connect_s, request_s)


def forget_clients() -> None:
    """Make new ones, of what the environment then says."""
    with _keeping:
        _kept.clear()
        _made_of.cache_clear()
