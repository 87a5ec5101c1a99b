"""`erann runs`: how runs stand, what happened to one, and its curves."""

import json
import re
import sys
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from matplotlib.image import imread

from erann_dist.log.events import Ended, Evaluated, Finished, Incident, IncidentKind
from erann_dist.storage.folder import LocalFolder
from jobs.cli.__main__ import main
from jobs.runs.summary import list_runs, show_run
from tests.support.run_logs import started, step, write_log

DAY = 86400.0


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A finished run with a failure, one that runs, one that was stopped, and one that never began."""
    folder, now = tmp_path / "runs", time.time()
    begin = now - DAY
    write_log(
        LocalFolder(f"{folder}/study/done"),
        (begin + 10, started(launched=begin)),
        (begin + 20, step(4, seconds=10.0, loss=0.5)),
        (begin + 21, Evaluated(4, 20, {"mAP": 0.5, "mAUC": 0.9})),
        (begin + 40, started(4, launched=begin, workers=1, hosts=["one"])),
        (begin + 40, Incident(4, "failure", "worker 1 on host two was lost", steps_lost=2, seconds_lost=19.0)),
        (begin + 41, Evaluated(4, 20, {"mAP": 0.5, "mAUC": 0.9})),  # again
        (begin + 60, step(10, seconds=15.0, loss=None)),
        (begin + 70, Evaluated(10, 20, {"mAP": 0.7, "mAUC": 0.8}, averaged=3)),
        (begin + 80, Evaluated(10, 20, {"mAP": 0.6, "mAUC": 0.95})),
        (begin + 100, Finished(10, 60.0, 0.25)),
    )
    write_log(
        LocalFolder(f"{folder}/going"),
        (now - 40, started(launched=now - 50)),
        (now - 5, step(3, seconds=25.0)),
        (now - 4, Incident(3, "bad_clip", "a.tar: clip x is damaged", keys=["x"])),
    )
    write_log(
        LocalFolder(f"{folder}/stopped"),
        (now - DAY, started(launched=now - DAY)),
        (now - DAY + 50, step(3, seconds=25.0)),
    )
    write_log(LocalFolder(f"{folder}/empty"))
    return folder


def test_how_the_runs_of_a_folder_stand(runs: Path) -> None:
    found = {run.pop("run"): run for run in list_runs(str(runs), None)["runs"]}
    assert found.keys() == {"study/done", "going", "stopped", "empty"}
    done, going, stopped, empty = (found[name] for name in ("study/done", "going", "stopped", "empty"))
    assert (done["state"], done["step"], done["steps"], done["workers"]) == ("finished", 10, 10, 1)
    assert done["best"] == {"metric": "mAP", "value": 0.7, "step": 10, "averaged": 3}
    assert done["goodput"] == pytest.approx(0.25, abs=1e-6)
    assert done["incidents"] == 1
    assert done["silent_s"] == pytest.approx(DAY - 100, abs=100)
    assert (going["state"], going["step"], going["best"], going["incidents"]) == ("running", 3, None, 1)
    assert 0.1 < going["goodput"] <= 0.5
    assert (stopped["state"], stopped["step"], stopped["goodput"]) == ("stopped", 3, pytest.approx(0.5, abs=1e-6))
    assert (empty["state"], empty["step"], empty["goodput"]) == ("empty", None, None)


def test_why_a_run_was_stopped(tmp_path: Path) -> None:
    now = time.time()
    ended = Ended(3, "stop requested by SIGTERM", told=True, launched=now - 50)
    begun = [(now - 40, started(launched=now - 50)), (now - 5, step(2, seconds=25.0)), (now - 4, ended)]
    write_log(LocalFolder(f"{tmp_path}/told"), *begun)
    write_log(LocalFolder(f"{tmp_path}/again"), *begun, (now - 2, started(2, launched=now - 3)))
    write_log(LocalFolder(f"{tmp_path}/done"), *begun)
    Path(tmp_path, "done/model").mkdir()
    Path(tmp_path, "done/model/config.json").write_text("{}")
    found = {run["run"]: (run["state"], run["step"], run["why"]) for run in list_runs(str(tmp_path), None)["runs"]}
    assert found == {
        "told": ("stopped", 3, "stop requested by SIGTERM"),
        "again": ("running", 2, None),
        "done": ("finished", 3, None),  # it was killed before its log said so
    }
    # Between the commands nothing ran.
    (again,) = (run for run in list_runs(str(tmp_path), None)["runs"] if run["run"] == "again")
    assert again["goodput"] == pytest.approx(25 / (46 + 3), rel=0.05)


def test_a_run_that_is_silent_for_long_as_it_was_before_still_runs(tmp_path: Path) -> None:
    now = time.time()
    for name, evaluated_for in (("slow", 900.0), ("quick", 9.0)):
        write_log(
            LocalFolder(f"{tmp_path}/{name}"),
            (now - 4000, started(launched=now - 4000)),
            (now - 2000, step(1)) if name == "slow" else (now - 3990, step(1)),
            (now - 2000 + evaluated_for, Evaluated(1, 20, {"mAP": 0.5})) if name == "slow" else (now - 3980, step(2)),
        )
    states = {run["run"]: run["state"] for run in list_runs(str(tmp_path), None)["runs"]}
    assert states == {"slow": "running", "quick": "stopped"}


def test_what_happened_to_a_run(runs: Path) -> None:
    run = show_run(str(runs), "study/done", None, None)
    assert [(line["step"], line["workers"]) for line in run["starts"]] == [(0, 2), (4, 1)]
    assert [(line["text"], line["steps_lost"]) for line in run["incident_list"]] == [
        ("worker 1 on host two was lost", 2)
    ]
    assert [(line["step"], line["averaged"], line["metrics"]["mAP"]) for line in run["evaluations"]] == [
        (4, None, 0.5),
        (10, 3, 0.7),
        (10, None, 0.6),
    ]


@pytest.fixture
def erann(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """Run the command in this process: its exit code, stdout and last line on stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["erann", "runs", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return int(stop.value.code or 0), out, err.strip()

    return run


def test_the_list_for_a_person(erann: Any, runs: Path) -> None:
    code, out, _ = erann(runs)
    assert code == 0
    lines = [re.sub(" +", " ", line).strip() for line in out.splitlines()]
    assert lines[0] == "run state step best goodput incidents last event"
    assert "study/done finished 10/10 mAP 0.7000 25.0% 1 24 h ago" in lines
    assert "stopped stopped 3/10 50.0% 0 24 h ago" in lines
    assert "empty empty 0" in lines
    assert lines[-1].startswith("going running 3/10 ")


def test_the_page_of_a_run(erann: Any, runs: Path) -> None:
    code, out, _ = erann(runs, "study/done")
    assert code == 0
    text = re.sub(" +", " ", out)
    assert f"run {runs}/study/done" in text
    assert "best mAP 0.7000 at step 10" in text
    assert "goodput 25.0%; lost: 2 steps, 0:00:19" in text
    assert re.search(r"4 2 0:00:19 failure worker 1", text)
    assert re.search(r"10 0\.7000 0\.8000 mean of 3", text)
    assert erann(f"{runs}/study/done")[1] == out
    assert erann(f"{runs}/study/done/")[1] == out


def test_json(erann: Any, runs: Path, tmp_path: Path) -> None:
    listed = json.loads(erann(runs, "--json")[1])
    assert [run["run"] for run in listed["runs"]] == ["empty", "going", "stopped", "study/done"]
    shown = json.loads(erann(runs, "going", "--plot", tmp_path / "going.png", "--json")[1])
    assert (shown["run"], shown["state"], shown["plot"]) == ("going", "running", str(tmp_path / "going.png"))
    assert shown["incident_list"][0]["keys"] == ["x"]


def test_a_run_of_the_folder_one_is_in(erann: Any, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs)
    assert json.loads(erann("going", "--json")[1])["run"] == "going"
    monkeypatch.chdir(runs / "going")
    assert json.loads(erann(".", "--json")[1])["state"] == "running"


@pytest.mark.parametrize("name", ["study/done", "going"])
def test_the_curves_are_an_image(erann: Any, runs: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / "curves.png"
    assert erann(runs, name, "--plot", path)[0] == 0
    image = imread(path)
    assert image.shape[0] > 1000
    red = np.abs(image[..., :3] - np.array([0xC0, 0x39, 0x2B]) / 255).max(axis=-1) < 0.02
    assert red.any() == (name == "study/done")  # a failure is marked


def test_long_curves_with_every_kind_of_incident_are_drawn(tmp_path: Path) -> None:
    events = [step(n, loss=1 / n, data_wait=0.1) for n in range(1, 301)]
    incidents = [Incident(30 * i + 10, kind, "", steps_lost=5) for i, kind in enumerate(get_args(IncidentKind))]
    times = ((float(i), event) for i, event in enumerate([started(), *events, *incidents]))
    write_log(LocalFolder(f"{tmp_path}/long"), *times)
    show_run(str(tmp_path), "long", None, tmp_path / "long.svg")
    text = (tmp_path / "long.svg").read_text()
    assert "<svg" in text


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["{runs}/nowhere"], 2, "{runs}/nowhere: no such folder"),
        (["{runs}/study/done/metrics.jsonl"], 2, "{runs}/study/done/metrics.jsonl: no such folder"),
        (
            ["{other}"],
            2,
            "{other}: contains no run (no metrics.jsonl); give the folder that a recipe's run.dir names",
        ),
        (["{runs}", "goin"], 2, "{runs}: no run goin; did you mean going?"),
        (["{runs}", "xyz"], 2, "{runs}: no run xyz; there are empty, going, stopped, study/done"),
        (["{runs}", "--plot", "a.png"], 2, "{runs}: --plot needs a single run; give its name too"),
        (["{runs}", "going", "--plot", "a.foo"], 2, "a.foo: not an image format; give FILE.png"),
        (["{runs}", "going", "--plot", "{runs}/no/a.png"], 1, "{runs}/no/a.png: No such file or directory"),
        (
            ["{runs}", "empty"],
            1,
            "{runs}/empty/metrics.jsonl: contains no event; the run's workers have not started, or it is damaged",
        ),
        ([""], 2, "the path is empty; a folder is needed"),
    ],
)
def test_bad_input(erann: Any, runs: Path, tmp_path: Path, arguments: list[str], code: int, line: str) -> None:
    (tmp_path / "other").mkdir()
    names = {"runs": str(runs), "other": str(tmp_path / "other")}
    outcome = erann(*[argument.format(**names) for argument in arguments])
    assert outcome == (code, "", f"erann: {line.format(**names)}")


def test_a_run_without_a_step_is_not_drawn(erann: Any, tmp_path: Path) -> None:
    write_log(LocalFolder(f"{tmp_path}/new"), (time.time(), started(launched=time.time())))
    assert erann(tmp_path, "new")[0] == 0
    code, _, line = erann(tmp_path, "new", "--plot", tmp_path / "a.png")
    assert (code, line) == (
        1,
        f"erann: {tmp_path}/new/metrics.jsonl: contains no steps yet, so there is nothing to plot",
    )
