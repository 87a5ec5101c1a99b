"""A shard set's clips in one pass over its tars, which webdataset reads, split over any number of workers."""

import tarfile
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO, get_args

import numpy as np
import numpy.typing as npt
import torch
import webdataset
from isal import isal_zlib
from webdataset.tariterators import tar_file_iterator

from erann_dist.data.audio import Codec, DecodeError, clip_buffer
from erann_dist.data.clip_reader import bad_clip
from erann_dist.data.loader import Batch, Crops, whole_clips
from erann_dist.data.manifest import Manifest
from erann_dist.errors import UsageError, UserError
from erann_dist.models.mel_config import padded_samples
from erann_dist.storage.folder import open_folder

_SUFFIXES = tuple(f".{codec}" for codec in get_args(Codec))
_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class StreamedClip:
    """A clip as it is in its tar."""

    row: int  # of the manifest that was streamed
    data: bytes  # FLAC or WAV


def stream_clips(manifest: Manifest, rank: int = 0, world_size: int = 1) -> Generator[StreamedClip, None, None]:
    """This worker's clips of the manifest, in the order in which they are stored in the tars.

    Over all workers each clip occurs exactly once, as worker_rows assigns it. Of each tar only the part with the
    worker's own clips is read. Every clip is checked. Raises UserError, which names tar and key, for a clip that is
    damaged or missing, and for a tar that can't be read.
    """
    rows = worker_rows(manifest, rank, world_size)
    starts = _starts(manifest)
    for tar_rows in np.split(rows, np.flatnonzero(np.diff(manifest.shards[rows])) + 1):
        if len(tar_rows):
            yield from _clips_of_tar(manifest, tar_rows, int(starts[tar_rows[0]]))


def worker_rows(manifest: Manifest, rank: int, world_size: int) -> npt.NDArray[np.int64]:
    """The rows that one worker streams: a contiguous, equal share of all tars, also with fewer tars than workers."""
    return np.array_split(_tar_order(manifest), world_size)[rank]


def _tar_order(manifest: Manifest) -> npt.NDArray[np.int64]:
    return np.lexsort((manifest.offsets, manifest.shards))


def _starts(manifest: Manifest) -> npt.NDArray[np.int64]:
    """For each clip an offset in its tar where a member begins: after the previous clip, or the tar's first byte."""
    order = _tar_order(manifest)
    ends = (manifest.offsets + manifest.sizes)[order]
    after = np.concatenate([[0], -(-ends[:-1] // _BLOCK) * _BLOCK])
    first = np.diff(manifest.shards[order], prepend=-1) != 0
    starts = np.empty(len(order), np.int64)
    starts[order] = np.where(first, 0, after)
    return starts


def _clips_of_tar(manifest: Manifest, rows: npt.NDArray[np.int64], start: int) -> Iterator[StreamedClip]:
    """The clips of these rows, which are in one tar in this order, from byte `start` on."""
    tar = manifest.tars[manifest.shards[rows[0]]]
    end = int(manifest.offsets[rows[-1]] + manifest.sizes[rows[-1]])
    left = deque(rows.tolist())
    try:
        with tar.folder.stream(tar.name, start, end) as file:
            for data in _sounds(file):
                # Members that are not in the manifest are skipped. Names can't identify a clip: in a tar that another
                # program wrote, two members may share one. As the order is known, size and checksum identify it, and
                # they have to be checked anyway.
                row = left[0]
                if len(data) == manifest.sizes[row] and isal_zlib.crc32(data) == manifest.crc32s[row]:
                    yield StreamedClip(left.popleft(), data)
                    if not left:
                        return
    except OSError as error:
        raise UserError(f"{tar}: {error.strerror} (clip {manifest.keys[left[0]]})") from error
    raise bad_clip(manifest, left[0], "is damaged or missing")


def _sounds(file: BinaryIO) -> Iterator[bytes]:
    """The sound files of a tar, as far as it is readable. Raises what reading the file raises."""

    def is_sound(name: str) -> bool:
        return name.lower().endswith(_SUFFIXES)

    try:
        # skip_meta: by default webdataset skips folders with names like __this__.
        yield from (member["data"] for member in tar_file_iterator(file, skip_meta=None, select_files=is_sound))
    except UserError as error:
        raise UserError(str(error).removesuffix(f" @ {file}")) from None  # webdataset adds it
    except (tarfile.TarError, ValueError, KeyError, TypeError, IndexError):  # from tarfile, for a damaged header
        return


def decode_clips(
    manifest: Manifest, clips: Iterable[StreamedClip], threads: int, micro_batch: int, pad_samples: int = 0
) -> Generator[Batch[Crops], None, None]:
    """Streamed clips as batches of whole clips, in the same order, decoded in threads ahead of the caller.

    A batch contains up to `micro_batch` consecutive clips that pad to the same length, at least `pad_samples`. Raises
    BadClip for a clip that does not decode.
    """

    def decode(clip: StreamedClip) -> npt.NDArray[np.int16]:
        buffer = clip_buffer()
        buffer.room(len(clip.data))[:] = clip.data
        try:
            return buffer.crop(0, int(manifest.samples[clip.row]))
        except DecodeError as error:
            raise bad_clip(manifest, clip.row, f"does not decode: {error}") from error

    def decoded(pool: ThreadPoolExecutor) -> Iterator[tuple[int, npt.NDArray[np.int16]]]:
        pending: deque[tuple[int, Future[npt.NDArray[np.int16]]]] = deque()
        for clip in clips:
            pending.append((clip.row, pool.submit(decode, clip)))
            if len(pending) > micro_batch:
                row, pcm = pending.popleft()
                yield row, pcm.result()
        yield from ((row, pcm.result()) for row, pcm in pending)

    group: list[tuple[int, npt.NDArray[np.int16]]] = []
    length = 0
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        for row, pcm in decoded(pool):
            padded = padded_samples(max(len(pcm), pad_samples))
            if group and (padded != length or len(group) == micro_batch):
                yield _batch(manifest, group, length)
                group = []
            length = padded
            group.append((row, pcm))
        if group:
            yield _batch(manifest, group, length)


def _batch(manifest: Manifest, group: list[tuple[int, npt.NDArray[np.int16]]], length: int) -> Batch[Crops]:
    samples = torch.zeros(len(group), length, dtype=torch.int16)
    for out, (_, pcm) in zip(samples.numpy(), group, strict=True):
        out[: len(pcm)] = pcm
    return Batch(whole_clips(manifest, np.array([row for row, _ in group]), length), samples)


def register_s3_opener(endpoint: str | None = None) -> None:
    """Let webdataset itself read s3:// URLs in this process, as S3Folder.stream does.

    A truncated stream raises UserError; webdataset would treat it as the end.
    """

    def open_s3(url: str, mode: str, bufsize: int) -> BinaryIO:
        if mode != "rb":
            raise UsageError(f"{url}: opened for reading only; write tars with erann pack")
        folder, _, name = url.rpartition("/")
        return open_folder(folder, endpoint).stream(name)

    webdataset.gopen_schemes["s3"] = open_s3
