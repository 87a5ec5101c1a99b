"""Packing one clip: from a source row to a file of encoded sound, or to the reason why the row is rejected."""

import errno
import math
import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from erann_dist import SAMPLE_RATE
from erann_dist.data.audio import Block, Codec, DecodeError, NoSamples, decode, encode, resample, to_pcm16
from shards.sources.containers import CONTAINERS, container_of
from shards.sources.rows import SourceRow
from shards.sources.tars import copy_member, is_remote

REASONS = ("missing", "unreadable", "empty", "silent", "too short", "wrong label", "duplicate")  # in the report
UNDECODED = ("unreadable", "empty", "silent", "too short")  # those of files that were there
_WHOLE_RECORDING_SECONDS = 1.0  # a file longer than its segment by more than this is the whole recording
_SILENCE_PEAK = 1e-4  # -80 dB of full scale
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


OLDER = {"assign": "all", "tries": "first", "shared": "segment"}  # the options that older sets lack, and what they mean


@dataclass(frozen=True)
class PackedSound:
    """The facts about a packed clip."""

    samples: int
    peak: float  # before clipping to 16 bits
    format: str  # of the source file, such as "mp3float 44100 Hz stereo"


class Rejected(Exception):
    """A row that can't be packed. Arguments: one of REASONS, the detail."""


def pack_clip(
    row: SourceRow, packing: Packing, file: IO[bytes], alive: Callable[[], None] = lambda: None
) -> PackedSound:
    """Write the row's sound to `file`: mono, 16 bits, at the packing's rate. `alive` is called for every block after
    the first.

    A file longer than the row's segment by more than a second is treated as the whole recording, and the segment is cut
    out of it; so is, at any length, a file of which other rows are segments too. Any other file is treated as the
    segment itself, and at most the segment's length is kept. Nothing is padded. Samples beyond full scale are clipped.
    Raises Rejected; OSError when `file` can't be written.
    """
    if row.reason:
        raise Rejected(row.reason, row.detail)
    rate, segment = packing.sample_rate, None
    is_recording = bool(row.shared) and packing.shared == "recording"
    slack = -math.inf if is_recording else round(_WHOLE_RECORDING_SECONDS * rate)
    if row.start is not None and row.end is not None:
        segment = round(row.start * rate), round((row.end - row.start) * rate)

    def write(blocks: Iterator[Block]) -> PackedSound:
        formats: dict[str, None] = {}
        count, peak = 0, 0.0

        def noted() -> Iterator[Block]:
            for number, block in enumerate(blocks):
                if number:
                    alive()
                formats[block.format] = None
                yield block

        def pcm() -> Iterator[npt.NDArray[np.int16]]:
            nonlocal count, peak
            samples = resample(noted(), rate)
            for part in cut_segment(samples, *segment, slack) if segment else samples:
                low, high = float(part.min(initial=0)), float(part.max(initial=0))
                if not (math.isfinite(low) and math.isfinite(high)):  # min and max propagate NaN
                    raise Rejected("unreadable", "non-finite samples")
                count += len(part)
                peak = max(peak, high, -low)
                yield to_pcm16(part)

        file.seek(0)
        file.truncate()
        encode(pcm(), file, rate, packing.codec)
        return PackedSound(count, peak, " + ".join(formats))

    try:
        packed = _with_sound(row, write)
    except NoSamples as error:
        raise Rejected("empty", str(error)) from error
    except DecodeError as error:
        raise Rejected("unreadable", str(error)) from error
    if not packed.samples and segment and is_recording:
        raise Rejected("empty", "ends before the segment; several segments share this file: name each by its times")
    if not packed.samples:
        raise Rejected("empty", "no sound in the segment" if segment else "no samples")
    if packed.samples < packing.min_seconds * rate:
        raise Rejected("too short", f"{packed.samples / rate:.4f} s, less than {packing.min_seconds:g} s")
    if packing.skip_silent and packed.peak < _SILENCE_PEAK:
        raise Rejected("silent", f"peak {packed.peak:.1e} of full scale")
    if file.seek(0, os.SEEK_END) > _MAX_BYTES:
        raise Rejected("unreadable", "more than 2 GiB when packed; cut it into parts")
    return packed


def first_block(row: SourceRow) -> Block:
    """The beginning of the row's sound, at most some 24 s. Raises Rejected, DecodeError."""
    return _with_sound(row, next)


def cut_segment(
    parts: Iterable[npt.NDArray[np.float32]], first: int, length: int, slack: float
) -> Iterator[npt.NDArray[np.float32]]:
    """`length` samples of the parts: from sample `first` if there are more than length + slack, else from the start."""
    head: list[npt.NDArray[np.float32]] = []
    held = 0
    parts = iter(parts)
    while held <= length + slack and (part := next(parts, None)) is not None:
        head.append(part)
        held += len(part)
    whole = held > length + slack
    skip, wanted = first if whole else 0, length
    for held_or_next in (head, parts):
        for part in held_or_next:
            part, skip = part[skip:], max(0, skip - len(part))
            if wanted and len(part):
                yield part[:wanted]
                wanted -= min(wanted, len(part))
            if not wanted:
                return


def _with_sound(row: SourceRow, use: Callable[[Iterator[Block]], T]) -> T:
    """The result of `use` for the blocks of the row's file. Raises Rejected, DecodeError."""
    path = row.path or b""
    if is_remote(path):
        with _remote_member(row, path) as member:
            return decode(member, use)
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
        return decode(Path(os.fsdecode(path)), use)
    container = container_of(path) or CONTAINERS[".tar"]
    with container.open(path, row.offset, row.size) as sound:
        return use(iter([sound])) if isinstance(sound, Block) else decode(sound, use)


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
