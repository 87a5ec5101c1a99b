"""Loads batches of decoded crops, in order, a bounded number of bytes ahead of the caller."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from erann_dist.data.cache import ClipCache
from erann_dist.data.clip_reader import BadClip, ClipReader, ReadStats
from erann_dist.data.manifest import Manifest
from erann_dist.data.permutations import CROP, keyed_uniform
from erann_dist.errors import UserError
from erann_dist.storage.folder import LocalFolder
from erann_dist.storage.s3_ranges import S3_REQUESTS

AHEAD_BYTES = 64 << 20  # of samples: one or two micro-batches, which may stay in the CPU cache
FETCH_AHEAD_BYTES = 256 << 20  # of clips requested from S3, some of whose responses take long
_SUBSTITUTES = 1000  # how many are tried for one clip


@dataclass(frozen=True)
class Crops:
    """Which samples of which clips make up one batch: (n,) each, and the batch's length."""

    rows: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]  # samples to decode; the rest of `length` is filled with zeros
    length: int
    positions: npt.NDArray[np.int64] | None  # in the sampler's stream, if they were sampled


C = TypeVar("C", bound=Crops)


@dataclass(frozen=True)
class Batch(Generic[C]):
    """Crops and their samples."""

    crops: C  # a bad clip's crop is replaced by its substitute's
    pcm: Tensor  # (n, length) int16


@dataclass
class BadClips:
    """The clips that were given up, and how many of them a run tolerates."""

    allowed: int = 0
    found: dict[str, str] = field(default_factory=dict)  # by key, what is wrong with them

    def add(self, bad: BadClip) -> None:
        """Raises the BadClip itself when none is allowed, UserError when it is one too many."""
        if not self.allowed:
            raise bad
        self.found.setdefault(bad.key, str(bad))
        if len(self.found) > self.allowed:
            raise UserError(f"{bad}; it is bad clip number {len(self.found)}, data.max_bad_clips is {self.allowed}")

    def unite(self, others: Iterable[dict[str, str]]) -> None:
        """Add the clips that other workers, or an earlier start of the run, gave up. Raises UserError for too many."""
        for found in others:
            self.found.update(found)
        if len(self.found) > self.allowed:
            raise UserError(f"{len(self.found)} clips are bad, data.max_bad_clips is {self.allowed}: {self._some()}")

    def _some(self) -> str:
        return ", ".join(sorted(self.found)[:5]) + (", …" if len(self.found) > 5 else "")


NONE_BAD = BadClips()  # stays empty, because it allows none

Requested = Future[list[Future[bytes] | None]] | None  # from S3, for a batch
# The crop that replaces the one sampled at a position, on attempt 0, 1, …: one of (1,) rows.
Substitute = Callable[[int, int], Crops]


def whole_clips(manifest: Manifest, rows: npt.NDArray[np.int64], length: int) -> Crops:
    """The clips from their first sample to their last, in a batch of `length` samples."""
    return Crops(rows, np.zeros(len(rows), np.int64), manifest.samples[rows], length, None)


def random_crops(
    manifest: Manifest, rows: npt.NDArray[np.int64], positions: npt.NDArray[np.int64], seed: int, length: int
) -> Crops:
    """A crop of `length` samples from each clip, its start keyed by (seed, position); shorter clips are whole."""
    samples = manifest.samples[rows]
    return Crops(rows, crop_starts(samples, positions, seed, length), np.minimum(samples, length), length, positions)


def crop_starts(
    samples: npt.NDArray[np.int64], positions: npt.NDArray[np.int64], seed: int, length: int
) -> npt.NDArray[np.int64]:
    """The first samples (n,) of random_crops' crops. samples: (n,) the lengths of the clips."""
    choices = np.maximum(samples - length, 0) + 1
    return np.floor(keyed_uniform(seed, CROP, positions) * choices).astype(np.int64)


class Loader(Iterator[Batch[C]]):
    """Reads and decodes batches of crops in threads, a bounded number of bytes ahead of the caller.

    While the caller works on a batch, `threads` threads read and decode the next one, and more of them up to
    `ahead_bytes`; further threads request the batches after those from S3, up to FETCH_AHEAD_BYTES.
    """

    def __init__(
        self,
        manifest: Manifest,
        batches: Iterable[C],
        *,
        threads: int,
        ahead_bytes: int = AHEAD_BYTES,
        cache: ClipCache | None = None,
        pin_memory: bool = False,
        bad_clips: BadClips = NONE_BAD,
        substitute: Substitute | None = None,
        stats: ReadStats | None = None,
    ) -> None:
        """A clip that is damaged or does not decode, also when read again, is added to `bad_clips` and replaced by
        `substitute`.

        `next` raises UserError, which names key or tar, when there are more bad clips than allowed, and for a tar that
        can't be read or does not match the manifest. stats: updated with each read. pin_memory: of the batches.
        """
        self._manifest = manifest
        self._threads, self._ahead_bytes, self._pin_memory = threads, ahead_bytes, pin_memory
        self._bad_clips, self._substitute = bad_clips, substitute
        self._given_up: set[int] = set()  # by row: another set's clip of the same key may be intact
        self._reader = ClipReader(manifest, cache, stats)
        # The pools start their threads when there is work.
        self._decoding = ThreadPoolExecutor(threads, thread_name_prefix="loader")
        self._fetching = ThreadPoolExecutor(S3_REQUESTS, thread_name_prefix="loader-s3")
        self._requesting = ThreadPoolExecutor(1, thread_name_prefix="loader-s3")  # one thread, to keep the order
        self._batches = self._load(batches)

    def __next__(self) -> Batch[C]:
        return next(self._batches)

    def close(self) -> None:
        """Stop the threads, whatever they are doing."""
        self._batches.close()
        self._shut_down()

    def _shut_down(self) -> None:
        self._reader.stop()
        # In this order, because decoding threads may wait for fetching ones.
        for pool in (self._requesting, self._fetching, self._decoding):
            pool.shutdown(cancel_futures=True)
        self._reader.close()

    def _load(self, batches: Iterable[C]) -> Generator[Batch[C], None, None]:
        pending: deque[tuple[Batch[C], list[Future[None]], int]] = deque()
        try:
            for crops, requested in self._requested_ahead(batches):
                batch, parts = self._decode(crops, requested)
                held = max(batch.pcm.nbytes, self._tar_bytes(crops) if requested else 0)
                pending.append((batch, parts, held))
                while len(pending) > 1 and sum(held for _, _, held in pending) > self._ahead_bytes:
                    yield _finished(*pending.popleft())
            while pending:
                yield _finished(*pending.popleft())
        finally:
            self._shut_down()

    def _requested_ahead(self, batches: Iterable[C]) -> Iterator[tuple[C, Requested]]:
        """The batches; before each is yielded, the clips of those that follow it are requested from S3."""
        if all(isinstance(tar.folder, LocalFolder) for tar in self._manifest.tars):
            yield from ((crops, None) for crops in batches)
            return
        requested: deque[tuple[C, Requested]] = deque()
        held = 0
        for crops in batches:
            requested.append((crops, self._requesting.submit(self._request, crops.rows.tolist())))
            held += self._tar_bytes(crops)
            while requested and held > FETCH_AHEAD_BYTES:
                held -= self._tar_bytes(requested[0][0])
                yield requested.popleft()
        yield from requested

    def _request(self, rows: list[int]) -> list[Future[bytes] | None]:
        """Request the clips that must come from S3, so that no decoding thread waits for one not yet requested."""
        reader, submit = self._reader, self._fetching.submit
        return [submit(reader.fetch, row) if reader.must_fetch(row) else None for row in rows]

    def _decode(self, crops: C, requested: Requested) -> tuple[Batch[C], list[Future[None]]]:
        """A batch that is being filled, and the futures that fill it."""
        shape = len(crops.rows), crops.length
        if self._pin_memory:
            pcm = torch.empty(shape, dtype=torch.int16, pin_memory=True)
        else:  # torch would align it; freed memory then does not fit the next batch, and the process grows
            pcm = torch.from_numpy(np.empty(shape, np.int16))
        out = pcm.numpy()
        # Only as many parts as threads, because each has to wait for the GIL.
        parts = [range(first, len(out), self._threads) for first in range(self._threads)]
        futures = [self._decoding.submit(self._decode_part, crops, part, requested, out) for part in parts]
        return Batch(crops, pcm), futures

    def _decode_part(self, crops: Crops, part: range, requested: Requested, out: npt.NDArray[np.int16]) -> None:
        fetched = requested.result() if requested else None
        for i in part:
            self._decode_into(crops, i, fetched[i] if fetched else None, out[i])

    def _decode_into(self, crops: Crops, i: int, fetched: Future[bytes] | None, out: npt.NDArray[np.int16]) -> None:
        """Write the crop's samples to out, (length,), or its substitute's when the clip is bad."""
        for row, start, count in self._candidates(crops, i):
            if row in self._given_up:
                continue
            try:
                self._reader.crop(row, start, out[:count], fetched if row == crops.rows[i] else None)
            except BadClip as bad:
                self._bad_clips.add(bad)
                self._given_up.add(row)
                continue
            out[count:] = 0
            crops.rows[i], crops.starts[i], crops.counts[i] = row, start, count
            return
        folder = self._manifest.tars[0].folder
        raise UserError(f"{folder}: no usable clip was found in {_SUBSTITUTES} draws")

    def _candidates(self, crops: Crops, i: int) -> Iterator[tuple[int, int, int]]:
        """The sampled clip, then those that may replace it."""
        yield int(crops.rows[i]), int(crops.starts[i]), int(crops.counts[i])
        if self._substitute is not None and crops.positions is not None:
            for attempt in range(_SUBSTITUTES):
                other = self._substitute(int(crops.positions[i]), attempt)
                yield int(other.rows[0]), int(other.starts[0]), int(other.counts[0])

    def _tar_bytes(self, crops: Crops) -> int:
        """The bytes of the batch's clips in their tars."""
        return int(self._manifest.sizes[crops.rows].sum())


def _finished(batch: Batch[C], parts: list["Future[None]"], _: int) -> Batch[C]:
    for part in parts:
        part.result()
    return batch
