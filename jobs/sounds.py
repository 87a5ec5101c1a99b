"""Reads the audio files given to a command."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from erann_dist.data.audio import DecodeError, load
from erann_dist.errors import UsageError, UserError


def read_sound(file: Path, rate: int) -> npt.NDArray[np.float32]:
    """Decode an audio file of any format to (n,) samples at `rate` Hz. Raises UserError."""
    if not file.is_file():
        raise UsageError(f"{file}: no such file")
    try:
        return load(file, rate).samples
    except DecodeError as error:
        raise UserError(f"{file}: could not be decoded ({error})") from error
