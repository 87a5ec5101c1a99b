"""Sound files of many formats, encoded by the FFmpeg in PyAV, which needs no program to be installed."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt

RATE = 44_100
Samples = npt.NDArray[np.floating]


def chirp(seconds: float, rate: int = RATE) -> Samples:
    """A tone whose frequency shows the time: 300 Hz at its begin, 40 Hz more for every second. (n,)."""
    t = np.arange(round(seconds * rate)) / rate
    return 0.5 * np.sin(2 * np.pi * (300 * t + 20 * t * t))


def time_of(samples: Samples, rate: int = RATE) -> float:
    """The time in a chirp, seconds, of the middle of a part of it (at least 0.2 s), to about 0.05 s."""
    middle, half = len(samples) // 2, round(0.1 * rate)
    samples = samples[middle - half : middle + half]
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples)), 1 << 18))
    return (np.argmax(spectrum) * rate / (1 << 18) - 300) / 40


def encode(
    path: Path,
    samples: Samples,
    codec: str,
    rate: int = RATE,
    form: str | None = None,
    gap: tuple[float, float] | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """Write (n,) or (channels, n). gap: the seconds from one to the other are left out, and the timestamps show it."""
    channels = np.atleast_2d(samples).astype(np.float32)
    layout = {1: "mono", 2: "stereo"}[len(channels)]
    with av.open(str(path), "w", format=form, options=options or {}) as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        size = stream.codec_context.frame_size or 1024
        resampler = av.AudioResampler(stream.codec_context.format, layout, rate, frame_size=size)
        length = channels.shape[1] / rate
        pieces = [(0.0, length)] if gap is None else [(0.0, gap[0]), (gap[1], length)]
        for begin, end in pieces:
            first, last = round(begin * rate), round(end * rate)
            for at in range(first, last, size):
                part = np.ascontiguousarray(channels[:, at : min(at + size, last)])
                if gap and part.shape[1] < size:
                    part = np.pad(part, ((0, 0), (0, size - part.shape[1])))
                frame = av.AudioFrame.from_ndarray(part, "fltp", layout)
                frame.sample_rate, frame.pts, frame.time_base = rate, at, Fraction(1, rate)
                for ready in resampler.resample(frame):
                    if gap:
                        ready.pts = at
                        ready.time_base = Fraction(1, rate)
                    container.mux(stream.encode(ready))
        if gap is None:
            for ready in resampler.resample(None):
                container.mux(stream.encode(ready))
        container.mux(stream.encode(None))
    return path
