"""What steps came to, told to the host some steps later, so that it need not wait for the device."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from erann_dist.train.optimizer import CheckedAdam

_LAG = 8  # steps; so many may be queued on a GPU


@dataclass(frozen=True)
class Outcome:
    """Of one step; the same on all workers."""

    step: int
    loss: float  # over all workers
    grad_norm: float
    skipped: bool  # by the optimizer, because one of them was not finite
    loss_scale: float  # of fp16; 1 without
    notices: int  # workers that are about to be taken away


class Outcomes:
    """In the order of the steps. All workers hear of a step at the same step, so that they may act on it as one."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._pending: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def add(self, step: int, loss: Tensor, adam: CheckedAdam, notices: Tensor) -> None:
        """loss, notices: () on the device."""
        values = torch.stack([loss, adam.norm, adam.skipped, adam.scale, notices])
        done = None
        if self._cuda:
            values = torch.empty(len(values), pin_memory=True).copy_(values, non_blocking=True)
            done = torch.cuda.current_stream().record_event()
        self._pending.append((step, values, done))

    def known(self, all_of_them: bool) -> Iterator[Outcome]:
        """Those that are new; on a GPU the last ones only if `all_of_them` are asked for, which waits for it."""
        while len(self._pending) > (_LAG if self._cuda and not all_of_them else 0):
            step, values, done = self._pending.popleft()
            if done:
                done.synchronize()
            loss, grad_norm, skipped, loss_scale, notices = values.tolist()
            yield Outcome(step, loss, grad_norm, skipped > 0, loss_scale, round(notices))
