"""A connection to Ray: the cluster at an address, or one embedded in this process that ends with it."""

import functools
import os
import secrets
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from urllib.parse import urlsplit

# Before Ray is imported: no usage reports; worker processes keep their working directory.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
# A fault is to be noticed soon: Ray Train asks its workers, and for preempted nodes, every second.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
# It is started where there is room. Should that be gone: how soon it is looked for anew.
os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")

import ray
from ray._private import ray_constants, services  # private: tests/test_private_names.py fails when they move

from cluster.environment import WORKER_ENVIRONMENT
from cluster.stop_request import stop_handlers_kept
from erann_dist.environment import usable_cpus
from erann_dist.errors import UsageError, UserError

# Tells the command's other processes the address of the cluster that its first one has started.
_EMBEDDED = "ERANN_EMBEDDED_CLUSTER"
_ANSWER_S = 10.0
# Ray talks gRPC, and so HTTP/2: either side begins with a frame of settings.
_HTTP2_SETTINGS = 4
_HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, _HTTP2_SETTINGS, 0, 0, 0, 0, 0])
# For all clusters that this process starts: Ray reads it once.
_TOKEN = secrets.token_hex(32)


@contextmanager
def _own_folder() -> Iterator[str]:
    """A new folder for Ray's files. Where Ray would keep them, everyone may put sockets and programs in their place.

    A socket's path may have 107 bytes, and below this folder Ray's sockets take 66 of them.
    """
    parent = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    too_long = len(os.fsencode(parent)) + len("/ray-01234567") > 107 - 66
    with tempfile.TemporaryDirectory(
        prefix="ray-", dir="/tmp" if too_long else parent, ignore_cleanup_errors=True
    ) as folder:
        yield folder


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Let Ray start, or connect to, a cluster that listens on loopback alone.

    Where there can be clusters of several hosts, Ray takes 127.0.0.1 for the host's own address, and then listens to
    all networks.
    """
    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _own_process_group() -> Iterator[None]:
    """Let the processes of a cluster that is started here be in a process group of their own.

    A signal to the command's whole group, as `timeout` and batch systems send it, would end them before the workers
    have saved a checkpoint. That they end with the command is the kernel's affair (PR_SET_PDEATHSIG, set by Ray).
    """
    before = services.ConsolePopen
    services.ConsolePopen = functools.partial(subprocess.Popen, process_group=0)
    try:
        yield
    finally:
        services.ConsolePopen = before


@contextmanager
def _own_token() -> Iterator[None]:
    """Let a cluster that is started here have a token of its own, if the user has set none.

    Ray asks for one while RAY_AUTH_MODE is unset, and sets that. It would leave a token in the home directory, for
    which every later cluster asks.
    """
    added = {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"} - os.environ.keys()
    os.environ.setdefault("RAY_AUTH_TOKEN", _TOKEN)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _found_on_this_machine() -> str:
    """The address that `ray start` has left for "auto". Raises UserError.

    Ray itself would search all processes of the machine, and connect to any user's cluster.
    """
    path = Path(os.environ.get("RAY_TMPDIR") or "/tmp", "ray", "ray_current_cluster")
    try:
        if os.getuid() not in (0, path.stat().st_uid):
            raise UserError(f"auto: the Ray cluster of {path} is another user's; give its address, HEAD:6379")
        return path.read_text().strip()
    except OSError as error:
        raise UserError(
            f"auto: no Ray cluster was started on this machine by ray start ({path}: {error.strerror}); give its "
            "address, HEAD:6379"
        ) from error


def _require_ray(address: str) -> None:
    """Raise OSError, ValueError when no Ray answers at host:port, for which Ray itself would wait many minutes."""
    try:
        parts = urlsplit(f"//{address}")  # in which an IPv6 address has brackets
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"this is no HEAD:6379 ({error})") from error
    if not host or not port:
        raise ValueError("this is no HEAD:6379")
    with socket.create_connection((host, port), timeout=_ANSWER_S) as connection:
        if os.environ.get("RAY_USE_TLS", "0") in ("1", "true", "True"):
            return  # it would not talk before certificates are exchanged
        connection.settimeout(_ANSWER_S)
        try:
            connection.sendall(_HTTP2_HELLO)
            answer = connection.recv(9)  # the header of the first frame
        except OSError as error:
            raise OSError(f"what listens there does not answer ({error})") from error
    if len(answer) < 4 or answer[3] != _HTTP2_SETTINGS:
        raise OSError("what listens there is no Ray cluster; its port is 6379 by default")


def opening(address: str | None) -> str:
    """What ray_cluster is about to do, in a few words."""
    if ray.is_initialized():
        return "using the Ray cluster that this command is connected to"
    address = address or os.environ.get("RAY_ADDRESS")
    return f"connecting to the Ray cluster at {address}" if address else "starting a Ray cluster on this machine"


@contextmanager
def ray_cluster(address: str | None = None, cpus: int = 1) -> Iterator[bool]:
    """Connected to the cluster at `address` (or at RAY_ADDRESS), else to a new one with at least `cpus` CPUs: True.

    A cluster started here is this user's alone, and gone at the end of the context. A connection that exists already is
    used and kept. Raises UserError when there is no cluster at the address, UsageError when it is of another kind.
    """
    if ray.is_initialized():
        yield False
        return
    address = address or os.environ.get("RAY_ADDRESS")
    if address and "://" in address:
        by_default = address == os.environ.get("RAY_ADDRESS")
        raise UsageError(
            f"{address}: is for erann submit, by which a command runs on the cluster; from one of its nodes the "
            "address is HEAD:6379, as --address or RAY_ADDRESS"
            + ("; unset RAY_ADDRESS to run on this machine" if by_default else "")
        )
    if address == "auto":
        address = _found_on_this_machine()
    runtime_env = {
        # A worker that hangs does not leave its process group in time; it is killed.
        "env_vars": WORKER_ENVIRONMENT | {"TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "3"},
        "worker_process_setup_hook": "cluster.environment.use_interface_of_node",
    }
    with nullcontext() if address else _own_folder() as folder, nullcontext() if address else _own_token():
        try:
            if address:
                os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # a token in the home directory may be another's
                _require_ray(address)
                with stop_handlers_kept(), _on_loopback() if address == os.environ.get(_EMBEDDED) else nullcontext():
                    ray.init(address, runtime_env=runtime_env, log_to_driver=False, logging_level="ERROR")
            else:
                with stop_handlers_kept(), _on_loopback(), _own_process_group():
                    ray.init(
                        "local",
                        num_cpus=max(cpus, usable_cpus()),
                        include_dashboard=False,
                        runtime_env=runtime_env,
                        log_to_driver=False,
                        logging_level="ERROR",
                        _node_ip_address="127.0.0.1",
                        _temp_dir=folder,
                    )
        except (OSError, ValueError, RuntimeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            what = f"no Ray cluster at {address}" if address else "no Ray cluster could be started on this machine"
            raise UserError(f"{what}: {reason}") from error
        if not address:
            os.environ[_EMBEDDED] = ray.get_runtime_context().gcs_address
        try:
            yield not address
        finally:
            ray.shutdown()
            if not address:
                del os.environ[_EMBEDDED]
