"""A run's log in an S3 bucket, whose server may fail, and the list of the runs there."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from erann_dist.errors import UsageError, UserError
from erann_dist.log.events import CheckpointSaved
from erann_dist.log.run_log import RunLog, read_log
from erann_dist.storage.folder import Folder, open_folder
from jobs.runs.summary import find_run, list_runs, show_run
from tests.support.run_logs import started, step, write_log
from tests.support.s3 import DENIED, DROP, INTERNAL_ERROR, LOSE, Server, always, once, s3_server


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def server(running: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The server, empty; uploads only when asked for, and short pauses."""
    monkeypatch.setattr("erann_dist.storage.s3.ATTEMPTS", 2)
    monkeypatch.setattr("erann_dist.storage.s3.PATIENT_ATTEMPTS", 2)
    monkeypatch.setattr("erann_dist.storage.s3.PAUSE_S", 0.001)
    monkeypatch.setattr("erann_dist.log.run_log.UPLOAD_S", 3600.0)
    running.empty()
    yield running
    running.empty()


@pytest.fixture
def folder(server: Server) -> Folder:
    return open_folder(f"{server.bucket_url}/runs/one", server.endpoint)


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def steps(folder: Folder) -> list[int]:
    return [line["step"] for line in read_log(folder) if line["event"] == "Step"]


def test_the_log_is_uploaded_when_asked_for_and_at_the_end(server: Server, folder: Folder) -> None:
    log = RunLog(folder, 0)
    log.event(started())
    wait_until(lambda: read_log(folder))
    log.event(step(1))
    log.event(CheckpointSaved(1, "there", 0.1, 0.0))
    wait_until(lambda: len(read_log(folder)) == 3)
    log.event(step(2))
    log.flush()
    wait_until(lambda: steps(folder) == [1, 2])
    log.event(step(3))
    assert steps(folder) == [1, 2]
    log.close()
    assert log.problem is None
    assert steps(folder) == [1, 2, 3]
    names = list(folder.sizes())
    assert names[0] == "metrics.jsonl"
    assert len(names) == 2
    assert names[1].startswith("tensorboard/events.out.tfevents.")


def test_the_log_is_uploaded_now_and_then(server: Server, folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("erann_dist.log.run_log.UPLOAD_S", 0.1)
    log = RunLog(folder, 0)
    log.event(step(1))
    wait_until(lambda: steps(folder) == [1])
    log.close()


def test_the_next_start_goes_on_from_what_was_uploaded(server: Server, folder: Folder) -> None:
    log = RunLog(folder, 0)
    for done in (1, 2, 3):
        log.event(step(done))
    log.close()
    log = RunLog(folder, 2)
    assert [line["step"] for line in log.found] == [1, 2, 3]
    assert steps(folder) == [1, 2]  # at once
    log.event(step(3, loss=0.5))
    log.close()
    assert [line["loss"] for line in read_log(folder) if line["event"] == "Step"] == [1.0, 1.0, 0.5]


def test_an_outage_does_not_end_the_run_and_loses_nothing(server: Server, folder: Folder) -> None:
    log = RunLog(folder, 0)
    server.faults = always(INTERNAL_ERROR)
    log.event(started())
    wait_until(lambda: log.problem)
    assert "metrics.jsonl" in str(log.problem)
    log.event(step(1))
    server.faults = lambda request: None
    log.flush()
    wait_until(lambda: log.problem is None)
    assert steps(folder) == [1]
    log.close()
    assert steps(folder) == [1]


def test_an_outage_at_the_end_is_told(server: Server, folder: Folder) -> None:
    log = RunLog(folder, 0)
    server.faults = always(DROP)
    log.event(step(1))
    log.close()
    assert "metrics.jsonl could not be" in str(log.problem)


def test_an_upload_whose_answer_was_lost_is_not_taken_for_anothers(server: Server, folder: Folder) -> None:
    log = RunLog(folder, 0)
    log.event(started())
    wait_until(lambda: read_log(folder))
    log.event(step(1))
    server.faults = always(LOSE, "PutObject")
    log.flush()
    wait_until(lambda: log.problem and "metrics.jsonl could not be written" in log.problem)
    assert steps(folder) == [1]
    server.faults = lambda request: None
    log.event(step(2))
    log.close()
    assert steps(folder) == [1, 2]


def test_a_start_that_was_replaced_no_longer_uploads_the_log(server: Server, folder: Folder) -> None:
    old = RunLog(folder, 0)
    old.event(started(launched=1.0))
    wait_until(lambda: read_log(folder))
    old.event(step(1))
    new = RunLog(folder, 0)
    new.event(started(launched=2.0))
    wait_until(lambda: len(read_log(folder)) == 2)
    old.event(step(2, loss=9.0))
    old.close()
    assert [line["launched"] for line in read_log(folder)] == [1.0, 2.0]
    new.event(step(1, loss=5.0))
    new.close()
    lines = [json.loads(line) for line in folder.read("metrics.jsonl").splitlines()]
    assert [line.get("launched", line.get("loss")) for line in lines] == [1.0, 2.0, 5.0]


def test_a_start_wins_over_one_that_uploads_once_more(server: Server, folder: Folder) -> None:
    """The old one uploads after the new one read the log, and before it says that it started."""
    old = RunLog(folder, 0)
    old.event(started(launched=1.0))
    wait_until(lambda: read_log(folder))
    new = RunLog(folder, 0)
    old.event(step(1, loss=9.0))
    old.close()
    assert steps(folder) == [1]
    new.event(started(launched=2.0))
    new.close()
    assert [line["launched"] for line in read_log(folder)] == [1.0, 2.0]


def test_a_single_fault_is_no_problem(server: Server, folder: Folder) -> None:
    log = RunLog(folder, 0)
    server.faults = once(DROP, "PutObject")
    log.event(step(1))
    log.close()
    assert log.problem is None
    assert steps(folder) == [1]


def test_the_runs_below_a_prefix(server: Server, tmp_path: Path) -> None:
    now = time.time()
    for name, began in (("one", now - 20), ("study/two", now - 90000)):
        folder = open_folder(f"{server.bucket_url}/runs/{name}", server.endpoint)
        write_log(folder, (began, started(launched=began)), (began + 10, step(4, seconds=5.0)))
        folder.write("checkpoints/step-00000004-0001/COMMITTED", b"{}")
    url = f"{server.bucket_url}/runs"
    listed = {run["run"]: run["state"] for run in list_runs(url, server.endpoint)["runs"]}
    assert listed == {"one": "running", "study/two": "stopped"}
    assert find_run(url, "study/two", server.endpoint) == (url, "study/two")
    assert find_run(f"{url}/one/", None, server.endpoint) == (url, "one")
    shown = show_run(url, "study/two", server.endpoint, tmp_path / "two.png")
    assert (shown["step"], shown["goodput"]) == (4, 0.5)
    assert (tmp_path / "two.png").stat().st_size > 10_000


def test_prefixes_without_the_run(server: Server) -> None:
    url = f"{server.bucket_url}/runs"
    with pytest.raises(UsageError, match=rf"^{url}: contains no run \(no metrics\.jsonl\)"):
        list_runs(url, server.endpoint)
    write_log(open_folder(f"{url}/one", server.endpoint), (1.0, started()))
    with pytest.raises(UsageError, match=f"^{url}: no run on; did you mean one\\?$"):
        find_run(url, "on", server.endpoint)
    with pytest.raises(UserError, match="could not be listed: no such bucket"):
        list_runs("s3://nowhere/runs", server.endpoint)
    server.faults = always(DENIED)
    with pytest.raises(UserError, match=f"^{url} could not be listed: access denied"):
        list_runs(url, server.endpoint)
