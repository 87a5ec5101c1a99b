"""Audio input and output: any file to blocks of mono float, blocks to FLAC or WAV, crops of packed clips to int16."""

import io
import math
import mmap
import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import IO, Any, Literal, TypeVar, cast

import av
import numpy as np
import numpy.typing as npt
import soundfile
import soxr
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.stream import Disposition

# The formats that FFmpeg may open. Playlists and scripts (concat, hls, ...) would open further files named in a clip.
_DEMUXERS = (
    "aac,ac3,aiff,amr,ape,asf,au,avi,caf,dsf,eac3,flac,flv,matroska,webm,mov,mp4,mp3,mpc,mpc8,mpeg,mpegts,nistsphere,"
    "ogg,tta,voc,w64,wav,wv"
)
# Lower-case suffixes of files that may contain sound. Headerless .pcm and .raw can't be decoded; they are reported.
SUFFIXES = frozenset(
    f".{name}"
    for name in (
        "3g2 3gp aac ac3 adts aif aifc aiff amr ape asf au avi bwf caf dsf eac3 ec3 flac flv m4a m4b m4v mka mkv mov "
        "mp1 mp2 mp3 mp4 mpc mpeg mpg oga ogg ogv opus pcm raw snd sph spx ts tta vob voc w64 wav wave webm wma wv"
    ).split()
)
LOSSLESS_SUFFIXES = frozenset(b".aif .aiff .bwf .flac .wav .wave".split())
RESAMPLER = {"library": "soxr", "quality": "HQ"}
Codec = Literal["flac", "wav"]

_UNCOMPRESSED = (b"RIFF", b"RIFX", b"RF64", b"FORM")  # WAV and AIFF, by their first bytes
_FLAC = b"fLaC"
# Titles and comments that are not UTF-8 must not keep a file from being read. PyAV 19 replaces invalid bytes by itself
# and no longer has the argument.
_READ_ANY_METADATA: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
_BLOCK_SAMPLES = 1 << 20  # 24 s at 44.1 kHz: most clips are one block, and a film needs no more memory than that
_RATES = range(1_000, 1_000_000)  # Hz; other rates mean a damaged header, and resampling would inflate the clip
_NOTHING = np.zeros(0, np.float32)
# Timestamps that differ by less from the samples' count are rounded or jitter: the samples are counted there.
_JITTER_SECONDS = 0.1
_TIMESTAMP_SECONDS = 0.001  # the resolution of many formats' timestamps
# A longer jump in a broadcast stream means that its clock was reset; FFmpeg's program treats it in the same way.
_CLOCK_RESET_SECONDS = 10.0
_BROADCAST = {"mpeg", "mpegts"}
# Formats whose header states the length of the sound; FFmpeg estimates that of others from what there is.
_LENGTH_IN_HEADER = {"ape", "flac", "flv", "matroska,webm", "mov,mp4,m4a,3gp,3g2,mj2", "tta", "wv"}
_MAX_FAILED_READS = 100  # in a row, before the rest of a file is given up
_UNSTATED_BYTES = 0x7FFF0000
_OPPOSITE = 0.1  # the mean's peak, of the channels' peak, below which the channels cancel each other
_PCM_SCALES = {"uint8": 2.0**7, "int16": 2.0**15, "int32": 2.0**31, "int64": 2.0**63}

T = TypeVar("T")


class DecodeError(Exception):
    """A file that can't be decoded. The message is the decoders', in one line."""


class NoSamples(DecodeError):
    """A file in which the decoders find neither an error nor sound."""


@dataclass(frozen=True)
class Sound:
    """One channel of sound."""

    samples: npt.NDArray[np.float32]  # (n,), full scale is ±1; a lossy codec may overshoot it
    rate: int

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.rate


@dataclass(frozen=True)
class Block(Sound):
    """A part of a file's sound."""

    format: str  # the file's, such as "mp3 44100 Hz stereo"
    lost: float = 0.0  # seconds that are missing before this block: undecodable, or skipped by the timestamps
    cancelled_peak: float = 0.0  # the channels' peak, where averaging them leaves almost nothing; else 0
    channels: int = 1  # of the file


def decode(file: Path | IO[bytes], consume: Callable[[Iterator[Block]], T], channel: int | None = None) -> T:
    """The result of `consume` for the file's blocks: one channel, at the file's own sample rate, in order.

    channel: its number, or that of the last if the file has fewer; None for the mean of all.

    libsndfile reads WAV and AIFF (up to 20 times as fast as FFmpeg there), FFmpeg everything else (it does not rely on
    a FLAC header for the length). When one fails, the other is tried from the start, and is no use if it gives less.
    A FLAC that FFmpeg finds damaged may be intact to libsndfile, whose other decoders hide what they can't read.

    The length is never taken from the file's header: only decoded samples count. What can't be decoded is skipped, and
    the next block has the seconds that are missing before it, as far as timestamps or header show them; an empty block
    at the end has those of the end. Raises DecodeError when nothing can be decoded, or the file can't be read.
    """
    try:
        with _opened(file) as opened:
            magic = opened.read(4)
    except OSError as error:
        raise DecodeError(error.strerror or str(error)) from error
    errors: dict[str, DecodeError] = {}
    most = seconds = lost = 0.0

    def timed(blocks: Iterator[Block]) -> Iterator[Block]:
        nonlocal seconds, lost
        seconds = lost = 0.0
        for block in blocks:
            seconds, lost = seconds + block.seconds, lost + block.lost
            yield block

    decoders = [("FFmpeg", _ffmpeg_blocks), ("libsndfile", _libsndfile_blocks)]
    first, second = reversed(decoders) if magic in _UNCOMPRESSED else decoders
    for name, blocks in (first, second):
        try:
            result = consume(timed(blocks(file, channel)))
        except DecodeError as error:
            errors[name], most = error, seconds
            continue
        if seconds < most:
            errors[name] = DecodeError(f"ends after {seconds:.2f} s, the other after {most:.2f} s")
        elif lost and magic == _FLAC and name == "FFmpeg" and _reads_all(second[1](file, channel), seconds + lost):
            return consume(second[1](file, channel))
        else:
            return result
    kind = NoSamples if all(isinstance(error, NoSamples) for error in errors.values()) else DecodeError
    raise kind("; ".join(f"{name}: {error}" for name, error in errors.items()))


def _reads_all(blocks: Iterator[Block], seconds: float) -> bool:
    """Whether a decoder finds no damage, and so many seconds, where the other finds damage."""
    try:
        parts = [(block.seconds, block.lost) for block in blocks]
    except DecodeError:
        return False
    return not any(lost for _, lost in parts) and sum(length for length, _ in parts) >= seconds - _TIMESTAMP_SECONDS


def load(path: Path, rate: int) -> Sound:
    """A whole file, resampled to the rate. Raises DecodeError."""
    return Sound(decode(path, lambda blocks: np.concatenate(list(resample(blocks, rate)))), rate)


def resample(blocks: Iterable[Sound], rate: int) -> Iterator[npt.NDArray[np.float32]]:
    """The blocks' samples at another rate, by soxr at its HQ quality. The rate may differ from block to block."""
    current, resampler = rate, None
    for block in blocks:
        if block.rate != current:
            if resampler:
                yield resampler.resample_chunk(_NOTHING, last=True)
            current = block.rate
            new = soxr.ResampleStream(current, rate, 1, dtype="float32", quality=RESAMPLER["quality"])
            resampler = new if current != rate else None
        yield resampler.resample_chunk(block.samples) if resampler else block.samples
    if resampler:
        yield resampler.resample_chunk(_NOTHING, last=True)


def resample_with_gaps(blocks: Iterator[Block], rate: int) -> Iterator[npt.NDArray[np.float32] | int]:
    """As resample; where samples are missing by the file's timestamps, their number stands for them."""
    following = next(blocks, None)

    def run() -> Iterator[Block]:
        nonlocal following
        while following is not None:
            yield following
            following = next(blocks, None)
            if following is not None and following.lost:
                return

    while following is not None:
        if lost := round(following.lost * rate):
            yield lost
        yield from resample(run(), rate)


def to_pcm16(samples: npt.NDArray[np.float32]) -> npt.NDArray[np.int16]:
    """Round to 16 bits; samples beyond full scale are clipped, never wrapped around."""
    scaled = samples * np.float32(32768)
    np.rint(scaled, out=scaled)
    return np.clip(scaled, -32768, 32767, out=scaled).astype(np.int16)


def encode(blocks: Iterable[npt.NDArray[np.int16]], file: IO[bytes], rate: int, codec: Codec = "flac") -> None:
    """Write blocks of int16, (n,) each, as one mono 16-bit file. Raises OSError when the file can't be written."""
    blocks = iter(blocks)
    head: list[npt.NDArray[np.int16]] = []
    while sum(map(len, head)) <= _BLOCK_SAMPLES and (block := next(blocks, None)) is not None:
        head.append(block)
    if sum(map(len, head)) <= _BLOCK_SAMPLES:  # that was all: libsndfile's many small writes are fastest in memory
        buffer = io.BytesIO()
        _write(head, buffer, rate, codec)
        file.write(buffer.getbuffer())
        return
    watched = _Watched(file)
    try:
        _write(chain(head, blocks), watched, rate, codec)
    finally:
        if watched.error:
            raise watched.error


def _write(blocks: Iterable[npt.NDArray[np.int16]], file: Any, rate: int, codec: Codec) -> None:
    with soundfile.SoundFile(file, "w", rate, 1, subtype="PCM_16", format=codec.upper()) as out:
        for block in blocks:
            out.write(block)


class ClipBuffer:
    """The bytes of one packed clip, FLAC or WAV, of which a crop is decoded. It can be refilled any number of times.

    It is a file in memory: libsndfile reads a file without Python's help, but for a buffer it calls back into Python
    some 180 times, and each time waits for the GIL.
    """

    def __init__(self) -> None:
        self._file = os.memfd_create("clip", os.MFD_CLOEXEC)
        self._map = memoryview(b"")
        self._size = 0

    def room(self, size: int) -> memoryview:
        """A buffer of `size` bytes for the next clip; it replaces the previous one."""
        if size > len(self._map):
            os.ftruncate(self._file, 2 * size)
            self._map = memoryview(mmap.mmap(self._file, 2 * size))
        os.ftruncate(self._file, size)
        self._size = size
        return self.held()

    def held(self) -> memoryview:
        """The clip's bytes; valid until the next room()."""
        return self._map[: self._size]

    def crop(self, start: int, count: int, out: npt.NDArray[np.int16] | None = None) -> npt.NDArray[np.int16]:
        """Samples start .. start + count: (count,) int16. Only that part is decoded.

        out: (count,) to write to.

        Raises DecodeError when the clip is not a mono sound file or ends earlier.
        """
        os.lseek(self._file, 0, os.SEEK_SET)
        try:
            with soundfile.SoundFile(self._file, closefd=False) as file:
                if file.channels != 1:
                    raise DecodeError(f"{file.channels} channels")
                file.seek(start)
                pcm = file.read(count, dtype="int16", out=out)
        except soundfile.LibsndfileError as error:
            raise DecodeError(error.error_string) from error
        if len(pcm) != count:
            raise DecodeError(f"ends after {start + len(pcm)} samples, {start + count} were needed")
        return pcm

    def __del__(self) -> None:
        os.close(self._file)


_per_thread = threading.local()


def clip_buffer() -> ClipBuffer:
    """This thread's buffer, which lives as long as the thread."""
    if not hasattr(_per_thread, "clip_buffer"):
        _per_thread.clip_buffer = ClipBuffer()
    buffer: ClipBuffer = _per_thread.clip_buffer
    return buffer


def measure(file: IO[bytes]) -> tuple[int, int]:
    """The number of samples and the rate of a packed clip, FLAC or WAV, from decoding all of it.

    Raises DecodeError when it is not mono 16-bit sound.
    """
    try:
        with soundfile.SoundFile(file) as opened:
            if opened.channels != 1 or opened.subtype != "PCM_16":
                raise DecodeError(f"{opened.channels} channels, {opened.subtype}, where mono 16-bit sound is needed")
            samples = sum(len(block) for block in opened.blocks(_BLOCK_SAMPLES, dtype="int16"))
            return samples, opened.samplerate
    except soundfile.LibsndfileError as error:
        raise DecodeError(error.error_string) from error


class _Watched:
    """A file that remembers its first error, which libsndfile's callbacks lose."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._file, name)

        def call(*arguments: Any) -> Any:
            try:
                return method(*arguments)
            except Exception as error:
                self.error = self.error or error
                raise

        self.__dict__[name] = call  # cached: it is called some 200 times per clip
        return call


@contextmanager
def _opened(file: Path | IO[bytes]) -> Iterator[IO[bytes]]:
    """The file, at its start."""
    if isinstance(file, Path):
        with file.open("rb") as opened:
            yield opened
    else:
        file.seek(0)
        yield file


def _ffmpeg_blocks(file: Path | IO[bytes], channel: int | None = None) -> Iterator[Block]:
    """Raises DecodeError."""
    if not isinstance(file, Path):
        file.seek(0)
    try:
        with av.open(
            str(file) if isinstance(file, Path) else file,
            mode="r",
            options={"format_whitelist": _DEMUXERS, "protocol_whitelist": "file"},
            **_READ_ANY_METADATA,
        ) as container:
            is_ogg = container.format.name == "ogg"
            rest = yield from _stream_blocks(
                container, _sound_stream(container), channel, partial(_further_links, file) if is_ogg else list
            )
        for link in rest:
            yield from _ffmpeg_blocks(link, channel)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise DecodeError(getattr(error, "strerror", None) or str(error).splitlines()[0]) from error


def _sound_stream(container: InputContainer) -> AudioStream:
    """The stream that players choose: the first that is marked as the default. Raises DecodeError."""
    streams = container.streams.audio
    known = [stream for stream in streams if stream.codec_context is not None]
    if not known:
        raise DecodeError("a codec that FFmpeg does not know" if streams else "no audio stream")
    return next((stream for stream in known if stream.disposition & Disposition.default), known[0])


def _stream_blocks(
    container: InputContainer, stream: AudioStream, channel: int | None, links: Callable[[], list[IO[bytes]]]
) -> Generator[Block, None, list[IO[bytes]]]:
    """Blocks without a gap inside: sound whose timestamps leave one out begins a new block.

    links: finds the file's further parts, when a read has failed. Returns those that remain to be decoded. Raises
    DecodeError.
    """
    codec, tick = stream.codec_context.name, float(stream.time_base or 0)
    is_broadcast = container.format.name in _BROADCAST
    stated = _stated_seconds(container, stream)
    kind: Any = None  # properties that may change in the middle of a file
    pieces: list[npt.NDArray[Any]] = []
    count = 0
    lost = 0.0  # before the pieces
    undecoded: float | None = None  # seconds in packets since the last frame; None: none failed
    first: float | None = None  # the time of the first sample, by the first timestamp
    end = 0.0  # of the last frame, from the first sample on, gaps included
    rest: list[IO[bytes]] | None = None
    for frame in _frames(container, stream, tick):
        if not isinstance(frame, AudioFrame):
            undecoded = (undecoded or 0.0) + (frame or 0.0)
            if frame is None and rest is None and (rest := links()):
                break
            continue
        gap = undecoded or 0.0
        if (pts := frame.pts) is not None:
            if first is None:
                first = pts * tick - end - gap
            late = pts * tick - first - end
            if is_broadcast and late > _CLOCK_RESET_SECONDS:
                first += late - gap
            elif late < -_JITTER_SECONDS or end + late > max(stated, end) + 1:
                pass  # a clock that went back, or a time that the file does not have
            elif undecoded is not None or late > _JITTER_SECONDS:
                gap = max(0.0, late)
        undecoded = None
        if gap < _TIMESTAMP_SECONDS:
            gap = 0.0
        rate = frame.sample_rate
        if (rate, frame.format.name, frame.layout.nb_channels) != kind or count >= _BLOCK_SAMPLES or gap:
            if pieces:
                yield _block(pieces, kind, codec, channel, lost)
                lost = 0.0
            kind, pieces, count = (rate, frame.format.name, frame.layout.nb_channels), [], 0
            # PyAV 18.1 crashes when it makes an array of eight planes, so they are interleaved first.
            interleave = av.AudioResampler(format="flt") if frame.format.is_planar and kind[2] > 2 else None
            lost += gap
            end += gap
        if interleave:
            pieces += [part.to_ndarray() for part in interleave.resample(frame)]
        else:
            pieces.append(frame.to_ndarray())
        count += (samples := frame.samples)
        end += samples / max(rate, 1)  # _mono rejects a rate of 0
    if kind is None and rest:
        return rest
    if kind is None:
        raise NoSamples("no samples") if undecoded is None else DecodeError("no packet that can be decoded")
    yield _block(pieces, kind, codec, channel, lost)
    if undecoded is not None:
        is_stated = container.format.name in _LENGTH_IN_HEADER and stated < math.inf
        missing = max(undecoded, stated - end) if is_stated else undecoded
        if missing >= _TIMESTAMP_SECONDS:
            yield Block(_NOTHING, kind[0], _format(kind[0], kind[2], codec), missing, channels=kind[2])
    return rest or []


def _frames(container: InputContainer, stream: AudioStream, tick: float) -> Iterator[AudioFrame | float | None]:
    """The stream's frames in order; for a packet that can't be decoded its length in seconds, 0 if unknown; None for a
    read that failed.

    FFmpeg's program skips these packets too. Raises OSError when the file can't be read.
    """
    failed = 0
    while failed < _MAX_FAILED_READS:
        try:
            for packet in container.demux(stream):
                failed = 0
                try:
                    yield from packet.decode()
                except av.error.FFmpegError as error:
                    if isinstance(error, MemoryError):
                        raise
                    yield float((packet.duration or 0) * tick)
                if packet.is_corrupt:  # a part of it is not there
                    yield 0.0
            return
        except av.error.FFmpegError as error:
            if isinstance(error, OSError | MemoryError):
                raise
            failed += 1
            yield None


def _stated_seconds(container: InputContainer, stream: AudioStream) -> float:
    """How long the sound is by the file's header or its last timestamp; infinity when that is unknown."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    # Of several streams another one may be the longest.
    return container.duration / av.time_base if container.duration and len(container.streams) == 1 else math.inf


class _Part(io.RawIOBase):
    """Bytes begin .. end of a file, as a file."""

    def __init__(self, file: Path | IO[bytes], begin: int, end: int) -> None:
        self._file = file.open("rb") if isinstance(file, Path) else file
        self._begin, self._size, self._at = begin, end - begin, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._at)
        self._file.seek(self._begin + self._at)
        data = self._file.read(left if size < 0 else min(size, left))
        self._at += len(data)
        return data


def _block(
    pieces: list[npt.NDArray[Any]], kind: tuple[int, str, int], codec: str, channel: int | None, lost: float
) -> Block:
    """FFmpeg's arrays, (channels, n) or interleaved (1, channels·n), as one block."""
    rate, _, channels = kind
    samples = np.concatenate(pieces, axis=1)
    if len(samples) != channels:
        samples = samples.reshape(-1, channels).T
    scale = _PCM_SCALES.get(samples.dtype.name)
    if samples.dtype == np.uint8:
        samples = samples.astype(np.float32) - 128
    samples = samples.astype(np.float32) / np.float32(scale) if scale else samples
    return _mono(samples, rate, codec, channel, lost)


def _further_links(file: Path | IO[bytes]) -> list[IO[bytes]]:
    """The parts of a chained Ogg file, each of one codec, rate and number of channels, after the first: FFmpeg reads no
    further than that."""
    with _opened(file) as opened:
        bounds = _ogg_links(opened)
    return [cast(IO[bytes], _Part(file, begin, end)) for begin, end in pairwise(bounds)][1:]


def _ogg_links(file: IO[bytes]) -> list[int]:
    """Where these parts begin, and the file's end. A page's header has 27 bytes, then a byte for each segment's size
    (RFC 3533)."""
    starts: list[tuple[int, bytes]] = []  # of the links, with what their streams are
    position, in_head = 0, False
    while True:
        file.seek(position)
        page = file.read(27)
        if len(page) < 27 or page[:4] != b"OggS":
            break
        sizes = file.read(page[26])
        if page[5] & 2:  # the first page of a stream: what it has is not compressed
            head = file.read(min(sum(sizes), 60))
            if head[1:7] == b"vorbis":
                head = head[:16]  # up to the rate
            elif head[:8] == b"OpusHead":
                head = head[:10]  # up to the channels
            start, before = starts.pop() if in_head else (position, b"")
            starts.append((start, before + head))
        in_head = bool(page[5] & 2)
        position += 27 + len(sizes) + sum(sizes)
    differing = [start for i, (start, head) in enumerate(starts) if i == 0 or head != starts[i - 1][1]]
    return [*differing, file.seek(0, io.SEEK_END)]


def _libsndfile_blocks(file: Path | IO[bytes], channel: int | None = None) -> Iterator[Block]:
    """Raises DecodeError."""
    try:
        with _opened(file) as data:
            missing = _missing_share(data)
        with _opened(file) as data:  # again, for its descriptor to be at the start
            watched = _Watched(data)
            # The file's descriptor, not its path: soundfile would trust a suffix such as .raw.
            with soundfile.SoundFile(watched if data is file else data.fileno(), closefd=False) as opened:
                yield from _read_blocks(opened, channel, missing)
            if watched.error:
                raise DecodeError(str(watched.error))
    except soundfile.LibsndfileError as error:
        raise DecodeError(error.error_string.strip().rstrip(".").removeprefix("Error : ")) from error
    except OSError as error:
        raise DecodeError(error.strerror or str(error)) from error


def _missing_share(file: IO[bytes]) -> float:
    """How many bytes of sound a WAV or AIFF that was cut short has lost for each that it has; 0 if that is unknown."""
    form = file.read(12)
    order: Literal["little", "big"] = "little" if form[:4] == b"RIFF" else "big"
    if form[:4] not in (b"RIFF", b"RIFX", b"FORM"):
        return 0.0
    end = file.seek(0, io.SEEK_END)
    position = 12
    while position + 8 <= end:
        file.seek(position)
        chunk = file.read(8)
        position, size = position + 8, int.from_bytes(chunk[4:], order)
        if chunk[:4] in (b"data", b"SSND"):
            # Programs that can't go back to the header write a size near 2 GiB or 4 GiB, or none.
            is_stated = size < _UNSTATED_BYTES and end > position
            return max(0, position + size - end) / (end - position) if is_stated else 0.0
        position += size + size % 2
    return 0.0


def _read_blocks(opened: soundfile.SoundFile, channel: int | None, missing: float) -> Iterator[Block]:
    codec = f"{opened.format} {opened.subtype}".lower()
    seconds = 0.0
    while len(samples := opened.read(_BLOCK_SAMPLES, dtype="float32", always_2d=True)):
        yield (block := _mono(samples.T, opened.samplerate, codec, channel))
        seconds += block.seconds
    if not seconds:
        raise NoSamples("no samples")
    if missing:
        lost = seconds * missing
        yield Block(_NOTHING, block.rate, block.format, lost, channels=block.channels)


def _mono(
    channels: npt.NDArray[np.floating[Any]], rate: int, codec: str, channel: int | None, lost: float = 0.0
) -> Block:
    """One of (channels, n), or their mean, which NumPy's mean over so short an axis takes 20 times as long for."""
    if rate not in _RATES:
        raise DecodeError(f"a sample rate of {rate} Hz")
    count = len(channels)
    samples = channels[0 if channel is None else min(channel, count - 1)].astype(np.float32)
    cancelled = 0.0
    if count > 1 and channel is None:
        for other in channels[1:]:
            samples += other.astype(np.float32)
        samples /= np.float32(count)
        cancelled = _cancelled_peak(channels, samples)
    return Block(samples, rate, _format(rate, count, codec), lost, cancelled, count)


def _cancelled_peak(channels: npt.NDArray[np.floating[Any]], mean: npt.NDArray[np.float32]) -> float:
    """The channels' peak, where almost nothing of it is left in their mean; else 0."""
    some = slice(None, None, 1 + len(mean) // 4096)  # enough to rule it out, in no time
    if np.abs(mean[some]).max(initial=0) >= _OPPOSITE * np.abs(channels[:, some]).max(initial=0):
        return 0.0
    peak = float(np.abs(channels).max(initial=0))
    return peak if np.abs(mean).max(initial=0) < _OPPOSITE * peak else 0.0


@dataclass(frozen=True)
class Header:
    """What a file says about its sound; the sound itself may say something else."""

    format: str  # such as "mp3 44100 Hz stereo"
    rate: int
    seconds: float | None  # None where the header does not have it


def read_header(path: Path) -> Header:
    """A sound file's format from its header, by the decoder that is the first to try. Raises DecodeError."""
    try:
        with path.open("rb") as file:
            if file.read(4) in _UNCOMPRESSED:
                file.seek(0)
                info = soundfile.info(file)
                codec = f"{info.format} {info.subtype}".lower()
                return Header(_format(info.samplerate, info.channels, codec), info.samplerate, info.duration)
        with av.open(
            str(path),
            options={"format_whitelist": _DEMUXERS, "protocol_whitelist": "file"},
            **_READ_ANY_METADATA,
        ) as container:
            context = _sound_stream(container).codec_context
            seconds = container.duration / av.time_base if container.duration else None
            text = _format(context.sample_rate, context.layout.nb_channels, context.name)
            return Header(text, context.sample_rate, seconds)
    except soundfile.LibsndfileError as error:
        raise DecodeError(error.error_string) from error
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise DecodeError(getattr(error, "strerror", None) or str(error).splitlines()[0]) from error


def _format(rate: int, channels: int, codec: str) -> str:
    layout = {1: "mono", 2: "stereo"}.get(channels, f"{channels} channels")
    return f"{codec} {rate} Hz {layout}"
