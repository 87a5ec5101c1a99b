"""Events: the times at which a label's probability is above a threshold, from overlapping windows."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class SoundEvent:
    """A label that is heard without interruption. Times are in seconds from the recording's beginning."""

    label: int
    start: float
    end: float
    mean: float  # probability over its windows
    peak: float


def find_events(
    starts: npt.NDArray[np.float64], ends: npt.NDArray[np.float64], scores: npt.NDArray[np.float32], threshold: float
) -> Iterator[SoundEvent]:
    """The events of a recording's windows (n,), with their scores (n, N), by label and time.

    Where windows overlap, the border between two of them is in the middle of their overlap, so that neighbouring events
    do not overlap and an event is not as much too long as a window.
    """
    if not len(starts):
        return
    borders = np.concatenate([starts[:1], (ends[:-1] + starts[1:]) / 2, ends[-1:]])
    for label in np.flatnonzero((scores >= threshold).any(axis=0)):
        above = np.concatenate([[False], scores[:, label] >= threshold, [False]])
        edges = np.flatnonzero(above[1:] != above[:-1])
        for first, last in zip(edges[::2], edges[1::2], strict=True):
            part = scores[first:last, label]
            yield SoundEvent(
                int(label), float(borders[first]), float(borders[last]), float(part.mean()), float(part.max())
            )
