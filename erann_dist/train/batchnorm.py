"""BatchNorm's running statistics, the same on every worker and exact at every step.

Within a micro-batch BatchNorm uses that micro-batch's own statistics. The running statistics, used in evaluation, are
updated once per optimizer step from the mean over the step's micro-batches, whichever workers computed them.
"""

import torch
from torch import Tensor, nn


class RunningStatistics:
    """Manages the running statistics of a model's BatchNorms while it is trained.

    Create it after a checkpoint is loaded. Per step: `add` after each micro-batch's forward pass, then one `update`.
    With a momentum of 1 a BatchNorm leaves the micro-batch's own statistics in its buffers, and in training it never
    reads them.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)]
        (self._momentum,) = {layer.momentum or 0.0 for layer in layers} or {0.0}
        for layer in layers:
            layer.momentum = 1.0
        self._buffers = [b for m in layers for b in (m.running_mean, m.running_var) if b is not None]
        self._counters = [m.num_batches_tracked for m in layers if m.num_batches_tracked is not None]
        # Counts steps; the buffers' own counters count forward passes. A model without a BatchNorm has none.
        self._count = self._counters[0].clone() if layers else None
        self._device = next(model.parameters()).device
        self._running = self._collect()
        self._sum = torch.zeros_like(self._running)

    def _collect(self) -> Tensor:
        return torch.cat(self._buffers) if self._buffers else torch.zeros(0, device=self._device)

    def add(self, weight: float) -> None:
        """Add the micro-batch of the last forward pass; one of weight 0 has no effect."""
        self._sum += weight * self._collect()

    def share(self) -> Tensor:
        """(n,) the sum over this worker's micro-batches of the step; over all workers it is the step's."""
        return self._sum

    def update(self, mean: Tensor, skipped: Tensor) -> None:
        """Update the running statistics after a step; a step that the optimizer skipped leaves them unchanged.

        mean: (n,) of the step's micro-batches. skipped: () 1 or 0.
        """
        self._running = torch.where(skipped > 0, self._running, torch.lerp(self._running, mean, self._momentum))
        self._sum.zero_()
        if self._count is None:
            return
        # Few launches for many small tensors.
        torch._foreach_copy_(self._buffers, list(self._running.split([len(buffer) for buffer in self._buffers])))
        self._count += 1
        torch._foreach_copy_(self._counters, [self._count] * len(self._counters))
