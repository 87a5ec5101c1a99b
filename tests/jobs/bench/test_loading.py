"""How the loader's benchmark counts."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from erann_dist.errors import UserError
from jobs.bench.loading import MOST_PER_CORE, completed, require_possible


def test_a_slow_first_item_does_not_let_the_others_pass_uncounted() -> None:
    finished, free = list[int](), threading.Event()

    def work(value: int) -> int:
        if value == 0:
            assert free.wait(60)
        finished.append(value)
        return value

    counted = []
    with ThreadPoolExecutor(4) as pool:
        for value in completed(pool, work, range(200), 8):
            counted.append(value)
            assert len(finished) - len(counted) <= 8
            if len(counted) == 100:
                free.set()
    assert sorted(counted) == list(range(200))


def test_an_error_ends_it() -> None:
    with ThreadPoolExecutor(2) as pool, pytest.raises(ZeroDivisionError):
        list(completed(pool, lambda value: 1 // value, [1, 0, 1], 2))


def test_a_rate_that_no_machine_has_fails_the_benchmark() -> None:
    require_possible("s3_arrow", 2 * MOST_PER_CORE, 2)
    with pytest.raises(UserError, match="s3_arrow"):
        require_possible("s3_arrow", 301_046, 2)
