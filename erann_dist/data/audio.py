"""Audio input and output: any file to blocks of mono float, blocks to FLAC or WAV, crops of packed clips to int16."""

import io
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any, Literal, TypeVar

import av
import numpy as np
import numpy.typing as npt
import soundfile
import soxr

# The formats that FFmpeg may open. Playlists and scripts (concat, hls, ...) would open further files named in a clip.
_DEMUXERS = (
    "aac,ac3,aiff,amr,ape,asf,au,avi,caf,flac,flv,matroska,webm,mov,mp4,mp3,mpegts,nistsphere,ogg,tta,voc,w64,wav,wv"
)
# Lower-case suffixes of files that may contain sound. Headerless .pcm and .raw can't be decoded; they are reported.
SUFFIXES = frozenset(
    f".{name}"
    for name in (
        "3g2 3gp aac ac3 adts aif aifc aiff amr ape asf au avi bwf caf flac flv m4a m4b m4v mka mkv mov mp1 mp2 mp3 "
        "mp4 oga ogg ogv opus pcm raw snd sph spx ts tta voc w64 wav wave webm wma wv"
    ).split()
)
LOSSLESS_SUFFIXES = frozenset(b".aif .aiff .bwf .flac .wav .wave".split())
RESAMPLER = {"library": "soxr", "quality": "HQ"}
Codec = Literal["flac", "wav"]

_UNCOMPRESSED = (b"RIFF", b"RIFX", b"RF64", b"FORM")  # WAV and AIFF, by their first bytes
# Titles and comments that are not UTF-8 must not keep a file from being read. PyAV 19 replaces invalid bytes by itself
# and no longer has the argument.
_READ_ANY_METADATA: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
_BLOCK_SAMPLES = 1 << 20  # 24 s at 44.1 kHz: most clips are one block, and a film needs no more memory than that
_RATES = range(1_000, 1_000_000)  # Hz; other rates mean a damaged header, and resampling would inflate the clip
_NOTHING = np.zeros(0, np.float32)
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
    """A part of a file's sound, and the file's format, such as "mp3 44100 Hz stereo"."""

    format: str


def decode(file: Path | IO[bytes], consume: Callable[[Iterator[Block]], T]) -> T:
    """The result of `consume` for the file's blocks: channels averaged, at the file's own sample rate, in order.

    libsndfile reads WAV and AIFF (up to 20 times as fast as FFmpeg there), FFmpeg everything else (it does not rely on
    a FLAC header for the length); when one fails, the other is tried from the start. The length is never taken from the
    file's header: only decoded samples count. Raises DecodeError.
    """
    try:
        with _opened(file) as opened:
            uncompressed = opened.read(4) in _UNCOMPRESSED
    except OSError as error:
        raise DecodeError(error.strerror or str(error)) from error
    errors: dict[str, DecodeError] = {}
    decoders = {"FFmpeg": _ffmpeg_blocks, "libsndfile": _libsndfile_blocks}
    for name in reversed(decoders) if uncompressed else decoders:
        try:
            return consume(decoders[name](file))
        except DecodeError as error:
            errors[name] = error
    kind = NoSamples if all(isinstance(error, NoSamples) for error in errors.values()) else DecodeError
    raise kind("; ".join(f"{name}: {error}" for name, error in errors.items()))


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


def _ffmpeg_blocks(file: Path | IO[bytes]) -> Iterator[Block]:
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
            if not container.streams.audio:
                raise DecodeError("no audio stream")
            stream = container.streams.audio[0]
            if stream.codec_context is None:
                raise DecodeError("a codec that FFmpeg does not know")
            codec = stream.codec_context.name
            kind: Any = None  # properties that may change in the middle of a file
            pieces: list[npt.NDArray[Any]] = []
            count = 0
            for frame in container.decode(stream):
                if (frame.sample_rate, frame.format.name, frame.layout.nb_channels) != kind or count >= _BLOCK_SAMPLES:
                    if pieces:
                        yield _block(pieces, kind, codec)
                    kind, pieces, count = (frame.sample_rate, frame.format.name, frame.layout.nb_channels), [], 0
                    # PyAV 18.1 crashes when it makes an array of eight planes, so they are interleaved first.
                    interleave = av.AudioResampler(format="flt") if frame.format.is_planar and kind[2] > 2 else None
                for part in interleave.resample(frame) if interleave else [frame]:
                    pieces.append(part.to_ndarray())
                    count += part.samples
            if not pieces:
                raise NoSamples("no samples")
            yield _block(pieces, kind, codec)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise DecodeError(getattr(error, "strerror", None) or str(error).splitlines()[0]) from error


def _block(pieces: list[npt.NDArray[Any]], kind: tuple[int, str, int], codec: str) -> Block:
    """FFmpeg's arrays, (channels, n) or interleaved (1, channels·n), as one block."""
    rate, _, channels = kind
    samples = np.concatenate(pieces, axis=1)
    if len(samples) != channels:
        samples = samples.reshape(-1, channels).T
    scale = _PCM_SCALES.get(samples.dtype.name)
    if samples.dtype == np.uint8:
        samples = samples.astype(np.float32) - 128
    return _mono(samples.astype(np.float32) / np.float32(scale) if scale else samples, rate, codec)


def _libsndfile_blocks(file: Path | IO[bytes]) -> Iterator[Block]:
    """Raises DecodeError."""
    try:
        with _opened(file) as data:
            watched = _Watched(data)
            # The file's descriptor, not its path: soundfile would trust a suffix such as .raw.
            with soundfile.SoundFile(watched if data is file else data.fileno(), closefd=False) as opened:
                yield from _read_blocks(opened)
            if watched.error:
                raise DecodeError(str(watched.error))
    except soundfile.LibsndfileError as error:
        raise DecodeError(error.error_string.strip().rstrip(".").removeprefix("Error : ")) from error
    except OSError as error:
        raise DecodeError(error.strerror or str(error)) from error


def _read_blocks(opened: soundfile.SoundFile) -> Iterator[Block]:
    codec = f"{opened.format} {opened.subtype}".lower()
    found = False
    while len(samples := opened.read(_BLOCK_SAMPLES, dtype="float32", always_2d=True)):
        found = True
        yield _mono(samples.T, opened.samplerate, codec)
    if not found:
        raise NoSamples("no samples")


def _mono(channels: npt.NDArray[np.floating[Any]], rate: int, codec: str) -> Block:
    """The mean of (channels, n). Added one by one: NumPy's mean over so short an axis takes 20 times as long."""
    if rate not in _RATES:
        raise DecodeError(f"a sample rate of {rate} Hz")
    count = len(channels)
    samples = channels[0].astype(np.float32)
    for channel in channels[1:]:
        samples += channel.astype(np.float32)
    if count > 1:
        samples /= np.float32(count)
    return Block(samples, rate, _format(codec, rate, count))


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
                return Header(_format(codec, info.samplerate, info.channels), info.samplerate, info.duration)
        with av.open(
            str(path),
            options={"format_whitelist": _DEMUXERS, "protocol_whitelist": "file"},
            **_READ_ANY_METADATA,
        ) as container:
            if not container.streams.audio:
                raise DecodeError("no audio stream")
            context = container.streams.audio[0].codec_context
            if context is None or not context.sample_rate:
                raise DecodeError("a codec that FFmpeg does not know")
            seconds = container.duration / av.time_base if container.duration else None
            text = _format(context.name, context.sample_rate, context.layout.nb_channels)
            return Header(text, context.sample_rate, seconds)
    except soundfile.LibsndfileError as error:
        raise DecodeError(error.error_string) from error
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise DecodeError(getattr(error, "strerror", None) or str(error).splitlines()[0]) from error


def _format(codec: str, rate: int, channels: int) -> str:
    layout = {1: "mono", 2: "stereo"}.get(channels, f"{channels} channels")
    return f"{codec} {rate} Hz {layout}"
