"""The front end against an independent computation in double precision, written from the definition."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from erann_dist.models.log_mel import LogMel
from erann_dist.models.mel_config import ERANN_MEL

RATE = 44_100


def reference_mel_power(samples: np.ndarray) -> np.ndarray:
    """Mel power (128, frames) by numpy in float64, frame by frame from the definition in paper order."""
    frames = -(-len(samples) // 22_050) * 64
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1380) / 1380)
    padded = np.concatenate([np.zeros(690), samples.astype(np.float64), np.zeros(frames * 345 + 1380)])
    power = np.stack([np.abs(np.fft.rfft(window * padded[345 * j : 345 * j + 1380])) ** 2 for j in range(frames)], 1)
    edges = 2595 * np.log10(1 + np.array([50.0, 14_000.0]) / 700)
    corners = 700 * (10 ** (np.linspace(*edges, 130) / 2595) - 1)
    frequencies = np.arange(691) * RATE / 1380
    filters = np.stack([np.interp(frequencies, corners[m : m + 3], [0.0, 1.0, 0.0]) for m in range(128)])
    return filters @ power


def signals() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    t = np.arange(2 * RATE) / RATE
    return {
        "white noise": 0.3 * rng.standard_normal(len(t)),
        "quiet noise": 1e-3 * rng.standard_normal(len(t)),
        "pink noise": np.cumsum(0.01 * rng.standard_normal(len(t))),
        "tone": 0.9 * np.sin(2 * np.pi * 1000.3 * t),
        "low tone": 0.9 * np.sin(2 * np.pi * 61.7 * t),
        "two tones": 0.5 * np.sin(2 * np.pi * 440 * t) + 0.01 * np.sin(2 * np.pi * 9000.7 * t),
        "chirp": 0.8 * np.sin(2 * np.pi * (50 * t + (14_000 - 50) / 4 * t**2)),
        "rumble under a quiet tone": 0.9 * np.sin(2 * np.pi * 11.3 * t) + 1e-3 * np.sin(2 * np.pi * 3000.7 * t),
        "clicks": (np.arange(len(t)) % 4410 == 0).astype(np.float64),
    }


def worst_errors(samples: np.ndarray) -> tuple[float, float]:
    """The largest error in dB within 60 dB of the frame's peak, and elsewhere."""
    samples = samples.astype(np.float32)
    ours = LogMel()(torch.from_numpy(samples)[None])[0, 0].double().numpy()
    power = reference_mel_power(samples)
    assert ours.shape == power.shape
    errors = np.abs(ours - 10 * np.log10(np.maximum(power, 1e-10)))
    loud = (power >= power.max(axis=0) * 1e-6) & (power > 1e-10)
    return errors[loud].max(initial=0), errors[~loud].max(initial=0)


@pytest.mark.parametrize("name", signals())
def test_within_a_thousandth_of_a_decibel(name: str, record_property: Callable[[str, object], None]) -> None:
    loud, elsewhere = worst_errors(signals()[name])
    record_property("worst error elsewhere, dB", float(elsewhere))
    assert loud < 1e-3


def test_within_a_thousandth_of_a_decibel_on_real_clips(
    real_data: Path, record_property: Callable[[str, object], None]
) -> None:
    worst_elsewhere = 0.0
    for path in sorted((real_data / "esc10" / "audio").glob("*.ogg"))[::10]:
        samples, rate = soundfile.read(path, dtype="float32")
        assert rate == RATE
        loud, elsewhere = worst_errors(samples)
        assert loud < 1e-3, path
        worst_elsewhere = max(worst_elsewhere, elsewhere)
    record_property("worst error elsewhere, dB", float(worst_elsewhere))


def test_frame_counts_for_every_half_second() -> None:
    log_mel = LogMel()
    for halves in range(1, 61):
        samples = halves * 22_050
        assert log_mel(torch.zeros(1, samples)).shape == (1, 1, 128, 64 * halves)
        assert log_mel(torch.zeros(1, samples - 1)).shape[-1] == ERANN_MEL.frames(samples - 1) == 64 * halves
        assert ERANN_MEL.frames(samples + 1) == 64 * (halves + 1)


def test_batch_equals_one_by_one() -> None:
    batch = torch.randn(5, 3 * 22_050, generator=torch.Generator().manual_seed(0))
    log_mel = LogMel()
    torch.testing.assert_close(log_mel(batch), torch.cat([log_mel(x[None]) for x in batch]), rtol=0, atol=0)


def test_single_precision_under_autocast() -> None:
    waveform = torch.randn(2, 22_050, generator=torch.Generator().manual_seed(0))
    log_mel = LogMel()
    expected = log_mel(waveform)
    with torch.autocast("cpu", torch.bfloat16):
        result = log_mel(waveform)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_silence_is_at_the_floor() -> None:
    assert torch.equal(LogMel()(torch.zeros(1, 22_050)), torch.full((1, 1, 128, 64), -100.0))
