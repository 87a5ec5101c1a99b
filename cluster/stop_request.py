"""Stop requests: signals that let the work save its state first, to resume elsewhere or later."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from erann_dist.errors import Stopped
from erann_dist.log.events import Interruption, StopRequest

# SIGUSR1 is sent by Slurm's --signal ahead of a time limit, SIGHUP when a terminal or an ssh connection is closed.
STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
_SAVING = b"erann: stopping as soon as a checkpoint is saved; Ctrl-C again stops at once, without one\n"


def no_stop_request() -> None:
    return None


def first_of(*requests: StopRequest) -> StopRequest:
    return lambda: next((reason for request in requests if (reason := request())), None)


class _Recorder:
    """A signal handler that records the signals."""

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
    """Print a line on the first Ctrl-C, from a signal handler."""
    with suppress(OSError):  # Not by print, which the signal may have interrupted.
        os.write(2, _SAVING)


def exit_as(stopped: Stopped, number: int) -> None:
    """Set the exit code of a process that this signal ends; for SIGUSR1, that of SIGTERM."""
    stopped.exit_code = 128 + (signal.SIGTERM if number == signal.SIGUSR1 else number)


@contextmanager
def signals_as_stop_request(announces: bool = True) -> Iterator[StopRequest]:
    """Turn SIGTERM, SIGHUP, SIGUSR1 and the first Ctrl-C into stop requests; a second Ctrl-C interrupts.

    announces: whether to print a line on the first Ctrl-C, which one process of a command should do. A Stopped that
    leaves the context gets the exit code of the signal. Ignored signals, as under nohup, stay ignored. Nested contexts
    share the signals that any of them has received.
    """
    before = {number: signal.getsignal(number) for number in STOPPING}
    outer = before[signal.SIGTERM]
    recorder = outer if isinstance(outer, _Recorder) else _Recorder(announces)
    handled = [number for number in STOPPING if before[number] is not signal.SIG_IGN]
    for number in handled:
        signal.signal(number, recorder)
    try:
        yield recorder.reason
    except Stopped as stopped:
        if recorder.received:
            exit_as(stopped, recorder.received[0])
        raise
    finally:
        for number in handled:
            signal.signal(number, before[number])


@contextmanager
def stop_handlers_kept() -> Iterator[None]:
    """Restore the handlers of `signals_as_stop_request` after code that installs its own, as Ray does."""
    before = {number: signal.getsignal(number) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            if isinstance(handler, _Recorder):
                signal.signal(number, handler)
