"""The environment of worker processes, under every launcher."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from erann_dist.environment import KEEP_MEMORY
from erann_dist.errors import UserError

WORKER_ENVIRONMENT = KEEP_MEMORY | {"OMP_NUM_THREADS": "1", "RAY_CHDIR_TO_TRIAL_DIR": "0"}
_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@contextmanager
def meeting_on_loopback() -> Iterator[None]:
    """Restrict gloo and NCCL to loopback, for workers that are all on this machine, unless the user has set otherwise.

    Raises UserError if there is no loopback interface.
    """
    unset = [name for name in _INTERFACES if name not in os.environ]
    loopback = psutil.net_if_stats().get("lo")
    if unset and not (loopback and loopback.isup):
        raise UserError(
            "workers on one machine communicate over its loopback interface, but lo is down; run ip link set lo up, or "
            f"set another interface in {' and '.join(unset)}"
        )
    os.environ.update(dict.fromkeys(unset, "lo"))
    try:
        yield
    finally:
        for name in unset:
            del os.environ[name]


def is_first_process() -> bool:
    """Whether this is the command's only process, or rank 0 under the user's torchrun: it does what is done once."""
    return not is_torchruns_worker() or os.environ["RANK"] == "0"


def is_torchruns_worker() -> bool:
    """Whether this process was started by torchrun."""
    # Batch systems set RANK too.
    return "TORCHELASTIC_RUN_ID" in os.environ


# Set for every `ray start`: a host that loses its network is declared dead after some 12 s (docs/clusters/hosts.md).
HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
}


def use_interface_of_node() -> None:
    """Let gloo and NCCL use the network interface with Ray's address of this node, unless the user has set one.

    By default gloo uses the address of the host's name, which is loopback on many hosts.
    """
    from ray.util import get_node_ip_address

    address = get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == address for each in addresses):
            for variable in _INTERFACES:
                os.environ.setdefault(variable, name)
