"""Windows of recordings, against slices of the whole."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from erann_dist.data.windows import windows

RATE = 10


@given(
    samples=st.integers(0, 200),
    size=st.integers(1, 50),
    step=st.integers(1, 50),
    cuts=st.lists(st.integers(0, 200), max_size=6),
)
@settings(deadline=None)
def test_windows_are_slices_that_cover_the_recording(samples: int, size: int, step: int, cuts: list[int]) -> None:
    step = min(step, size)
    sound = np.arange(samples, dtype=np.float32)
    parts = np.split(sound, sorted(min(cut, samples) for cut in cuts))
    found = list(windows(parts, RATE, size / RATE, step / RATE))
    for number, window in enumerate(found):
        first = min(number * step, max(0, samples - size))
        assert window.start == first / RATE
        assert window.end == min(first + size, samples) / RATE
        np.testing.assert_array_equal(window.samples, sound[first : first + size])
    assert (found[-1].end * RATE if found else 0) == samples
    assert all(window.end * RATE < samples for window in found[:-1])  # none after the one that ends it


def test_a_remainder_of_a_hundredth_is_left() -> None:
    for samples, ends in ((2000, [1000, 2000]), (2010, [1000, 2000]), (2011, [1000, 2000, 2011]), (9, [9])):
        assert [round(window.end) for window in windows([np.zeros(samples, np.float32)], 1, 1000, 1000)] == ends


def test_a_hop_has_to_fit_its_window() -> None:
    for seconds, hop in ((1.0, 1.1), (1.0, 0.0), (0.01, 0.01)):
        with pytest.raises(ValueError, match="hop"):
            list(windows([], RATE, seconds, hop))
