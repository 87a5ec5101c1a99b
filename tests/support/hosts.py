"""Several hosts on one machine: each with an address, a name, processes and a /dev/shm of its own, on one switch.

with hosts("head", "worker-1", "laptop") as network:
    head, worker, laptop = network.hosts
    log = head.popen("ray", "start", "--head", "--block", log=tmp_path / "head.log")
    laptop.run("curl", f"http://{head.address}:8265")
    network.cut(worker)
    network.join(worker)

The hosts share the file system, but for /dev/shm, and the test itself is reachable at `network.address`. A host is a
set of Linux namespaces that lives as long as its first process, which reads from a pipe of the test's: with the test,
however it ends, the kernel ends all of the host's processes and takes its mounts and network away.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

_NAMESPACES = ["--net", "--mount", "--uts", "--ipc", "--pid"]
_BOOT = """
set -e
hostname "$0"
mount -t tmpfs tmpfs /dev/shm
ip link set lo up
echo up
read -r end || true
"""


@dataclass(frozen=True)
class Host:
    name: str
    address: str
    first: int  # process id of its first process, as the test sees it
    environment: dict[str, str]

    def run(self, *command: object, timeout: float = 120) -> str:
        """Run a command to its end; what it wrote to stdout. It must succeed."""
        done = subprocess.run(
            self._command(command), env=self.environment, capture_output=True, text=True, timeout=timeout
        )
        assert done.returncode == 0, f"{self.name}: {command}: {done.stdout}{done.stderr}"
        return done.stdout

    def popen(self, *command: object, log: Path) -> subprocess.Popen[bytes]:
        """Start a command. It ends with the host, if not before."""
        with log.open("ab") as file:
            return subprocess.Popen(
                self._command(command), env=self.environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file
            )

    def processes(self) -> list[psutil.Process]:
        """All that run there now; their ids are those that the test sees."""
        return [process for process in psutil.process_iter() if _namespace(process.pid) == _namespace(self.first)]

    def _command(self, command: tuple[object, ...]) -> list[str]:
        return ["nsenter", f"--target={self.first}", *_NAMESPACES, f"--wdns={Path.cwd()}", *map(str, command)]


@dataclass(frozen=True)
class Network:
    hosts: list[Host]
    address: str  # where the hosts reach the test
    switch: int

    def cut(self, host: Host) -> None:
        """Pull the host's plug out of the switch. The host lives on."""
        _ip(self.switch, f"link set dev {host.name} down")

    def join(self, host: Host) -> None:
        """Put it in again."""
        _ip(self.switch, f"link set dev {host.name} up")


@contextmanager
def hosts(*names: str, **environment: str) -> Iterator[Network]:
    """So many new hosts. Skips the test where that is not allowed. environment: of their processes, besides the test's.

    names: of at most 15 characters each.
    """
    _require_namespaces()
    # Of the range for benchmarks of networks, which is in use nowhere; two tests at the same time take two parts.
    subnet = f"198.{18 + os.getpid() // 256 % 2}.{os.getpid() % 256}"
    with ExitStack() as stack:
        switch = stack.enter_context(_namespaces("switch"))
        outside = f"hosts{os.getpid()}"
        _ip(switch, "link add name bridge type bridge", "link set dev bridge up")
        _ip(switch, f"link add name outside type veth peer name {outside} netns {os.getpid()}")
        _ip(switch, "link set dev outside master bridge up")
        _ip(os.getpid(), f"address add {subnet}.1/24 dev {outside}", f"link set dev {outside} up")
        stack.callback(_ip, os.getpid(), f"link delete dev {outside}")  # at once; else the kernel does it soon
        found = []
        for number, name in enumerate(names, 11):
            first = stack.enter_context(_namespaces(name))
            _ip(switch, f"link add name {name} type veth peer name eth0 netns {first}")
            _ip(switch, f"link set dev {name} master bridge up")
            _ip(first, f"address add {subnet}.{number}/24 dev eth0", "link set dev eth0 up")
            found.append(Host(name, f"{subnet}.{number}", first, {**os.environ, **environment}))
        yield Network(found, f"{subnet}.1", switch)


@contextmanager
def _namespaces(name: str) -> Iterator[int]:
    """New namespaces; the process id of their first process."""
    command = ["unshare", *_NAMESPACES, "--fork", "--mount-proc", "bash", "-c", _BOOT, name]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as unshare:
        assert unshare.stdout
        assert unshare.stdout.readline() == b"up\n"
        yield int(Path(f"/proc/{unshare.pid}/task/{unshare.pid}/children").read_text())


def _namespace(process: int) -> str | None:
    """The set of processes that a process belongs to; none when it has ended."""
    with suppress(OSError):
        return os.readlink(f"/proc/{process}/ns/pid")
    return None


def _ip(process: int, *commands: str) -> None:
    """Configure the network that the process sees. Process ids in the commands are those that the test sees."""
    batch = "".join(f"{command}\n" for command in commands)
    ip = ["nsenter", f"--target={process}", "--net", "ip", "-batch", "-"]
    done = subprocess.run(ip, input=batch, capture_output=True, text=True)
    assert done.returncode == 0, f"ip {commands}: {done.stderr}"


def _require_namespaces() -> None:
    for tool in ("ip", "unshare", "nsenter"):
        if not shutil.which(tool):
            pytest.skip(f"hosts as network namespaces need the program {tool} (packages iproute2 and util-linux)")
    if os.geteuid() != 0:
        pytest.skip("hosts as network namespaces can only be made by root")
    trial = (
        "mount -t tmpfs tmpfs /dev/shm && ip link add name s type bridge && ip link add name t type veth peer name u"
    )
    command = ["unshare", *_NAMESPACES, "--fork", "--mount-proc", "bash", "-c", trial]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"hosts as network namespaces are not allowed here: {done.stderr.strip()}")
