"""From int16 crops to the model's input, on the device: pitch shift, mixup of waveforms or spectrograms, SpecAugment.

Every random choice is keyed by (seed, position); the position is the example's, or the clip's for the pitch. So it is
the same on any number of workers and after every restart.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from erann_dist.data.permutations import FREQUENCY_MASK, MIXUP, PITCH, TIME_MASK, keyed_integer, keyed_uniform
from erann_dist.models.log_mel import LogMel, decibels
from erann_dist.models.pitch import shift_pitch
from erann_dist.recipe import AugmentSection, Mixup, MixupOn, Partner

_SILENCE_RMS = 1e-5  # −100 dB: the level of a silent clip, so that levels can be compared
_TIME_MASKS = _FREQUENCY_MASKS = 2
_FREQUENCY_MASK_SHARE = 8  # a frequency mask covers up to 16 of ERANN's 128 bins
_TIME_MASK_SHARE = 16  # a time mask covers up to 1/16 of the frames: 8·t_c of 128·t_c


@dataclass(frozen=True)
class AugmentParams:
    """The random choices for one micro-batch."""

    lam: Tensor  # (M,) float32: the first clip's share in a mixup
    time_masks: Tensor  # (M, 2, masks) int64: first frames and numbers of frames
    frequency_masks: Tensor  # (M, 2, masks) int64: the same of mel bins
    shifted: dict[int, Tensor]  # by shift in semitones, without 0: (k,) int64, the crops of the micro-batch

    def map(self, function: Callable[[Tensor], Tensor]) -> "AugmentParams":
        return AugmentParams(
            function(self.lam),
            function(self.time_masks),
            function(self.frequency_masks),
            {semitones: function(crops) for semitones, crops in self.shifted.items()},
        )


@dataclass(frozen=True)
class Inputs:
    """One micro-batch of the model's training input."""

    log_mel: Tensor  # (M, 1, bins, T) float32, dB
    mask: Tensor | None  # (M, 1, bins, T) bool, SpecAugment's
    targets: Tensor  # (M, N) float32


def clip_positions(examples: npt.NDArray[np.int64], mixup: Mixup, partner: Partner) -> npt.NDArray[np.int64]:
    """The sampler's positions for the examples: two for each with fresh partners, otherwise one.

    As in PANNs, example e with a fresh partner mixes positions 2e and 2e + 1.
    """
    if mixup != "none" and partner == "fresh":
        return np.stack([2 * examples, 2 * examples + 1], axis=1).reshape(-1)
    return examples


def draw_augment_params(
    examples: npt.NDArray[np.int64], bins: int, frames: int, seed: int, augment: AugmentSection
) -> AugmentParams:
    """The random choices for the examples at these positions (M,) of the run, on the CPU.

    bins, frames: of the crops. SpecAugment uses two time masks of up to 1/16 of the frames and two frequency masks of
    up to 1/8 of the bins.
    """
    positions = clip_positions(examples, augment.mixup, augment.partner)
    shifts = keyed_integer(-augment.pitch_shift, augment.pitch_shift, seed, PITCH, positions)
    return AugmentParams(
        torch.from_numpy(keyed_uniform(seed, MIXUP, examples)).float(),
        _bands(TIME_MASK, examples, _TIME_MASKS, frames // _TIME_MASK_SHARE, frames, seed),
        _bands(FREQUENCY_MASK, examples, _FREQUENCY_MASKS, bins // _FREQUENCY_MASK_SHARE, bins, seed),
        {int(shift): torch.from_numpy(np.flatnonzero(shifts == shift)) for shift in np.unique(shifts) if shift},
    )


def make_inputs(
    pcm: Tensor, targets: Tensor, params: AugmentParams, front_end: LogMel, augment: AugmentSection
) -> Inputs:
    """One micro-batch, augmented; everything is on the device.

    pcm: (n, samples) int16 crops and targets: (n, N) float32, of clip_positions(examples).
    """
    waveform = pcm.float() / 32768
    for semitones, crops in params.shifted.items():
        waveform[crops] = shift_pitch(waveform[crops], semitones)
    if augment.mixup == "none":
        spectrogram = front_end(waveform)
    else:
        mix = MIXES[augment.mixup_on, augment.mixup]
        if augment.mixup_on == "waveform":
            spectrogram = front_end(mix(*_pairs(waveform, augment.partner), params.lam))
        else:
            spectrogram = mix(*_pairs(front_end.power(waveform), augment.partner), params.lam)
        targets = interpolate(*_pairs(targets, augment.partner), params.lam)
    mask = spec_augment_mask(params, *spectrogram.shape[-2:]) if augment.specaugment else None
    return Inputs(spectrogram, mask, targets)


def _pairs(clips: Tensor, partner: Partner) -> tuple[Tensor, Tensor]:
    """The first and the second clip of each example: (M, ...) both."""
    if partner == "fresh":
        return clips[0::2], clips[1::2]
    return clips, clips[torch.arange(len(clips), device=clips.device) ^ 1]


def interpolate(x1: Tensor, x2: Tensor, lam: Tensor) -> Tensor:
    """lam·x1 + (1 − lam)·x2 (Zhang et al. 2018). x1, x2: (M, ...); lam: (M,)."""
    lam = lam.view(-1, *[1] * (x1.dim() - 1))
    return lam * x1 + (1 - lam) * x2


def mix_modified(x1: Tensor, x2: Tensor, lam: Tensor) -> Tensor:
    """Between-class mixing (Tokozume et al. 2018): lam is the ratio r of perceived loudness, and energy is preserved.

    p = 1 / (1 + 10^((G1 − G2) / 20) · (1 − r) / r) for the levels G in dB, x = (p·x1 + (1 − p)·x2) / √(p² + (1 − p)²).
    The paper's own rule for "modified mixup" is not published; this is our default. Levels are plain RMS.
    """
    rms1, rms2 = (x.square().mean(dim=1).sqrt().clamp(min=_SILENCE_RMS) for x in (x1, x2))
    p = (1 / (1 + rms1 / rms2 * (1 - lam) / lam))[:, None]
    return (p * x1 + (1 - p) * x2) / (p.square() + (1 - p).square()).sqrt()


def mix_decibels(power1: Tensor, power2: Tensor, lam: Tensor) -> Tensor:
    """Interpolate the log-mels, as in PANNs."""
    return interpolate(decibels(power1), decibels(power2), lam)


def mix_power(power1: Tensor, power2: Tensor, lam: Tensor) -> Tensor:
    """Interpolate the mel power, which is additive like the sounds; the paper's rule is not published here either."""
    return decibels(interpolate(power1, power2, lam))


# From the examples' two clips and lam (M,): waveforms (M, samples) to the mixed waveform, mel power (M, 1, bins, T) to
# the mixed log-mel. To add a rule, add a function here.
MIXES: dict[tuple[MixupOn, Mixup], Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    ("waveform", "standard"): interpolate,
    ("waveform", "modified"): mix_modified,
    ("log_mel", "standard"): mix_decibels,
    ("log_mel", "modified"): mix_power,
}


def spec_augment_mask(params: AugmentParams, bins: int, frames: int) -> Tensor:
    """The cells that the masks cover: (M, 1, bins, frames) bool."""
    time, frequency = _covered(params.time_masks, frames), _covered(params.frequency_masks, bins)
    return frequency[:, None, :, None] | time[:, None, None, :]


def _bands(purpose: int, examples: npt.NDArray[np.int64], masks: int, widest: int, length: int, seed: int) -> Tensor:
    """`masks` bands of 0 to `widest` cells anywhere in `length`: (M, 2, masks) int64, first cells and widths."""
    bands = np.empty((len(examples), 2, masks), np.int64)
    for number in range(masks):
        width = bands[:, 1, number] = keyed_integer(0, widest, seed, purpose, number, 0, examples)
        bands[:, 0, number] = keyed_integer(0, length - width, seed, purpose, number, 1, examples)
    return torch.from_numpy(bands)


def _covered(bands: Tensor, length: int) -> Tensor:
    """Whether a band covers each cell: (M, length) bool."""
    cells = torch.arange(length, device=bands.device)[:, None]
    first, width = bands[:, 0, None], bands[:, 1, None]
    return ((cells >= first) & (cells < first + width)).any(dim=-1)
