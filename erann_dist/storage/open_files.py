"""A bounded number of open files, the most recently used: a set may have more tars than a process may open files."""

import os
import resource
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

_MOST = 4096
# 1/8 of the files that the process may open: a run has two loaders (training and evaluation) and a cache.
_SHARE = 8


class OpenFile:
    """A file descriptor, closed when the last reference goes: a thread may still read what others have released."""

    def __init__(self, path: str | Path, flags: int, mode: int = 0o666) -> None:
        """Raises OSError."""
        self.descriptor = os.open(path, flags | os.O_CLOEXEC, mode)
        self._close = weakref.finalize(self, os.close, self.descriptor)

    def close(self) -> None:
        """Close it at once; calling it again does nothing."""
        self._close()


class OpenFiles(Generic[K]):
    """The most recently used open files by key, for any number of threads."""

    def __init__(self, most: int | None = None) -> None:
        """most: how many at once; by default an eighth of the files that the process may open, at least 16."""
        self._most = most or min(_MOST, max(16, allowed_files() // _SHARE))
        self._lock = threading.Lock()
        self._files: OrderedDict[K, OpenFile] = OrderedDict()

    def get(self, key: K, open_it: Callable[[], OpenFile]) -> OpenFile:
        """The file, opened if necessary, possibly by several threads at once. Keep the reference while it is in use."""
        with self._lock:
            if file := self._files.get(key):
                self._files.move_to_end(key)
                return file
        opened = open_it()  # not under the lock: on a network file system it takes a while
        with self._lock:
            file = self._files.setdefault(key, opened)
            self._files.move_to_end(key)
            while len(self._files) > self._most:
                self._files.popitem(last=False)
            return file

    def close(self) -> None:
        """Close all files that are not in use; the others close when their last reference goes."""
        with self._lock:
            self._files.clear()


def allowed_files() -> int:
    """How many files this process may open, after raising its limit as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard if hard != resource.RLIM_INFINITY else 1 << 20
