"""A run on several hosts, whose network is cut: tests.hosts is the machine room.

Each test starts a Ray head and two worker hosts of one CPU each and submits the run from a fourth host. All hosts see
the run's folder, a host that is cut off too: what it still writes comes there.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import pytest
import yaml
from safetensors.numpy import load_file

from shards.sources.audioset import read_audioset
from tests.commands import erann
from tests.conftest import pack_here, small_recipe, write_tone_set
from tests.hosts import Host, Network, hosts

T = TypeVar("T")

STEPS = 40
ENVIRONMENT = {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "PYTHONPATH": str(Path(__file__).parents[2]),
    "RAY_TMPDIR": "/dev/shm",  # the one place that is a host's own
    # A host that is gone is noticed within seconds.
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tones")
    return pack_here(read_audioset(*write_tone_set(root, 40)), root / "shards")


def write_recipe(shards: Path, folder: Path, **run: object) -> Path:
    """A run of small steps in a folder; the rate is so low that rounding does not grow from step to step."""
    recipe = small_recipe(
        shards,
        folder / "run",
        data={"crop_s": 0.5},
        optim={"micro_batch": 8, "examples": 16 * STEPS, "lr": 1e-4},
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

    def checkpoints(self) -> list[Path]:
        return sorted(path.parent for path in self.run.glob("checkpoints/step-*/COMMITTED"))

    def wait_for(self, what: str, look: Callable[[], T], seconds: float = 240) -> T:
        """What it sees, once that is something."""
        deadline = time.monotonic() + seconds
        while not (seen := look()):
            assert time.monotonic() < deadline, f"no {what} in {seconds:g} s\n{self.output.read_text()[-5000:]}"
            assert self.submission.poll() is None, f"ended before {what}\n{self.output.read_text()[-5000:]}"
            time.sleep(0.2)
        self.tell(what)
        return seen

    def tell(self, what: str) -> None:
        """For whoever runs the test with -s."""
        print(f"{time.strftime('%H:%M:%S')} step {self.step():3} {what}", flush=True)

    def wait_for_start(self, number: int) -> dict[str, Any]:
        """The run's workers are started for the nth time: on which hosts, from which step."""
        return self.wait_for(f"start {number}", lambda: self.lines("Started")[number - 1 : number])[0]

    def wait_for_steps(self, number: int) -> None:
        last = self.step()
        self.wait_for(f"{number} steps more", lambda: self.step() >= last + number)

    def finish(self) -> None:
        assert self.submission.wait(timeout=400) == 0, self.output.read_text()[-5000:]
        self.tell("finished")

    def host(self, name: str) -> Host:
        return next(host for host in self.network.hosts if host.name == name)

    def workers_on(self, host: Host) -> list[psutil.Process]:
        """The training's processes there."""
        family = psutil.Process(host.first).children(recursive=True)
        found = [process for process in psutil.process_iter() if "RayTrainWorker" in " ".join(process.cmdline())]
        return found or family


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
            # Ray on a host that was cut off ends when it hears that it was given up; a service manager starts it again.
            forever = f"while true; do {' '.join([*ray_start, *own])}; sleep 1; done"
            host.popen("bash", "-c", forever, log=log_folder / f"{host.name}.log")
        address = f"http://{head.address}:8265"
        probe = f"import urllib.request; urllib.request.urlopen('{address}/api/version')"
        until_up = f"until python -c \"{probe}\" 2>/dev/null; do sleep 0.5; done"
        laptop.run("timeout", 120, "bash", "-c", until_up)
        submit = ["ray", "job", "submit", f"--address={address}", "--", "erann", "pretrain", recipe]
        output = log_folder / "job.log"
        yield Job(recipe.with_suffix(""), network, laptop.popen(*submit, log=output), output)


def test_a_run_on_two_hosts(shards: Path, undisturbed: Path, tmp_path: Path) -> None:
    with submitted(write_recipe(shards, tmp_path, launcher="ray", workers=2), tmp_path) as job:
        job.finish()
        print(job.lines("Started"))


def require_same_course(found: Job, undisturbed: Path) -> None:
    """Each step is there once, and came to what the sample stream promises.

    Two workers add their gradients up in another order than one. Every step goes on from weights that differ by such
    roundings, so that the difference of the losses grows; different examples change the loss by a tenth.
    """
    expected = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in expected if line["event"] == "Step"}
    steps = found.lines("Step")
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    for line in steps:
        assert line["loss"] == pytest.approx(losses[line["step"]], rel=1e-3)
    weights = load_file(found.run / "model" / "model.safetensors")
    for name, expected_value in load_file(undisturbed / "model" / "model.safetensors").items():
        np.testing.assert_allclose(weights[name], expected_value, rtol=1e-3, atol=1e-3)


def require_whole(job: Job) -> None:
    """Every checkpoint on disk is what its marker says, to the byte."""
    assert job.checkpoints()
    for path in job.checkpoints():
        marker = json.loads((path / "COMMITTED").read_text())
        assert marker == {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in marker}
        assert json.loads((path / "state.json").read_text())["step"] == int(path.name.split("-")[1])
        load_file(path / "state.safetensors")
