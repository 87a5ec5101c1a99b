"""Ends a worker that makes no progress, and leaves the stacks of its threads behind.

A worker may hang where no Python runs, in a collective operation or in a driver: faulthandler's own thread, which needs
no lock of Python's, writes the stacks, and the kernel's timer ends the process.
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

_REARM_S = 1.0  # each costs a thread
_START_S = 600.0  # the least that the start may take: reading manifests and a checkpoint, compiling
_GRACE_S = 5.0  # in which the others that wait for a hung worker write their stacks too, before the first one ends


class Watchdog:
    """Ends the process when `alive` is not called for `timeout` seconds."""

    def __init__(self, run: str, rank: int, timeout: float) -> None:
        """run: the run's folder or URL."""
        self._timeout = timeout
        self._armed = 0.0
        descriptor, new = tempfile.mkstemp(".new", f"{_prefix(run)}rank{rank}-")
        self._file = os.fdopen(descriptor, "w")
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # until this process ends; its id may mean another in a container beside
        self._path = Path(new).rename(Path(new).with_suffix(".txt"))
        self._arm(max(timeout, _START_S))

    def alive(self) -> None:
        """There is progress."""
        if time.monotonic() - self._armed > min(_REARM_S, self._timeout / 4):
            self._arm(self._timeout)

    def _arm(self, seconds: float) -> None:
        self._armed = time.monotonic()
        faulthandler.dump_traceback_later(seconds, file=self._file)
        signal.setitimer(signal.ITIMER_REAL, seconds + _GRACE_S)  # SIGALRM, which ends a process that does not mind

    def stop(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        if not os.fstat(self._file.fileno()).st_size:
            self._path.unlink(missing_ok=True)  # who cleans up there may have been faster than a long run
        self._file.close()


@contextmanager
def watching(run: str, rank: int, timeout: float) -> Iterator[Watchdog]:
    """A watchdog for the length of the context."""
    watchdog = Watchdog(run, rank, timeout)
    try:
        yield watchdog
    finally:
        watchdog.stop()


def stacks_left(run: str) -> list[tuple[str, str]]:
    """The stacks that hung workers of the run left on this node, each behind its rank, as in "rank0"; taken away."""
    found = []
    for path in sorted(Path(tempfile.gettempdir()).glob(f"{_prefix(run)}*.txt")):
        # Not when its worker lives, it is another user's, or another worker of the node has taken it.
        with suppress(OSError), path.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            text = file.read()
            path.unlink()
            if text:  # empty when it was killed
                found.append((path.name.removeprefix(_prefix(run)).partition("-")[0], text))
    return found


def remove_empty(run: str) -> None:
    """Remove the files that workers of the run which were killed, and did not hang, left on this machine."""
    for path in Path(tempfile.gettempdir()).glob(f"{_prefix(run)}*"):
        with suppress(OSError), path.open("r+") as file:  # as above
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(file.fileno()).st_size:
                path.unlink()


def _prefix(run: str) -> str:
    return f"erann-stacks-{hashlib.sha256(os.path.abspath(run).encode()).hexdigest()[:16]}-"
