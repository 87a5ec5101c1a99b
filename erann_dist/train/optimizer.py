"""Adam that checks the gradient before a step, on the device, so that the host need not wait."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from erann_dist.recipe import OptimSection

# As in torch.amp.GradScaler, the scale is halved when a gradient overflows, and doubled after this many steps without.
_FIRST_SCALE = 65536.0
_GROWTH_INTERVAL = 2000


class CheckedAdam(torch.optim.Adam):
    """torch's fused Adam, which leaves weights and moments unchanged when the step is not finite.

    Before `step`, set `loss` to the step's loss over all workers. After it, `skipped` and `norm` are the outcome. All
    are () on the device. The gradient is divided by the loss scale and clipped to `clip_norm`.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        optim: OptimSection,
        sum_of_parts: Callable[[Tensor], Tensor],
    ) -> None:
        """sum_of_parts: sums a number over the workers that each have a part of the gradient."""
        super().__init__(parameters, optim.lr, optim.betas, weight_decay=optim.weight_decay, fused=True)
        device = self.param_groups[0]["params"][0].device
        self._clip_norm = optim.clip_norm
        self._sum_of_parts = sum_of_parts
        self.scaled = optim.precision == "fp16"  # whether the losses are scaled, and with them the gradient
        self.scale = torch.full((), _FIRST_SCALE if self.scaled else 1.0, device=device)
        self.steps_at_scale = torch.zeros((), device=device)
        self.loss = self.norm = self.skipped = torch.zeros((), device=device)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        square = self._sum_of_parts(nn.utils.get_total_norm(gradients).square())
        self.norm = square.sqrt() / self.scale
        self.skipped = (~(torch.isfinite(self.norm) & torch.isfinite(self.loss))).float()
        # torch's GradScaler sets these for fused optimizers, which skip if found_inf is 1, and divide by grad_scale.
        self.found_inf = self.skipped
        self.grad_scale = None
        if self._clip_norm is not None:
            self.grad_scale = self.scale * (self.norm / self._clip_norm).clamp(min=1)
        elif self.scaled:
            self.grad_scale = self.scale
        super().step()
        if self.scaled:
            self._adjust_scale()

    def _adjust_scale(self) -> None:
        steps = (self.steps_at_scale + 1) * (1 - self.skipped)
        grown = (steps >= _GROWTH_INTERVAL).float()
        self.scale = self.scale * (1 - self.skipped / 2) * (1 + grown)
        self.steps_at_scale = steps * (1 - grown)
