"""How a machine that is about to go tells Ray, from where the run's workers hear it (test_faults has what they do)."""

import http.server
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import ray
import yaml
from ray._private.state import state
from ray.cluster_utils import Cluster

from cluster.render.kubernetes import render_kubernetes
from cluster.spot import read_notice
from tests.support.manifests import kubernetes_cluster, pods

BIN = Path(sys.executable).parent


class Metadata:
    """The metadata service of an EC2 instance, which wants a token (IMDSv2) and is away now and then."""

    def __init__(self) -> None:
        self.action: dict[str, str] | None = None
        self.failures = 0

    @contextmanager
    def serve(self) -> Iterator[str]:
        metadata = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                assert int(self.headers["X-aws-ec2-metadata-token-ttl-seconds"]) > 0
                self._answer(200, "a-token" if self.path == "/latest/api/token" else "")

            def do_GET(self) -> None:
                if metadata.failures:
                    metadata.failures -= 1
                    self._answer(503, "")
                elif self.headers["X-aws-ec2-metadata-token"] != "a-token":
                    self._answer(401, "")
                elif self.path == "/latest/meta-data/spot/instance-action" and metadata.action:
                    self._answer(200, json.dumps(metadata.action))
                else:
                    self._answer(404, "")

            def _answer(self, code: int, text: str) -> None:
                self.send_response(code)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: Any) -> None:
                pass

        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{server.server_port}"
            server.shutdown()

    def take_back(self, seconds: float) -> None:
        until = datetime.now(UTC) + timedelta(seconds=seconds)
        self.action = {"action": "terminate", "time": f"{until:%Y-%m-%dT%H:%M:%SZ}"}


@pytest.fixture
def head() -> Iterator[Cluster]:
    """A head with a CPU, which the test may damage, and this process connected to it."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    ray.init(made.address, log_to_driver=False, logging_level="ERROR")
    yield made
    ray.shutdown()
    made.shutdown()


@ray.remote(num_cpus=1)
class Work:
    """Without which a node that is to go ends at once."""

    def node(self) -> str:
        return ray.get_runtime_context().get_node_id()


def wait_until(done: Callable[[], Any], what: str, seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := done()):
        assert time.monotonic() < deadline, f"not so in {seconds} s: {what}"
        time.sleep(0.2)
    return found


def test_the_notice_is_read_as_amazon_writes_it() -> None:
    metadata = Metadata()
    with metadata.serve() as url:
        assert read_notice(url) is None
        metadata.action = {"action": "terminate", "time": "2026-11-25T08:22:00Z"}
        assert read_notice(url) == datetime(2026, 11, 25, 8, 22, tzinfo=UTC)
        metadata.failures = 1
        with pytest.raises(OSError, match="503"):
            read_notice(url)


def test_a_pod_that_is_evicted_tells_ray(head: Cluster, tmp_path: Path) -> None:
    """SIGTERM, as the kubelet sends, to `ray start --block` with the environment of the manifest's GPU pods."""
    _, worker = pods(yaml.safe_load(render_kubernetes(kubernetes_cluster())))
    settings = {entry["name"]: entry["value"] for entry in worker["containers"][0]["env"]}
    # KubeRay starts it by a shell like this, which must not stand between the signal and Ray.
    start = (
        f"ulimit -n 4096; {BIN}/ray start --address={head.address} --num-cpus=1 --resources='{{\"pod\": 1}}' --block"
    )
    with (tmp_path / "log").open("wb") as log:
        pod = subprocess.Popen(["/bin/bash", "-c", "--", start], env=os.environ | settings, stdout=log, stderr=log)
    try:
        wait_until(lambda: "pod" in ray.cluster_resources(), "the pod has joined")

        work = Work.options(resources={"pod": 1}).remote()
        node = ray.get(work.node.remote())
        assert state.get_draining_nodes() == {}
        told = time.time()
        pod.send_signal(signal.SIGTERM)
        until = wait_until(lambda: state.get_draining_nodes().get(node), "the node is about to go", seconds=30)
        assert until / 1000 - told == pytest.approx(float(settings["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]), abs=20)
        assert ray.get(work.node.remote(), timeout=60) == node  # it may finish
        ray.kill(work)
        assert pod.wait(timeout=60) != 0  # at once then, not only at the end of the time
    finally:
        pod.kill()
        pod.wait()


def test_a_spot_instance_that_is_taken_back_tells_ray(head: Cluster, tmp_path: Path) -> None:
    metadata = Metadata()
    with metadata.serve() as url, (tmp_path / "log").open("w+") as log:
        environment = os.environ | {"RAY_ADDRESS": head.address, "AWS_EC2_METADATA_SERVICE_ENDPOINT": url}
        metadata.failures = 1
        command = [sys.executable, "-m", "cluster.spot"]
        watch = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            wait_until(lambda: "instance metadata can't be read" in (tmp_path / "log").read_text(), "it goes on asking")
            work = Work.remote()
            node = ray.get(work.node.remote())
            assert state.get_draining_nodes() == {}
            metadata.take_back(120)
            assert watch.wait(timeout=120) == 0, (tmp_path / "log").read_text()
        finally:
            watch.kill()
            watch.wait()
        until = wait_until(lambda: state.get_draining_nodes().get(node), "the node is about to go", seconds=30)
        assert 50 < until / 1000 - time.time() < 115
        assert "this instance will be interrupted at " in (tmp_path / "log").read_text()


def test_health_is_told_without_the_token(tmp_path: Path) -> None:
    """The manifest's probes, at a head that asks everyone else for a token."""
    head, _ = pods(yaml.safe_load(render_kubernetes(kubernetes_cluster())))
    container = head["containers"][0]
    probe = container["livenessProbe"]["httpGet"]
    assert container["readinessProbe"]["httpGet"] == probe
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a-token-of-this-test-0123456789"}
    port = 20_000 + os.getpid() % 5000 * 2  # not the probe's: another Ray may run on this machine
    ports = ["--port=0", f"--dashboard-agent-listen-port={port}", f"--ray-client-server-port={port + 1}"]
    start = [BIN / "ray", "start", "--head", "--block", "--num-cpus=0", "--include-dashboard=false", *ports]

    def ask(path: str) -> int:
        try:
            with urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
                return int(answer.status)
        except OSError as error:
            return int(getattr(error, "code", 0))

    # The paths of sockets below it may not be long.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, (tmp_path / "log").open("wb") as log:
        command = [*start, f"--temp-dir={folder}"]
        ray_head = subprocess.Popen(command, env=os.environ | token, stdout=log, stderr=log)
        try:
            wait_until(lambda: ask(probe["path"]) == 200, "healthy")
            assert ask("/api/job_agent/jobs/") == 401
        finally:
            ray_head.terminate()
            ray_head.wait(timeout=120)
