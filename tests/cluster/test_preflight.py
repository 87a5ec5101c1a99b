"""erann preflight on a real Ray cluster of several nodes, each with an address of its own, and some of them not well.

A node that is not well joins a healthy head and two healthy nodes, and goes again.
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from erann_dist.storage.folder import open_folder
from tests.conftest import small_recipe
from tests.support.commands import ERANN, Running
from tests.support.s3 import Server, put_set, s3_server

ROOT = Path(__file__).parents[2]
BAD = "127.0.0.9"  # address of the node that is not well
CHECKS = ["nodes", "versions", "clocks", "shards", "run folder", "all-reduce", "step", "supply", "estimate"]


@pytest.fixture(scope="module")
def server(tone_shards: Path) -> Iterator[Server]:
    """With the set of tones; nodes and commands that are started find it."""
    with s3_server() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", server.endpoint)
        put_set(server, tone_shards)
        yield server


class Nodes:
    """A head without CPUs, and two nodes of one CPU."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.address = self._cluster.address
        for number in (2, 3):
            self._cluster.add_node(num_cpus=1, node_ip_address=f"127.0.0.{number}")

    def living(self) -> set[str]:
        return {n["NodeManagerAddress"] for n in self._cluster.global_state.node_table() if n["Alive"]}

    @contextmanager
    def one_more(self, gpus: int = 0, **environment: str) -> Iterator[None]:
        """With another node, at the address BAD, in this environment; with GPUs, if it is to claim that."""
        node = self._cluster.add_node(num_cpus=1, num_gpus=gpus, node_ip_address=BAD, env_vars=environment)
        try:
            yield
        finally:
            self._cluster.remove_node(node, allow_graceful=False)
            self._wait(BAD, False)

    @contextmanager
    def one_with_own_disk(self, folder: Path, log: Path) -> Iterator[None]:
        """With another node, at BAD and called `stray`, on which a disk of 1 MB of its own lies over the folder."""
        ray = str(Path(sys.executable).parent / "ray")
        start = [ray, "start", "--block", f"--address={self.address}", "--num-cpus=1", f"--node-ip-address={BAD}"]
        start += ["--object-store-memory=100000000"]
        boot = 'hostname stray && mount -t tmpfs -o size=1m tmpfs "$0" && exec "$@"'
        command = ["unshare", "--mount", "--uts", "bash", "-c", boot, str(folder)]
        if subprocess.run([*command, "true"], capture_output=True).returncode:
            pytest.skip("a node with a disk of its own needs the right to mount")
        with log.open("w") as file, subprocess.Popen([*command, *start], stdout=file, stderr=file) as process:
            try:
                self._wait(BAD, True)
                yield
            finally:
                process.terminate()
                process.wait(timeout=60)
                self._wait(BAD, False)

    def _wait(self, address: str, lives: bool) -> None:
        deadline = time.monotonic() + 120
        while (address in self.living()) != lives:
            assert time.monotonic() < deadline
            time.sleep(0.2)

    def close(self) -> None:
        self._cluster.shutdown()


@pytest.fixture(scope="module")
def nodes(server: Server) -> Iterator[Nodes]:
    nodes = Nodes()
    yield nodes
    nodes.close()


@pytest.fixture
def place(tone_shards: Path, tmp_path: Path) -> Path:
    """A folder with a recipe, run.yaml, of a run of two workers in runs/."""
    recipe = small_recipe(
        tone_shards,
        tmp_path / "runs" / "run",
        data={"crop_s": 2.0},
        optim={"examples": 4800},
        run={"launcher": "ray", "engine": "torch", "workers": 2},
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    return tmp_path


def preflight(place: Path, nodes: Nodes, *overrides: object, code: int = 0) -> dict[str, dict[str, Any]]:
    """What the command says of each check, by name; it leaves nothing in run.dir."""
    command = [*ERANN, "preflight", "run.yaml", "--address", nodes.address, "--json", *map(str, overrides)]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=600)
    assert done.returncode == code, done.stderr
    assert done.stdout, done.stderr
    result = json.loads(done.stdout)
    assert result["ready"] == (code == 0)
    assert not (place / "runs").exists() or not list((place / "runs").iterdir())
    return {check["check"]: check for check in result["checks"]} | {"": result}


def states(result: dict[str, dict[str, Any]], state: str) -> list[str]:
    return [name for name, check in result.items() if name and check["state"] == state]


def problem(check: dict[str, Any]) -> str:
    """That of the one node that is not well."""
    (found,) = check["problems"]
    assert BAD in found["text"]
    assert "127.0.0.2" not in found["text"]
    assert found["mend"]
    return str(found["text"])


def test_a_healthy_cluster(place: Path, nodes: Nodes) -> None:
    """With a cache, too, and a folder of runs in which there is one already."""
    (place / "runs" / "other").mkdir(parents=True)
    cache = f"data.cache={{dir: {place}/cache, max_bytes: 64MB}}"
    command = Running(place, "preflight", "run.yaml", cache, "--address", nodes.address, "--json")
    try:
        assert command.process.wait(timeout=600) == 0, command.text()
    finally:
        command.process.kill()
        command.process.wait()
    assert command.survivors() == []
    assert [path.name for path in (place / "runs").iterdir()] == ["other"]
    *lines, last = command.text().splitlines()
    result = json.loads(last)
    assert result["ready"]
    checks = [*CHECKS[:5], "cache", *CHECKS[5:]]
    assert [(check["check"], check["state"]) for check in result["checks"]] == [(name, "ok") for name in checks]
    assert [line[9:21].rstrip() for line in lines if line.startswith("ok ")] == checks
    figures = {check["check"]: check["figures"] for check in result["checks"]}
    assert sorted(node["workers"] for node in figures["nodes"]["nodes"]) == [0, 1, 1]
    assert all(abs(offset) < 0.5 for offset in figures["clocks"]["offset_s"].values())
    assert all(value > 5 for value in figures["shards"]["clips_per_s"].values())
    step = figures["step"]["step_s"]
    assert 0.005 < step < 60
    assert figures["step"]["examples_per_s"] == pytest.approx(16 / step)
    assert 0 <= figures["step"]["data_wait"] < 1
    assert figures["all-reduce"]["bytes"] > 10**6
    assert figures["step"]["all_reduce_share"] == pytest.approx(figures["all-reduce"]["seconds"] / step)
    assert figures["supply"]["needed_clips_per_s"] == pytest.approx(16 * 2 / 2 / step)
    assert figures["supply"]["cache_hits"] > 0.9
    assert figures["estimate"]["steps"] == 300
    assert figures["estimate"]["seconds"] == pytest.approx(300 * step)


def test_a_node_with_another_version_of_the_program(place: Path, nodes: Nodes) -> None:
    for name in ("erann_dist", "shards", "cluster", "jobs"):
        shutil.copytree(ROOT / name, place / "copy" / name)
    with (place / "copy" / "cluster" / "launch.py").open("a") as file:
        file.write("# changed\n")
    with nodes.one_more(PYTHONPATH=str(place / "copy")):
        result = preflight(place, nodes, "run.workers=3", code=1)
    assert states(result, "failed") == ["versions"]
    text = problem(result["versions"])
    assert "a different version of erann-dist: " in text
    assert f"in {place}/copy, here " in text
    assert text.endswith("cluster/launch.py differs")
    assert states(result, "not checked") == ["all-reduce", "step", "supply", "estimate"]


@pytest.mark.slow
def test_a_node_without_the_program(place: Path, nodes: Nodes) -> None:
    (place / "none" / "cluster").mkdir(parents=True)
    (place / "none" / "cluster" / "__init__.py").write_text("raise ImportError('not installed')\n")
    with nodes.one_more(PYTHONPATH=str(place / "none")):
        result = preflight(place, nodes, code=1)
    assert states(result, "failed") == ["versions"]
    assert problem(result["versions"]).endswith("this program can't be started there: ImportError: not installed")


def test_a_node_that_does_not_reach_s3(place: Path, nodes: Nodes, server: Server) -> None:
    url = f"{server.bucket_url}/set"
    data = [f"data.train={url}", f"data.eval={url}", f"run.dir={server.bucket_url}/runs", "run.workers=3"]
    with nodes.one_more(AWS_ENDPOINT_URL="http://127.0.0.1:9"):
        result = preflight(place, nodes, *data, code=1)
    assert states(result, "failed") == ["shards", "run folder"]
    for name in ("shards", "run folder"):
        assert "could not connect to 127.0.0.1:9" in problem(result[name])
    assert states(result, "not checked") == ["step", "supply", "estimate"]
    folder = open_folder(f"{server.bucket_url}/runs", server.endpoint)
    assert folder.is_empty()


@pytest.mark.slow
def test_a_node_whose_cache_disk_is_full(place: Path, nodes: Nodes) -> None:
    """The run could start, without a cache there; so the steps are tried all the same."""
    (place / "nvme").mkdir()
    cache = f"data.cache={{dir: {place}/nvme/cache, max_bytes: 64MB}}"
    with nodes.one_with_own_disk(place / "nvme", place / "stray.log"):
        result = preflight(place, nodes, cache, "run.workers=3", code=1)
    assert states(result, "failed") == ["cache"]
    text = problem(result["cache"])
    assert text == f"{BAD} (stray): 1.0 MB free for data.cache in {place}/nvme/cache, 64.0 MB requested"
    assert states(result, "not checked") == []
    assert sorted(result["step"]["figures"]["hosts"])[0] == "stray"


def test_a_run_folder_that_is_not_shared(place: Path, nodes: Nodes) -> None:
    (place / "runs").mkdir()
    with nodes.one_with_own_disk(place / "runs", place / "stray.log"):
        result = preflight(place, nodes, code=1)
    assert states(result, "failed") == ["run folder"]
    assert "others don't see" in problem(result["run folder"])
    assert states(result, "not checked") == ["step", "supply", "estimate"]


@pytest.mark.slow
def test_a_node_whose_gpu_can_not_be_used(place: Path, nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "77")  # Ray believes that it is there
    with nodes.one_more(gpus=1):
        result = preflight(place, nodes, "run.workers=1", "run.device=cuda", code=1)
    assert states(result, "failed") == ["nodes"]
    assert "its GPU can't be used: RuntimeError: " in problem(result["nodes"])


def test_no_room_and_no_shards(place: Path, nodes: Nodes) -> None:
    """All that can be checked is."""
    result = preflight(place, nodes, "run.workers=4", f"data.train={place}/nothing", code=1)
    assert states(result, "failed") == ["nodes", "shards"]
    (room,) = result["nodes"]["problems"]
    assert room["text"] == (
        "4 workers with 1 CPU each requested, but there is capacity for 2: the cluster has 3 nodes with 2 CPUs"
    )
    (shards,) = result["shards"]["problems"]
    assert shards["text"].endswith(
        f"where the command runs: {place}/nothing: no such folder; make a shard set with erann pack"
    )
    assert states(result, "ok") == ["versions", "clocks", "run folder"]


@pytest.mark.slow
def test_what_ends_a_worker_is_the_steps_failure(place: Path, nodes: Nodes) -> None:
    result = preflight(place, nodes, f"model.init={place}/nothing", code=1)
    assert states(result, "failed") == ["step"]
    (found,) = result["step"]["problems"]
    assert f"{place}/nothing" in found["text"]
    assert states(result, "not checked") == ["supply", "estimate"]


@pytest.mark.slow
def test_ctrl_c_in_the_middle_of_the_steps(place: Path, nodes: Nodes) -> None:
    command = Running(place, "preflight", "run.yaml", "--address", nodes.address)
    try:
        deadline = time.monotonic() + 300
        while not list(place.glob("runs/preflight-*/run/metrics.jsonl")):
            assert time.monotonic() < deadline, command.text()
            assert command.process.poll() is None, command.text()
            time.sleep(0.1)
        assert command.end(signal.SIGINT) == 130, command.text()
    finally:
        command.process.kill()
        command.process.wait()
    assert "Traceback" not in command.text()
    assert command.survivors() == []
    assert not (place / "runs").exists()


def test_nothing_at_the_address(place: Path) -> None:
    command = [*ERANN, "preflight", "run.yaml", "--address", "127.0.0.1:9"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "erann: no Ray cluster at 127.0.0.1:9: [Errno 111] Connection refused"
    assert "Traceback" not in done.stderr
