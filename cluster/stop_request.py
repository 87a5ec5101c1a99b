"""Requests to stop: the work may save what it has, and resume elsewhere or later."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from erann_dist.errors import Stopped
from erann_dist.log.events import Interruption, StopRequest

# SIGUSR1 is what Slurm's --signal sends ahead of a limit, SIGHUP comes when a terminal or an ssh connection is closed.
STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
_SAVING = b"erann: stopping as soon as a checkpoint is saved; Ctrl-C again stops at once, without one\n"


def no_stop_request() -> None:
    return None


def first_of(*requests: StopRequest) -> StopRequest:
    return lambda: next((reason for request in requests if (reason := request())), None)


class _Note:
    """A handler of signals that notes them."""

    def __init__(self, announces: bool) -> None:
        self.received: list[signal.Signals] = []
        self._announces = announces

    def __call__(self, number: int, _: object) -> None:
        is_second_interrupt = number == signal.SIGINT and number in self.received
        self.received.append(signal.Signals(number))
        if is_second_interrupt:
            raise KeyboardInterrupt
        if number == signal.SIGINT and self._announces:
            announce_saving()

    def reason(self) -> Interruption | None:
        return Interruption("stop", f"stop requested by {self.received[0].name}") if self.received else None


def announce_saving() -> None:
    """Answer the first Ctrl-C, from a handler of signals."""
    with suppress(OSError):  # not by print, in the middle of which the signal may have come
        os.write(2, _SAVING)


def exit_as(stopped: Stopped, number: int) -> None:
    """Let the command end with the exit code of a process that this signal ended; of SIGUSR1 with SIGTERM's."""
    stopped.exit_code = 128 + (signal.SIGTERM if number == signal.SIGUSR1 else number)


@contextmanager
def signals_as_stop_request(announces: bool = True) -> Iterator[StopRequest]:
    """SIGTERM, SIGHUP, SIGUSR1 and the first Ctrl-C end nothing here but are noted; a second Ctrl-C interrupts.

    announces: whether the first Ctrl-C is answered by a line, as by the one process of a command that is to do that.
    A Stopped that leaves the context gets the exit code of the signal. Signals that are ignored, as under nohup, stay
    so. One of these contexts in another hears what the outer one has heard, and the outer one what it hears.
    """
    before = {number: signal.getsignal(number) for number in STOPPING}
    outer = before[signal.SIGTERM]
    note = outer if isinstance(outer, _Note) else _Note(announces)
    handled = [number for number in STOPPING if before[number] is not signal.SIG_IGN]
    for number in handled:
        signal.signal(number, note)
    try:
        yield note.reason
    except Stopped as stopped:
        if note.received:
            exit_as(stopped, note.received[0])
        raise
    finally:
        for number in handled:
            signal.signal(number, before[number])


@contextmanager
def stop_handlers_kept() -> Iterator[None]:
    """What starts in here may handle signals itself, as Ray does, but not in place of `signals_as_stop_request`."""
    before = {number: signal.getsignal(number) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            if isinstance(handler, _Note):
                signal.signal(number, handler)
