"""What docs/security.md says of networks, other users, tokens and buckets, tried on the real thing."""

import json
import os
import re
import socket
import stat
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest
import yaml
from moto import settings
from moto.core.authorization import ActionAuthenticatorMixin

from erann_dist import s3
from erann_dist.errors import UserError
from erann_dist.events import Incident
from erann_dist.folder import LocalFolder, open_folder
from jobs.pretrain import pretrain
from jobs.runs import list_runs
from shards import build
from shards.clip import Packing
from shards.sources.audioset import read_audioset
from shards.stage import copy, staging
from tests.commands import Running
from tests.conftest import pack_here, small_recipe, write_tone_set
from tests.s3 import Server, forget_clients, s3_server
from tests.test_security import PAGE
from tests.workers import of_kind

RAY = str(Path(sys.executable).parent / "ray")
PING = """
import sys
from ray._raylet import GcsClient
print(len(GcsClient(address=sys.argv[1]).get_all_node_info(timeout=30)))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a packed set of tones."""
    place = tmp_path_factory.mktemp("place")
    pack_here(read_audioset(*write_tone_set(place / "set", 40)), place / "shards")
    return place


@dataclass
class Seen:
    """What the processes of a command listened to: addresses, and the paths of sockets with those of their folders."""

    addresses: dict[str, set[str]]  # by what was listening
    sockets: set[Path]

    def look(self, process: psutil.Process) -> None:
        try:
            name = " ".join(process.cmdline())[:60]
            for each in process.net_connections("all"):
                if each.family == socket.AF_UNIX and isinstance(each.laddr, str) and each.laddr.startswith("/"):
                    self.sockets.add(Path(each.laddr))
                elif each.family != socket.AF_UNIX and each.laddr and not each.raddr:
                    self.addresses.setdefault(each.laddr.ip, set()).add(name)
        except psutil.Error:  # it has just ended
            pass


def is_loopback(address: str) -> bool:
    found = ip_address(address)
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


def is_private(path: Path) -> bool:
    """Whether a folder on the way to it lets nobody else through."""
    return any(folder.stat().st_mode & 0o077 == 0 and folder.stat().st_uid == os.getuid() for folder in path.parents)


@pytest.mark.parametrize(("launcher", "workers"), [("none", 1), ("torchrun", 2), ("ray", 2)])
def test_a_run_on_one_machine_is_closed_to_all_others(
    place: Path, monkeypatch: pytest.MonkeyPatch, launcher: str, workers: int
) -> None:
    """Nothing of it listens to a network, its sockets are where other users can't go, and Ray asks for a token."""
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)  # as a user has it
    monkeypatch.setenv("HOME", str(place))
    run = {"launcher": launcher, "workers": workers}
    recipe = small_recipe(Path("shards"), Path("runs") / launcher, run=run, optim={"examples": 16 * 16})
    (place / f"{launcher}.yaml").write_text(yaml.safe_dump(recipe.model_dump()))
    command = Running(place, "pretrain", f"{launcher}.yaml")
    seen, private, refused = Seen({}, set()), set[Path](), ""
    deadline = time.monotonic() + 500
    while command.process.poll() is None and time.monotonic() < deadline:
        command._watch() if psutil.pid_exists(command.process.pid) else None
        for process in [psutil.Process(command.process.pid), *command.family.values()]:
            seen.look(process)
        private |= {path for path in seen.sockets - private if path.exists() and is_private(path)}
        if launcher == "ray" and not refused and (gcs := gcs_address(list(command.family.values()))):
            refused = without_and_with_token(*gcs)
        time.sleep(0.2)
    assert command.process.wait(60) == 0, command.text()
    assert command.survivors() == []
    assert seen.addresses  # gloo's, if nothing else
    assert {ip: names for ip, names in seen.addresses.items() if not is_loopback(ip)} == {}
    assert seen.sockets == private
    expected = {"none": [], "torchrun": ["socket"], "ray": ["plasma_store", "raylet"]}[launcher]
    assert set(expected) <= {path.name for path in seen.sockets}
    assert "AuthenticationError" in refused or launcher != "ray"
    assert not (place / ".ray").exists()


def gcs_address(family: list[psutil.Process]) -> tuple[str, str] | None:
    """Where the family's Ray cluster is to be reached, and the token for it, once a worker is there."""
    for process in family:
        try:
            found = re.search(r"--gcs-address=(\S+)", " ".join(process.cmdline()))
            if found and "raylet" in process.name():
                return found[1], process.environ()["RAY_AUTH_TOKEN"]
        except psutil.Error:
            pass
    return None


def without_and_with_token(address: str, token: str) -> str:
    """What a process of another user would be told; with the token it would be let in."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    refusals = []
    for mine in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}):
        done = subprocess.run([sys.executable, "-c", PING, address], env=ours | mine, capture_output=True, text=True)
        assert done.returncode == 1, done.stdout
        refusals.append(done.stderr)
    mine = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    done = subprocess.run([sys.executable, "-c", PING, address], env=ours | mine, capture_output=True, text=True)
    assert done.stdout.strip() == "1", done.stderr
    assert all("AuthenticationError" in refusal for refusal in refusals)
    return refusals[0]


@dataclass(frozen=True)
class Head:
    """A cluster that `ray start --head` has started, with a token."""

    gcs: int
    dashboard: int
    client: int
    agent: int
    token: Path
    process: psutil.Process

    @property
    def http(self) -> str:
        return f"http://127.0.0.1:{self.dashboard}"


def free_ports(count: int) -> list[int]:
    taken = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in taken]
    for each in taken:
        each.close()
    return ports


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    folder = tmp_path_factory.mktemp("head")
    token = folder / "token"
    token.write_text("f00d" * 16)
    token.chmod(0o600)
    gcs, dashboard, client, agent = free_ports(4)
    options = {
        "port": gcs,
        "dashboard-port": dashboard,
        "ray-client-server-port": client,
        "dashboard-agent-listen-port": agent,
        "num-cpus": 1,
        "temp-dir": tempfile.mkdtemp(),  # a short path; it goes with the tests' own folder
    }
    command = [RAY, "start", "--head", "--block", *(f"--{name}={value}" for name, value in options.items())]
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    family: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 180
        while True:
            family = psutil.Process(process.pid).children(recursive=True)
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{dashboard}/api/version", timeout=10).close()
                break
            except urllib.error.HTTPError:
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.5)
        yield Head(gcs, dashboard, client, agent, token, psutil.Process(process.pid))
    finally:
        family += psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        process.wait(60)
        for each in psutil.wait_procs(family, timeout=30)[1]:
            each.kill()
