"""The job that `erann cluster render slurm` writes, on a real Slurm of two nodes: requeued, near its limit, failing."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from safetensors.numpy import load_file

from shards.sources.audioset import read_audioset
from tests.conftest import pack_here, small_recipe, write_tone_set
from tests.support.commands import ERANN, erann
from tests.support.hosts import Host
from tests.support.slurm import Slurm, slurm

STEPS = 200


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    erann_first = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
    with slurm(tmp_path_factory.mktemp("slurm"), "node-1", "node-2", PATH=erann_first) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tones")
    return pack_here(read_audioset(*write_tone_set(root, 40)), root / "shards")


def write_recipe(shards: Path, folder: Path, workers: int) -> str:
    """Of two micro-batches a step, so that one worker and two come to the same sums to the bit; its name."""
    recipe = small_recipe(
        shards,
        folder / "run",
        optim={"global_batch": 4, "micro_batch": 2, "examples": 4 * STEPS},
        checkpoint={"every": 10},
        run={"engine": "deepspeed", "launcher": "ray", "workers": workers},
    )
    (folder / "tones.yaml").write_text(yaml.safe_dump(recipe.model_dump()))
    return "tones.yaml"


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same run by the command alone, on an embedded cluster of two workers."""
    folder = tmp_path_factory.mktemp("undisturbed")
    erann(folder, "pretrain", write_recipe(shards, folder, 2))
    return folder / "run"


@dataclass(frozen=True)
class Job:
    cluster: Slurm
    number: str
    folder: Path

    def log(self) -> str:
        """The command's and the script's."""
        path = self.folder / f"tones-{self.number}.log"
        return path.read_text() if path.exists() else ""

    def events(self, kind: str) -> list[dict[str, Any]]:
        """The run's log, as far as it is written."""
        path = self.folder / "run" / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        events = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return [event for event in events if event["event"] == kind]

    def state(self) -> str:
        return self.cluster.job(self.number)["JobState"]

    def node(self) -> Host:
        """Where it runs, or its first part does."""
        host = self.cluster.job(self.number)["BatchHost"]
        return next(node for node in self.cluster.nodes if node.name == host)

    def process(self, word: str) -> psutil.Process:
        """The one there that has this in its command line."""
        (found,) = [each for each in self.node().processes() if word in command_line(each)]
        return found

    def wait_for(self, what: str, look: Callable[[], object]) -> None:
        """Until it sees something, while the job waits or runs."""

        def is_seen() -> bool:
            seen = bool(look())
            assert seen or self.state() in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED"), self.story()
            return seen

        self.cluster.wait_for(what, is_seen, self.story)

    def wait_for_steps(self, number: int) -> None:
        self.wait_for(f"step {number}", lambda: len(self.events("Step")) >= number)

    def end(self) -> dict[str, str]:
        """What Slurm says of the job at its end."""
        ends = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")
        self.cluster.wait_for("end", lambda: self.state() in ends, self.story)
        print(self.story())  # for whoever runs the test with -s
        return self.cluster.job(self.number)

    def story(self) -> str:
        return "\n".join(f"{path.name}:\n{path.read_text()[-10_000:]}" for path in sorted(self.folder.glob("*.log")))

    def require_same_course(self, undisturbed: Path) -> None:
        """Each step is there once, and came to what the sample stream promises; so did the weights."""
        expected = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
        losses = [(line["step"], line["loss"]) for line in expected if line["event"] == "Step"]
        assert [step for step, _ in losses] == list(range(1, STEPS + 1))
        assert [(event["step"], event["loss"]) for event in self.events("Step")] == losses
        weights = load_file(self.folder / "run" / "model" / "model.safetensors")
        for name, value in load_file(undisturbed / "model" / "model.safetensors").items():
            np.testing.assert_array_equal(weights[name], value, err_msg=name)

    def wait_for_clean_nodes(self) -> None:
        """Until nothing of the job is left on them."""

        def are_clean() -> bool:
            return not self.processes() and not any(node.run("ls", "/dev/shm") for node in self.cluster.nodes)

        self.cluster.wait_for("clean nodes", are_clean, self.story)

    def processes(self) -> list[psutil.Process]:
        """All of the nodes' but Slurm's own and the first ones."""
        found = [each for node in self.cluster.nodes for each in node.processes() if each.pid != node.first]
        return [each for each in found if not command_line(each).startswith("slurmd ")]


@contextmanager
def submitted(cluster: Slurm, folder: Path, nodes: int, *command: str) -> Iterator[Job]:
    """A job that is rendered in the folder and submitted there. When the context ends, so does it."""
    # /dev/shm is what each of the nodes has to itself.
    options = ["--nodes", str(nodes), "--gpus-per-node=0", "--scratch=/dev/shm", "--job-name=tones"]
    with (folder / "job.sh").open("w") as file:
        subprocess.run([*ERANN, "cluster", "render", "slurm", *options, "--", *command], stdout=file, check=True)
    job = Job(cluster, cluster.run("sbatch", "--parsable", "job.sh", cwd=folder).strip(), folder)
    try:
        yield job
        job.wait_for_clean_nodes()
    finally:
        cluster.run("scancel", "--quiet", job.number)
        for process in job.processes():  # of a job that went wrong
            with suppress(psutil.NoSuchProcess):
                process.kill()


def command_line(process: psutil.Process) -> str:
    with suppress(psutil.Error):  # ended
        return " ".join(process.cmdline())
    return ""


@pytest.mark.slow
def test_requeued_in_mid_run(cluster: Slurm, shards: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Slurm ends all of it where it stands, as when it needs the nodes, and starts it again."""
    with submitted(cluster, tmp_path, 2, "erann", "pretrain", write_recipe(shards, tmp_path, 2)) as job:
        job.wait_for_steps(25)
        cluster.run("scontrol", "requeue", job.number)
        facts = job.end()
        assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("COMPLETED", "0:0", "1"), job.story()
        first, second = job.events("Started")
        assert sorted(first["hosts"]) == sorted(second["hosts"]) == ["node-1", "node-2"]
        assert second["step"] >= 20  # its last checkpoint
        assert "start 1 on node-[1-2]" in job.log()
        assert "start 2 on node-[1-2]" in job.log()
        job.require_same_course(undisturbed)


@pytest.mark.slow
def test_notice_before_the_limit(cluster: Slurm, shards: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Slurm's signal ahead of the limit costs no step: a checkpoint, back into the queue, and on from there."""
    with submitted(cluster, tmp_path, 1, "erann", "pretrain", write_recipe(shards, tmp_path, 1)) as job:
        job.wait_for_steps(13)
        worker = job.process("RayTrainWorker")
        worker.suspend()  # Slurm looks at the limits every 30 seconds; by then the run is not to be over
        # In a minute or two, and the signal was asked for five minutes ahead of it.
        minutes = int(cluster.run("squeue", "--noheader", "--format=%M", f"--jobs={job.number}").split(":")[0])
        cluster.run("scontrol", "update", f"JobId={job.number}", f"TimeLimit={minutes + 2}")
        require_token(job)
        job.wait_for("notice", lambda: "notice from Slurm" in job.log())
        cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")
        worker.resume()
        facts = job.end()
        assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("COMPLETED", "0:0", "1"), job.story()
        _, second = job.events("Started")
        (ended,) = job.events("Ended")
        assert ended["told"]
        assert "stop requested by SIGUSR1" in ended["text"]
        assert second["step"] >= 13
        assert second["step"] == max(event["step"] for event in job.events("Step") if event["time"] < second["time"])
        assert "not finished: back into the queue" in job.log()
        job.require_same_course(undisturbed)


def require_token(job: Job) -> None:
    """Ray answers who has got the job's token and nobody else, and no log and no command line tells it."""
    environment = job.process("bin/erann pretrain").environ()
    token, address = environment["RAY_AUTH_TOKEN"], environment["RAY_ADDRESS"]
    assert len(token) == 64
    assert address == f"127.0.0.1:{20_000 + int(job.number)}"
    ask = f"ray health-check --address {address} 2>&1; echo $?"
    for mode, code in (("token", "0"), ("disabled", "1")):
        answer = job.node().run("env", f"RAY_AUTH_MODE={mode}", f"RAY_AUTH_TOKEN={token}", "sh", "-c", ask)
        assert answer.splitlines()[-1] == code, answer
    assert not [path for path in job.folder.glob("*.log") if token in path.read_text()]
    assert not [process for process in job.node().processes() if token in command_line(process)]


def test_what_fails_is_not_run_again(cluster: Slurm, tmp_path: Path) -> None:
    with submitted(cluster, tmp_path, 1, "erann", "pretrain", "no such recipe.yaml") as job:
        facts = job.end()
        assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "2:0", "0"), job.story()
        assert "erann: no such recipe.yaml: no such recipe; " in job.log()
        assert "ended with exit code 2" in job.log()
