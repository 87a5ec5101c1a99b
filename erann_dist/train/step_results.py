"""The results of steps, read by the host some steps later, so that it need not wait for the device."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from erann_dist.train.optimizer import CheckedAdam

_LAG = 8  # How many steps may be queued on a GPU.


@dataclass(frozen=True)
class StepResult:
    """The result of one step; the same on all workers."""

    step: int
    loss: float  # over all workers
    grad_norm: float
    skipped: bool  # by the optimizer, because the loss or the gradient was not finite
    loss_scale: float  # of fp16; otherwise 1
    stop_requests: int  # the number of workers that were requested to stop


class StepResults:
    """Step results in order. All workers read a result at the same step, so that they can act on it together."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._pending: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def add(self, step: int, loss: Tensor, adam: CheckedAdam, stop_requests: Tensor) -> None:
        """loss, stop_requests: () on the device."""
        values = torch.stack([loss, adam.norm, adam.skipped, adam.scale, stop_requests])
        done = None
        if self._cuda:
            values = torch.empty(len(values), pin_memory=True).copy_(values, non_blocking=True)
            done = torch.cuda.current_stream().record_event()
        self._pending.append((step, values, done))

    def drain(self, wait: bool) -> Iterator[StepResult]:
        """The new results. On a GPU the last few are returned only with `wait`, which waits for the device."""
        while len(self._pending) > (_LAG if self._cuda and not wait else 0):
            step, values, done = self._pending.popleft()
            if done:
                done.synchronize()
            loss, grad_norm, skipped, loss_scale, stop_requests = values.tolist()
            yield StepResult(step, loss, grad_norm, skipped > 0, loss_scale, round(stop_requests))
