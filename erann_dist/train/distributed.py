"""The workers of one run and their communication. A process group always exists, also for one worker."""

import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, Store

from erann_dist.clock import steady_time
from erann_dist.errors import UsageError
from erann_dist.log.events import Interruption, StopRequest

T = TypeVar("T")


@dataclass(frozen=True)
class Workers:
    """This worker's place among those of its run."""

    rank: int
    world_size: int
    device: torch.device
    launched: float = field(default_factory=steady_time)  # when the command was started, in Unix time
    failure: Interruption | None = None  # why the previous workers ended, if this command started those too
    reached: int = 0  # the last step that they reported
    stop_request: StopRequest = lambda: None  # why this worker has to stop, once a stop is requested

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The tensor's sum over the workers, in place, on all of them."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Each worker's value, by rank, on rank 0; an empty list on the other workers."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size if self.is_rank_zero else []
        dist.gather_object(value, values if self.is_rank_zero else None)
        return values

    def all_gather(self, value: T) -> list[T]:
        """Each worker's value, by rank, on all of them."""
        values: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on all of them."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()


def process_group_backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


@contextmanager
def process_group(device: torch.device, rank: int, world_size: int, store: Store) -> Iterator[Workers]:
    """This process as worker `rank` of the `world_size` that meet at `store`, until the context ends."""
    dist.init_process_group(process_group_backend(device), store=store, rank=rank, world_size=world_size)
    try:
        yield Workers(rank, world_size, device)
    finally:
        dist.destroy_process_group()


@contextmanager
def single_worker(device: torch.device) -> Iterator[Workers]:
    """This process as the only worker of a run."""
    with process_group(device, 0, 1, HashStore()) as workers:
        yield workers


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the processor as far as Linux reports it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    linux = Path("/proc/cpuinfo")
    name = re.search(r"^model name\s*:\s*(.+)$", linux.read_text() if linux.exists() else "", re.MULTILINE)
    return name[1] if name else platform.machine()


def pick_device(wanted: str, local_rank: int = 0, local_workers: int = 1) -> torch.device:
    """The device of one of `local_workers` on this host: wanted is auto, cpu or cuda. Raises UsageError."""
    gpus = torch.cuda.device_count()
    if wanted == "cuda" and gpus < local_workers:
        raise UsageError(f"run.device is cuda, but this host has {gpus} GPUs for {local_workers} workers")
    if wanted != "cpu" and gpus >= local_workers:
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    return torch.device("cpu")
