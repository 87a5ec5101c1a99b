"""Cuts a recording of any length into windows, holding no more of it than a window and a decoded block."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_REMAINDER = 0.01  # of a window


@dataclass(frozen=True)
class Window:
    """A part of a recording. Times are in seconds from its beginning."""

    start: float
    end: float
    samples: npt.NDArray[np.float32]  # (n,)


def windows(parts: Iterable[npt.NDArray[np.float32]], rate: int, seconds: float, hop: float) -> Iterator[Window]:
    """Windows of `seconds` that begin every `hop` seconds, from the parts (n,) of a recording at `rate` Hz.

    The last one ends with the recording and begins earlier for that, unless less than a hundredth of a window remains.
    A recording shorter than a window is one window. Nothing is padded. An empty recording has no window. Raises
    ValueError unless 0 < hop <= seconds, or if they are less than a sample.
    """
    size, step = round(seconds * rate), round(hop * rate)
    if not 0 < step <= size:
        raise ValueError(f"a hop of {hop:g} s between windows of {seconds:g} s")
    held = last = np.zeros(0, np.float32)
    first = covered = 0  # samples: where `held` begins, and where the last window ended
    for part in parts:
        held = np.concatenate([held, part])
        while len(held) >= size:
            last, covered = held[:size], first + size
            yield Window(first / rate, covered / rate, last)
            held, first = held[step:], first + step
    end = first + len(held)
    if end - covered > (_REMAINDER * size if covered else 0):
        tail = np.concatenate([last[:step], held])[-size:]
        yield Window((end - len(tail)) / rate, end / rate, tail)
