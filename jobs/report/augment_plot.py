"""What augmentation does to a clip, as an image: waveform and log-mel before and after each kind of augmentation.

Everything is computed by the functions that make the training inputs. The clip takes position 0 of a run, its partner
position 1.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from torch import Tensor

from erann_dist import SAMPLE_RATE
from erann_dist.data.audio import to_pcm16
from erann_dist.data.loader import crop_starts
from erann_dist.models.log_mel import LogMel, mel
from erann_dist.models.mel_config import ERANN_MEL
from erann_dist.models.pitch import shift_pitch
from erann_dist.recipe import AugmentSection
from erann_dist.train.augment import MIXES, AugmentParams, draw_augment_params, make_inputs, spec_augment_mask
from jobs.html.figure import FILL, INK, new_figure, plain, save_figure, shortened
from jobs.sounds import read_sound

_ALL = AugmentSection(pitch_shift=2)
_MOST_S = 60  # Longer files are cut to this.
_RANGE_DB = 80  # Range of the colours, below the loudest cell of all panels.
_HERTZ = (100, 500, 1000, 2000, 5000, 10_000)
_MARK = "#c9a227"
_LEAST_SHARE, _MOST_SHARE = (
    0.3,
    0.5,
)  # The clip's share in mixup. A run draws any share; most of them would hide one clip.


@dataclass(frozen=True)
class _Panel:
    title: str
    log_mel: Tensor  # (1, 128, T) dB
    waveform: Tensor | None = None  # (samples,)
    mask: Tensor | None = None  # (1, 128, T) bool, SpecAugment's
    marks: tuple[float, ...] = ()  # seconds


def draw_augmentation(clip: Path, partner: Path | None, out: Path, seed: int, crop_s: float) -> dict[str, Any]:
    """Write the image, in the format of its suffix. Returns the random choices.

    Without a partner the clip is mixed with itself, reversed. Raises UserError, OSError.
    """
    figure = new_figure(out, 13, 20)
    clips = [_read(clip), _read(partner) if partner else _read(clip)[::-1].copy()]
    names = [shortened(clip.name), shortened(partner.name) if partner else f"{shortened(clip.name)}, reversed"]
    length = round(crop_s * SAMPLE_RATE)
    starts = crop_starts(np.array([len(each) for each in clips]), np.arange(2), seed, length)
    pcm = np.zeros((2, length), np.int16)
    for each, start, crop in zip(clips, starts, pcm, strict=True):
        taken = each[start : start + length]
        crop[: len(taken)] = taken
    params = draw_augment_params(np.arange(1), ERANN_MEL.mel_bins, ERANN_MEL.frames(length), seed, _ALL)
    params = replace(params, lam=_LEAST_SHARE + (_MOST_SHARE - _LEAST_SHARE) * params.lam)
    semitones = [next((s for s, crops in params.shifted.items() if number in crops), 0) for number in range(2)]

    log_mel = LogMel()
    panels = [*_crops(names, clips, starts, pcm, log_mel), *_augmented(pcm, params, semitones, log_mel)]
    rows = len(panels) // 2
    loudest = max(float(panel.log_mel.max()) for panel in panels)
    axes = figure.subplots(2 * rows, 2, gridspec_kw={"height_ratios": [1, 2.6] * rows})
    for number, panel in enumerate(panels):
        row, column = divmod(number, 2)
        image = _draw(panel, axes[2 * row, column], axes[2 * row + 1, column], loudest)
    bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.4, aspect=50, pad=0.01)
    bar.set_label("dB of mel power", color=INK)
    plain(bar.ax)
    title = f"Augmentation of {shortened(clip.name, 100)}, seed {seed}"
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", color=INK)
    save_figure(figure, out)
    return {
        "clip": str(clip),
        "partner": str(partner) if partner else None,
        "out": str(out),
        "seed": seed,
        "crop_s": crop_s,
        "crop_starts_s": [round(start / SAMPLE_RATE, 3) for start in starts.tolist()],
        "semitones": semitones,
        "mixup_share": round(float(params.lam), 4),
    }


def _read(file: Path) -> npt.NDArray[np.int16]:
    """The file's samples as they would be packed, (n,)."""
    return to_pcm16(read_sound(file, SAMPLE_RATE)[: _MOST_S * SAMPLE_RATE])


def _crops(
    names: list[str],
    clips: list[npt.NDArray[np.int16]],
    starts: npt.NDArray[np.int64],
    pcm: npt.NDArray[np.int16],
    log_mel: LogMel,
) -> Iterator[_Panel]:
    """Both whole clips, and below them their crops."""
    seconds, length = starts / SAMPLE_RATE, pcm.shape[1] / SAMPLE_RATE
    for number, each in enumerate(clips):
        waveform = torch.from_numpy(each).float() / 32768
        marks = (seconds[number], min(seconds[number] + length, len(each) / SAMPLE_RATE))
        title = f"{'partner' if number else 'clip'}: {names[number]}; its crop is between the lines"
        yield _Panel(title, log_mel(waveform[None])[0], waveform, marks=marks)
    for number, crop in enumerate(torch.from_numpy(pcm).float() / 32768):
        title = f"{'partner' if number else 'clip'}: temporal crop, {length:g} s from {seconds[number]:.2f} s"
        yield _Panel(title, log_mel(crop[None])[0], crop)


def _augmented(
    pcm: npt.NDArray[np.int16], params: AugmentParams, semitones: list[int], log_mel: LogMel
) -> Iterator[_Panel]:
    """The first crop with each kind of augmentation; mixup mixes it with the second."""
    waveforms = torch.from_numpy(pcm).float() / 32768
    clip, partner = waveforms[:1], waveforms[1:]
    for shift in (-2, 2):
        shifted = shift_pitch(clip, shift)
        yield _Panel(f"pitch shift by {shift:+d} semitones", log_mel(shifted)[0], shifted[0])
    for (mixup_on, mixup), mix in MIXES.items():
        title = f"mixup {mixup}, on the {mixup_on.replace('_', '-')}, {float(params.lam):.2f} of the clip"
        if mixup_on == "waveform":
            mixed = mix(clip, partner, params.lam)
            yield _Panel(title, log_mel(mixed)[0], mixed[0])
        else:
            yield _Panel(title, mix(log_mel.power(clip), log_mel.power(partner), params.lam)[0])
    spectrogram = log_mel(clip)
    yield _Panel("SpecAugment", spectrogram[0], clip[0], spec_augment_mask(params, *spectrogram.shape[-2:])[0])
    inputs = make_inputs(torch.from_numpy(pcm), torch.eye(2), params, log_mel, _ALL)
    assert inputs.mask is not None
    title = f"all, as in training: pitch {semitones[0]:+d} and {semitones[1]:+d}, mixup, SpecAugment"
    yield _Panel(title, inputs.log_mel[0], mask=inputs.mask[0])


def _draw(panel: _Panel, above: Axes, below: Axes, loudest: float) -> AxesImage:
    seconds = panel.log_mel.shape[-1] * ERANN_MEL.hop / SAMPLE_RATE
    above.set_title(panel.title, loc="left", fontsize=10.5, color=INK)
    above.set_xlim(0, seconds)
    above.set_xticks([])
    above.set_ylim(-1, 1)
    if panel.waveform is None:
        above.set_yticks([])
    else:
        above.plot(np.arange(len(panel.waveform)) / SAMPLE_RATE, panel.waveform, color=FILL, linewidth=0.5)
        above.set_yticks([-1, 0, 1])
    extent = (0.0, seconds, -0.5, ERANN_MEL.mel_bins - 0.5)
    low, high = loudest - _RANGE_DB, loudest
    image = below.imshow(
        panel.log_mel[0], origin="lower", aspect="auto", extent=extent, cmap="magma", vmin=low, vmax=high
    )
    if panel.mask is not None:
        covered = np.ma.masked_equal(panel.mask[0].float().numpy(), 0)
        below.imshow(covered, origin="lower", aspect="auto", extent=extent, cmap="Greys", vmin=0, vmax=2.5)
    for axes in (above, below):
        for second in panel.marks:
            axes.axvline(second, color=_MARK, linewidth=2)
        plain(axes)
    corners = mel(torch.tensor([ERANN_MEL.f_min, ERANN_MEL.f_max, *_HERTZ]))
    bins = (corners[2:] - corners[0]) / (corners[1] - corners[0]) * (ERANN_MEL.mel_bins + 1) - 1
    below.set_yticks(bins, [f"{hertz:,}" for hertz in _HERTZ])
    below.set_ylabel("Hz", color=INK)
    below.set_xlabel("s", color=INK, labelpad=0)
    return image
