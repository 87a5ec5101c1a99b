"""Workers that are lost, hang, are told to go or are joined by others: on real Ray clusters of several nodes.

Most workers are a small stand-in for the training: a step is an all-reduce, its checkpoint a file with a number.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from erann_dist.recipe import Recipe
from shards.sources.audioset import read_audioset
from tests.conftest import pack_here, small_recipe, small_steps, write_tone_set
from tests.support.commands import Running
from tests.support.counting import SECONDS, gone, running
from tests.support.workers import train_on

STEPS = 60  # of the real training
MANY = 5000  # more than any test waits for


class Nodes:
    """A Ray cluster of a head without CPUs, where the command is, and nodes of one CPU each."""

    def __init__(self, count: int) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.address = self._cluster.address
        self.head = self._cluster.head_node
        self.nodes = [self.add() for _ in range(count)]

    def add(self) -> Any:
        return self._cluster.add_node(num_cpus=1)

    def remove(self, node: Any) -> None:
        self._cluster.remove_node(node, allow_graceful=False)

    def drain(self, node: Any, seconds: int = 120) -> None:
        ray = str(Path(sys.executable).parent / "ray")
        reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        deadline = ["--deadline-remaining-seconds", str(seconds)]
        command = [ray, "drain-node", "--address", self.address, "--node-id", node.node_id, *reason, *deadline]
        subprocess.run(command, check=True, capture_output=True)

    def close(self) -> None:
        self._cluster.shutdown()


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Nodes]:
    """For the tests that leave the nodes as they are."""
    nodes = Nodes(2)
    yield nodes
    nodes.close()


@pytest.fixture
def own_nodes() -> Iterator[Callable[[int], Nodes]]:
    """Clusters that a test may damage."""
    made: list[Nodes] = []

    def make(count: int) -> Nodes:
        made.append(Nodes(count))
        return made[-1]

    yield make
    for nodes in made:
        nodes.close()


@pytest.mark.slow
def test_one_worker_is_killed_and_then_all(two_nodes: Nodes, tmp_path: Path) -> None:
    with running(tmp_path, {}, address=two_nodes.address) as command:
        command.wait_for_step(15)
        os.kill(command.starts()[0][1]["pid"], signal.SIGKILL)
        command.wait_until(lambda: len(command.starts()) == 2 and len(command.starts()[1]) == 2)
        command.wait_for_step(25)
        for worker in command.starts()[1]:
            os.kill(worker["pid"], signal.SIGKILL)
        first, second, third = command.end()
    assert [worker["failure"] for worker in first] == [None, None]
    assert [worker["from"] for worker in second] == [10, 10]
    assert [worker["from"] for worker in third] == [20, 20]
    assert second[0]["failure"] == second[1]["failure"]
    assert second[0]["failure"].startswith("worker 1 on ")
    assert "killed" in second[0]["failure"]
    assert first[0]["launched"] == second[1]["launched"] <= time.time()
    assert (tmp_path / "stdout").read_text() == ""


@pytest.mark.slow
def test_a_worker_that_is_stuck(two_nodes: Nodes, tmp_path: Path) -> None:
    """The watchdogs end it, and the one that waits for it."""
    stuck = {"fault": "stuck", "fault_step": 15, "watchdog_s": 15}
    with running(tmp_path, stuck, address=two_nodes.address) as command:
        _, second = command.end()
    assert [worker["from"] for worker in second] == [10, 10]
    assert "watchdog" in second[0]["failure"]


def test_a_failure_at_the_same_step_again_and_again_ends_the_run(two_nodes: Nodes, tmp_path: Path) -> None:
    fault = {"fault": "exception", "fault_step": 15}
    with running(tmp_path, fault, address=two_nodes.address, max_failures=1) as command:
        starts = command.end(1)
    # The first one came after a checkpoint, the second without one.
    assert [start[0]["from"] for start in starts] == [0, 10]
    line = command.log.read_text().splitlines()[-1]
    assert line.startswith("erann: the workers failed 2 times in a row without a new checkpoint, last: worker 1 on ")
    assert "RuntimeError: no such device; run the same command again" in line


@pytest.mark.slow
def test_an_outage_of_s3_is_followed_by_another_start(two_nodes: Nodes, tmp_path: Path) -> None:
    fault = {"fault": "S3 away", "fault_step": 15}
    with running(tmp_path, fault, address=two_nodes.address) as command:
        _, second = command.end()
    assert [worker["from"] for worker in second] == [10, 10]
    assert second[0]["failure"] == "s3://bucket/set/0.tar could not be read: S3 can't do it now"


@pytest.mark.slow
def test_a_users_error_ends_the_run_at_once(two_nodes: Nodes, tmp_path: Path) -> None:
    with running(tmp_path, {"fault": "user error", "fault_step": 3}, address=two_nodes.address) as command:
        assert len(command.end(1)) == 1
    assert command.log.read_text().splitlines()[-1] == "erann: clip 7 is bad"


def test_the_command_is_told_to_stop(two_nodes: Nodes, tmp_path: Path) -> None:
    with running(tmp_path, {"steps": 400}, address=two_nodes.address) as command:
        command.wait_for_step(15)
        command.process.terminate()
        assert len(command.end(143)) == 1
    assert "stop requested by SIGTERM" in command.log.read_text().splitlines()[-1]
    assert int((tmp_path / "saved").read_text()) >= int((tmp_path / "step").read_text())


@pytest.mark.slow
def test_the_command_is_killed_and_run_again(two_nodes: Nodes, tmp_path: Path) -> None:
    with running(tmp_path, {"steps": 400}, address=two_nodes.address) as command:
        command.wait_for_step(15)
        pids = [worker["pid"] for worker in command.starts()[0]]
    with running(tmp_path, {}, address=two_nodes.address) as command:
        _, second = command.end()
    assert [worker["from"] for worker in second] == [10, 10]
    assert second[0]["failure"] is None
    assert gone(pids)


def test_the_head_is_lost_and_the_command_run_again(own_nodes: Callable[[int], Nodes], tmp_path: Path) -> None:
    nodes = own_nodes(1)
    with running(tmp_path, {"steps": 400}, num_workers=1, address=nodes.address) as command:
        command.wait_for_step(15)
        nodes.remove(nodes.head)
        command.end(1)
    assert "the Ray cluster is lost" in command.log.read_text().splitlines()[-1]
    nodes = own_nodes(1)
    with running(tmp_path, {}, num_workers=1, address=nodes.address) as command:
        _, second = command.end()
    assert second[0]["from"] >= 10


def test_more_workers_than_the_cluster_has(two_nodes: Nodes, tmp_path: Path) -> None:
    options = {"num_workers": 4, "min_workers": 3, "address": two_nodes.address, "wait_for_workers": 3}
    with running(tmp_path, {}, **options) as command:
        assert command.end(1) == []
    text = command.log.read_text()
    missing = "3 workers with 1 CPU each requested, but there is capacity for 2: the cluster has 3 nodes with 2 CPUs"
    assert f"{missing}; waiting up to 3 s for more" in text
    assert text.splitlines()[-1] == f"erann: {missing} after 3 s; start fewer (run.workers) or add nodes"


def test_more_workers_than_an_embedded_cluster_has(tmp_path: Path) -> None:
    """It does not grow: nothing is waited for."""
    with running(tmp_path, {}, device="cuda") as command:
        assert command.end(1) == []
    line = command.log.read_text().splitlines()[-1]
    assert line.startswith(
        "erann: 2 workers with 1 CPU and 1 GPU each requested, but there is capacity for 0: the cluster"
    )
    assert line.endswith(" and 0 GPUs; start fewer (run.workers) or add nodes")
    assert "waiting" not in command.log.read_text()


@pytest.mark.slow
def test_waits_for_a_cluster_that_grows(own_nodes: Callable[[int], Nodes], tmp_path: Path) -> None:
    nodes = own_nodes(1)
    with running(tmp_path, {}, address=nodes.address) as command:
        command.wait_until(lambda: "waiting up to 180 s for more" in command.log.read_text())
        nodes.add()
        (start,) = command.end()
    assert len(start) == 2


@pytest.mark.parametrize(
    ("launcher", "workers", "how"),
    [
        ("none", 1, signal.SIGTERM),
        ("torchrun", 2, signal.SIGUSR1),
        pytest.param("none", 1, signal.SIGUSR1, marks=pytest.mark.slow),
        pytest.param("torchrun", 2, signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_signals_without_ray(tmp_path: Path, launcher: str, workers: int, how: signal.Signals) -> None:
    """SIGTERM, and SIGUSR1 as Slurm sends it: a checkpoint is taken, no step is lost."""
    with running(tmp_path, {"steps": 400}, launcher=launcher, num_workers=workers) as command:
        command.wait_for_step(15)
        command.process.send_signal(how)
        (start,) = command.end(143)
    assert len(start) == workers
    assert f"stop requested by {how.name}" in command.log.read_text()
    assert (tmp_path / "saved").read_text() == (tmp_path / "step").read_text()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a shard set and the real training on it: `expected`, on two workers, undisturbed."""
    place = tmp_path_factory.mktemp("place")
    pack_here(read_audioset(*write_tone_set(place / "set", 40)), place / "shards")
    train_on(2, recipe(place, "expected"))
    return place


def recipe(place: Path, name: str, steps: int = STEPS, **run: Any) -> Recipe:
    run = {"launcher": "ray", "workers": 2, "max_failures": 2} | run
    optim = small_steps(steps) | {"schedule": "constant"}  # so that runs of different lengths begin alike
    return small_recipe(place / "shards", place / "runs" / name, run=run, optim=optim, checkpoint={"every": 5})


@contextmanager
def pretraining(place: Path, name: str, nodes: Nodes, steps: int = STEPS, **run: Any) -> Iterator[Running]:
    (place / f"{name}.yaml").write_text(yaml.safe_dump(recipe(place, name, steps, **run).model_dump()))
    command = Running(place, "pretrain", place / f"{name}.yaml", "--address", nodes.address)
    try:
        yield command
    finally:
        command.process.kill()
        command.process.wait()


def lines(place: Path, name: str, event: str) -> list[dict[str, Any]]:
    log = (place / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, log) if line["event"] == event]


def restarts(place: Path, name: str) -> list[dict[str, Any]]:
    """The incidents; without a checkpoint that was just being written."""
    return [line for line in lines(place, name, "Incident") if line["kind"] != "checkpoint"]


def stop_in_start(command: Running, place: Path, name: str, number: int) -> None:
    """Stop the run once its start of this number, from 1, has trained."""

    def has_trained() -> bool:
        starts = lines(place, name, "Started")
        return len(starts) == number and lines(place, name, "Step")[-1]["step"] > starts[-1]["step"]

    command.wait_until(has_trained, f"step in start {number}", SECONDS)
    assert command.end(signal.SIGTERM) == 143, command.text()


def test_training_goes_on_bit_for_bit_when_a_worker_is_killed(two_nodes: Nodes, place: Path) -> None:
    with pretraining(place, "killed", two_nodes) as command:
        command.wait_for(place / "runs/killed/checkpoints/step-00000010-0001/COMMITTED", SECONDS)
        workers = [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in "".join(p.cmdline())]
        assert len(workers) == 2
        workers[0].kill()
        assert command.process.wait(SECONDS) == 0, command.text()
    (incident,) = restarts(place, "killed")
    assert incident["kind"] == "failure"
    assert incident["text"].startswith("worker ")
    assert incident["step"] >= 10
    expected, found = lines(place, "expected", "Step"), lines(place, "killed", "Step")
    assert [line["loss"] for line in found] == [line["loss"] for line in expected]
    models = [load_file(place / "runs" / name / "model" / "model.safetensors") for name in ("expected", "killed")]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_training_goes_on_when_a_worker_freezes_and_leaves_the_others_stacks(two_nodes: Nodes, place: Path) -> None:
    with pretraining(place, "frozen", two_nodes, hang_timeout=12) as command:
        command.wait_for(place / "runs/frozen/checkpoints/step-00000010-0001/COMMITTED", SECONDS)
        workers = [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in "".join(p.cmdline())]
        assert len(workers) == 2
        workers[0].suspend()
        assert command.process.wait(SECONDS) == 0, command.text()
    _, alive = psutil.wait_procs(workers, SECONDS)
    assert not alive
    (incident,) = restarts(place, "frozen")
    assert incident["kind"] == "failure"
    assert incident["text"].startswith("worker ")
    assert "does not answer" in incident["text"]
    (stacks,) = (place / "runs/frozen/stacks").iterdir()
    assert incident["text"].endswith(f" are in {place}/runs/frozen/stacks/{stacks.name}")
    assert "in train_step" in stacks.read_text()  # where the other one waited
    models = [load_file(place / "runs" / name / "model" / "model.safetensors") for name in ("expected", "frozen")]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_training_loses_no_step_to_a_preemption(own_nodes: Callable[[int], Nodes], place: Path) -> None:
    """Nobody waits for the end of the notice, and the node is not taken again while it lasts."""
    nodes = own_nodes(2)
    with pretraining(place, "preempted", nodes, MANY, workers={"min": 1, "max": 2}, max_failures=0) as command:
        command.wait_for(place / "runs/preempted/checkpoints/step-00000005-0001/COMMITTED", SECONDS)
        nodes.drain(nodes.nodes[1])
        stop_in_start(command, place, "preempted", 2)
    (incident,) = restarts(place, "preempted")
    assert (incident["kind"], incident["steps_lost"]) == ("preemption", 0)
    assert incident["text"].startswith("preempted: node ")
    assert incident["text"].endswith("; resized from 2 to 1 worker")
    steps = [line["step"] for line in lines(place, "preempted", "Step")]
    assert steps == list(range(1, len(steps) + 1))


def test_training_goes_on_without_a_node_and_takes_another_in(own_nodes: Callable[[int], Nodes], place: Path) -> None:
    nodes = own_nodes(2)
    with pretraining(place, "moved", nodes, MANY, workers={"min": 1, "max": 2}) as command:
        checkpoints = place / "runs/moved/checkpoints"
        command.wait_for(checkpoints / "step-00000010-0001/COMMITTED", SECONDS)
        nodes.remove(nodes.nodes[1])
        command.wait_for(checkpoints / "step-00000020-0002/COMMITTED", SECONDS)
        nodes.add()
        stop_in_start(command, place, "moved", 3)
    assert "Traceback" not in command.text()
    lost, resized = restarts(place, "moved")
    assert lost["text"].startswith("node ")
    assert lost["text"].endswith(" lost; resized from 2 to 1 worker")
    assert (resized["text"], resized["steps_lost"]) == ("resized from 1 to 2 workers", 0)
    # Numbers of workers differ in the order of summation only; what that does grows from step to step.
    steps = [line["step"] for line in lines(place, "moved", "Step")]
    assert steps == list(range(1, len(steps) + 1))
    expected, found = ([line["loss"] for line in lines(place, name, "Step")] for name in ("expected", "moved"))
    assert found[:10] == expected[:10]
    assert found[10:14] == pytest.approx(expected[10:14], rel=1e-3)
