"""Random numbers and permutations as pure functions of a key: no generator state, the same on every machine.

A key is a tuple of integers, such as (seed, PURPOSE, position). Everything here is fixed 64-bit integer arithmetic on
NumPy arrays, so that no library's generator can change a sample stream between versions. The mixing function is the
finalizer of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014).
"""

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]

# The purpose of a stream of numbers. Streams of different purposes are independent; changing a value changes results.
ROUND, CLASS_PASS, EPOCH, CROP, MIXUP, TIME_MASK, FREQUENCY_MASK, SHARD_DEAL, SUBSTITUTE, PITCH, DROPOUT = range(1, 12)

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)
_LOW32 = np.uint64(0xFFFFFFFF)
_U32 = np.uint64(32)
_S30, _S27, _S31 = (np.uint64(shift) for shift in (30, 27, 31))
_ROUNDS = 10


def _mix(x: U64) -> U64:
    x = x.copy()
    _mix_in_place(x, np.empty_like(x))
    return x


def _word(value: int | npt.NDArray[np.integer]) -> U64:
    """Any integer, or array of integers, as 64-bit words (negative values in two's complement)."""
    if isinstance(value, np.ndarray):
        return value.astype(np.uint64)
    return np.array([value & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64)


def keyed_hash(*key: int | npt.NDArray[np.integer]) -> U64:
    """64 random bits for each key; array components broadcast. Returns (n,) uint64."""
    state = np.zeros(1, np.uint64)
    for component in key:
        state = _mix((state ^ _word(component)) + _GOLDEN)
    return _mix(state + _GOLDEN)


def keyed_uniform(*key: int | npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    """A number in the open interval (0, 1) for each key: never 0, never 1. Returns (n,) float64."""
    return ((keyed_hash(*key) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def keyed_integer(low: int | I64, high: int | I64, *key: int | npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    """An integer in low..high, both inclusive, for each key. Returns (n,) int64."""
    span = np.asarray(high) - np.asarray(low) + 1
    return low + np.floor(keyed_uniform(*key) * span).astype(np.int64)


def keyed_seed(*key: int) -> int:
    """A 63-bit seed for another generator."""
    return int(keyed_hash(*key)[0] >> np.uint64(1))


def permute(index: npt.NDArray[np.integer], size: npt.NDArray[np.integer] | int, key: U64) -> I64:
    """Entry `index` of the random permutation of range(size) that belongs to `key`, for each triple.

    A Feistel network over a grid of a × b ≥ size cells (a, b near the square root), whose half-rounds add a keyed hash
    of one coordinate to the other; results outside `size` are mapped again until they are inside (cycle walking). The
    cost is the same for every index, so jumping to any position is free.

    index, size, key: (n,), broadcast; 0 <= index < size < 2**32. Returns (n,) int64.
    """
    x, size, key = np.broadcast_arrays(_word(index), _word(size), key)
    # Even sides of at least 4: with odd sides every half-round, and so every permutation, is an even permutation, and
    # sides of 2 or 3 mix small sizes too slowly (a chi-square test over all permutations of 5 to 7 entries shows both).
    a = np.maximum(np.sqrt(size.astype(np.float64)).astype(np.uint64) & ~np.uint64(1), np.uint64(4))
    b = np.maximum((size + a - np.uint64(1)) // a, np.uint64(4))
    b += b & np.uint64(1)
    result = _feistel(x, a, b, key)
    outside = np.flatnonzero(result >= size)
    while outside.size:
        walked = _feistel(result[outside], a[outside], b[outside], key[outside])
        result[outside] = walked
        outside = outside[walked >= size[outside]]
    return result.astype(np.int64)


def _feistel(x: U64, a: U64, b: U64, key: U64) -> U64:
    left, right = np.divmod(x, b)
    key = key.copy()
    cell, scratch = np.empty_like(x), np.empty_like(x)
    for number in range(_ROUNDS):
        key += _GOLDEN
        moved, other, side = (left, right, a) if number % 2 == 0 else (right, left, b)
        # moved = (moved + a keyed hash of the other coordinate, scaled to the side) modulo the side
        np.bitwise_xor(other, key, out=cell)
        _mix_in_place(cell, scratch)
        cell &= _LOW32
        cell *= side
        cell >>= _U32
        moved += cell
        np.subtract(moved, side, out=cell)  # wraps to a huge number where nothing has to be subtracted
        np.minimum(moved, cell, out=moved)
    left *= b
    left += right
    return left


def _mix_in_place(x: U64, scratch: U64) -> None:
    """_mix without new arrays: for a few hundred numbers, allocating them costs more than the arithmetic."""
    for shift, factor in ((_S30, _MIX1), (_S27, _MIX2)):
        np.right_shift(x, shift, out=scratch)
        x ^= scratch
        x *= factor
    np.right_shift(x, _S31, out=scratch)
    x ^= scratch
