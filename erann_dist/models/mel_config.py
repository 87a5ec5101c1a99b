"""The parameters of a front end, without torch, which packing does not import."""

from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt

from erann_dist import SAMPLE_RATE

# Clips are zero-padded to whole half seconds.
PAD_SAMPLES = 22_050
FLOOR = 1e-10  # of the mel power

_Count = TypeVar("_Count", int, npt.NDArray[np.int64])


def padded_samples(samples: _Count) -> _Count:
    """Samples of a clip, or of several, padded to whole half seconds."""
    return -(-samples // PAD_SAMPLES) * PAD_SAMPLES


@dataclass(frozen=True)
class MelConfig:
    """The parameters of a front end. Lengths are in samples at `sample_rate`, frequencies in Hz."""

    window: int
    hop: int
    mel_bins: int
    f_min: float
    f_max: float
    mel_scale: Literal["htk", "slaney"]
    half_second: int  # frames
    sample_rate: int = SAMPLE_RATE  # the sound is resampled to it

    def frames(self, samples: int) -> int:
        """How many frames a clip of this many samples at 44.1 kHz gives."""
        return padded_samples(samples) // PAD_SAMPLES * self.half_second

    def as_dict(self) -> dict[str, bool | int | float | str | None]:
        """The form in a model folder's config.json."""
        names = ("window", "hop", "mel_bins", "f_min", "f_max", "mel_scale")
        resampled = {} if self.sample_rate == SAMPLE_RATE else {"resampled_to": self.sample_rate}
        return {name: getattr(self, name) for name in names} | {"power_floor": FLOOR} | resampled


# 64 frames in half a second are a multiple of every ERANN's frame multiple.
ERANN_MEL = MelConfig(window=1380, hop=345, mel_bins=128, f_min=50.0, f_max=14_000.0, mel_scale="htk", half_second=64)
