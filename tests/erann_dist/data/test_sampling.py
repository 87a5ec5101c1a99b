import gzip
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from erann_dist.data.permutations import keyed_hash, keyed_integer, keyed_uniform, permute
from erann_dist.data.sampling import BalancedSampler, SequentialSampler, UniformSampler, class_lists


@pytest.mark.parametrize("key", [0, 1, 2**64 - 1])
def test_permutations_of_every_size_up_to_5000_are_bijective(key: int) -> None:
    for first in range(1, 5001, 250):
        sizes = np.arange(first, first + 250)
        starts = np.cumsum(sizes) - sizes
        size, start = np.repeat(sizes, sizes), np.repeat(starts, sizes)
        index = np.arange(sizes.sum()) - start
        permuted = permute(index, size, keyed_hash(key, size))
        assert (permuted < size).all()
        assert (np.bincount(start + permuted) == 1).all()


@pytest.mark.parametrize("size", [65_537, 99_991, 2**20, 2_041_789, 2_063_949])
def test_large_permutations_are_bijective(size: int) -> None:
    assert (np.bincount(permute(np.arange(size), size, keyed_hash(7, size)), minlength=size) == 1).all()


@pytest.mark.parametrize("size", [2**31 - 1, 2**31, 2**32 - 1])
def test_the_largest_permutations_send_no_two_entries_to_one_place(size: int) -> None:
    ends = np.concatenate([np.arange(300_000), size - 1 - np.arange(300_000)])
    within = np.random.default_rng(size).integers(300_000, size - 300_000, 400_000)
    index = np.unique(np.concatenate([ends, within]))
    permuted = permute(index, size, keyed_hash(7, size))
    assert len(np.unique(permuted)) == len(index) > 999_000
    assert permuted.min() >= 0
    assert permuted.max() < size


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


@pytest.mark.parametrize("size", [11, 64, 97, 128, 527, 1_000])
def test_an_entry_lands_everywhere_equally_often(size: int) -> None:
    keys = keyed_hash(5, np.arange(200_000))
    for entry in (0, 1, size // 2, size - 1):
        landed = permute(np.full(len(keys), entry), size, keys)
        assert_uniform(np.bincount(landed, minlength=size), len(keys))


@pytest.mark.parametrize("size", [10_000, 65_536, 2_041_789])
def test_neighbours_in_a_large_permutation_have_nothing_to_do_with_each_other(size: int) -> None:
    """Where an entry and its neighbour land, in 20 × 20 cells, and the way from one to the other, in 100."""
    for key in range(5):
        landed = permute(np.arange(size), size, keyed_hash(6, key))
        for apart in (1, 2, int(size**0.5)):
            one, other = landed[:-apart], landed[apart:]
            assert_uniform(np.bincount(one * 20 // size * 20 + other * 20 // size, minlength=400), len(one))
            assert_uniform(np.bincount((other - one) % size * 100 // size, minlength=100), len(one))


def test_orders_of_one_seeds_rounds_passes_and_classes_are_not_alike() -> None:
    """Entries in the same place of two orders of 1,000: about one, and never ten."""
    orders = [permute(np.arange(1_000), 1_000, keyed_hash(seed, purpose, n)) for seed in (0, 1) for purpose in (1, 2, 3)
              for n in range(10)]  # fmt: skip
    alike = [(a == b).sum() for i, a in enumerate(orders) for b in orders[:i]]
    assert 0.8 < np.mean(alike) < 1.2
    assert max(alike) < 10


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
    with pytest.raises(ValueError, match="at least one"):
        SequentialSampler(0)


def test_a_class_without_clips_is_skipped_and_the_clip_of_a_class_of_one_comes_every_round() -> None:
    sampler = BalancedSampler([np.array([], np.int64), np.array([7]), np.arange(5)], 3)
    assert sampler.classes.tolist() == [1, 2]
    rounds = sampler.draw(np.arange(200)).reshape(100, 2)
    assert ((rounds == 7).sum(axis=1) == 1).all()
    assert BalancedSampler([np.array([9])], 0).draw(np.array([0, 5, 10**12])).tolist() == [9, 9, 9]


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
        pytest.param(
            "unbalanced_train_segments.csv.gz", 2_041_789, (7, 999_421), 50, marks=pytest.mark.slow, id="unbalanced"
        ),
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
