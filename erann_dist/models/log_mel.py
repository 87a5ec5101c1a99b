"""The front end: waveform to log-mel spectrogram, with the paper's parameters and this project's defaults for what it
leaves open (HTK mel scale without filter normalisation, power spectrogram, 10·log10 with a floor of 1e-10)."""

from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erann_dist import SAMPLE_RATE
from erann_dist.models.erann import MEL_BINS
from erann_dist.versions import import_torchaudio

torchaudio = import_torchaudio()

WINDOW = 1380
HOP = 345
F_MIN, F_MAX = 50.0, 14_000.0
FLOOR = 1e-10
# Clips are zero-padded to whole half seconds: 22,050 samples, 64 frames (a multiple of every variant's frame multiple).
PAD_SAMPLES = 22_050
PAD_FRAMES = 64


_Count = TypeVar("_Count", int, npt.NDArray[np.int64])


def padded_samples(samples: _Count) -> _Count:
    """Samples of a clip, or of several, padded to whole half seconds."""
    return -(-samples // PAD_SAMPLES) * PAD_SAMPLES


def padded_frames(samples: int) -> int:
    """How many frames LogMel makes of so many samples."""
    return -(-samples // PAD_SAMPLES) * PAD_FRAMES


class LogMel(nn.Module):
    """Log-mel spectrogram: (B, samples) at 44.1 kHz -> (B, 1, 128, 128·t) in dB.

    The clip is zero-padded to t seconds, a whole number of half seconds. Frame j covers the samples
    [345·j − 690, 345·j + 690), zeros outside the clip, for j < 128·t. float32 also under autocast; the Fourier
    transform itself is in double precision, because in single precision rumble below the mel range, which real
    recordings have, costs the quiet bins their third decimal.
    """

    window: Tensor
    filters: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(WINDOW, dtype=torch.float64), persistent=False)
        self.register_buffer("filters", mel_filters().float(), persistent=False)

    def forward(self, waveform: Tensor) -> Tensor:
        return decibels(self.power(waveform))

    def power(self, waveform: Tensor) -> Tensor:
        """The mel power of which that is the logarithm: (B, 1, 128, 128·t) float32."""
        with torch.autocast(waveform.device.type, enabled=False):
            frames = padded_frames(waveform.shape[-1])
            after = frames * HOP + WINDOW // 2 - HOP - waveform.shape[-1]
            padded = F.pad(waveform.double(), (WINDOW // 2, after))
            spectrum = torchaudio.functional.spectrogram(
                padded, 0, self.window, WINDOW, HOP, WINDOW, power=None, normalized=False, center=False
            )
            power = torch.view_as_real(spectrum.to(torch.complex64)).square().sum(dim=-1)
            return (self.filters @ power).unsqueeze(1)


def decibels(power: Tensor) -> Tensor:
    """Mel power as log-mel, in dB."""
    return 10 * torch.log10(power.clamp(min=FLOOR))


def mel(hertz: Tensor) -> Tensor:
    """HTK's mel scale."""
    return 2595 * torch.log10(1 + hertz / 700)


def mel_filters() -> Tensor:
    """Triangular filters on the HTK mel scale, not normalised: (128, 691) float64.

    In double precision, unlike torchaudio's: where an FFT bin touches only the foot of a filter, the rounding of its
    corner frequencies in float32 shows in the spectrogram.
    """
    low, high = mel(torch.tensor([F_MIN, F_MAX], dtype=torch.float64)).tolist()
    corners = 700 * (10 ** (torch.linspace(low, high, MEL_BINS + 2, dtype=torch.float64) / 2595) - 1)
    bins = torch.arange(WINDOW // 2 + 1, dtype=torch.float64) * SAMPLE_RATE / WINDOW
    left, centre, right = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    rising = (bins - left) / (centre - left)
    falling = (right - bins) / (right - centre)
    return torch.minimum(rising, falling).clamp(min=0)
