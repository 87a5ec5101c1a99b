"""Folds that run beside each other on a Ray cluster, wait for their turn, fail, are killed and are started again."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from erann_dist.log.run_log import read_log
from erann_dist.storage.folder import LocalFolder
from erann_dist.train import checkpoint
from tests.support.commands import Running, erann
from tests.support.folded import write_folded_set, write_protocol

RUN = {"launcher": "ray", "engine": "torch", "wait_for_workers": 120}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folded_set(tmp_path_factory.mktemp("tones"), [1, 2, 3])


@pytest.fixture(scope="module")
def two_folds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folded_set(tmp_path_factory.mktemp("two"), [1, 2])


@pytest.fixture(scope="module")
def one_by_one(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of the same folds one after the other, without Ray."""
    place = tmp_path_factory.mktemp("alone")
    recipe = write_protocol(place / "tones.yaml", shards, run=RUN | {"launcher": "none"})
    erann(place, "finetune", recipe, "--from", "none")
    return place / "runs" / "tones"


def same_models(one: Path, other: Path, folds: list[int]) -> bool:
    name = "model/model.safetensors"
    return all((one / f"fold-{f}" / name).read_bytes() == (other / f"fold-{f}" / name).read_bytes() for f in folds)


def spans(runs: Path) -> list[tuple[float, float]]:
    """When each fold's command wrote its recipe, which is its beginning, and when it ended."""
    folds = sorted(runs.glob("fold-*"))
    ends = [read_log(LocalFolder(str(fold)))[-1]["time"] for fold in folds]
    return [((fold / "recipe.yaml").stat().st_mtime, end) for fold, end in zip(folds, ends, strict=True)]


def most_at_once(times: list[tuple[float, float]]) -> int:
    return max(sum(began <= at < ended for began, ended in times) for at, _ in times)


def starts(run: Path) -> int:
    return sum(line["event"] == "Started" for line in read_log(LocalFolder(str(run))))


def process_of(command: Running, fold: int) -> psutil.Process:
    """That which launches the fold's workers: the one that holds the lock of the run's folder."""
    for child in psutil.Process(command.process.pid).children(recursive=True):
        if any(file.path.endswith(f"/fold-{fold}/.lock") for file in child.open_files()):
            return child
    raise AssertionError(f"no process of fold {fold}")


def test_folds_share_a_cluster_and_wait_for_their_turn(shards: Path, tmp_path: Path, one_by_one: Path) -> None:
    """Two CPUs take two folds of one worker each; the third waits. They come to what they do alone, bit for bit."""
    recipe = write_protocol(tmp_path / "tones.yaml", shards, run=RUN)
    result = erann(tmp_path, "finetune", recipe, "--from", "none")
    runs = tmp_path / "runs" / "tones"
    assert [fold["fold"] for fold in result["folds"]] == [1, 2, 3]
    assert not result["failed"]
    if os.cpu_count() == 2:
        assert most_at_once(spans(runs)) == 2
    assert same_models(runs, one_by_one, [1, 2, 3])


def test_a_fold_whose_process_is_killed_goes_on(two_folds: Path, tmp_path: Path) -> None:
    recipe = write_protocol(tmp_path / "tones.yaml", two_folds, run=RUN, optim={"examples": 320})
    runs = tmp_path / "runs" / "tones"
    command = Running(tmp_path, "finetune", recipe, "--from", "none", "--json")
    try:
        command.wait_for(runs / "fold-1" / "checkpoints" / "step-00000004-0001")
        process_of(command, 1).kill()
        assert command.process.wait(timeout=400) == 0, command.text()
        assert [starts(runs / f"fold-{fold}") for fold in (1, 2)] == [2, 1]
        steps = [line["step"] for line in read_log(LocalFolder(str(runs / "fold-1"))) if line["event"] == "Step"]
        assert sorted(set(steps)) == list(range(1, 21))
        assert len(steps) < 30  # it went on from its checkpoint
    finally:
        command.process.kill()
        command.process.wait()
    assert command.survivors() == []


def test_a_fold_that_fails_takes_no_other_along(shards: Path, tmp_path: Path) -> None:
    """A file is in the way of its model folder. It is tried again before it is given up."""
    recipe = write_protocol(tmp_path / "tones.yaml", shards, run=RUN | {"launcher": "none"})
    runs = tmp_path / "runs" / "tones"
    (runs / "fold-2").mkdir(parents=True)
    (runs / "fold-2" / "model").write_text("in the way")
    command = Running(tmp_path, "finetune", recipe, "--from", "none", "--json")
    try:
        assert command.process.wait(timeout=400) == 1, command.text()
    finally:
        command.process.kill()
        command.process.wait()
    result = json.loads((runs / "results.json").read_text())
    assert [fold["fold"] for fold in result["folds"]] == [1, 3]
    assert [failed["fold"] for failed in result["failed"]] == [2]
    assert not result["comparable"]
    (runs / "fold-2" / "model").unlink()
    again = erann(tmp_path, "finetune", recipe, "--from", "none")
    assert [fold["fold"] for fold in again["folds"]] == [1, 2, 3]
    assert again["failed"] == []
    assert [starts(runs / f"fold-{fold}") for fold in (1, 3)] == [1, 1]


def test_told_to_stop_with_all_that_it_has_started(shards: Path, tmp_path: Path) -> None:
    """As Ray's stop of a job does: the run saves a checkpoint all the same."""
    run = RUN | {"launcher": "none", "log_every": 1}
    recipe = write_protocol(
        tmp_path / "tones.yaml", shards, run=run, optim={"examples": 3200}, checkpoint={"every": 999}
    )
    fold = LocalFolder(str(tmp_path / "runs" / "tones" / "fold-1"))
    command = Running(tmp_path, "finetune", recipe, "--from", "none")
    try:
        command.wait_until(lambda: any(line["event"] == "Step" for line in read_log(fold)), "step", 180)
        for process in [command.process, *command.family.values()]:
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        assert command.process.wait(timeout=60) == 143, command.text()
    finally:
        command.process.kill()
        command.process.wait()
    assert command.survivors() == []
    assert checkpoint.committed(fold)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_stopped_and_run_again(shards: Path, tmp_path: Path, one_by_one: Path, how: signal.Signals) -> None:
    recipe = write_protocol(tmp_path / "tones.yaml", shards, run=RUN)
    runs = tmp_path / "runs" / "tones"
    command = Running(tmp_path, "finetune", recipe, "--from", "none")
    try:
        command.wait_for(runs / "fold-1" / "checkpoints")
        code = command.end(how)
        assert code == 128 + how, command.text()
        assert "Traceback" not in command.text()
    finally:
        command.process.kill()
        command.process.wait()
    assert command.survivors() == []
    result = erann(tmp_path, "finetune", recipe, "--from", "none")
    assert len(result["folds"]) == 3
    assert same_models(runs, one_by_one, [1, 2, 3])


HOLDER = """
import sys, ray
from ray.util.placement_group import placement_group
ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")
ray.get(placement_group([{"CPU": 1}] * int(sys.argv[2])).ready())
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def shared_cluster() -> Iterator[str]:
    """The address of a cluster of two CPUs."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        yield cluster.address
    finally:
        cluster.shutdown()


@contextmanager
def held(address: str, cpus: int) -> Iterator[None]:
    """Somebody else's work on CPUs of the cluster."""
    command = [sys.executable, "-c", HOLDER, address, str(cpus)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        assert holder.stdin
        try:
            assert holder.stdout.readline() == "held\n"
            yield
        finally:
            holder.stdin.close()
            holder.wait(timeout=60)


@pytest.mark.slow
def test_folds_wait_while_others_work_on_the_cluster(two_folds: Path, tmp_path: Path, shared_cluster: str) -> None:
    """Longer than run.wait_for_workers. With one CPU of two taken, one fold runs at a time."""
    recipe = write_protocol(tmp_path / "tones.yaml", two_folds, run=RUN | {"wait_for_workers": 2})
    runs = tmp_path / "runs" / "tones"
    with held(shared_cluster, 1):
        with held(shared_cluster, 1):
            command = Running(tmp_path, "finetune", recipe, "--from", "none", "--address", shared_cluster)
            try:
                command.wait_for_text("waiting for the cluster to have capacity")
                assert not list(runs.glob("fold-*"))
            except BaseException:
                command.process.kill()
                raise
        try:
            assert command.process.wait(timeout=400) == 0, command.text()
        finally:
            command.process.kill()
            command.process.wait()
    assert [starts(runs / f"fold-{fold}") for fold in (1, 2)] == [1, 1]
    assert most_at_once(spans(runs)) == 1


@pytest.mark.slow
def test_a_fold_that_loses_its_room_waits_for_it_again(two_folds: Path, tmp_path: Path, shared_cluster: str) -> None:
    """It is taken between the fold's start and its workers'."""
    recipe = write_protocol(tmp_path / "tones.yaml", two_folds, run=RUN | {"wait_for_workers": 2})
    runs = tmp_path / "runs" / "tones"
    with held(shared_cluster, 1):
        command = Running(tmp_path, "finetune", recipe, "--from", "none", "--address", shared_cluster)
        try:
            command.wait_for(runs / "fold-1" / ".lock")
            with held(shared_cluster, 1):
                command.wait_for_text("waiting for the cluster to have capacity")
            assert command.process.wait(timeout=400) == 0, command.text()
        finally:
            command.process.kill()
            command.process.wait()
    assert [starts(runs / f"fold-{fold}") for fold in (1, 2)] == [1, 1]
