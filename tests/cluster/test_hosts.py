"""A run on several hosts, whose network is cut: tests.support.hosts is the machine room.

Each test starts a Ray head and two worker hosts of one CPU each and submits the run from a fourth host. All hosts see
the run's folder, a host that is cut off too: what it still writes comes there.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import pytest
import yaml
from safetensors.numpy import load_file

from shards.sources.audioset import read_audioset
from tests.conftest import pack_here, small_recipe, write_tone_set
from tests.support.commands import erann
from tests.support.hosts import Host, Network, hosts

T = TypeVar("T")

STEPS = 600
ENVIRONMENT = {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "PYTHONPATH": str(Path(__file__).parents[2]),
    "RAY_TMPDIR": "/dev/shm",  # the one place that is a host's own
    # A host that is gone is noticed within seconds. One that is cut off lives on as long as a test wants it to.
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tones")
    return pack_here(read_audioset(*write_tone_set(root, 40)), root / "shards")


def write_recipe(shards: Path, folder: Path, **run: object) -> Path:
    """A run of small steps in a folder.

    With two micro-batches a step there is only one order of summation, so that runs on one and on two workers agree
    to the bit.
    """
    recipe = small_recipe(
        shards,
        folder / "run",
        optim={"global_batch": 4, "micro_batch": 2, "examples": 4 * STEPS},
        checkpoint={"every": 10},
        run={"engine": "deepspeed", **run},
    )
    (folder / "run.yaml").write_text(yaml.safe_dump(recipe.model_dump()))
    return folder / "run.yaml"


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same run in one process, without Ray."""
    folder = tmp_path_factory.mktemp("undisturbed")
    erann(folder, "pretrain", write_recipe(shards, folder, launcher="none"))
    return folder / "run"


@dataclass(frozen=True)
class Job:
    """A run that was submitted to a cluster of hosts."""

    run: Path
    network: Network
    submission: subprocess.Popen[bytes]
    output: Path

    def lines(self, event: str) -> list[dict[str, Any]]:
        """The run's log, as far as it is written."""
        log = self.run / "metrics.jsonl"
        text = log.read_text() if log.exists() else ""
        complete = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return [line for line in complete if line["event"] == event]

    def step(self) -> int:
        """The last step that was done."""
        return max((line["step"] for line in self.lines("Step")), default=0)

    def wait_for(self, what: str, look: Callable[[], T], seconds: float = 240, every: float = 0.2) -> T:
        """What it sees, once that is something."""
        deadline = time.monotonic() + seconds
        while not (seen := look()):
            assert time.monotonic() < deadline, f"no {what} in {seconds:g} s\n{self.output.read_text()[-5000:]}"
            assert self.submission.poll() is None, f"ended before {what}\n{self.output.read_text()[-5000:]}"
            time.sleep(every)
        self.tell(what)
        return seen

    def tell(self, what: str) -> None:
        """For whoever runs the test with -s."""
        print(f"{time.strftime('%H:%M:%S')} step {self.step():3}: {what}", flush=True)

    def wait_for_start(self, number: int) -> dict[str, Any]:
        """The run's workers are started for the nth time: from which step, on which hosts."""
        start = self.wait_for(f"start {number}", lambda: self.lines("Started")[number - 1 : number])[0]
        self.tell(f"from step {start['step']} on {', '.join(start['hosts'])}")
        return start

    def wait_for_steps(self, number: int) -> None:
        last = self.step()
        self.wait_for(f"{number} steps more", lambda: self.step() >= last + number)

    def incidents(self) -> list[dict[str, Any]]:
        """Without a checkpoint that was just being written."""
        return [line for line in self.lines("Incident") if line["kind"] != "checkpoint"]

    def finish(self) -> None:
        assert self.submission.wait(timeout=400) == 0, self.output.read_text()[-5000:]
        self.tell("finished")
        for incident in self.incidents():
            print(*(f"{key}={incident[key]}" for key in ("kind", "text", "steps_lost", "seconds_lost")), flush=True)
        print(f"goodput={self.lines('Finished')[0]['goodput']}", flush=True)

    def cut(self, host: Host) -> None:
        self.network.cut(host)
        self.tell(f"{host.name} is cut off")

    def join(self, host: Host) -> None:
        self.network.join(host)
        self.tell(f"{host.name} is back")

    def host(self, name: str) -> Host:
        return next(host for host in self.network.hosts if host.name == name)

    def require_same_course(self, undisturbed: Path) -> None:
        """Each step is there once, and came to what the sample stream promises; so did the weights."""
        expected = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
        losses = [(line["step"], line["loss"]) for line in expected if line["event"] == "Step"]
        assert [step for step, _ in losses] == list(range(1, STEPS + 1))
        assert [(line["step"], line["loss"]) for line in self.lines("Step")] == losses
        weights = load_file(self.run / "model" / "model.safetensors")
        for name, value in load_file(undisturbed / "model" / "model.safetensors").items():
            np.testing.assert_array_equal(weights[name], value, err_msg=name)

    def require_whole_checkpoints(self) -> None:
        """Every checkpoint on disk is what its marker says, to the byte, and the last is the run's end."""
        paths = sorted(path.parent for path in self.run.glob("checkpoints/step-*/COMMITTED"))
        for path in paths:
            marker = json.loads((path / "COMMITTED").read_text())
            assert marker == {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in marker}
            assert path.name.startswith(f"step-{json.loads((path / 'state.json').read_text())['step']:08d}-")
            load_file(path / "state.safetensors")
        assert paths[-1].name.startswith(f"step-{STEPS:08d}-")


def training_process(host: Host) -> psutil.Process:
    (found,) = [process for process in host.processes() if "RayTrainWorker" in " ".join(process.cmdline())]
    return found


@contextmanager
def submitted(recipe: Path, log_folder: Path) -> Iterator[Job]:
    """The run, submitted over the network to a new cluster; all is gone at the end."""
    with hosts("head", "worker-1", "worker-2", "laptop", **ENVIRONMENT) as network:
        head, *workers, laptop = network.hosts
        ray_start = ["ray", "start", "--block", "--object-store-memory=100000000"]
        own = ["--port=6379", "--dashboard-host=0.0.0.0", "--num-cpus=0", f"--node-ip-address={head.address}"]
        head.popen(*ray_start, "--head", *own, log=log_folder / "head.log")
        for host in workers:
            own = [f"--address={head.address}:6379", "--num-cpus=1", f"--node-ip-address={host.address}"]
            # On a host that was given up Ray ends as soon as it hears of it. A service manager starts it again.
            forever = f"while true; do {' '.join([*ray_start, *own])}; sleep 1; done"
            host.popen("bash", "-c", forever, log=log_folder / f"{host.name}.log")
        address = f"http://{head.address}:8265"
        wait_for_nodes(address, 3)
        output = log_folder / "job.log"
        submit = ["ray", "job", "submit", f"--address={address}", "--", "erann", "pretrain", recipe]
        job = Job(recipe.with_suffix(""), network, laptop.popen(*submit, log=output), output)
        job.tell("submitted")
        yield job


def wait_for_nodes(address: str, number: int) -> None:
    """Until Ray has so many nodes."""
    deadline, found = time.monotonic() + 180, 0
    while found < number:
        assert time.monotonic() < deadline, f"only {found} nodes at {address}"
        time.sleep(0.2)
        with suppress(OSError), urllib.request.urlopen(f"{address}/api/v0/nodes", timeout=10) as answer:
            found = len(json.load(answer)["data"]["result"]["result"])


@pytest.mark.slow
def test_a_host_is_cut_off_and_comes_back(shards: Path, undisturbed: Path, tmp_path: Path) -> None:
    """The run goes on with the other host, and with both again. It is rank 0's: log and checkpoints change hands."""
    recipe = write_recipe(shards, tmp_path, launcher="ray", workers={"min": 1, "max": 2})
    with submitted(recipe, tmp_path) as job:
        names = job.wait_for_start(1)["hosts"]
        assert sorted(names) == ["worker-1", "worker-2"]
        lost = job.host(names[0])
        job.wait_for_steps(15)
        process, before = training_process(lost), job.step()
        job.cut(lost)
        alone = job.wait_for_start(2)
        assert alone["hosts"] == [names[1]]
        job.wait_for_steps(10)
        assert process.is_running()  # it was cut off and has not ended
        job.join(lost)
        assert sorted(job.wait_for_start(3)["hosts"]) == ["worker-1", "worker-2"]
        job.finish()

        cut, back = job.incidents()
        assert (cut["kind"], back["kind"]) == ("failure", "resize")
        assert cut["text"].startswith(f"node {lost.address} lost")
        assert cut["steps_lost"] >= before - alone["step"]
        assert cut["seconds_lost"] > 0
        assert back["text"].startswith("resized from 1 to 2 workers")
        assert back["steps_lost"] == 0
        assert back["seconds_lost"] > 0
        job.require_whole_checkpoints()
        job.require_same_course(undisturbed)


@pytest.mark.slow
def test_a_writer_that_is_cut_off_does_no_harm(shards: Path, undisturbed: Path, tmp_path: Path) -> None:
    """It freezes in the middle of a checkpoint and wakes up when the run goes on elsewhere: it finds that, and ends."""
    with submitted(write_recipe(shards, tmp_path, launcher="ray", workers=1), tmp_path) as job:
        stale = job.host(job.wait_for_start(1)["hosts"][0])
        job.wait_for_steps(15)
        writer = training_process(stale)

        def is_frozen_while_it_writes() -> bool:
            if not is_writing(job.run):
                return False
            writer.suspend()
            if not is_writing(job.run):
                writer.resume()
                return False
            return True

        job.wait_for("a checkpoint that is being written", is_frozen_while_it_writes, every=0.001)
        job.cut(stale)
        assert job.wait_for_start(2)["hosts"] != [stale.name]
        job.wait_for_steps(15)
        assert has_open(writer, "metrics.jsonl")
        writer.resume()
        job.tell(f"the worker on {stale.name} goes on")
        job.wait_for("its end", lambda: not has_open(writer, "metrics.jsonl"))
        assert writer.is_running()  # nobody has ended it: it gave the run up
        job.join(stale)
        job.finish()
        (incident,) = job.incidents()
        assert incident["text"].startswith(f"node {stale.address} lost")
        job.require_whole_checkpoints()
        job.require_same_course(undisturbed)
        assert {path.name[-4:] for path in job.run.glob("checkpoints/*")} == {"0002"}


def is_writing(run: Path) -> bool:
    """Whether a checkpoint has files, but not yet its marker."""
    folders = [path for path in run.glob("checkpoints/step-*") if any(path.iterdir())]
    return any(not (path / "COMMITTED").exists() for path in folders)


def has_open(process: psutil.Process, name: str) -> bool:
    """Whether the process has a file of this name open, be it one that is no longer in its folder."""
    for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            if Path(os.readlink(descriptor).removesuffix(" (deleted)")).name == name:
                return True
    return False
