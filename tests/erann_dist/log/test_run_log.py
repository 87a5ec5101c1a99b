"""The run's log over kills and commands, and what it says of the time that counted."""

import errno
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from erann_dist.log.events import CheckpointSaved, Discarded, Evaluated, EvaluationProgress, Finished, Incident, Step
from erann_dist.log.run_log import (
    CommandGoodput,
    Line,
    Lost,
    RunLog,
    as_line,
    continued,
    goodput,
    lost,
    read_damaged_log,
    read_log,
    seconds_run,
)
from erann_dist.storage.folder import LocalFolder
from tests.support.run_logs import started, step


@contextmanager
def opened(folder: Path, from_step: int) -> Iterator[RunLog]:
    log = RunLog(LocalFolder(str(folder)), from_step)
    try:
        yield log
    finally:
        log.close()


def kinds(lines: list[Line]) -> list[tuple[str, int]]:
    return [(line["event"], line["step"]) for line in lines]


def test_every_event_is_a_line_at_once(tmp_path: Path) -> None:
    with opened(tmp_path, 0) as log:
        assert log.found == []
        for event in (started(), step(1), Incident(1, "bad_clip", "a.tar: clip x", keys=["x"]), Evaluated(1, 4, {})):
            log.event(event)
            line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
            assert line == as_line(event, line["time"])
        log.event(EvaluationProgress(1, 1, 4))
    assert kinds(read_log(LocalFolder(str(tmp_path)))) == [
        ("Started", 0),
        ("Step", 1),
        ("Incident", 1),
        ("Evaluated", 1),
    ]


def test_what_is_computed_again_is_taken_out_and_what_happened_stays(tmp_path: Path) -> None:
    with opened(tmp_path, 0) as log:
        log.event(started(launched=5.0))
        for done in (1, 2, 3, 4):
            log.event(step(done))
            log.event(Evaluated(done, 4, {"mAP": done / 10}))
            log.event(CheckpointSaved(done, "there", 0.1, 0.0))
        log.event(Incident(4, "cache", "full"))
        log.event(step(5))
    last = read_log(LocalFolder(str(tmp_path)))[-1]
    for _ in range(2):  # the second start finds nothing more to take out
        with opened(tmp_path, 2) as log:
            pass
        lines = read_log(LocalFolder(str(tmp_path)))
        assert kinds(lines) == [
            ("Started", 0),
            *[(kind, done) for done in (1, 2) for kind in ("Step", "Evaluated", "CheckpointSaved")],
            ("Incident", 4),
            ("Discarded", 5),
        ]
        assert lines[-1]["time"] == last["time"]
        assert [line["step"] for line in log.lines] == [line["step"] for line in lines]


def test_a_line_that_a_kill_cut_short_is_taken_out(tmp_path: Path) -> None:
    whole = json.dumps(as_line(step(1), 7.0))
    torn = json.dumps(as_line(Incident(1, "bad_clip", "ü\u2028"), 8.0), ensure_ascii=False).encode()
    for cut in (torn[:20], torn[: torn.index("ü".encode()) + 1], torn[:-1]):
        (tmp_path / "metrics.jsonl").write_bytes(whole.encode() + b"\n" + cut)
        assert read_log(LocalFolder(str(tmp_path))) == [json.loads(whole)]
        with opened(tmp_path, 1) as log:
            log.event(step(2, loss=float("nan")))
        first, second = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
        assert first == json.loads(whole)
        assert (second["step"], second["loss"]) == (2, None)
    (tmp_path / "metrics.jsonl").write_bytes(torn)
    assert read_log(LocalFolder(str(tmp_path)))[0]["text"] == "ü\u2028"


def test_lines_that_are_no_events_are_not_read(tmp_path: Path) -> None:
    lines = [
        '{"event": "Step", "step": 1, "time": 1.0}',
        '{"loss": 1}',
        "7",
        '{"event": ["x"]}',
        "",
        '{"event": "Else"}',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert read_damaged_log(LocalFolder(str(tmp_path))) == ([], 4)  # but for the last line, which may be being written
    assert read_log(LocalFolder(str(tmp_path / "absent"))) == []


def test_a_process_that_was_replaced_no_longer_writes_into_the_log(tmp_path: Path) -> None:
    with opened(tmp_path, 0) as old:
        old.event(step(1))
        with opened(tmp_path, 1) as new:
            old.event(step(2, loss=9.0))
            new.event(step(2, loss=5.0))
            old.event(step(3, loss=9.0))
    assert [line["loss"] for line in read_log(LocalFolder(str(tmp_path)))] == [1.0, 5.0]


def test_tensorboard_has_the_scalars_and_forgets_what_is_computed_again(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with opened(tmp_path, 0) as log:
        for done in (1, 2, 3):
            log.event(step(done, loss=float(done)))
    (first,) = (tmp_path / "tensorboard").iterdir()
    first.rename(first.with_name("events.out.tfevents.1"))  # the names tell the order by the second
    with opened(tmp_path, 1) as log:
        log.event(step(2, loss=20.0))
        log.event(Evaluated(2, 4, {"mAP": 0.5}))
        log.event(Evaluated(2, 4, {"mAP": 0.6}, averaged=3))
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(each.step, each.value) for each in found.Scalars("train/loss")] == [(1, 1.0), (2, 20.0)]
    assert [round(each.value, 3) for each in found.Scalars("eval/mAP")] == [0.5]
    assert [round(each.value, 3) for each in found.Scalars("eval_averaged/mAP")] == [0.6]


def test_tensorboards_file_follows_when_the_disk_has_room_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    full = False
    write = io.FileIO.write

    class Limited(io.FileIO):
        def write(self, data: Any) -> int:
            if full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(self, data[:50])  # a write may take a part

    with opened(tmp_path, 0) as log:
        (path,) = (tmp_path / "tensorboard").iterdir()
        log._sinks[0]._file = Limited(path, "ab")
        for done in (1, 2, 3, 4):
            full = done in (2, 3)
            log.event(step(done, loss=float(done)))
            assert bool(log.problem) == (done >= 2)
        assert str(path) in log.problem
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [each.step for each in found.Scalars("train/loss")] == [1, 2, 3, 4]


# Histories made by hand: a command is started at 100, its training begins at 110, a step takes 10 s.
FIRST = [as_line(started(launched=100.0), 110.0), *(as_line(step(n, seconds=10.0), 110.0 + 10 * n) for n in (1, 2, 3))]


def test_nothing_is_lost_at_the_first_start() -> None:
    assert lost([], 0, 100.0, 110.0) == Lost(0, 0.0, 0)
    assert goodput([], 110.0) == 0.0


def test_goodput_is_the_share_of_steps_in_the_time_since_the_command() -> None:
    assert goodput(FIRST, 140.0) == 30 / 40
    assert goodput(FIRST, 160.0) == 30 / 60  # an evaluation, say


def test_a_restart_within_a_command() -> None:
    """Step 2, done at 130, was the last in a checkpoint; the next workers begin at 155."""
    assert lost(FIRST, 2, 100.0, 155.0) == Lost(1, 25.0, 3)
    lines = [*continued(FIRST, 2), as_line(started(2, launched=100.0), 155.0)]
    assert goodput(lines, 155.0) == 20 / 55
    assert goodput([*lines, as_line(step(3, seconds=10.0), 165.0)], 165.0) == 30 / 65


def test_a_command_that_was_run_again() -> None:
    """The first ended at 140, as far as its log tells; the second was started at 1000 and trains at 1010."""
    assert lost(FIRST, 2, 1000.0, 1010.0) == Lost(1, 10.0 + 10.0, 3)
    lines = [*continued(FIRST, 2), as_line(started(2, launched=1000.0), 1010.0)]
    assert goodput(lines, 1010.0) == 20 / (40 + 10)


def test_without_a_checkpoint_all_since_the_start_is_lost() -> None:
    assert lost(FIRST, 0, 100.0, 150.0) == Lost(3, 40.0, 3)
    assert goodput(continued(FIRST, 0), 150.0) == 0.0


def test_after_a_checkpoint_at_the_last_step_only_time_is_lost() -> None:
    assert lost(FIRST, 3, 1000.0, 1010.0) == Lost(0, 10.0, 3)


def test_seconds_that_an_incident_has_counted_are_not_counted_again() -> None:
    first = lost(FIRST, 2, 100.0, 155.0)
    lines = [*continued(FIRST, 2), as_line(started(2, launched=100.0), 155.0)]
    lines.append(as_line(Incident(2, "failure", "a worker", first.steps, first.seconds), 155.0))
    assert lost(lines, 2, 100.0, 175.0) == Lost(0, 20.0, 2)


def test_a_checkpoint_tells_when_its_step_was_done_though_no_step_was_logged() -> None:
    """Step 4 was done at 150 and committed at 156; a step was to be logged at 5."""
    lines = [*FIRST, as_line(CheckpointSaved(4, "there", 6.0, 0.1), 156.0)]
    assert lost(lines, 4, 100.0, 170.0) == Lost(0, 20.0, 4)


def test_goodput_at_the_end_of_a_run() -> None:
    lines = [*FIRST, as_line(Finished(3, 30.0, 0.6), 150.0)]
    assert goodput(lines, lines[-1]["time"]) == 30 / 50


SECONDS = st.integers(0, 400).map(lambda n: n / 8)  # such sums are exact
PAUSE = st.integers(1, 400).map(lambda n: n / 8)
STEP_SECONDS = st.integers(1, 80).map(lambda n: n / 8)


@settings(deadline=None)
@given(data=st.data(), log_every=st.integers(1, 4), save_every=st.integers(1, 7))
def test_time_is_accounted_for_over_kills_and_commands(data: Any, log_every: int, save_every: int) -> None:
    """Of all time that commands ran, as a clock beside them tells, steps that count and losses take disjoint parts."""
    lines: list[Line] = []
    now, ran = 1000.0, 0.0  # ran: by the commands before this one
    saved = [0]
    good: dict[int, float] = {}  # seconds of the windows that count, by their last step
    all_lost = 0.0
    watched = CommandGoodput()
    for _ in range(data.draw(st.integers(1, 4), "commands")):
        launched = now = now + data.draw(PAUSE, "pause")  # commands are told apart by when they were started
        for _ in range(data.draw(st.integers(1, 3), "starts")):
            now += data.draw(SECONDS, "start-up")
            if len(saved) > 1 and data.draw(st.booleans(), "damaged"):
                saved.pop()
            begin = saved[-1]
            loss = lost(lines, begin, launched, now)
            computed = max(good, default=0)
            assert loss.steps == max(0, computed - begin)
            assert loss.last_step == max(begin, computed)
            assert 0 <= loss.seconds <= ran + now - launched
            all_lost += loss.seconds
            watched.add(started(begin, launched))
            good = {last: seconds for last, seconds in good.items() if last <= begin}
            lines = continued(lines, begin)
            lines.append(as_line(started(begin, launched), now))
            lines.append(as_line(Incident(begin, "failure", "", loss.steps, loss.seconds), now))
            ended = now
            window: list[float] = []
            for done in range(begin + 1, begin + 1 + data.draw(st.integers(0, 12), "steps")):
                window.append(data.draw(STEP_SECONDS, "step"))
                now += window[-1]
                if done % log_every == 0:
                    good[done] = sum(window)
                    watched.add(step(done, steps=len(window), seconds=good[done]))
                    lines.append(as_line(step(done, steps=len(window), seconds=good[done]), now))
                    window, ended = [], now
                if done % save_every == 0:
                    seconds = data.draw(SECONDS, "saving")
                    now += seconds
                    lines.append(as_line(CheckpointSaved(done, "", seconds, seconds), now))
                    saved.append(done)
                    ended = now
            now += data.draw(SECONDS, "until it is noticed")
            share = goodput(lines, now)
            assert 0 <= share <= 1
            assert share == (sum(good.values()) / (ran + now - launched) if ran + now > launched else 0)
            if ran == 0:
                assert watched.at(now) == share
            assert all_lost + sum(good.values()) <= ran + now - launched
        ran += ended - launched
        assert {line["step"] for line in lines if line["event"] == "Step"} == good.keys()


def test_how_long_every_command_ran_is_known_though_its_lines_are_gone() -> None:
    """The second command reached nothing, the third goes on before what the first had."""
    second = [as_line(started(3, launched=200.0), 210.0)]
    lines = continued([*FIRST, *second], 1)
    assert lines == [*FIRST[:2], as_line(Discarded(3), 140.0), *second]
    third = as_line(started(1, launched=300.0), 310.0)
    assert goodput([*lines, third], 310.0) == 10 / (40 + 10 + 10)
    assert seconds_run([*lines, third]) == 40 + 10 + 10  # and not the pauses between them
    assert continued(FIRST, 3) == FIRST


@pytest.mark.parametrize("event", [Step, Evaluated, CheckpointSaved, Incident, Finished, Discarded])
def test_every_kind_of_event_is_read_back(tmp_path: Path, event: type) -> None:
    values = {"kind": "cache", "text": "t", "metrics": {}, "path": "p"}
    counts = ("step", "steps", "clips", "bad_clips", "steps_lost", "averaged")
    made = event(
        **{
            name: values.get(name, 1 if name in counts else 0.5)
            for name in event.__dataclass_fields__
            if name not in ("keys", "outcome")
        }
    )
    with opened(tmp_path, 0) as log:
        log.event(made)
    assert [line["event"] for line in read_log(LocalFolder(str(tmp_path)))] == [event.__name__]
