"""Unix time that never jumps, for durations: a machine's own clock can be set while a run trains.

The processes of a command have one such clock: that of the process that the user started.
"""

import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Anchor:
    """A moment on both clocks."""

    unix: float
    monotonic: float  # of this machine, the same in all of its processes

    def now(self) -> float:
        return self.unix + time.monotonic() - self.monotonic


_anchor = Anchor(time.time(), time.monotonic())


def steady_time() -> float:
    """Seconds since 1970 by the clock as it was when the command was started, whatever was done to it since."""
    return _anchor.now()


def anchor() -> Anchor:
    """For other processes of this machine."""
    return _anchor


def follow(other: Anchor) -> None:
    """Use the clock of another process of this machine."""
    global _anchor
    _anchor = other


def set_time(unix: float) -> None:
    """Set this process's steady clock: for processes of other machines."""
    follow(Anchor(unix, time.monotonic()))
