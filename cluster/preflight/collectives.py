"""Tests whether the nodes reach each other, and how fast workers all-reduce their gradients."""

import datetime
import socket
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from erann_dist.errors import UserError
from erann_dist.train.distributed import process_group_backend

_ROUNDS = 5
_CONNECT_S = 5.0
_JOIN_S = 60.0  # Time for all workers to join the process group.
_LISTENING: list[socket.socket] = []  # Keeps the sockets opened by `listen` open.


def listen() -> int:
    """Open a port for the other nodes to connect to, and return it."""
    _LISTENING.append(socket.create_server(("", 0), backlog=4096))
    port: int = _LISTENING[-1].getsockname()[1]
    return port


def unreachable(others: dict[str, tuple[str, int]]) -> list[str]:
    """The names of the nodes that can't be reached from here. others: address and port by name."""

    def fails(where: tuple[str, int]) -> bool:
        try:
            socket.create_connection(where, timeout=_CONNECT_S).close()
        except OSError:
            return True
        return False

    with ThreadPoolExecutor(64) as pool:
        return [name for name, failed in zip(others, pool.map(fails, others.values()), strict=True) if failed]


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def all_reduce_seconds(rank: int, world_size: int, address: str, port: int, elements: int, use_gpu: bool) -> float:
    """Median seconds of an all-reduce of `elements` float32 values over the workers, all of which call this.

    address, port: of rank 0. Raises UserError if the sum is wrong.
    """
    device = torch.device("cuda", 0) if use_gpu else torch.device("cpu")
    took = []
    with _joined(rank, world_size, address, port, device):
        for _ in range(1 + _ROUNDS):
            tensor = torch.ones(elements, device=device)
            dist.barrier()
            _wait_for(device)
            began = time.perf_counter()
            dist.all_reduce(tensor)
            _wait_for(device)
            took.append(time.perf_counter() - began)
            if not bool((tensor == world_size).all()):
                raise UserError(f"the sum of ones over {world_size} workers is {tensor.min()} to {tensor.max()}")
    return statistics.median(took[1:])


@contextmanager
def _joined(rank: int, world_size: int, address: str, port: int, device: torch.device) -> Iterator[None]:
    timeout = datetime.timedelta(seconds=_JOIN_S)
    store = TCPStore(address, port, world_size, is_master=rank == 0, timeout=timeout)
    dist.init_process_group(
        process_group_backend(device), store=store, rank=rank, world_size=world_size, timeout=timeout
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
