"""The order of the samples, as a pure function of (clip lists, seed, position).

A sampler answers `draw(positions) -> row indices` for any positions in any order; it has no iterator and no state, so
a run needs one integer to resume, and any number of workers draw the same stream.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np
import numpy.typing as npt

from erann_dist.data.permutations import CLASS_PASS, EPOCH, I64, ROUND, keyed_hash, permute


class Sampler(Protocol):
    """The interface of a sampler."""

    def draw(self, positions: npt.NDArray[np.integer]) -> I64:
        """(n,) positions -> (n,) row indices."""


class BalancedSampler:
    """Class-balanced sampling with the semantics of PANNs' balanced sampler (Kong et al. 2020), by position.

    Round k = position // C visits each of the C classes that have clips once, in an order shuffled by (seed, k). The
    class's clip is entry k mod n of its own n clips, reshuffled by (seed, class, pass) for each pass k // n: each of a
    class's clips occurs once before any of them occurs again. Classes without clips are skipped.

    class_lists: for each class the rows of the clips with that label; a clip with several labels is in several lists.
    """

    def __init__(self, class_lists: Sequence[npt.NDArray[np.integer]], seed: int) -> None:
        sizes = np.array([len(rows) for rows in class_lists], dtype=np.int64)
        if not sizes.any():
            raise ValueError("balanced sampling needs at least one class with clips")
        self._seed = seed
        self._classes = np.flatnonzero(sizes)
        self._sizes = sizes
        self._starts = np.cumsum(sizes) - sizes
        self._rows = np.concatenate([np.asarray(rows, dtype=np.int32) for rows in class_lists])

    @property
    def classes(self) -> I64:
        """The classes that have clips, ascending: (C,)."""
        return self._classes

    def draw(self, positions: npt.NDArray[np.integer]) -> I64:
        round_, place = np.divmod(np.asarray(positions, dtype=np.int64), len(self._classes))
        class_ = self._classes[permute(place, len(self._classes), keyed_hash(self._seed, ROUND, round_))]
        pass_, entry = np.divmod(round_, self._sizes[class_])
        entry = permute(entry, self._sizes[class_], keyed_hash(self._seed, CLASS_PASS, class_, pass_))
        return self._rows[self._starts[class_] + entry].astype(np.int64)


class UniformSampler:
    """Every row once per epoch, in an order shuffled by (seed, epoch)."""

    def __init__(self, rows: int, seed: int) -> None:
        if rows < 1:
            raise ValueError("uniform sampling needs at least one clip")
        self._rows = rows
        self._seed = seed

    def draw(self, positions: npt.NDArray[np.integer]) -> I64:
        epoch, place = np.divmod(np.asarray(positions, dtype=np.int64), self._rows)
        return permute(place, self._rows, keyed_hash(self._seed, EPOCH, epoch))


class SequentialSampler:
    """Every row once per epoch, in the manifest's order."""

    def __init__(self, rows: int) -> None:
        if rows < 1:
            raise ValueError("sequential sampling needs at least one clip")
        self._rows = rows

    def draw(self, positions: npt.NDArray[np.integer]) -> I64:
        return np.asarray(positions, dtype=np.int64) % self._rows


def class_lists(
    values: npt.NDArray[np.integer], offsets: npt.NDArray[np.integer], num_classes: int
) -> list[npt.NDArray[np.int32]]:
    """Turn each clip's labels into each class's clips, rows ascending.

    values, offsets: the labels of clip i are values[offsets[i]:offsets[i + 1]].
    """
    rows = np.repeat(np.arange(len(offsets) - 1, dtype=np.int32), np.diff(offsets))
    order = np.argsort(values, kind="stable")
    bounds = np.searchsorted(values[order], np.arange(num_classes + 1))
    return [rows[order[start:end]] for start, end in pairwise(bounds)]
