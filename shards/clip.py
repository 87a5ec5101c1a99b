"""Packing one clip: from a source row to a file of encoded sound, or to the reason why the row is rejected."""

import errno
import math
import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from erann_dist import SAMPLE_RATE
from erann_dist.data.audio import (
    Block,
    Codec,
    DecodeError,
    NoSamples,
    decode,
    encode,
    resample,
    resample_with_gaps,
    to_pcm16,
)
from shards.sources.containers import CONTAINERS, container_of
from shards.sources.rows import SourceRow
from shards.sources.tars import copy_member, is_remote

REASONS = ("missing", "unreadable", "empty", "silent", "too short", "wrong label", "duplicate")  # in the report
UNDECODED = ("unreadable", "empty", "silent", "too short")  # those of files that were there
MIN_INTACT = 0.25
_WHOLE_RECORDING_SECONDS = 1.0  # a file longer than its segment by more than this is the whole recording
_CHANNELS = {"mean": None, "left": 0}  # as decode takes them
_SILENCE_PEAK = 1e-4  # -80 dB of full scale
_OPPOSITE_PHASE = 0.1  # of the channels' peak, the peak of their mean below which they cancel each other
_ERRORS_OF_THE_FILE = {errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EPERM}
_IN_MEMORY_BYTES = 64 << 20  # a longer member of a tar in S3 goes through a temporary file
_MAX_BYTES = np.iinfo(np.int32).max  # the manifest's column

T = TypeVar("T")


@dataclass(frozen=True)
class Packing:
    """The options of packing. With the rows and the library versions, they decide a shard set's bytes."""

    sample_rate: int = SAMPLE_RATE
    codec: Codec = "flac"
    clips_per_shard: int = 2500
    order: Literal["shuffled", "source"] = "shuffled"
    min_seconds: float = 0.02
    skip_silent: bool = False
    # Which rows are assigned to shards: those that have a file, or all, as in sets that do not say which.
    assign: Literal["present", "all"] = "present"
    # Which of a clip's files are tried, when one can't be decoded.
    tries: Literal["all", "first"] = "all"
    # What a file without times in its name is that several segments share: the whole recording, or, if it is short,
    # each of the segments.
    shared: Literal["recording", "segment"] = "recording"
    channels: Literal["mean", "left", "loudest"] = "mean"  # how several become one
    # A clip of which less can be decoded, as a share of its seconds, is rejected; 0 in sets that do not say.
    min_intact: float = MIN_INTACT


# The options that older sets lack, and what these sets are.
OLDER = {"assign": "all", "tries": "first", "shared": "segment", "channels": "mean", "min_intact": 0.0}


@dataclass(frozen=True)
class PackedSound:
    """The facts about a packed clip."""

    samples: int
    peak: float  # before clipping to 16 bits
    format: str  # of the source file, such as "mp3float 44100 Hz stereo"
    lost: float | None = None  # seconds that are missing or could not be decoded; None for an intact clip
    channel_peak: float | None = None  # the channels' peak, if almost nothing of it is left in their mean; else None


@dataclass(frozen=True)
class _Segment:
    """The part of a file that a row wants. Times in seconds."""

    start: float
    end: float
    is_shared: bool  # the file is the whole recording, however short it is


class Rejected(Exception):
    """A row that can't be packed. Arguments: one of REASONS, the detail."""


def pack_clip(
    row: SourceRow, packing: Packing, file: IO[bytes], alive: Callable[[], None] = lambda: None
) -> PackedSound:
    """Write the row's sound to `file`: mono, 16 bits, at the packing's rate. `alive` is called for every block after
    the first.

    A file longer than the row's segment by more than a second is treated as the whole recording, and the segment is cut
    out of it, by the file's timestamps; so is, at any length, a file of which other rows are segments too. Any other
    file is treated as the segment itself, and at most the segment's length is kept. Nothing is padded. Samples beyond
    full scale are clipped. Raises Rejected; OSError when `file` can't be written.
    """
    if row.reason:
        raise Rejected(row.reason, row.detail)
    rate, segment = packing.sample_rate, _segment(row, packing)
    seconds = 0.0  # of the file, as far as it was read

    def write(blocks: Iterator[Block]) -> PackedSound:
        nonlocal seconds
        formats: dict[str, None] = {}
        count, peak, channel_peak, lost = 0, 0.0, 0.0, 0.0
        seconds = 0.0

        def noted() -> Iterator[Block]:
            nonlocal seconds, lost, channel_peak
            for number, block in enumerate(blocks):
                if number:
                    alive()
                formats[block.format] = None
                seconds += block.lost + block.seconds
                lost += 0.0 if segment else block.lost
                channel_peak = max(channel_peak, block.cancelled_peak)
                yield block

        def pcm() -> Iterator[npt.NDArray[np.int16]]:
            nonlocal count, peak, lost
            for part in _clip_parts(noted(), rate, segment):
                if isinstance(part, int):
                    lost += part / rate
                    continue
                low, high = float(part.min(initial=0)), float(part.max(initial=0))
                if not (math.isfinite(low) and math.isfinite(high)):  # min and max propagate NaN
                    raise Rejected("unreadable", "non-finite samples")
                count += len(part)
                peak = max(peak, high, -low)
                yield to_pcm16(part)

        file.seek(0)
        file.truncate()
        encode(pcm(), file, rate, packing.codec)
        cancels = peak < _OPPOSITE_PHASE * channel_peak
        return PackedSound(count, peak, " + ".join(formats), lost or None, channel_peak if cancels else None)

    try:
        channel = _loudest(row, rate, segment) if packing.channels == "loudest" else _CHANNELS[packing.channels]
        packed = _with_sound(row, write, channel)
    except NoSamples as error:
        raise Rejected("empty", str(error)) from error
    except DecodeError as error:
        raise Rejected("unreadable", str(error)) from error
    kept, lost = packed.samples / rate, packed.lost or 0.0
    if kept < packing.min_intact * (kept + lost):
        raise Rejected("unreadable", f"damaged: {kept:.2f} of {kept + lost:.2f} s are left")
    if not packed.samples:
        detail = "no samples"
        if segment:
            detail = f"ends after {seconds:.2f} s, before the segment from {segment.start:g} to {segment.end:g} s"
            if segment.is_shared:
                detail += "; several segments share this file: name each by its times"
        raise Rejected("empty", detail)
    if kept < packing.min_seconds:
        raise Rejected("too short", f"{kept:.4f} s, less than {packing.min_seconds:g} s")
    if packing.skip_silent and packed.peak < _SILENCE_PEAK:
        raise Rejected("silent", f"peak {packed.peak:.1e} of full scale")
    if file.seek(0, os.SEEK_END) > _MAX_BYTES:
        raise Rejected("unreadable", "more than 2 GiB when packed; cut it into parts")
    return packed


def first_block(row: SourceRow) -> Block:
    """The beginning of the row's sound, at most some 24 s. Raises Rejected, DecodeError."""
    return _with_sound(row, next)


def _segment(row: SourceRow, packing: Packing) -> _Segment | None:
    """None for the whole file."""
    if row.start is None or row.end is None:
        return None
    return _Segment(row.start, row.end, bool(row.shared) and packing.shared == "recording")


def _loudest(row: SourceRow, rate: int, segment: _Segment | None) -> int:
    """The number of the channel with the most energy in the row's clip. The file is decoded once for each channel.

    Raises Rejected, DecodeError.
    """

    def measure(blocks: Iterator[Block]) -> tuple[float, int]:
        energy, channels = 0.0, 1

        def noted() -> Iterator[Block]:
            nonlocal channels
            for block in blocks:
                channels = max(channels, block.channels)
                yield block

        for part in _clip_parts(noted(), rate, segment):
            if not isinstance(part, int):
                energy += float(np.vdot(part, part))
        return energy, channels

    energies: list[float] = []
    channels = 1
    while len(energies) < channels:
        energy, channels = _with_sound(row, measure, len(energies))
        energies.append(energy)
    return energies.index(max(energies))


def _clip_parts(
    blocks: Iterator[Block], rate: int, segment: _Segment | None
) -> Iterator[npt.NDArray[np.float32] | int]:
    """The part of a file's blocks that is its row's clip, at the rate; for a segment, the number of samples for those
    that are missing."""
    if segment is None:
        return resample(blocks, rate)
    slack = -math.inf if segment.is_shared else round(_WHOLE_RECORDING_SECONDS * rate)
    first, length = round(segment.start * rate), round((segment.end - segment.start) * rate)
    return cut_segment(resample_with_gaps(blocks, rate), first, length, slack)


def cut_segment(
    parts: Iterable[npt.NDArray[np.float32] | int], first: int, length: int, slack: float
) -> Iterator[npt.NDArray[np.float32] | int]:
    """`length` samples of the parts: from sample `first` if there are more than length + slack, else from the start.

    A number stands for so many samples that are missing.
    """
    head: list[npt.NDArray[np.float32] | int] = []
    held = 0
    parts = iter(parts)
    while held <= length + slack and (part := next(parts, None)) is not None:
        head.append(part)
        held += _length(part)
    skip, wanted = first if held > length + slack else 0, length
    for part in chain(head, parts):
        here = min(max(0, _length(part) - skip), wanted)
        if here:
            yield here if isinstance(part, int) else part[skip : skip + here]
        skip = max(0, skip - _length(part))
        wanted -= here
        if not wanted:
            return


def _length(part: npt.NDArray[np.float32] | int) -> int:
    return part if isinstance(part, int) else len(part)


def _with_sound(row: SourceRow, use: Callable[[Iterator[Block]], T], channel: int | None = None) -> T:
    """The result of `use` for the blocks of the row's file (channel: as in decode). Raises Rejected, DecodeError."""
    path = row.path or b""
    if is_remote(path):
        with _remote_member(row, path) as member:
            return decode(member, use, channel)
    try:
        status = os.stat(path)
    except FileNotFoundError as error:
        if not os.path.isdir(os.path.dirname(path)):
            raise FileNotFoundError(
                error.errno, "the folder is gone; is its disk mounted?", os.fsdecode(path)
            ) from error
        raise Rejected("missing", "a link to a missing file" if os.path.islink(path) else "gone") from error
    except OSError as error:
        if error.errno not in _ERRORS_OF_THE_FILE:
            raise  # the disk's fault
        raise Rejected("unreadable", error.strerror) from error
    if not stat.S_ISREG(status.st_mode):
        raise Rejected("unreadable", "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file")
    if (status.st_size if row.size is None else row.size) == 0:
        raise Rejected("empty", "0 bytes")
    if row.offset is None:
        return decode(Path(os.fsdecode(path)), use, channel)
    container = container_of(path) or CONTAINERS[".tar"]
    with container.open(path, row.offset, row.size) as sound:
        return use(iter([sound])) if isinstance(sound, Block) else decode(sound, use, channel)


@contextmanager
def _remote_member(row: SourceRow, path: bytes) -> Iterator[IO[bytes]]:
    """A copy of a member of a tar in S3. It is whole before it is decoded, so that an error of S3 is not the clip's."""
    if not row.size:
        raise Rejected("empty", "0 bytes")
    with tempfile.SpooledTemporaryFile(_IN_MEMORY_BYTES) as file:
        try:
            copy_member(path, row.offset or 0, row.size, file)
        except FileNotFoundError as error:
            raise Rejected("missing", "gone") from error
        yield file
