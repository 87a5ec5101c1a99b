"""CNN14, against PANNs' paper, and its front end, against torchaudio and a plain Fourier transform."""

import numpy as np
import pytest
import torch
import torchaudio

from erann_dist.models.base import count_parameters
from erann_dist.models.cnn14 import PANNS_MEL
from erann_dist.models.log_mel import LogMel, mel_filters
from erann_dist.models.spec import build_model


def test_size_is_the_papers() -> None:
    """80.75 million parameters."""
    with torch.device("meta"):
        assert count_parameters(build_model("CNN14", 527)) == 80_753_615


@pytest.mark.parametrize(("name", "bins", "frames"), [("CNN14", 64, 50), ("CNN14-ERANN", 128, 64)])
def test_logits_from_half_a_second_on(name: str, bins: int, frames: int) -> None:
    model = build_model(name, 3).eval()
    assert model.front_end.frames(22_050) == frames
    log_mel = LogMel(model.front_end)(torch.randn(2, 22_050))
    assert log_mel.shape == (2, 1, bins, frames)
    with torch.no_grad():
        assert model(log_mel).shape == (2, 3)
    with pytest.raises(ValueError, match=r"takes \(B, 1, \d+, T\) with T >= 32"):
        model(log_mel[..., :31])


def test_mask_is_the_mean() -> None:
    """What SpecAugment covers has no influence, whatever was there."""
    model = build_model("CNN14", 3).eval()
    x, mask = torch.randn(1, 1, 64, 50), torch.zeros(1, 1, 64, 50, dtype=torch.bool)
    mask[..., 10:20] = True
    with torch.no_grad():
        assert torch.equal(model(x, mask), model(torch.where(mask, 7.0, x), mask))
        assert not torch.equal(model(x), model(torch.where(mask, 7.0, x)))


def test_mel_filters_are_slaneys() -> None:
    theirs = torchaudio.functional.melscale_fbanks(513, 50.0, 14_000.0, 64, 32_000, "slaney", "slaney").T.double()
    torch.testing.assert_close(mel_filters(PANNS_MEL), theirs, rtol=2e-3, atol=1e-6)  # theirs is in single precision


def test_log_mel_of_a_tone() -> None:
    """A tone of 1 kHz at 44.1 kHz: resampled, its frames in the middle are those of a tone made at 32 kHz."""
    seconds = 2
    at_44, at_32 = (np.sin(2 * np.pi * 1000 * np.arange(seconds * rate) / rate) for rate in (44_100, 32_000))
    ours = LogMel(PANNS_MEL)(torch.from_numpy(at_44).float()[None])[0, 0].numpy()
    assert ours.shape == (64, 100 * seconds)
    filters = mel_filters(PANNS_MEL).numpy()
    for frame in (20, 77, 150):
        piece = at_32[frame * 320 - 512 : frame * 320 + 512] * np.hanning(1025)[:1024]
        expected = 10 * np.log10(np.maximum(filters @ np.abs(np.fft.rfft(piece)) ** 2, 1e-10))
        loud = expected > expected.max() - 40
        np.testing.assert_allclose(ours[loud, frame], expected[loud], atol=0.05)
