"""Unix time that never jumps, for measuring durations: a machine's own clock may be adjusted while a run trains.

All processes of a command share one such clock: that of the process that the user started.
"""

import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Anchor:
    """A moment on both clocks."""

    unix: float
    monotonic: float  # the same for all processes on a machine

    def now(self) -> float:
        return self.unix + time.monotonic() - self.monotonic


_anchor = Anchor(time.time(), time.monotonic())


def steady_time() -> float:
    """Seconds since 1970 by the clock as it was set when the command started, without later adjustments."""
    return _anchor.now()


def anchor() -> Anchor:
    """This process's anchor, for other processes on this machine."""
    return _anchor


def follow(other: Anchor) -> None:
    """Use the clock of another process on this machine."""
    global _anchor
    _anchor = other


def set_time(unix: float) -> None:
    """Set this process's steady clock; for processes on other machines."""
    follow(Anchor(unix, time.monotonic()))
