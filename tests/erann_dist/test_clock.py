"""Durations of a run when the machine's clock is set while it trains."""

import time
from pathlib import Path

import pytest

from erann_dist import clock
from erann_dist.clock import Anchor, anchor, follow, set_time, steady_time
from erann_dist.log.events import Event, Finished, Incident, Step
from erann_dist.log.run_log import read_log
from erann_dist.storage.folder import LocalFolder
from jobs.training.pretrain import pretrain
from tests.conftest import small_recipe


@pytest.fixture(autouse=True)
def own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "_anchor", anchor())


def test_it_is_the_other_process_clock() -> None:
    follow(Anchor(1000.0, time.monotonic() - 5))
    assert steady_time() == pytest.approx(1005, abs=1)
    set_time(50.0)
    assert steady_time() == pytest.approx(50, abs=1)
    assert anchor().now() == pytest.approx(50, abs=1)


@pytest.mark.parametrize("jump", [-1e6, 1e6])
def test_a_clock_that_jumps(tone_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: float) -> None:
    """In mid-run, and then the run is started again."""
    recipe = small_recipe(tone_shards, tmp_path / "run", checkpoint={"every": 2})
    wall, offset, events = time.time, 0.0, list[Event]()
    monkeypatch.setattr(time, "time", lambda: wall() + offset)

    def watch(event: Event) -> None:
        nonlocal offset
        events.append(event)
        if isinstance(event, Step) and event.step == 2 and not offset:
            offset = jump
        elif isinstance(event, Step) and event.step == 3 and len(events) < 8:
            raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        pretrain(recipe, "auto", None, watch)
    pretrain(recipe, "auto", None, events.append)
    took = time.monotonic() - began
    (finished,) = [event for event in events if isinstance(event, Finished)]
    assert 0.01 < finished.goodput <= 1
    assert all(0 <= event.seconds_lost <= took for event in events if isinstance(event, Incident))
    times = [line["time"] for line in read_log(LocalFolder(recipe.run_url))]
    assert times == sorted(times)
    assert times[-1] - times[0] <= took
