"""Word that work is to stop: it may save what it has, and go on elsewhere or later."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Notice = Callable[[], str | None]  # says why, once it is so


def no_notice() -> None:
    return None


def first_of(*notices: Notice) -> Notice:
    return lambda: next((text for notice in notices if (text := notice())), None)


class _Note:
    """A handler of signals that notes them."""

    def __init__(self) -> None:
        self.received: list[str] = []

    def __call__(self, number: int, _: object) -> None:
        self.received.append(signal.Signals(number).name)


@contextmanager
def signals_as_notice() -> Iterator[Notice]:
    """SIGTERM, and the SIGUSR1 that Slurm's --signal sends ahead of a limit, end nothing here but are noted.

    One of these contexts in another hears what the outer one has heard, and the outer one what it hears.
    """
    outer = signal.getsignal(signal.SIGTERM)
    note = outer if isinstance(outer, _Note) else _Note()
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield lambda: f"told to stop by {note.received[0]}" if note.received else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def notice_kept() -> Iterator[None]:
    """What starts in here may handle SIGTERM itself, as Ray does, but not in place of `signals_as_notice`."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if isinstance(before, _Note):
            signal.signal(signal.SIGTERM, before)
