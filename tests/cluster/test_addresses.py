"""Addresses of clusters: what is not there, or something else, is one line and soon."""

import http.server
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from cluster import embedded
from cluster.embedded import ray_cluster
from cluster.submit import ray_jobs
from erann_dist.errors import UserError

SOON_S = 30


@pytest.fixture
def other_service() -> Iterator[int]:
    """The port of something that is no Ray."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@pytest.fixture
def silent() -> Iterator[int]:
    """The port of something that never answers, as a process that is stopped."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def refused(address: str | None) -> str:
    began = time.monotonic()
    with pytest.raises(UserError) as error, ray_cluster(address):
        pass
    assert time.monotonic() - began < SOON_S
    assert "\n" not in str(error.value)
    return str(error.value)


def test_something_else_listens(other_service: int, silent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_ANSWER_S", 0.5)
    assert "no Ray cluster" in refused(f"127.0.0.1:{other_service}")
    assert "does not answer" in refused(f"127.0.0.1:{silent}")


@pytest.mark.parametrize("address", ["head", "head:x", "head:99999999", "[fd00::1:6379", ":6379"])
def test_what_is_no_address(address: str) -> None:
    assert address in refused(address)


def test_an_ipv6_address_has_brackets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(where: tuple[str, int], timeout: float) -> None:
        asked.append(where)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", refuse)
    refused("[fd00::1]:6379")
    assert asked == [("fd00::1", 6379)]


def test_auto_is_what_ray_start_has_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other_service: int) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert str(tmp_path) in refused(None)
    left = tmp_path / "ray/ray_current_cluster"
    left.parent.mkdir()
    left.write_text(f"127.0.0.1:{other_service}\n")
    assert "no Ray cluster" in refused(None)
    monkeypatch.setattr(os, "getuid", lambda: 54_321)
    assert "another user" in refused(None)


def test_a_dashboard_behind_a_proxy(monkeypatch: pytest.MonkeyPatch, other_service: int, silent: int) -> None:
    """The line names the proxy, without its password."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", f"http://me:secret@127.0.0.1:{other_service}")
    with pytest.raises(UserError) as error:
        ray_jobs.connect(f"http://127.0.0.1:{silent}")
    assert f"127.0.0.1:{other_service}" in str(error.value)
    assert "no_proxy=127.0.0.1" in str(error.value)
    assert "secret" not in str(error.value)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert ray_jobs._proxy_hint(f"http://127.0.0.1:{silent}") == ""


START = """
from cluster.embedded import ray_cluster
import ray
with ray_cluster():
    print(ray.get(ray.remote(lambda: 42).remote()))
"""


def test_an_embedded_cluster_beside_others(tmp_path: Path) -> None:
    """Ray's usual ports are taken, and its usual folder is a stale one that nobody may write to."""
    stale = tmp_path / "tmp" / "ray"
    stale.mkdir(parents=True)
    (stale / "ray_current_cluster").write_text("127.0.0.1:1\n")
    (stale / "session_latest").symlink_to("session_gone")
    stale.chmod(0o555)
    with ExitStack() as taken:
        for port in (6379, 8265, 8076, 10001, 52365, 44217, 44227):
            with suppress(OSError):  # taken by others already
                taken.enter_context(socket.create_server(("127.0.0.1", port)))
        environment = os.environ | {"TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": str(Path(__file__).parents[2])}
        environment.pop("RAY_ADDRESS", None)
        command = [sys.executable, "-c", START]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split()[-1:] == ["42"], done.stderr


def test_an_embedded_cluster_that_does_not_start_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("The raylet died.\nwith a page of text")

    monkeypatch.setattr(embedded.ray, "init", fail)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert "The raylet died" in refused(None)
