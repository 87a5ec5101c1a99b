import gzip
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from erann_dist.keyed import keyed_hash, keyed_integer, keyed_uniform, permute
from erann_dist.sampling import BalancedSampler, UniformSampler, class_lists


@given(size=st.integers(1, 5000), key=st.integers(0, 2**64 - 1))
@settings(max_examples=150, deadline=None)
def test_permutations_are_bijective(size: int, key: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size, np.array([key], np.uint64))), np.arange(size))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 99_991, 2**20, 2_063_949])
def test_permutations_of_other_sizes(size: int) -> None:
    permuted = permute(np.arange(size), size, keyed_hash(7, size))
    assert np.array_equal(np.sort(permuted), np.arange(size))


def assert_uniform(counts: np.ndarray, total: int) -> None:
    """Chi-square within six standard deviations of its mean: far beyond any usual quantile."""
    expected = total / len(counts)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < len(counts) - 1 + 6 * np.sqrt(2 * len(counts))


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6, 7])
def test_small_permutations_are_equally_likely(size: int) -> None:
    keys = keyed_hash(3, np.arange(200_000))
    columns = np.stack([permute(np.full(len(keys), i), size, keys) for i in range(size)])
    _, counts = np.unique(8 ** np.arange(size) @ columns, return_counts=True)
    assert len(counts) == math.factorial(size)
    assert_uniform(counts, len(keys))


@pytest.mark.parametrize("size", [9, 12, 25, 30, 49, 100])
def test_pairs_of_entries_are_equally_likely(size: int) -> None:
    keys = keyed_hash(4, np.arange(200_000))
    first, second, last = (permute(np.full(len(keys), i), size, keys) for i in (0, 1, size - 1))
    for other in (second, last):
        counts = np.bincount(first * size + other, minlength=size**2).reshape(size, size)
        assert not counts.diagonal().any()
        assert_uniform(counts[~np.eye(size, dtype=bool)], len(keys))


def test_keyed_numbers_are_pinned() -> None:
    """The plan of a run must be the same in every version: changing these numbers breaks every run's resume."""
    assert keyed_hash(1, 2, 3).tolist() == [1321962074176129191]
    assert permute(np.arange(10), 10, keyed_hash(0)).tolist() == [8, 3, 7, 5, 0, 9, 2, 6, 1, 4]


def test_uniform_numbers_lie_in_the_open_interval() -> None:
    values = keyed_uniform(1, np.arange(100_000))
    assert values.min() > 0
    assert values.max() < 1
    assert abs(values.mean() - 0.5) < 0.01
    dice = keyed_integer(1, 6, 2, np.arange(60_000))
    assert set(dice.tolist()) == {1, 2, 3, 4, 5, 6}
    assert np.bincount(dice)[1:].min() > 9_000


LISTS = st.lists(st.lists(st.integers(0, 50), max_size=12, unique=True), min_size=1, max_size=8).filter(any)


@given(lists=LISTS, seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_panns_semantics(lists: list[list[int]], seed: int) -> None:
    """In each round every class with clips once; a class's clips all occur once before any of them repeats."""
    # Rows that tell their class: the rows of class c are 1000·c + row.
    tagged = [np.array([1000 * c + row for row in rows], np.int64) for c, rows in enumerate(lists)]
    sampler = BalancedSampler(tagged, seed)
    active = [c for c, rows in enumerate(lists) if rows]
    rounds = 3 * max(len(rows) for rows in lists)
    drawn = sampler.draw(np.arange(rounds * len(active))).reshape(rounds, len(active))
    assert (np.sort(drawn // 1000, axis=1) == active).all()
    for c in active:
        own = drawn[drawn // 1000 == c]
        size = len(lists[c])
        for start in range(0, len(own) - size + 1, size):
            assert set(own[start : start + size]) == set(tagged[c].tolist())


@given(order=st.permutations(range(60)), chunk=st.integers(1, 60))
@settings(max_examples=30, deadline=None)
def test_draw_is_a_pure_function_of_the_position(order: list[int], chunk: int) -> None:
    lists = [np.arange(5), np.arange(5, 7), np.array([], np.int64), np.arange(3, 20)]
    for sampler in (BalancedSampler(lists, 4), UniformSampler(17, 4)):
        whole = sampler.draw(np.arange(60))
        pieces = [sampler.draw(np.array(order[i : i + chunk])) for i in range(0, 60, chunk)]
        assert np.array_equal(np.concatenate(pieces), whole[order])


def test_seeds_differ() -> None:
    lists = [np.arange(50), np.arange(50, 90)]
    for a, b in (
        (BalancedSampler(lists, 0), BalancedSampler(lists, 1)),
        (UniformSampler(90, 0), UniformSampler(90, 1)),
    ):
        assert (a.draw(np.arange(200)) != b.draw(np.arange(200))).mean() > 0.5


def test_uniform_sampling_is_a_fresh_permutation_each_epoch() -> None:
    epochs = UniformSampler(101, 0).draw(np.arange(3 * 101)).reshape(3, 101)
    assert (np.sort(epochs, axis=1) == np.arange(101)).all()
    assert (epochs[0] != epochs[1]).mean() > 0.8


def test_no_clips_at_all() -> None:
    with pytest.raises(ValueError, match="at least one"):
        BalancedSampler([np.array([], np.int64)], 0)
    with pytest.raises(ValueError, match="at least one"):
        UniformSampler(0, 0)


def test_class_lists_are_the_labels_transposed() -> None:
    lists = class_lists(np.array([2, 0, 2, 1, 2]), np.array([0, 1, 1, 3, 5]), 4)
    assert [rows.tolist() for rows in lists] == [[2], [3], [0, 2, 3], []]


def real_class_lists(path: Path, classes: Path) -> list[np.ndarray]:
    index = {line.split(",")[1]: i for i, line in enumerate(classes.read_text().splitlines()[1:])}
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        labels = [[index[m] for m in line.split('"')[1].split(",")] for line in file if not line.startswith("#")]
    offsets = np.cumsum([0] + [len(x) for x in labels])
    return class_lists(np.fromiter((c for x in labels for c in x), np.int16, offsets[-1]), offsets, len(index))


@pytest.mark.parametrize(
    ("name", "clips", "sizes", "rounds"),
    [
        ("balanced_train_segments.csv", 22_160, (59, 6_244), 180),
        ("unbalanced_train_segments.csv.gz", 2_041_789, (7, 999_421), 50),
    ],
)
def test_panns_semantics_on_the_real_lists(
    real_data: Path, name: str, clips: int, sizes: tuple[int, int], rounds: int
) -> None:
    folder = real_data / "audioset"
    lists = real_class_lists(folder / name, folder / "class_labels_indices.csv")
    counts = np.array([len(rows) for rows in lists])
    assert len(np.unique(np.concatenate(lists))) == clips
    assert (counts.min(), counts.max()) == sizes
    # In place of the row each entry carries its place in all the lists, which tells the class it was drawn for.
    starts = np.cumsum(counts) - counts
    first = 10**9 // 527 * 527
    places = BalancedSampler([np.arange(s, s + n) for s, n in zip(starts, counts, strict=True)], 0).draw(
        np.arange(first, first + 527 * rounds)
    )
    classes = (np.searchsorted(starts, places, side="right") - 1).reshape(rounds, 527)
    assert (np.sort(classes, axis=1) == np.arange(527)).all()
    whole_passes = 0
    for c in range(527):
        own = places[classes.reshape(-1) == c] - starts[c]
        begun = -(first // 527) % counts[c]  # rounds until the class's next pass begins
        for start in range(begun, rounds - counts[c] + 1, counts[c]):
            assert np.array_equal(np.sort(own[start : start + counts[c]]), np.arange(counts[c]))
            whole_passes += 1
        assert len(np.unique(own[:begun])) == len(own[:begun])
    assert whole_passes > 0
    # And the rows are those that stand at these places.
    rows = BalancedSampler(lists, 0).draw(np.arange(first, first + 527 * rounds))
    assert np.array_equal(rows, np.concatenate(lists)[places])
