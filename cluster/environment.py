"""The environment of worker processes, whoever starts them."""

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
    """Let gloo and NCCL, of workers that are all on this machine, listen to no network. What the user has set stays.

    Raises UserError when there is no loopback interface.
    """
    unset = [name for name in _INTERFACES if name not in os.environ]
    loopback = psutil.net_if_stats().get("lo")
    if unset and not (loopback and loopback.isup):
        raise UserError(
            "workers on one machine communicate over its loopback interface, and lo is down: ip link set lo up, or "
            f"name another interface in {' and '.join(unset)}"
        )
    os.environ.update(dict.fromkeys(unset, "lo"))
    try:
        yield
    finally:
        for name in unset:
            del os.environ[name]


def is_first_process() -> bool:
    """False in all but the first of the processes that a user's torchrun started: what is done once is done there."""
    return not is_torchruns_worker() or os.environ["RANK"] == "0"


def is_torchruns_worker() -> bool:
    """Whether this process is one that a torchrun has started."""
    # RANK alone is set by batch systems too.
    return "TORCHELASTIC_RUN_ID" in os.environ


# Of every `ray start`: a host whose network is gone is given up after some 12 seconds (docs/clusters/hosts.md).
HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
}


def use_interface_of_node() -> None:
    """Let gloo and NCCL meet the other hosts on the network interface whose address is Ray's for this node.

    By itself gloo takes the address that the host's name has, which is loopback on many. What the user has set stays.
    """
    from ray.util import get_node_ip_address

    address = get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == address for each in addresses):
            for variable in _INTERFACES:
                os.environ.setdefault(variable, name)
