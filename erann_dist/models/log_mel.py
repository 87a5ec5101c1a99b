"""The front end: waveform to log-mel spectrogram.

ERANN's parameters are the paper's, with this project's defaults where it leaves them open: HTK mel scale without filter
normalisation, power spectrogram, 10·log10 with a floor of 1e-10.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erann_dist import SAMPLE_RATE
from erann_dist.models.mel_config import ERANN_MEL, FLOOR, MelConfig
from erann_dist.versions import import_torchaudio

torchaudio = import_torchaudio()


class LogMel(nn.Module):
    """Log-mel spectrogram: (B, samples) at 44.1 kHz -> (B, 1, mel bins, frames) in dB.

    The clip is zero-padded to a whole number of half seconds. Frame j covers `window` samples around sample hop·j,
    with zeros outside the clip; for ERANN these are the samples [345·j − 690, 345·j + 690) for j < 128·t in t seconds.
    The result is float32 also under autocast. The Fourier transform itself is in double precision: in single precision,
    rumble below the mel range, which real recordings have, costs the quiet bins their third decimal.
    """

    window: Tensor
    filters: Tensor

    def __init__(self, config: MelConfig = ERANN_MEL) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("window", torch.hann_window(config.window, dtype=torch.float64), persistent=False)
        self.register_buffer("filters", mel_filters(config).float(), persistent=False)

    def forward(self, waveform: Tensor) -> Tensor:
        return decibels(self.power(waveform))

    def power(self, waveform: Tensor) -> Tensor:
        """The mel power, before the logarithm: (B, 1, mel bins, frames) float32."""
        config = self.config
        with torch.autocast(waveform.device.type, enabled=False):
            frames = config.frames(waveform.shape[-1])
            if config.sample_rate != SAMPLE_RATE:
                waveform = torchaudio.functional.resample(waveform.float(), SAMPLE_RATE, config.sample_rate)
            before = config.window // 2
            after = frames * config.hop + before - config.hop - waveform.shape[-1]
            padded = F.pad(waveform.double(), (before, after))
            spectrum = torchaudio.functional.spectrogram(
                padded,
                0,
                self.window,
                config.window,
                config.hop,
                config.window,
                power=None,
                normalized=False,
                center=False,
            )
            power = torch.view_as_real(spectrum.to(torch.complex64)).square().sum(dim=-1)
            return (self.filters @ power).unsqueeze(1)


def decibels(power: Tensor) -> Tensor:
    """Mel power as log-mel, in dB."""
    return 10 * torch.log10(power.clamp(min=FLOOR))


def mel(hertz: Tensor) -> Tensor:
    """HTK's mel scale."""
    return 2595 * torch.log10(1 + hertz / 700)


def _slaney(hertz: Tensor) -> Tensor:
    """Slaney's mel scale, librosa's default: linear to 1 kHz, then 27 steps for each factor of 6.4."""
    return torch.where(hertz < 1000, hertz * 3 / 200, 15 + 27 * torch.log(hertz.clamp(min=1e-9) / 1000) / np.log(6.4))


def mel_filters(config: MelConfig = ERANN_MEL) -> Tensor:
    """Triangular filters: (mel bins, window // 2 + 1) float64. HTK's are not normalised, Slaney's have equal areas.

    In double precision, unlike torchaudio's: where an FFT bin touches only the foot of a filter, the rounding of its
    corner frequencies in float32 shows in the spectrogram.
    """
    ends = torch.tensor([config.f_min, config.f_max], dtype=torch.float64)
    low, high = (mel(ends) if config.mel_scale == "htk" else _slaney(ends)).tolist()
    points = torch.linspace(low, high, config.mel_bins + 2, dtype=torch.float64)
    if config.mel_scale == "htk":
        corners = 700 * (10 ** (points / 2595) - 1)
    else:
        corners = torch.where(points < 15, points * 200 / 3, 1000 * 6.4 ** ((points - 15) / 27))
    bins = torch.arange(config.window // 2 + 1, dtype=torch.float64) * config.sample_rate / config.window
    left, centre, right = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    rising = (bins - left) / (centre - left)
    falling = (right - bins) / (right - centre)
    filters = torch.minimum(rising, falling).clamp(min=0)
    return filters if config.mel_scale == "htk" else filters * 2 / (right - left)
