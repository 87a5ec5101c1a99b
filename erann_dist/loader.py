"""Batches of decoded crops, in order, a bounded number ahead of the caller."""

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from erann_dist.audio import DecodeError, decode_crop
from erann_dist.errors import UserError
from erann_dist.keyed import CROP, keyed_uniform
from erann_dist.manifest import Manifest
from erann_dist.storage import ClipReader


@dataclass(frozen=True)
class Crops:
    """Which samples of which clips make one batch: (n,) each, and the batch's length."""

    rows: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]  # samples to decode; what is missing to `length` is zeros at the end
    length: int


@dataclass(frozen=True)
class Batch:
    """Crops and their samples."""

    crops: Crops
    pcm: Tensor  # (n, length) int16


def whole_clips(manifest: Manifest, rows: npt.NDArray[np.int64], length: int) -> Crops:
    """The clips from their first sample to their last, in a batch of `length` samples."""
    return Crops(rows, np.zeros(len(rows), np.int64), manifest.samples[rows], length)


def random_crops(
    manifest: Manifest, rows: npt.NDArray[np.int64], positions: npt.NDArray[np.int64], seed: int, length: int
) -> Crops:
    """A crop of `length` samples from each clip, its start keyed by (seed, position); shorter clips are whole."""
    counts = np.minimum(manifest.samples[rows], length)
    choices = manifest.samples[rows] - counts + 1
    starts = np.floor(keyed_uniform(seed, CROP, positions) * choices).astype(np.int64)
    return Crops(rows, starts, counts, length)


def load(
    manifest: Manifest, batches: Iterable[Crops], *, threads: int, ahead: int, pin_memory: bool = False
) -> Generator[Batch, None, None]:
    """For each batch its samples, in pinned memory if asked.

    `ahead` batches are read and decoded by `threads` threads while the caller works on one. Raises UserError, naming
    key and shard, for a clip that can't be read or decoded. Closing the iterator ends the threads.
    """
    reader = ClipReader(manifest)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="loader")
    pending: deque[tuple[Batch, list[Future[None]]]] = deque()

    def decode_into(row: int, start: int, count: int, out: npt.NDArray[np.int16]) -> None:
        data = reader.read(row)
        try:
            out[:count] = decode_crop(data, start, count)
        except DecodeError as error:
            path = manifest.shard_paths[manifest.shards[row]]
            raise UserError(f"{path}: clip {manifest.keys[row]} does not decode: {error}") from error

    def submit(crops: Crops) -> None:
        pcm = torch.zeros(len(crops.rows), crops.length, dtype=torch.int16, pin_memory=pin_memory)
        columns = (crops.rows.tolist(), crops.starts.tolist(), crops.counts.tolist(), pcm.numpy())
        pending.append((Batch(crops, pcm), [pool.submit(decode_into, *clip) for clip in zip(*columns, strict=True)]))

    try:
        for crops in batches:
            submit(crops)
            if len(pending) > ahead:
                yield _finished(pending.popleft())
        while pending:
            yield _finished(pending.popleft())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        reader.close()


def _finished(item: tuple[Batch, list["Future[None]"]]) -> Batch:
    batch, clips = item
    for clip in clips:
        clip.result()
    return batch
