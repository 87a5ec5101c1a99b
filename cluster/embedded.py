"""A connection to Ray: to the cluster at an address, or to one embedded in this process, which ends with it."""

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
# To detect faults soon, Ray Train checks its workers, and for preempted nodes, every second.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
# With a new cluster Ray would start an idle worker for each CPU, and use none of them: all that runs there has a
# runtime environment.
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
# Workers are started where there is capacity. If it was taken in the meantime: how soon to look for capacity again.
os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")

import ray
from ray._private import ray_constants, services  # private: tests/test_private_names.py fails when they move

from cluster.environment import WORKER_ENVIRONMENT
from cluster.stop_request import stop_handlers_kept
from erann_dist.environment import usable_cpus
from erann_dist.errors import UsageError, UserError

# Environment variable with the address of the cluster that the command's first process started, for its others.
_EMBEDDED = "ERANN_EMBEDDED_CLUSTER"
# Ray Train's actor that watches for nodes about to be lost; the one machine of an embedded cluster is this command's.
_WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
_ANSWER_S = 10.0
# Ray uses gRPC, and so HTTP/2, in which either side begins with a frame of settings.
_HTTP2_SETTINGS = 4
_HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, _HTTP2_SETTINGS, 0, 0, 0, 0, 0])
# The same for all clusters that this process starts: Ray reads it once.
_TOKEN = secrets.token_hex(32)


@contextmanager
def _own_folder() -> Iterator[str]:
    """A new folder for Ray's files. In Ray's default folder, any user could plant sockets and programs.

    A socket's path may have 107 bytes, of which Ray's sockets take 66 below this folder.
    """
    parent = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    too_long = len(os.fsencode(parent)) + len("/ray-01234567") > 107 - 66
    with tempfile.TemporaryDirectory(
        prefix="ray-", dir="/tmp" if too_long else parent, ignore_cleanup_errors=True
    ) as folder:
        yield folder


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Let Ray start, or connect to, a cluster that listens only on loopback.

    With clusters of several hosts enabled, Ray replaces 127.0.0.1 by the host's own address, and then listens on all
    networks.
    """
    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _own_process_group() -> Iterator[None]:
    """Start the processes of an embedded cluster in a separate process group.

    A signal to the command's whole group, as sent by `timeout` and batch systems, would end them before the workers
    have saved a checkpoint. The kernel ends them with the command (PR_SET_PDEATHSIG, set by Ray).
    """
    before = services.ConsolePopen
    services.ConsolePopen = functools.partial(subprocess.Popen, process_group=0)
    try:
        yield
    finally:
        services.ConsolePopen = before


@contextmanager
def _own_token() -> Iterator[None]:
    """Give an embedded cluster its own token, unless the user has set one.

    While RAY_AUTH_MODE is unset, Ray requires a token and sets the variable. It would leave the token in the home
    directory, and every later cluster would require it.
    """
    added = {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"} - os.environ.keys()
    os.environ.setdefault("RAY_AUTH_TOKEN", _TOKEN)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _found_on_this_machine() -> str:
    """The address that `ray start` has stored for "auto". Raises UserError.

    Ray itself would search all processes of the machine, and connect to any user's cluster.
    """
    path = Path(os.environ.get("RAY_TMPDIR") or "/tmp", "ray", "ray_current_cluster")
    try:
        if os.getuid() not in (0, path.stat().st_uid):
            raise UserError(f"auto: the Ray cluster of {path} belongs to another user; give its address, HEAD:6379")
        return path.read_text().strip()
    except OSError as error:
        raise UserError(
            f"auto: no Ray cluster was started on this machine by ray start ({path}: {error.strerror}); give its "
            "address, HEAD:6379"
        ) from error


def _require_ray(address: str) -> None:
    """Raise OSError or ValueError if no Ray answers at host:port. Ray itself would wait for many minutes."""
    try:
        parts = urlsplit(f"//{address}")  # in which an IPv6 address has brackets
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"not an address such as HEAD:6379 ({error})") from error
    if not host or not port:
        raise ValueError("not an address such as HEAD:6379")
    with socket.create_connection((host, port), timeout=_ANSWER_S) as connection:
        if os.environ.get("RAY_USE_TLS", "0") in ("1", "true", "True"):
            return  # It would not answer before certificates are exchanged.
        connection.settimeout(_ANSWER_S)
        try:
            connection.sendall(_HTTP2_HELLO)
            answer = connection.recv(9)  # the header of the first frame
        except OSError as error:
            raise OSError(f"the server there does not answer ({error})") from error
    if len(answer) < 4 or answer[3] != _HTTP2_SETTINGS:
        raise OSError("the server there is not a Ray cluster; its port is 6379 by default")


def opening(address: str | None) -> str:
    """What ray_cluster is about to do, for a log line."""
    if ray.is_initialized():
        return "using the Ray cluster that this command is connected to"
    address = address or os.environ.get("RAY_ADDRESS")
    return f"connecting to the Ray cluster at {address}" if address else "starting a Ray cluster on this machine"


@contextmanager
def ray_cluster(address: str | None = None, cpus: int = 1) -> Iterator[bool]:
    """Connect to the cluster at `address` (or RAY_ADDRESS), or to a new embedded one with at least `cpus` CPUs.

    Yields whether the cluster is embedded. Such a cluster is private to this user and ends with the context. An
    existing connection is used and kept. Raises UserError if there is no cluster at the address, UsageError if the
    address is of another kind.
    """
    if ray.is_initialized():
        yield False
        return
    address = address or os.environ.get("RAY_ADDRESS")
    if address and "://" in address:
        by_default = address == os.environ.get("RAY_ADDRESS")
        raise UsageError(
            f"{address}: is for erann submit, which runs a command on the cluster; on one of its nodes use HEAD:6379 "
            "as --address or RAY_ADDRESS" + ("; unset RAY_ADDRESS to run on this machine" if by_default else "")
        )
    if address == "auto":
        address = _found_on_this_machine()
    runtime_env = {
        # A hung worker does not leave its process group in time; it is then killed.
        "env_vars": WORKER_ENVIRONMENT | {"TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "3"},
        "worker_process_setup_hook": "cluster.environment.use_interface_of_node",
    }
    with nullcontext() if address else _own_folder() as folder, nullcontext() if address else _own_token():
        try:
            if address:
                os.environ.setdefault(
                    "RAY_AUTH_MODE", "disabled"
                )  # A token in the home directory may be for another cluster.
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
            watcher = os.environ.get(_WATCHER)
            os.environ |= {_EMBEDDED: ray.get_runtime_context().gcs_address, _WATCHER: watcher or "0"}
        try:
            yield not address
        finally:
            ray.shutdown()
            if not address:
                del os.environ[_EMBEDDED]
                if watcher is None:
                    del os.environ[_WATCHER]
