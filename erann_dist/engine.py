"""What turns losses into weights: DeepSpeed, and plain PyTorch as its oracle and baseline, behind one interface.

Both optimise with torch's Adam (betas 0.9 and 0.999, no weight decay). `state` and `load_state` speak of parameters by
name, free of the number of workers and of the ZeRO stage.
"""

import logging
import os
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from erann_dist.distributed import Workers
from erann_dist.model import ERANN
from erann_dist.recipe import OptimSection

_BETAS = (0.9, 0.999)


class Engine(Protocol):
    """One step: `forward` and `backward` for each of the worker's micro-batches, then `step`."""

    model: ERANN

    def forward(self, log_mel: Tensor, mask: Tensor | None) -> Tensor:
        """Logits of a micro-batch."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of the micro-batch's share of the step's loss; shares add up over all workers."""

    def step(self, lr: float) -> None:
        """Let the optimizer take one step at this learning rate."""

    def state(self) -> dict[str, Tensor]:
        """Weights, buffers and moments by name, on the CPU. All workers call it; the first gets the answer."""

    def load_state(self, state: dict[str, Tensor], step: int) -> None:
        """Take over `state` as it was after `step` optimizer steps. Only before the first step of this engine."""


def make_engine(kind: str, model: ERANN, optim: OptimSection, micro_batches: int, workers: Workers) -> Engine:
    """kind: deepspeed or torch. micro_batches: how many each worker computes per step."""
    if kind == "torch":
        return TorchEngine(model, optim, workers)
    return DeepSpeedEngine(model, optim, micro_batches, workers)


class TorchEngine:
    """Plain PyTorch: gradients summed over the workers in one all-reduce."""

    def __init__(self, model: ERANN, optim: OptimSection, workers: Workers) -> None:
        self.model = model
        self._workers = workers
        self._bf16 = optim.precision == "bf16"
        self._adam = _adam(model, optim.lr)

    def forward(self, log_mel: Tensor, mask: Tensor | None) -> Tensor:
        with torch.autocast(log_mel.device.type, torch.bfloat16, enabled=self._bf16):
            logits: Tensor = self.model(log_mel, mask)
        return logits

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, lr: float) -> None:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        total = self._workers.sum(torch.cat([g.flatten() for g in gradients]))
        for gradient, value in zip(gradients, total.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(value.view_as(gradient))
        _set_lr(self._adam, lr)
        self._adam.step()
        self._adam.zero_grad()

    def state(self) -> dict[str, Tensor]:
        return _model_state(self.model) | _adam_state(self._adam, self.model)

    def load_state(self, state: dict[str, Tensor], step: int) -> None:
        _load_model_state(self.model, state)
        _load_adam_state(self._adam, self.model, state, step)


class DeepSpeedEngine:
    """DeepSpeed at ZeRO stage 0, 1 or 2, over the process group that exists."""

    def __init__(self, model: ERANN, optim: OptimSection, micro_batches: int, workers: Workers) -> None:
        deepspeed = _import_deepspeed(workers.device)
        self.model = model
        self._workers = workers
        self._stage = optim.zero_stage
        self._adam = _adam(model, optim.lr)
        config = {
            # Nominal: a rank that is one micro-batch short repeats its last with weight 0.
            "train_micro_batch_size_per_gpu": optim.micro_batch,
            "gradient_accumulation_steps": micro_batches,
            "gradient_clipping": 0.0,  # DeepSpeed's default is 1.0
            "zero_optimization": {"stage": optim.zero_stage},
            "torch_autocast": {"enabled": optim.precision == "bf16", "dtype": "bfloat16"},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 1 << 62,
        }
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=self._adam, config=config, dist_init_required=False
        )

    def forward(self, log_mel: Tensor, mask: Tensor | None) -> Tensor:
        logits: Tensor = self._engine(log_mel, mask)
        return logits

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed averages over the workers; the shares of the loss are to be added.
        self._engine.backward(loss * self._workers.world_size, scale_wrt_gas=False)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # only counts the micro-batch

    def step(self, lr: float) -> None:
        _set_lr(self._engine.optimizer, lr)
        self._engine.step()

    def state(self) -> dict[str, Tensor]:
        if self._stage == 0:
            return _model_state(self.model) | _adam_state(self._adam, self.model)
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        state = {f"model.{name}": buffer.detach().cpu().clone() for name, buffer in self.model.named_buffers()}
        for name, parameter in self.model.named_parameters():
            state[f"model.{name}"] = safe_get_full_fp32_param(parameter).detach().cpu().clone()
            for moment in ("exp_avg", "exp_avg_sq"):
                value = safe_get_full_optimizer_state(parameter, moment)
                state[f"{moment}.{name}"] = value.detach().cpu().clone()
        return state

    def load_state(self, state: dict[str, Tensor], step: int) -> None:
        _load_model_state(self.model, state)
        if self._stage == 0:
            _load_adam_state(self._adam, self.model, state, step)
            return
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        zero = self._engine.optimizer
        for flat in zero.single_partition_of_fp32_groups:
            zero.optimizer.state[flat] = {
                "step": torch.tensor(float(step)),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }
        # Private, hence DeepSpeed's exact pin: links each parameter with its slice of the flat moments, which
        # otherwise happens in the first step only.
        zero._lazy_init_hp_params_optimizer_state()
        for name, parameter in self.model.named_parameters():
            safe_set_full_fp32_param(parameter, state[f"model.{name}"].to(self._workers.device))
            for moment in ("exp_avg", "exp_avg_sq"):
                safe_set_full_optimizer_state(parameter, state[f"{moment}.{name}"].to(self._workers.device), moment)


def _import_deepspeed(device: torch.device) -> Any:
    assert dist.is_initialized()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    os.environ.setdefault("LOCAL_RANK", "0")  # asked for although a process group exists
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    # A C++ extension for gloo over shared memory that is compiled at start-up; a killed compilation's lock file hangs
    # the next one for ever. The results are the same without it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _adam(model: nn.Module, lr: float) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters(), lr, _BETAS)


def _set_lr(optimizer: Any, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def _model_state(model: nn.Module) -> dict[str, Tensor]:
    return {f"model.{name}": value.detach().cpu().clone() for name, value in model.state_dict().items()}


def _load_model_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    own = {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
    model.load_state_dict(own)


def _adam_state(adam: torch.optim.Adam, model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{moment}.{name}": adam.state[parameter][moment].detach().cpu().clone()
        for name, parameter in model.named_parameters()
        for moment in ("exp_avg", "exp_avg_sq")
    }


def _load_adam_state(adam: torch.optim.Adam, model: nn.Module, state: dict[str, Tensor], step: int) -> None:
    for name, parameter in model.named_parameters():
        adam.state[parameter] = {
            "step": torch.tensor(float(step)),
            **{m: state[f"{m}.{name}"].to(parameter.device).clone() for m in ("exp_avg", "exp_avg_sq")},
        }
