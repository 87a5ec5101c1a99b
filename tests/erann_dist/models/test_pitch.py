"""Pitch shift: a sound's frequencies move by the right ratio, and nothing else about it changes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from erann_dist.models.pitch import WINDOW, pitch_ratio, shift_pitch

RATE = 44_100
SHIFTS = [-2, -1, 1, 2]


def tone(hertz: float, samples: int = 3 * RATE) -> np.ndarray:
    return 0.3 * np.sin(2 * np.pi * hertz * np.arange(samples) / RATE + 0.7)


def shifted(sound: np.ndarray, semitones: int) -> np.ndarray:
    return shift_pitch(torch.from_numpy(sound[None]).float(), semitones)[0].double().numpy()


def middle(sound: np.ndarray) -> np.ndarray:
    return sound[RATE // 2 : -RATE // 2]


def peak(sound: np.ndarray, near: float) -> float:
    """The strongest frequency within 3 % of `near`, by a transform so long that its bins are .05 Hz apart."""
    spectrum = np.abs(np.fft.rfft(sound * np.hanning(len(sound)), 20 * RATE))
    bins = np.arange(round(0.97 * near * 20), round(1.03 * near * 20))
    return float(bins[np.argmax(spectrum[bins])] / 20)


def level(sound: np.ndarray) -> float:
    """dB"""
    return float(10 * np.log10(np.square(sound).mean()))


def cents(one: float, other: float) -> float:
    return 1200 * float(np.log2(one / other))


@pytest.mark.parametrize(("semitones", "off"), [(0, 0), (1, 1.1), (-1, 1.1), (2, 4), (-2, 4), (12, 0), (-12, 0)])
def test_the_ratio_is_that_of_the_semitones(semitones: int, off: float) -> None:
    assert abs(cents(float(pitch_ratio(semitones)), 2 ** (semitones / 12))) <= off


@pytest.mark.parametrize("semitones", SHIFTS)
@pytest.mark.parametrize("hertz", [110.0, 443.0, 1234.5, 6000.0])
def test_a_tone_moves_and_keeps_its_level(hertz: float, semitones: int) -> None:
    sound = tone(hertz)
    result = shifted(sound, semitones)
    wanted = hertz * float(pitch_ratio(semitones))
    assert abs(cents(peak(middle(result), wanted), wanted)) < 2
    assert abs(level(middle(result)) - level(sound)) < 1
    # The tone alone: what else there is, is 30 dB below it.
    count = len(middle(result))
    spectrum = np.abs(np.fft.rfft(middle(result) * np.hanning(count))) ** 2
    near = np.abs(np.fft.rfftfreq(count, 1 / RATE) - wanted) < 30
    assert 10 * np.log10(spectrum[~near].sum() / spectrum[near].sum()) < -30


@pytest.mark.parametrize("semitones", SHIFTS)
def test_a_voice_keeps_its_partials(semitones: int) -> None:
    """Of 120 Hz, each partial weaker than the one before."""
    sound = sum(tone(120.0 * n) / n for n in range(1, 21))
    result = middle(shifted(sound, semitones))
    for n in (1, 2, 5, 12):
        wanted = 120 * n * float(pitch_ratio(semitones))
        assert abs(cents(peak(result, wanted), wanted)) < 3
    assert abs(level(result) - level(middle(sound))) < 1


@pytest.mark.parametrize("semitones", SHIFTS)
def test_no_click_at_the_ends(semitones: int) -> None:
    """Nothing there is louder than the tone, and it does not jump."""
    result = shifted(tone(440.0), semitones)
    steepest = 0.3 * 2 * np.pi * 440 / RATE * float(pitch_ratio(semitones))
    for end in (result[:4096], result[-4096:]):
        assert np.abs(end).max() < 1.15 * 0.3
        assert np.abs(np.diff(end)).max() < 3 * steepest
        assert level(end) > level(tone(440.0)) - 2


@pytest.mark.parametrize("semitones", SHIFTS)
def test_silence_stays_silence(semitones: int) -> None:
    assert not shifted(np.zeros(RATE), semitones).any()
    short = np.concatenate([tone(500.0, RATE // 2), np.zeros(RATE)])
    result = shifted(short, semitones)
    assert level(result[RATE // 2 + WINDOW :]) < -100  # no frame in it has sound
    assert level(result[RATE // 2 :][:WINDOW]) < level(result[: RATE // 2]) - 10


@pytest.mark.parametrize("semitones", SHIFTS)
def test_a_sound_stays_where_it_was(semitones: int) -> None:
    """A burst of noise half a second behind the start is still there."""
    sound = np.zeros(RATE)
    sound[22_050:24_050] = 0.3 * np.random.default_rng(0).standard_normal(2000)
    power = np.square(shifted(sound, semitones))
    centre = (power * np.arange(len(power))).sum() / power.sum()
    assert abs(centre - 23_050) < 500


@given(st.integers(1, 30_000), st.integers(-12, 12), st.integers(0, 2**32), st.sampled_from([0, 1e-5, 0.1, 1]))
@settings(deadline=None, max_examples=40)
def test_any_sound_of_any_length(samples: int, semitones: int, seed: int, loudness: float) -> None:
    rng = np.random.default_rng(seed)
    sound = np.round(rng.uniform(-1, 1, samples) * loudness * 32767) / 32768
    result = shifted(sound, semitones)
    assert result.shape == sound.shape
    assert np.isfinite(result).all()
    assert np.abs(result).max(initial=0) <= 6 * loudness


def test_a_clip_does_not_depend_on_the_others() -> None:
    clips = 0.1 * torch.randn(13, RATE, generator=torch.Generator().manual_seed(0))
    before = clips.clone()
    for semitones in (-2, -1, 1, 2):
        together = shift_pitch(clips, semitones)
        for part in (slice(0, 1), slice(3, 5), slice(12, 13)):
            torch.testing.assert_close(shift_pitch(clips[part], semitones), together[part], rtol=0, atol=1e-5)
    assert torch.equal(clips, before)
