"""Sound in and out: any file to mono float, mono float to FLAC, and a crop of a FLAC back to int16."""

import io
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from erann_dist.features import SAMPLE_RATE

# What FFmpeg may open. Its playlists and scripts (concat, hls, ...) would open further files that a clip names.
_DEMUXERS = "aac,ac3,aiff,amr,ape,asf,au,avi,caf,flac,flv,matroska,webm,mov,mp4,mp3,mpegts,ogg,tta,w64,wav,wv"
# Suffixes of files that can hold sound, lower case.
SUFFIXES = frozenset(
    f".{name}"
    for name in (
        "aac ac3 aif aiff amr ape asf au avi caf flac flv m4a m4v mka mkv mov mp3 mp4 oga ogg ogv opus ts tta "
        "w64 wav webm wma wv"
    ).split()
)
RESAMPLER = {"library": "soxr", "quality": "HQ"}


class DecodeError(Exception):
    """A file from which no sound could be had. The message is FFmpeg's, in one line."""


@dataclass(frozen=True)
class Sound:
    """One channel of sound."""

    samples: npt.NDArray[np.float32]  # (n,), full scale is ±1; a lossy codec may overshoot it
    rate: int

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.rate


def decode(path: Path) -> Sound:
    """The whole file, its channels averaged, at its own sample rate.

    Nothing in the file's header is trusted for its length: what decodes is what counts. Raises DecodeError.
    """
    try:
        with av.open(str(path), options={"format_whitelist": _DEMUXERS}, metadata_errors="replace") as container:
            if not container.streams.audio:
                raise DecodeError("no audio stream")
            # Averaged here: FFmpeg's downmix would weigh surround channels. Interleaved, because PyAV 18.1 crashes when
            # it makes an array of eight planes.
            to_float = av.AudioResampler(format="flt")
            channels = [
                converted.to_ndarray().reshape(-1, converted.layout.nb_channels).mean(axis=1, dtype=np.float32)
                for frame in container.decode(container.streams.audio[0])
                for converted in to_float.resample(frame)
            ]
            rate = container.streams.audio[0].rate
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise DecodeError(str(error).splitlines()[0]) from error
    if not channels:
        raise DecodeError("no samples")
    return Sound(np.concatenate(channels), rate)


def resample(sound: Sound, rate: int = SAMPLE_RATE) -> npt.NDArray[np.float32]:
    """The samples at another rate, by soxr at its HQ quality: (n,) float32."""
    if sound.rate == rate:
        return sound.samples
    return soxr.resample(sound.samples, sound.rate, rate, quality=RESAMPLER["quality"])


def to_pcm16(samples: npt.NDArray[np.float32]) -> npt.NDArray[np.int16]:
    """Rounded to 16 bits; what lies above full scale is clipped, never wrapped around."""
    return np.clip(np.rint(samples * 32768.0), -32768, 32767).astype(np.int16)


def encode_flac(pcm: npt.NDArray[np.int16], rate: int = SAMPLE_RATE) -> bytes:
    """A mono 16-bit FLAC file of (n,) int16."""
    buffer = io.BytesIO()
    soundfile.write(buffer, pcm, rate, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def decode_flac(flac: bytes, start: int, count: int) -> npt.NDArray[np.int16]:
    """Samples start .. start + count of a FLAC file: (count,) int16. Only that part is decoded.

    Raises DecodeError when the file is no FLAC or ends earlier.
    """
    try:
        with soundfile.SoundFile(io.BytesIO(flac)) as file:
            file.seek(start)
            pcm = file.read(count, dtype="int16")
    except soundfile.LibsndfileError as error:
        raise DecodeError(error.error_string) from error
    if len(pcm) != count:
        raise DecodeError(f"ends after {start + len(pcm)} samples, {start + count} were needed")
    return pcm
