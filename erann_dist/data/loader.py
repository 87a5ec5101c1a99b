"""Batches of decoded crops, in order, a bounded number of bytes ahead of the caller."""

from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from erann_dist.data.cache import ClipCache
from erann_dist.data.clip_reader import BadClip, ClipReader
from erann_dist.data.manifest import Manifest
from erann_dist.data.permutations import CROP, keyed_uniform
from erann_dist.errors import UserError
from erann_dist.recipe import CacheForm
from erann_dist.storage.folder import LocalFolder
from erann_dist.storage.s3_ranges import S3_REQUESTS
from erann_dist.storage.slow_reads import SlowReads

AHEAD_BYTES = 64 << 20  # of samples: one or two micro-batches, which may stay in the processor's cache
FETCH_AHEAD_BYTES = 256 << 20  # of clips asked for in S3, some of whose answers take long
_SUBSTITUTES = 1000  # for one clip, one after the other


@dataclass(frozen=True)
class Crops:
    """Which samples of which clips make one batch: (n,) each, and the batch's length."""

    rows: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]  # samples to decode; what is missing to `length` is zeros at the end
    length: int
    positions: npt.NDArray[np.int64] | None = None  # in the sampler's stream, if they were drawn


@dataclass(frozen=True)
class Batch:
    """Crops and their samples."""

    crops: Crops  # a bad clip's place is taken by its substitute's
    pcm: Tensor  # (n, length) int16


@dataclass
class BadClips:
    """The clips that were given up, and how many a run tolerates."""

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
        """Note what other workers, or an earlier start of the run, gave up. Raises UserError when it is too many."""
        for found in others:
            self.found.update(found)
        if len(self.found) > self.allowed:
            raise UserError(f"{len(self.found)} clips are bad, data.max_bad_clips is {self.allowed}: {self._some()}")

    def _some(self) -> str:
        return ", ".join(sorted(self.found)[:5]) + (", …" if len(self.found) > 5 else "")


NONE_BAD = BadClips()  # stays empty: it allows none

Begun = Future[list[Future[bytes] | None]] | None  # what was asked of S3 for a batch
# The crop that takes the place of the one drawn at a position, on attempt 0, 1, …: one of (1,) rows.
Substitute = Callable[[int, int], Crops]


def whole_clips(manifest: Manifest, rows: npt.NDArray[np.int64], length: int) -> Crops:
    """The clips from their first sample to their last, in a batch of `length` samples."""
    return Crops(rows, np.zeros(len(rows), np.int64), manifest.samples[rows], length)


def random_crops(
    manifest: Manifest, rows: npt.NDArray[np.int64], positions: npt.NDArray[np.int64], seed: int, length: int
) -> Crops:
    """A crop of `length` samples from each clip, its start keyed by (seed, position); shorter clips are whole."""
    samples = manifest.samples[rows]
    return Crops(rows, crop_starts(samples, positions, seed, length), np.minimum(samples, length), length, positions)


def crop_starts(
    samples: npt.NDArray[np.int64], positions: npt.NDArray[np.int64], seed: int, length: int
) -> npt.NDArray[np.int64]:
    """The first samples (n,) of random_crops' crops from clips of so many samples (n,)."""
    choices = np.maximum(samples - length, 0) + 1
    return np.floor(keyed_uniform(seed, CROP, positions) * choices).astype(np.int64)


def load(
    manifest: Manifest,
    batches: Iterable[Crops],
    *,
    threads: int,
    ahead_bytes: int = AHEAD_BYTES,
    cache: ClipCache | None = None,
    cache_form: CacheForm = "flac",
    pin_memory: bool = False,
    bad_clips: BadClips = NONE_BAD,
    substitute: Substitute | None = None,
    read: Counter[str] | None = None,
    slow: SlowReads | None = None,
) -> Generator[Batch, None, None]:
    """For each batch its samples, in pinned memory if asked.

    At least one batch, and as many as `ahead_bytes` hold, are read and decoded by `threads` threads while the caller
    works on one; further threads ask S3 for those behind them, up to FETCH_AHEAD_BYTES. A clip that is damaged or does
    not decode, read twice, is noted in `bad_clips` and replaced by `substitute`'s. Raises UserError, which names key or
    tar: when there are more of them than allowed, and for a tar that can't be read or is not as the manifest says.
    `read` is kept up to date with what ClipReader counts, and so is `slow`. Closing the iterator ends the threads.
    """
    reader = ClipReader(manifest, cache, cache_form, read, slow)
    remote = any(not isinstance(tar.folder, LocalFolder) for tar in manifest.tars)
    decoding = ThreadPoolExecutor(threads, thread_name_prefix="loader")
    fetching = ThreadPoolExecutor(S3_REQUESTS, thread_name_prefix="loader-s3")  # its threads start when there is work
    asking = ThreadPoolExecutor(1, thread_name_prefix="loader-s3")  # one, for the order's sake
    pending: deque[tuple[Batch, list[Future[None]], int]] = deque()
    given_up: set[int] = set()  # by row: another set's clip of the same key may be sound

    def candidates(crops: Crops, i: int) -> Iterator[tuple[int, int, int]]:
        """The clip that was drawn, and those that may take its place."""
        yield int(crops.rows[i]), int(crops.starts[i]), int(crops.counts[i])
        if substitute is not None and crops.positions is not None:
            for attempt in range(_SUBSTITUTES):
                other = substitute(int(crops.positions[i]), attempt)
                yield int(other.rows[0]), int(other.starts[0]), int(other.counts[0])

    def begin(rows: list[int]) -> list[Future[bytes] | None]:
        """Ask S3 for what must come from there; a decoding thread then waits for nothing that was not asked for."""
        return [fetching.submit(reader.fetch, row) if reader.must_fetch(row) else None for row in rows]

    def decode_into(crops: Crops, i: int, fetched: Future[bytes] | None, out: npt.NDArray[np.int16]) -> None:
        for row, start, count in candidates(crops, i):
            if row in given_up:
                continue
            try:
                reader.crop(row, start, out[:count], fetched if row == crops.rows[i] else None)
            except BadClip as bad:
                bad_clips.add(bad)
                given_up.add(row)
                continue
            out[count:] = 0
            crops.rows[i], crops.starts[i], crops.counts[i] = row, start, count
            return
        raise UserError(f"{manifest.tars[0].folder}: no clip was found that is not bad, in {_SUBSTITUTES} draws")

    def decode_part(crops: Crops, part: range, begun: Begun, out: npt.NDArray[np.int16]) -> None:
        fetched = begun.result() if begun else None
        for i in part:
            decode_into(crops, i, fetched[i] if fetched else None, out[i])

    def asked_ahead() -> Iterator[tuple[Crops, Begun, int]]:
        """The batches, each after S3 was asked for the clips of those behind it, and the bytes of its own clips."""
        asked: deque[tuple[Crops, Begun, int]] = deque()
        held = 0
        for crops in batches:
            if not remote:
                yield crops, None, 0
                continue
            asked.append((crops, asking.submit(begin, crops.rows.tolist()), _bytes(manifest, crops)))
            held += asked[-1][2]
            while asked and held > FETCH_AHEAD_BYTES:
                held -= asked[0][2]
                yield asked.popleft()
        yield from asked

    def decode(crops: Crops, begun: Begun, clip_bytes: int) -> None:
        shape = len(crops.rows), crops.length
        if pin_memory:
            pcm = torch.empty(shape, dtype=torch.int16, pin_memory=True)
        else:  # torch would align it: what is freed then does not fit the next one, and the process grows
            pcm = torch.from_numpy(np.empty(shape, np.int16))
        out = pcm.numpy()
        # As few parts as there are threads: each costs them a turn at Python's lock.
        parts = [range(first, len(out), threads) for first in range(threads)]
        futures = [decoding.submit(decode_part, crops, part, begun, out) for part in parts]
        pending.append((Batch(crops, pcm), futures, max(pcm.nbytes, clip_bytes)))

    try:
        for each in asked_ahead():
            decode(*each)
            while len(pending) > 1 and sum(held for _, _, held in pending) > ahead_bytes:
                yield _finished(*pending.popleft())
        while pending:
            yield _finished(*pending.popleft())
    finally:
        reader.stop()
        for pool in (asking, fetching, decoding):  # in this order: those that decode may wait for those that fetch
            pool.shutdown(cancel_futures=True)
        reader.close()


def _bytes(manifest: Manifest, crops: Crops) -> int:
    """Of its clips, as they are in their tars."""
    return int(manifest.sizes[crops.rows].sum())


def _finished(batch: Batch, parts: list["Future[None]"], _: int) -> Batch:
    for part in parts:
        part.result()
    return batch
