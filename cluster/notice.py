"""Word that work is to stop: it may save what it has, and go on elsewhere or later."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Notice = Callable[[], str | None]  # says why, once it is so


def no_notice() -> None:
    return None


def first_of(*notices: Notice) -> Notice:
    return lambda: next((text for notice in notices if (text := notice())), None)


@contextmanager
def signals_as_notice() -> Iterator[Notice]:
    """SIGTERM, and the SIGUSR1 that Slurm's --signal sends ahead of a limit, end nothing here but are noted."""
    received: list[str] = []

    def note(number: int, _: object) -> None:
        received.append(signal.Signals(number).name)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield lambda: f"told to stop by {received[0]}" if received else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
