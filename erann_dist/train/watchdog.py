"""Ends a worker that makes no progress, after writing the stacks of its threads to a file.

A worker may hang outside Python, in a collective operation or in a driver. So faulthandler's own thread, which does not
need the GIL, writes the stacks, and a kernel timer ends the process.
"""

import faulthandler
import fcntl
import hashlib
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_REARM_S = 1.0  # at most this often, because each time starts a thread
_START_S = 600.0  # the minimum for the start: reading manifests and a checkpoint, compiling
_GRACE_S = 5.0  # so that workers waiting for the hung one can write their stacks too before the first one ends


class Watchdog:
    """Ends the process when `alive` is not called for `timeout` seconds."""

    def __init__(self, run: str, rank: int, timeout: float) -> None:
        """run: the run's folder or URL."""
        self._timeout = timeout
        self._armed = 0.0
        descriptor, new = tempfile.mkstemp(".new", f"{_prefix(run)}rank{rank}-")
        self._file = os.fdopen(descriptor, "w")
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # until this process ends; another container may use the same id
        self._path = Path(new).rename(Path(new).with_suffix(".txt"))
        self._arm(max(timeout, _START_S))

    def alive(self) -> None:
        """Report progress."""
        if time.monotonic() - self._armed > min(_REARM_S, self._timeout / 4):
            self._arm(self._timeout)

    def _arm(self, seconds: float) -> None:
        self._armed = time.monotonic()
        faulthandler.dump_traceback_later(seconds, file=self._file)
        signal.setitimer(signal.ITIMER_REAL, seconds + _GRACE_S)  # SIGALRM, which by default ends a process

    def stop(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        if not os.fstat(self._file.fileno()).st_size:
            self._path.unlink(missing_ok=True)  # a cleanup of the folder may have been faster
        self._file.close()


@contextmanager
def watching(run: str, rank: int, timeout: float) -> Iterator[Watchdog]:
    """A watchdog for the duration of the context."""
    watchdog = Watchdog(run, rank, timeout)
    try:
        yield watchdog
    finally:
        watchdog.stop()


def stacks_left(run: str) -> list[tuple[str, str]]:
    """The stacks left on this node by hung workers of the run, as ("rank0", stack); their files are removed."""
    found = []
    for path in sorted(Path(tempfile.gettempdir()).glob(f"{_prefix(run)}*.txt")):
        # Skipped when its worker is alive, it is another user's, or another worker of the node has taken it.
        with suppress(OSError), path.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            text = file.read()
            path.unlink()
            if text:  # empty when the worker was killed
                found.append((path.name.removeprefix(_prefix(run)).partition("-")[0], text))
    return found


def remove_empty(run: str) -> None:
    """Remove the files left on this machine by workers of the run that were killed and did not hang."""
    for path in Path(tempfile.gettempdir()).glob(f"{_prefix(run)}*"):
        with suppress(OSError), path.open("r+") as file:  # as above
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(file.fileno()).st_size:
                path.unlink()


def _prefix(run: str) -> str:
    return f"erann-stacks-{hashlib.sha256(os.path.abspath(run).encode()).hexdigest()[:16]}-"
