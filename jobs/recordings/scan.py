"""Applies a function of the model to every window of recordings, in batches over windows and recordings."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from glob import glob, has_magic
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from erann_dist.data.audio import SUFFIXES, Block, DecodeError, decode, resample_with_gaps
from erann_dist.data.windows import Window, windows
from erann_dist.errors import UsageError
from erann_dist.models.mel_config import padded_samples
from shards.sources.walk import walk

BATCH = 16


@dataclass
class Recording:
    """A file and what came out of its windows; `problem` says why there is nothing."""

    file: Path
    starts: list[float] = field(default_factory=list)  # seconds
    ends: list[float] = field(default_factory=list)
    values: list[npt.NDArray[np.float32]] = field(default_factory=list)  # one (D,) for each window
    problem: str | None = None


@dataclass
class _Attempt:
    """The windows of a recording, as one decoder reads it. If it fails, another begins from the start."""

    found: Recording
    waiting: int = 0  # windows that are not computed yet
    is_complete: bool = False


def find_recordings(places: Sequence[str]) -> list[Path]:
    """The sound files that the arguments name: files, folders (at any depth) and patterns; each once, in order.

    Raises UsageError for a place where there is none.
    """
    found: dict[Path, None] = {}
    for place in places:
        path = Path(place)
        if path.is_dir():
            files = (Path(entry.path) for entry, is_folder in walk(place) if not is_folder)
            here = sorted(each for each in files if each.suffix.lower() in SUFFIXES and not each.name.startswith("."))
        elif path.exists():
            here = [path]
        else:
            here = sorted(map(Path, glob(place, recursive=True))) if has_magic(place) else []
        if not here:
            kind = "no sound file in it or below it" if path.is_dir() else "no such file"
            raise UsageError(f"{place}: {kind}")
        found |= dict.fromkeys(here)
    return list(found)


def scan(
    files: Sequence[Path],
    compute: Callable[[Tensor], npt.NDArray[np.float32]],
    rate: int,
    seconds: float,
    hop: float,
    least_samples: int = 0,
    on_seconds: Callable[[float], None] = lambda seconds: None,
) -> Iterator[Recording]:
    """The recordings with a value (D,) for each window, in the order of the files.

    compute: from a batch of windows (B, n) at `rate` Hz, float32, to (B, D). least_samples: the length to which shorter
    windows are zero-padded. on_seconds: called with the end of each window that was read.

    Memory holds a batch of windows and the values of the recordings under way, whatever their length.
    """
    waiting: deque[_Attempt] = deque()
    batch: list[tuple[_Attempt, Window]] = []

    def flush() -> None:
        if not batch:
            return
        length = padded_samples(max(least_samples, len(batch[0][1].samples)))
        stacked = np.zeros((len(batch), length), np.float32)
        for row, (_, window) in zip(stacked, batch, strict=True):
            row[: len(window.samples)] = window.samples
        for (attempt, window), value in zip(batch, compute(torch.from_numpy(stacked)), strict=True):
            attempt.waiting -= 1
            attempt.found.starts.append(window.start)
            attempt.found.ends.append(window.end)
            attempt.found.values.append(value)
        batch.clear()

    def read(attempt: _Attempt, blocks: Iterator[Block]) -> None:
        for window in windows(_filled(resample_with_gaps(blocks, rate), rate), rate, seconds, hop):
            if batch and padded_samples(len(batch[0][1].samples)) != padded_samples(len(window.samples)):
                flush()
            # A copy: the window is a view of all that the decoder had given.
            batch.append((attempt, Window(window.start, window.end, window.samples.copy())))
            attempt.waiting += 1
            on_seconds(window.end)
            if len(batch) == BATCH:
                flush()

    def take(file: Path) -> _Attempt:
        attempt = _Attempt(Recording(file))

        def consume(blocks: Iterator[Block]) -> None:
            nonlocal attempt
            attempt = _Attempt(Recording(file))
            read(attempt, blocks)

        try:
            decode(file, consume)
            if not attempt.waiting and not attempt.found.values:
                attempt.found.problem = "no samples"
        except DecodeError as error:
            attempt = _Attempt(Recording(file, problem=str(error)))
        attempt.is_complete = True
        return attempt

    for file in files:
        waiting.append(take(file))
        while waiting and not waiting[0].waiting:
            yield waiting.popleft().found
    flush()
    yield from (attempt.found for attempt in waiting)


def _filled(parts: Iterable[npt.NDArray[np.float32] | int], rate: int) -> Iterator[npt.NDArray[np.float32]]:
    """The parts with silence where samples are missing, so that the windows have the recording's own times."""
    for part in parts:
        if isinstance(part, int):
            for begin in range(0, part, rate):  # a second at a time: a gap may be hours long
                yield np.zeros(min(rate, part - begin), np.float32)
        else:
            yield part
