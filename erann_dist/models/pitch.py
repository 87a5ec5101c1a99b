"""Pitch shift: torchaudio's phase vocoder stretches the sound, and resampling restores its length.

torchaudio.functional.pitch_shift does the same, but resamples by the exact ratio of a semitone, whose filter has some
57 million taps at 44.1 kHz. With a ratio of small integers the filter is short: `erann bench augment` measures both.
"""

import math
from fractions import Fraction

import torch
from torch import Tensor

from erann_dist.versions import import_torchaudio

torchaudio = import_torchaudio()

WINDOW = 2048  # samples, 46 ms: resolves the partials of a 100 Hz voice
_HOP = WINDOW // 4
_LARGEST_DENOMINATOR = 18


def pitch_ratio(semitones: int) -> Fraction:
    """New frequency / old frequency: 18/17 for one semitone (1 cent flat), 9/8 for two (4 cents sharp).

    For up to 12 semitones it is accurate to 10 cents.
    """
    ratio = Fraction(2 ** (abs(semitones) / 12)).limit_denominator(_LARGEST_DENOMINATOR)
    return ratio if semitones >= 0 else 1 / ratio


def shift_pitch(waveform: Tensor, semitones: int) -> Tensor:
    """The clips (n, samples) float32 at pitch_ratio(semitones) times their frequencies: (n, samples) float32.

    On any device. Silence stays silence; as with every phase vocoder, onsets and offsets are smeared by up to half a
    window (23 ms).
    """
    samples, ratio = waveform.shape[-1], pitch_ratio(semitones)
    window = torch.hann_window(WINDOW, device=waveform.device)
    advance = torch.linspace(0, math.pi * _HOP, WINDOW // 2 + 1, device=waveform.device)[:, None]
    spectrum = torch.stft(waveform, WINDOW, _HOP, window=window, pad_mode="constant", return_complex=True)
    spectrum = torchaudio.functional.phase_vocoder(spectrum, float(1 / ratio), advance)
    stretched = torch.istft(spectrum, WINDOW, _HOP, window=window, length=math.ceil(samples * ratio))
    return torchaudio.functional.resample(stretched, ratio.numerator, ratio.denominator)[:, :samples]
