"""Jobs on a real Ray cluster with a dashboard: sent, followed, left, stopped, sent again, killed, cut off."""

import http.server
import json
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from erann_dist.errors import UserError
from erann_dist.log.run_log import read_log
from erann_dist.storage.folder import LocalFolder
from tests.conftest import small_recipe, small_steps
from tests.jobs.test_pipeline import write_pipeline
from tests.support.commands import Running, erann
from tests.support.folded import write_folded_set, write_protocol

SECRET = "wJalrXUtnFEMI-not-to-be-seen"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Nodes:
    """A Ray cluster of a head without CPUs and a node of two, with its dashboard."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        port = free_port()
        head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": port}
        # What machines of their own would have: the agents that start jobs want the same port by default, and each
        # unpacks a job's package into the temporary folder, again even where another one's job is using it.
        self.cluster = Cluster(initialize_head=True, head_node_args=head | {"dashboard_agent_listen_port": free_port()})
        folder = tempfile.mkdtemp(prefix="")  # a short path, for sockets
        self.cluster.add_node(num_cpus=2, dashboard_agent_listen_port=free_port(), temp_dir=folder)
        self.gcs = self.cluster.address
        self.address = f"http://127.0.0.1:{port}"


@contextmanager
def nodes() -> Iterator[Nodes]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")  # jobs run `python`
        made = Nodes()
    try:
        yield made
    finally:
        made.cluster.shutdown()


@pytest.fixture(scope="module")
def ray() -> Iterator[Nodes]:
    """For the tests that leave it as it is."""
    with nodes() as made:
        yield made


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to submit from, where secrets are in the environment."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    return tmp_path


def write_recipe(place: Path, shards: Path, steps: int) -> Path:
    run = {"launcher": "ray", "engine": "torch"}
    every = {"every": 5}
    optim = small_steps(steps)
    recipe = small_recipe(shards, place / "runs" / "tones", run=run, optim=optim, checkpoint=every)
    (place / "tones.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True)))
    return Path("tones.yaml")


def lines_of(place: Path, event: str) -> list[dict[str, Any]]:
    folder = place / "runs" / "tones"
    return [line for line in read_log(LocalFolder(str(folder))) if line["event"] == event] if folder.exists() else []


def wait_until(is_so: Any, what: str, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def has_checkpoint(place: Path) -> bool:
    return any((place / "runs" / "tones" / "checkpoints").glob("*/COMMITTED"))


def test_submitted_and_submitted_again(place: Path, tone_shards: Path, ray: Nodes) -> None:
    """It trains once. No secret of the client's is with the job."""
    recipe = write_recipe(place, tone_shards, 4)
    command = ["submit", "pretrain", recipe, "--address", ray.address]
    first = erann(place, *command)
    assert (first["status"], first["new"], first["exit_code"]) == ("SUCCEEDED", True, 0)
    assert len(lines_of(place, "Started")) == 1
    again = erann(place, *command)
    assert (again["status"], again["new"]) == ("SUCCEEDED", True)
    assert again["job"] != first["job"]
    assert len(lines_of(place, "Started")) == 1
    listed = erann(place, "jobs", "list", "--address", ray.address)["jobs"]
    assert [job["job"] for job in listed if job["run"] == str(place / "runs" / "tones")] == [first["job"], again["job"]]

    from cluster.submit.ray_jobs import connect, find, logs

    cluster = connect(ray.address)
    seen = [json.dumps(find(cluster, first["job"]).dict()), logs(cluster, first["job"])]
    assert all(SECRET not in text for text in seen)
    assert "eu-central-1" in seen[0]
    assert "finished after" in seen[1]


def test_left_followed_and_stopped(place: Path, tone_shards: Path, ray: Nodes) -> None:
    """Ctrl-C leaves the job running; the same command comes back to it; a stop saves a checkpoint; it is resumed."""
    recipe = write_recipe(place, tone_shards, 3000)
    command = ["submit", "pretrain", recipe, "--address", ray.address]
    running = Running(place, *command)
    running.wait_for_text("train  ")
    assert running.end(signal.SIGINT) == 130
    assert "detached; the job is still running" in running.text()
    assert "Traceback" not in running.text()
    (job,) = [job for job in erann(place, "jobs", "list", "--address", ray.address)["jobs"] if str(place) in job["run"]]
    assert job["status"] == "RUNNING"
    assert f"erann jobs stop {job['job']} --address {ray.address}" in running.text()

    detached = erann(place, *command, "--detach")
    assert (detached["job"], detached["new"]) == (job["job"], False)
    following = Running(place, "jobs", "logs", job["job"], "--follow", "--address", ray.address)
    following.wait_for_text("train  ")
    wait_until(lambda: has_checkpoint(place), "a checkpoint")
    stopped = erann(place, "jobs", "stop", job["job"], "--address", ray.address)
    assert stopped["status"] == "STOPPED"
    assert following.process.wait(timeout=60) == 143
    (end,) = lines_of(place, "Ended")
    assert end["told"]
    done = max(line["step"] for line in lines_of(place, "Step"))
    assert erann(place, "jobs", "stop", job["job"], "--address", ray.address)["status"] == "STOPPED"  # once more

    again = erann(place, *command, "--detach")
    assert again["new"]
    wait_until(lambda: len(lines_of(place, "Started")) == 2, "a second start")
    assert lines_of(place, "Started")[1]["step"] == done  # no step is lost
    erann(place, "jobs", "stop", again["job"], "--address", ray.address)


def test_the_commands_process_is_killed(place: Path, tone_shards: Path, ray: Nodes) -> None:
    """It is started again, and the run goes on from its checkpoint to its end."""
    recipe = write_recipe(place, tone_shards, 60)
    running = Running(place, "submit", "pretrain", recipe, "--address", ray.address)
    wait_until(lambda: has_checkpoint(place), "a checkpoint")
    (command,) = [each for each in psutil.process_iter(["cmdline"]) if is_command(each, place)]
    command.kill()
    assert running.process.wait(timeout=240) == 0, running.text()
    assert "the command was killed by SIGKILL; started again, 1 of 3 times" in running.text()
    first, second = lines_of(place, "Started")
    assert first["step"] == 0 < second["step"]
    assert (place / "runs" / "tones" / "model" / "config.json").exists()


def is_command(process: psutil.Process, place: Path) -> bool:
    """Whether it is the command that a job runs, on a run below the place."""
    with suppress(psutil.Error):
        lock = str(place / "runs" / "tones" / ".lock")
        return "jobs.cli.__main__" in process.info["cmdline"] and any(
            file.path == lock for file in process.open_files()
        )
    return False


def test_what_the_run_refuses_is_the_jobs_failure(place: Path, ray: Nodes) -> None:
    """Found on the cluster: exit code and message are those of the command there."""
    recipe = write_recipe(place, place / "nothing", 4)
    running = Running(place, "submit", "pretrain", recipe, "--address", ray.address)
    assert running.process.wait(timeout=120) == 2
    assert f"erann: {place}/nothing: no such folder" in running.text()
    (job,) = [job for job in erann(place, "jobs", "list", "--address", ray.address)["jobs"] if str(place) in job["run"]]
    assert job["status"] == "FAILED"
    assert job["message"].startswith(f"erann: {place}/nothing: no such folder")


@pytest.mark.slow
def test_preflight_by_a_job(place: Path, tone_shards: Path, ray: Nodes) -> None:
    """Its verdicts, its JSON and its exit code are those of the command on the cluster."""
    recipe = write_recipe(place, tone_shards, 200)
    command = ["preflight", "--address", ray.address, recipe]
    ready = erann(place, *command)
    assert ready["ready"]
    assert {check["check"]: check["state"] for check in ready["checks"]}["step"] == "ok"
    assert not (place / "runs").exists()
    running = Running(place, *command, "run.workers=3")
    assert running.process.wait(timeout=180) == 1
    assert re.search(r"^FAILED +nodes ", running.text(), re.MULTILINE)
    listed = erann(place, "jobs", "list", "--address", ray.address)["jobs"]
    assert [(job["run"], job["status"]) for job in listed if str(place) in job["run"]] == [
        (f"preflight of {place}/runs/tones", "SUCCEEDED"),
        (f"preflight of {place}/runs/tones", "FAILED"),
    ]


def test_another_version(place: Path, tone_shards: Path, ray: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    from cluster.submit import ray_jobs
    from cluster.submit.package import make_package, versions

    monkeypatch.chdir(place)
    recipe = write_recipe(place, tone_shards, 4)
    monkeypatch.setattr(ray_jobs, "versions", lambda: versions() | {"torch": "2.9.0"})
    cluster = ray_jobs.connect(ray.address)
    package = make_package({str(recipe): recipe})
    job, _ = ray_jobs.submit(
        cluster, ray_jobs.Submission(["pretrain", str(recipe)], str(place / "runs"), True, package, "image")
    )
    text: list[str] = []
    assert ray_jobs.follow(cluster, job, text.append, text.append) == "FAILED"
    assert "erann: the cluster has other versions" in "".join(text)
    assert f"torch {versions()['torch']} here, 2.9.0 there" in "".join(text)
    assert not (place / "runs").exists()


def test_two_at_the_same_moment(place: Path, tone_shards: Path, ray: Nodes) -> None:
    recipe = write_recipe(place, tone_shards, 3000)
    command = ["submit", "pretrain", recipe, "--address", ray.address, "--detach", "--json"]
    both = []
    for name in ("one", "two"):
        (place / name).mkdir()
        shutil.copy(place / recipe, place / name)
        both.append(Running(place / name, *command))
    for each in both:
        assert each.process.wait(timeout=60) == 0
    jobs = [json.loads(each.text().splitlines()[-1]) for each in both]
    assert jobs[0]["job"] == jobs[1]["job"]
    assert {each["new"] for each in jobs} == {True, False}
    refused = erann(place, *command[:3], "optim.lr=0.1", "--address", ray.address, code=1)
    assert f"job {jobs[0]['job']} already trains it, by another command: " in refused
    (place / recipe).write_text((place / recipe).read_text() + "# another\n")
    refused = erann(place, *command[:3], "--address", ray.address, code=1)
    assert "by the same command, but the recipes here have changed since" in refused
    erann(place, "jobs", "stop", jobs[0]["job"], "--address", ray.address)


@pytest.mark.slow
def test_a_cross_validation_that_is_stopped_goes_on(place: Path, ray: Nodes) -> None:
    """Its run saves a checkpoint, although Ray tells every process of the job to end, and the command tells it too."""
    shards = write_folded_set(place / "set", [1, 2])
    sections = {"optim": {"examples": 16 * 60}, "evaluate": {"every": 60, "pad_s": 1}, "checkpoint": {"every": 60}}
    write_protocol(place / "tones.yaml", shards, run={"launcher": "ray", "workers": 2}, **sections)
    run = LocalFolder(str(place / "runs" / "tones" / "fold-1"))

    def last(event: str) -> dict[str, Any]:
        return [line for line in read_log(run) if line["event"] == event][-1]

    command = ["submit", "finetune", "tones.yaml", "--from", "none", "--address", ray.address]
    running = Running(place, *command)
    running.wait_for_text("tones/fold-1: step ", seconds=400)
    (job,) = re.findall(r"^(\S+): submitted", running.text(), re.MULTILINE)
    assert erann(place, "jobs", "stop", job, "--address", ray.address)["status"] == "STOPPED"
    assert running.process.wait(timeout=60) == 143
    assert last("Ended")["told"]
    assert (done := last("Step")["step"]) < 60
    assert erann(place, *command)["status"] == "SUCCEEDED"
    assert last("Started")["step"] == done  # no step is lost
    result = json.loads((place / "runs" / "tones" / "results.json").read_text())
    assert [fold["fold"] for fold in result["folds"]] == [1, 2]


@pytest.mark.slow
def test_a_pipeline(place: Path, ray: Nodes) -> None:
    """From pretraining to the report, as one job."""
    shards = write_folded_set(place / "set", [1, 2])
    path = write_pipeline(place, shards).relative_to(place)
    tree = yaml.safe_load((place / path).read_text())
    for stage in (tree["pretrain"], *tree["finetune"]):
        stage["recipe"] = Path(stage["recipe"]).name  # they go along
        stage["set"] = {"run": {"launcher": "ray"}}
    (place / path).write_text(yaml.safe_dump(tree))
    submitted = erann(place, "submit", "pipeline", path, "--address", ray.address)
    assert submitted["status"] == "SUCCEEDED"
    assert submitted["run"] == str(place / "runs" / "all")
    for validation in ("one", "two"):
        result = json.loads((place / "runs" / "all" / validation / "results.json").read_text())
        assert len(result["folds"]) == 2
        assert result["init"] == str(place / "runs/all/first/model")
    assert (place / "runs/all/report.html").exists()


def test_a_job_of_an_odd_name(place: Path, ray: Nodes) -> None:
    """Sent by something else than this program."""
    from ray.job_submission import JobSubmissionClient

    name = "who's job 1: ä +b"
    JobSubmissionClient(ray.address).submit_job(entrypoint="echo hello; sleep 600", submission_id=name)
    wait_until(lambda: erann(place, "jobs", "status", name, "--address", ray.address)["status"] == "RUNNING", "a start")
    running = Running(place, "jobs", "logs", name, "--address", ray.address)
    assert running.process.wait(timeout=60) == 0
    assert "\nhello\n" in running.text()
    assert erann(place, "jobs", "stop", name, "--address", ray.address)["status"] == "STOPPED"
    assert erann(place, "jobs", "status", "no/such job", "--address", ray.address, code=1).startswith(
        "erann: no/such job: no such job at "
    )


def test_a_job_that_the_cluster_no_longer_knows(ray: Nodes) -> None:
    """As after its head was replaced: nothing to wait for."""
    from cluster.submit import ray_jobs

    with pytest.raises(UserError, match=f"pretrain-tones-9: unknown at {ray.address}"):
        ray_jobs.follow(ray_jobs.connect(ray.address), "pretrain-tones-9", print, print)


def test_a_command_that_never_begins(place: Path, ray: Nodes) -> None:
    """Ray could not make its environment; no log says why."""
    from ray.job_submission import JobSubmissionClient

    job = JobSubmissionClient(ray.address).submit_job(
        entrypoint="true", runtime_env={"working_dir": "gcs://_ray_pkg_0123456789abcdef.zip"}
    )
    following = Running(place, "jobs", "logs", job, "--follow", "--address", ray.address)
    assert following.process.wait(timeout=120) == 1
    assert re.search(rf"^{job}: failed: .*_ray_pkg_0123456789abcdef", following.text(), re.MULTILINE)


class Link:
    """A way to the dashboard that can be cut."""

    def __init__(self, port: int) -> None:
        self._target = port
        self.port = free_port()
        self._open: list[socket.socket] = []
        self._listener: socket.socket | None = None

    def up(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._serve, args=[self._listener], daemon=True).start()

    def down(self) -> None:
        assert self._listener
        for each in [self._listener, *self._open]:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._open.clear()

    def _serve(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
                self._open += [client, server]
                for one, other in ((client, server), (server, client)):
                    threading.Thread(target=self._pass_on, args=[one, other], daemon=True).start()

    @staticmethod
    def _pass_on(one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(1 << 16):
                other.sendall(data)
            other.shutdown(socket.SHUT_WR)


def test_a_lost_connection(place: Path, ray: Nodes) -> None:
    """The log is shown once, from its beginning to its end."""
    from ray.job_submission import JobSubmissionClient

    link = Link(int(ray.address.rpartition(":")[2]))
    link.up()
    counting = "for i in $(seq 30); do echo line $i; sleep 0.5; done"
    job = JobSubmissionClient(ray.address).submit_job(entrypoint=counting)
    following = Running(place, "jobs", "logs", job, "--follow", "--address", f"http://127.0.0.1:{link.port}")
    following.wait_for_text("line 5\n")
    link.down()
    following.wait_for_text("lost")
    link.up()
    following.wait_for_text("reconnected to")
    assert following.process.wait(timeout=120) == 0
    link.down()
    shown = [line for line in following.text().splitlines() if line.startswith("line ")]
    assert shown == [f"line {i}" for i in range(1, 31)]


def test_the_head_is_gone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a job is followed. It says how to come back."""
    from ray.job_submission import JobSubmissionClient

    from cluster.submit import ray_jobs

    monkeypatch.setattr(ray_jobs, "_PATIENCE_S", 5.0)
    said: list[str] = []
    with nodes() as own:
        job = JobSubmissionClient(own.address).submit_job(entrypoint="echo hello; sleep 600")
        cluster = ray_jobs.connect(own.address)

        def shut(text: str) -> None:
            if "hello" in text:
                threading.Thread(target=own.cluster.shutdown).start()

        with pytest.raises(UserError, match=f"erann jobs logs {job} --address {own.address} --follow"):
            ray_jobs.follow(cluster, job, shut, said.append)
    assert any("lost" in line for line in said)


def test_addresses(place: Path, ray: Nodes) -> None:
    """Nothing there, another service there, Ray's own other port."""
    status = ["jobs", "status", "x", "--address"]
    assert "no Ray dashboard answers there" in erann(place, *status, f"http://127.0.0.1:{free_port()}", code=1)
    assert "no Ray dashboard" in erann(place, *status, f"http://{ray.gcs}", code=1)
    assert "not a cluster's address" in erann(place, *status, ray.gcs, code=2)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        other = f"http://127.0.0.1:{server.server_address[1]}"
        assert "no Ray dashboard" in erann(place, *status, other, code=1)
        server.shutdown()
