"""A file that is read range by range behaves as the bytes that it has."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from erann_dist.storage.ranged_file import ranged_file

CONTENT = bytes(range(256)) * 20
STEP = st.one_of(st.tuples(st.just("read"), st.integers(0, 6000)), st.tuples(st.just("seek"), st.integers(0, 6000)))


@given(steps=st.lists(STEP, max_size=20), buffer=st.integers(1, 3000))
def test_it_reads_as_bytes_do(steps: list[tuple[str, int]], buffer: int) -> None:
    asked: list[tuple[int, int]] = []

    def read(start: int, count: int) -> bytes:
        asked.append((start, count))
        return CONTENT[start : start + count]

    ours, theirs = ranged_file(read, len(CONTENT), buffer), io.BytesIO(CONTENT)
    for name, number in steps:
        assert getattr(ours, name)(number) == getattr(theirs, name)(number)
        assert ours.tell() == theirs.tell()
    assert ours.seek(-3, io.SEEK_END) == len(CONTENT) - 3
    assert ours.read() == CONTENT[-3:]
    assert all(start >= 0 and 0 < count <= len(CONTENT) - start for start, count in asked)


def test_what_reading_raises_passes() -> None:
    def read(start: int, count: int) -> bytes:
        raise FileNotFoundError("gone")

    with pytest.raises(FileNotFoundError, match="gone"):
        ranged_file(read, 10, 4).read(2)
