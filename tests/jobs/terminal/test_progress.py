"""What a person sees of a run, on a terminal and in a file."""

import io
import re
import time

import pytest
from rich.console import Console

from erann_dist.log.events import CheckpointSaved, Evaluated, EvaluationProgress, Event, Finished, Incident
from jobs.terminal import progress
from tests.support.run_logs import started, step

TEXTS = ["set[1]/a.tar: clip x is damaged; check the set with erann verify set[1]", "/scratch: the cache is full"]
HISTORY: list[Event] = [
    started(launched=time.time() - 10, hosts=["one", "two"]),
    step(3),
    Incident(3, "bad_clip", TEXTS[0]),
    EvaluationProgress(4, 7, 20),
    Evaluated(4, 20, {"mAP": 0.7, "mAUC": 0.9}),
    Evaluated(4, 20, {"mAP": 0.8, "mAUC": 0.9}, averaged=3),
    CheckpointSaved(4, "there", 1.0, 0.1),
    Incident(4, "cache", TEXTS[1]),
    Incident(4, "failure", "worker 1 was lost", steps_lost=2, seconds_lost=61.2),
    started(4, launched=time.time() - 10, workers=1, hosts=["one"]),
    step(8, loss=0.25, lr=1e-3, examples_per_s=1234.5, clips_per_s=2469.0, data_wait=0.0123),
    Evaluated(8, 20, {"mAP": 0.6, "mAUC": 0.9}),
    step(10),
    Finished(10, 12.0, 0.75),
]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> io.StringIO:
    seen = io.StringIO()
    console = Console(
        file=seen, force_terminal=request.param, highlight=False, soft_wrap=True, width=200, color_system=None
    )
    monkeypatch.setattr(progress, "console", console)
    return seen


@pytest.mark.parametrize("shown", [False, True], indirect=True)
def test_what_happens_is_a_line_of_its_own(shown: io.StringIO) -> None:
    with progress.RunView() as view:
        for event in HISTORY:
            view.event(event)
    for line in (
        "training on 40 clips, evaluating on 20, 2 workers on cpu, 2 hosts",
        f"step 3: {TEXTS[0]}",
        "step 4: mAP 0.7000  mAUC 0.9000  on 20 clips",
        "step 4 (mean weights of 3 checkpoints): mAP 0.8000  mAUC 0.9000  on 20 clips",
        f"step 4: {TEXTS[1]}",
        "step 4: worker 1 was lost; lost: 2 steps, 0:01:01",
        "training on 40 clips, evaluating on 20, 1 worker on cpu",
        "resuming from step 4 of 10 (checkpoints/step-00000004-0001)",
        "training finished after 0:00:12, goodput of the whole run 75.0%",
    ):
        assert f"{line}\n" in shown.getvalue()


def lines(text: str) -> list[str]:
    return [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", line).rstrip() for line in text.split("\n")]


@pytest.mark.parametrize("shown", [True], indirect=True)
def test_a_terminal_shows_how_the_run_stands(shown: io.StringIO) -> None:
    with progress.RunView() as view:
        for event in HISTORY[:-2]:
            view.event(event)
    *_, step_, loss, speed, evaluation, checkpoint, goodput, _ = lines(shown.getvalue())
    assert re.search(r"step +[━╸╺]+ +8 of 10$", step_)
    assert re.fullmatch(r"loss +0\.2500  learning rate 1\.00e-03  gradient norm 1  \(0:\d\d:\d\d ago\)", loss)
    assert re.fullmatch(r"speed +1,234\.5 examples/s  2,469\.0 clips/s  waiting for data 1\.2%", speed)
    assert re.fullmatch(r"evaluation +mAP 0\.6000 at step 8, best 0\.7000 at step 4", evaluation)
    assert re.fullmatch(r"checkpoint +step 4  \(0:\d\d:\d\d ago\)", checkpoint)
    assert re.fullmatch(r"goodput +\d+\.\d% since this command was started, 3 incidents", goodput)


@pytest.mark.parametrize("shown", [True], indirect=True)
def test_a_terminal_shows_an_evaluation_while_it_goes_on(shown: io.StringIO) -> None:
    with progress.RunView() as view:
        for event in HISTORY[:4]:
            view.event(event)
    assert any(re.search(r"scoring +[━╸╺]+ +7 of 20 clips$", line) for line in lines(shown.getvalue()))


@pytest.mark.parametrize("shown", [True], indirect=True)
def test_a_restart_is_not_shown_as_further_than_it_is(shown: io.StringIO) -> None:
    with progress.RunView() as view:
        for event in (started(), step(8), started(4)):
            view.event(event)
    assert re.search(r"step +[━╸╺]+ +4 of 10$", lines(shown.getvalue())[-3])


@pytest.mark.parametrize("shown", [False, True], indirect=True)
def test_an_evaluation_alone_has_a_bar(shown: io.StringIO) -> None:
    with progress.RunView() as view:
        view.event(EvaluationProgress(0, 20, 20))
        view.event(Evaluated(0, 20, {"accuracy": 0.5}))
    assert "score" in shown.getvalue()
    assert "20/20" in shown.getvalue()
    assert "accuracy 0.5000  on 20 clips" in lines(shown.getvalue())


@pytest.mark.parametrize("shown", [False], indirect=True)
def test_a_file_gets_a_line_now_and_then(shown: io.StringIO) -> None:
    with progress.RunView() as view:
        view.event(started())
        for done in range(1, 11):
            view.event(step(done, loss=0.5))
    trained = [line for line in shown.getvalue().splitlines() if line.startswith("train  ")]
    assert "train  1/10  loss 0.5000" in trained[0]
    assert (
        "train  10/10  loss 0.5000  lr 1.00e-03  100.0 examples/s  200.0 clips/s  waiting for data 1.0%" in trained[-1]
    )
    assert len(trained) < 10


def test_the_time_left_is_told_by_the_speed_since_the_first_step() -> None:
    assert progress._time_left(20, 100, (10, 1000.0), 1005.0) == "0:00:40 left"
    assert progress._time_left(10, 100, (10, 1000.0), 1005.0) == ""
    assert progress._time_left(100, 100, (10, 1000.0), 1005.0) == ""
    assert progress._time_left(10, 100, None, 1005.0) == ""
