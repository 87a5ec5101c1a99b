"""The image, built and run by podman: the demo in it, and a cluster of containers as KubeRay starts one.

`make test-image`, as root on Debian with podman, runc and debootstrap. The base of the Dockerfile itself, CUDA's, is
replaced by a Debian root, which is made here and whose Python is newer.
"""

import json
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[1]
SUITE = os.environ.get("ERANN_IMAGE_SUITE", "trixie")
NAME = f"erann-test-{os.getpid()}"
BASE, IMAGE = f"localhost/{NAME}-base:1", f"localhost/{NAME}:1"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
TOKEN = "0123456789abcdef" * 4
SECONDS = 900

pytestmark = pytest.mark.image


def run(*command: object, cwd: Path | None = None, timeout: float = SECONDS, **options: Any) -> str:
    """A command's output; the end of what it wrote when it fails."""
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout, **options
    )
    text = done.stdout.decode(errors="replace")
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{text[-4000:]}"
    return text


# Of a container. Podman's own limits may be above those of this machine, which it then can't set.
LIMITS = {"nofile": resource.RLIMIT_NOFILE, "nproc": resource.RLIMIT_NPROC}
ULIMITS = [f"--ulimit={name}={':'.join(map(str, resource.getrlimit(kind)))}" for name, kind in LIMITS.items()]
RUN = ("run", "--runtime", "runc", *ULIMITS, "--cap-drop", "all", "--shm-size", "2g")


def podman(*arguments: object, **options: Any) -> str:
    return run("podman", *arguments, **options)


@pytest.fixture(scope="module", autouse=True)
def tools() -> None:
    missing = [name for name in ("podman", "runc", "debootstrap") if not shutil.which(name)]
    if missing or os.getuid():
        pytest.skip(f"needs root and {', '.join(missing) or 'nothing else'} (apt-get install podman runc debootstrap)")


@pytest.fixture(scope="module")
def base(tools: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Debian root with the user that Ubuntu's image has, and with this machine's certificates."""
    root = tmp_path_factory.mktemp("root")
    run("debootstrap", "--variant=minbase", "--include=ca-certificates", SUITE, root)
    with (root / "etc/passwd").open("a") as passwd:
        passwd.write("ubuntu:x:1000:1000::/home/ubuntu:/bin/bash\n")
    with (root / "etc/group").open("a") as group:
        group.write("ubuntu:x:1000:\n")
    (root / "home/ubuntu").mkdir()
    os.chown(root / "home/ubuntu", 1000, 1000)
    if CERTIFICATES.exists():
        shutil.copyfile(CERTIFICATES, root / "etc/ssl/certs/ca-certificates.crt")
    trust = [f"--change=ENV {name}={CERTIFICATES}" for name in ("SSL_CERT_FILE", "PIP_CERT")]
    archive = root.with_suffix(".tar")
    run("tar", "--numeric-owner", "-C", root, "-cf", archive, ".")
    shutil.rmtree(root)
    podman("import", *trust, archive, BASE)
    archive.unlink()
    yield BASE
    podman("rmi", "--force", BASE)


@pytest.fixture(scope="module")
def image(base: str) -> Iterator[str]:
    build = ("build", "--runtime", "runc", "--network", "host", "--build-arg", f"BASE={base}")
    podman(*build, "--file", "cluster/Dockerfile", "--tag", IMAGE, ".", cwd=ROOT, timeout=3600)
    yield IMAGE
    podman("rmi", "--force", IMAGE)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the containers' user."""
    place = tmp_path_factory.mktemp("place")
    os.chown(place, 1000, 1000)
    for parent in place.parents[:3]:
        parent.chmod(parent.stat().st_mode | 0o711)
    return place


def in_image(image: str, place: Path, *command: object, options: tuple[object, ...] = ()) -> str:
    """A command in a container of its own: user 1000, no capabilities, no network."""
    closed = ("--network", "none", "--security-opt", "no-new-privileges")
    volume = ("--volume", f"{place}:/data", "--workdir", "/data")
    return podman(*RUN, "--rm", *closed, *volume, *options, image, *command, timeout=3600)


@pytest.fixture(scope="module")
def demo(image: str, place: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(in_image(image, place, "erann", "demo", "--json").splitlines()[-1])
    return result


def test_it_runs_the_demo_without_network_and_capabilities(image: str, demo: dict[str, Any], place: Path) -> None:
    assert in_image(image, place, "id", "-u").strip() == "1000"
    assert demo["mAP"] > 0.8
    assert demo["packed"]["demo/shards/train"]["not_packed"] == {"missing": 1, "unreadable": 1}


@dataclass
class Pods:
    """Containers on a network of their own, as KubeRay starts a head and its workers."""

    image: str
    place: Path
    names: list[str] = field(default_factory=list)

    def start(self, name: str, *ray_start: str, alias: str | None = None) -> str:
        name = f"{NAME}-{name}"
        environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "60"}
        podman(
            *(*RUN, "--detach", "--name", name, "--network", NAME),
            *("--volume", f"{self.place}:/data", "--workdir", "/data", "--stop-timeout", "90"),
            *(word for pair in environment.items() for word in ("--env", "=".join(pair))),
            *(("--network-alias", alias) if alias else ()),
            *(self.image, "bash", "-lc", " ".join(["export PATH=/opt/erann/bin:$PATH; exec ray start", *ray_start])),
        )
        self.names.append(name)
        return name

    def head(self, name: str) -> str:
        """Its ray start line is that of KubeRay, with the dashboard's host that its services need."""
        options = "--head --block --num-cpus=0 --dashboard-host=0.0.0.0 --metrics-export-port=8080".split()
        found = self.start(name, *options, "--dashboard-agent-listen-port=52365", alias="head")
        self.wait(
            lambda: "success" in self.do(found, "wget", "-qO-", "http://localhost:52365/api/local_raylet_healthz")
        )
        return found

    def worker(self, name: str) -> str:
        options = "--address=head:6379 --block --num-cpus=1 --metrics-export-port=8080".split()
        return self.start(name, *options, "--dashboard-agent-listen-port=52365")

    def do(self, name: str, *command: str) -> str:
        done = subprocess.run(["podman", "exec", name, *command], capture_output=True, text=True, timeout=60)
        return done.stdout + done.stderr

    def wait(self, condition: Callable[[], bool], seconds: float = SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "\n".join(podman("logs", "--tail", "20", name) for name in self.names)
            time.sleep(1)

    def submit(self, run_name: str) -> subprocess.Popen[str]:
        """A client's container sends the demo's training to the dashboard, by HTTP, and follows it."""
        places = ["data.train=/data/demo/shards/train", "data.eval=/data/demo/shards/eval", "run.dir=/data/runs"]
        keys = [f"run.name={run_name}", "run.workers=2", "run.device=cpu", "checkpoint.every=12", "optim.examples=1600"]
        return subprocess.Popen(
            [
                *("podman", *RUN, "--rm", "--network", NAME),
                *("--env", "RAY_AUTH_MODE=token", "--env", f"RAY_AUTH_TOKEN={TOKEN}", self.image),
                *("erann", "submit", "pretrain", "demo.yaml", *places, *keys, "--address", "http://head:8265"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def lines(self, run_name: str, event: str) -> list[dict[str, Any]]:
        path = self.place / "runs" / run_name / "metrics.jsonl"
        found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in found if line["event"] == event]

    def end(self) -> None:
        subprocess.run(["podman", "rm", "--force", "--time", "0", *self.names], capture_output=True, timeout=300)


@pytest.fixture(scope="module")
def pods(image: str, demo: dict[str, Any], place: Path) -> Iterator[Pods]:
    podman("network", "create", NAME)
    pods = Pods(image, place)
    try:
        yield pods
    finally:
        pods.end()
        podman("network", "rm", "--force", NAME)


def ended(job: subprocess.Popen[str]) -> str:
    text, _ = job.communicate(timeout=SECONDS)
    return text


def test_a_cluster_of_containers(pods: Pods, place: Path) -> None:
    """A worker is killed, another one evicted, then the head lost: each time the weights are the undisturbed ones."""
    shutil.rmtree(place / "runs", ignore_errors=True)
    head = pods.head("head-1")
    first, second = pods.worker("worker-1"), pods.worker("worker-2")

    job = pods.submit("undisturbed")
    assert "training finished after" in ended(job)

    job = pods.submit("killed")
    pods.wait(lambda: len(pods.lines("killed", "CheckpointSaved")) >= 2)
    podman("kill", "--signal", "KILL", first)
    third = pods.worker("worker-3")
    assert "training finished after" in ended(job)
    (incident,) = [line for line in pods.lines("killed", "Incident") if line["kind"] == "failure"]
    assert incident["steps_lost"] <= 13

    job = pods.submit("evicted")
    pods.wait(lambda: len(pods.lines("evicted", "CheckpointSaved")) >= 2)
    eviction = subprocess.Popen(["podman", "stop", second], stdout=subprocess.DEVNULL)
    pods.worker("worker-4")
    assert "training finished after" in ended(job)
    eviction.wait(SECONDS)
    (incident,) = [line for line in pods.lines("evicted", "Incident") if line["kind"] == "preemption"]
    assert incident["steps_lost"] == 0

    job = pods.submit("headless")
    pods.wait(lambda: len(pods.lines("headless", "CheckpointSaved")) >= 2)
    podman("kill", "--signal", "KILL", head)
    ended(job)
    for worker in (third, f"{NAME}-worker-4"):
        podman("rm", "--force", "--time", "0", worker)
    podman("rm", "--force", head)
    pods.head("head-2")
    pods.worker("worker-5"), pods.worker("worker-6")
    assert "training finished after" in ended(pods.submit("headless"))

    expected = load_file(place / "runs/undisturbed/model/model.safetensors")
    for name in ("killed", "evicted", "headless"):
        found = load_file(place / "runs" / name / "model/model.safetensors")
        assert all((found[key] == value).all() for key, value in expected.items()), name
