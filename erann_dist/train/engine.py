"""The engines that turn losses into weights: DeepSpeed, and plain PyTorch as its reference, with one interface.

Both use Adam (optimizer.py). `state` and `load_state` address parameters by name, independent of the number of workers
and of the ZeRO stage.
"""

import logging
import os
import shutil
import socket
from contextlib import nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from erann_dist.errors import UsageError
from erann_dist.models.base import AudioModel
from erann_dist.models.mel_config import PAD_SAMPLES
from erann_dist.recipe import OptimSection
from erann_dist.train.distributed import Workers
from erann_dist.train.optimizer import CheckedAdam

_MOMENTS = ("exp_avg", "exp_avg_sq")
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}

# On the CPU, by name: model.…, exp_avg.…, exp_avg_sq.…, adam.step, and with fp16 loss_scale.…
State = dict[str, Tensor]


class Engine(Protocol):
    """One step: `forward` and `backward` for each of the worker's micro-batches, then `step`."""

    model: AudioModel
    adam: CheckedAdam  # its `skipped` and `norm` describe the last step

    def forward(self, log_mel: Tensor, mask: Tensor | None) -> Tensor:
        """Logits of a micro-batch."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of the micro-batch's part of the step's loss; the parts are summed over all workers."""

    def step(self, lr: float, loss: Tensor) -> None:
        """Take one optimizer step at this learning rate, unless the loss or the gradient is not finite.

        loss: () the step's, over all workers.
        """

    def state(self, into: State | None) -> None:
        """Copy weights, buffers and the optimizer's state `into` the tensors of that name, created if necessary.

        All workers call it; a worker that passes None only takes part.
        """

    def load_state(self, state: State) -> None:
        """Load what `state` saved. Only before the first step of this engine."""


def make_engine(kind: str, model: AudioModel, optim: OptimSection, micro_batches: int, workers: Workers) -> Engine:
    """kind: deepspeed or torch. micro_batches: how many each worker computes per step."""
    torch.backends.cudnn.allow_tf32 = optim.precision == "tf32"  # of convolutions; the front end keeps its precision
    if kind == "torch":
        return TorchEngine(model, optim, micro_batches, workers)
    return DeepSpeedEngine(model, optim, micro_batches, workers)


def require_compiler(device: torch.device) -> None:
    """Raise UsageError when torch.compile would find no compiler: C++ on CPUs, C for Triton on GPUs."""
    if device.type == "cpu":
        wanted, names = "C++", [os.environ.get("CXX", "g++")]
    else:
        wanted, names = "C", [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
    if not any(shutil.which(name.split(" ")[0]) for name in names):
        raise UsageError(
            f"optim.compile=true needs a {wanted} compiler on {socket.gethostname()}, and {' or '.join(names)} is not "
            "there; install one, or remove optim.compile"
        )


class TorchEngine:
    """Plain PyTorch, with DistributedDataParallel for several workers."""

    def __init__(self, model: AudioModel, optim: OptimSection, micro_batches: int, workers: Workers) -> None:
        self.model = model
        self.adam = CheckedAdam(model.parameters(), optim, _whole)
        self._micro_batches = micro_batches
        self._left = micro_batches  # of the step
        self._world_size = workers.world_size
        self._network: _Network | DistributedDataParallel = _Network(model, optim)
        if self._world_size > 1:
            self._network = DistributedDataParallel(
                self._network, broadcast_buffers=False, gradient_as_bucket_view=True
            )
            self._settle_buckets(workers.device)

    def _settle_buckets(self, device: torch.device) -> None:
        """Run a backward pass without effect.

        After its first backward pass DistributedDataParallel rebuilds the gradient buckets in the order in which the
        gradients arrived. Without this pass, the first step after a resume would be summed in another order than in an
        undisturbed run.
        """
        front_end = self.model.front_end
        shape = front_end.mel_bins, front_end.frames(PAD_SAMPLES)
        self.model.eval()  # leaves the running statistics alone
        with torch.compiler.set_stance("force_eager"):
            self._network(torch.zeros(1, 1, *shape, device=device), None).sum().backward()
        self.model.train()
        self.adam.zero_grad()

    def forward(self, log_mel: Tensor, mask: Tensor | None) -> Tensor:
        self._left -= 1
        network = self._network
        # Gradients are sent to the other workers together with those of the last micro-batch.
        alone = network.no_sync() if isinstance(network, DistributedDataParallel) and self._left else nullcontext()
        with alone:
            logits: Tensor = network(log_mel, mask)
        return logits

    def backward(self, loss: Tensor) -> None:
        # DistributedDataParallel averages over the workers, but the parts of the loss must be summed.
        _scaled(loss, self.adam, self._world_size).backward()

    def step(self, lr: float, loss: Tensor) -> None:
        _set_lr(self.adam, lr)
        self.adam.loss = loss
        self.adam.step()
        self.adam.zero_grad()
        self._left = self._micro_batches

    def state(self, into: State | None) -> None:
        if into is not None:
            _copy_state(self.model, self.adam, into)

    def load_state(self, state: State) -> None:
        _load_state(self.model, self.adam, state)


class DeepSpeedEngine:
    """DeepSpeed at ZeRO stage 0, 1 or 2, over the existing process group."""

    def __init__(self, model: AudioModel, optim: OptimSection, micro_batches: int, workers: Workers) -> None:
        deepspeed = _import_deepspeed(workers.device)
        self.model = model
        self._workers = workers
        self._sharded = optim.zero_stage > 0
        self.adam = CheckedAdam(model.parameters(), optim, workers.all_reduce_sum if self._sharded else _whole)
        config = {
            # Nominal: a rank with one micro-batch fewer repeats its last one with weight 0.
            "train_micro_batch_size_per_gpu": optim.micro_batch,
            "gradient_accumulation_steps": micro_batches,
            "gradient_clipping": 0.0,  # DeepSpeed's default is 1.0; CheckedAdam clips
            # CheckedAdam computes the norm too: DeepSpeed's makes the host wait for the device in each step.
            "zero_optimization": {"stage": optim.zero_stage} | ({"compute_grad_norm": False} if self._sharded else {}),
            "zero_allow_untested_optimizer": True,
            "timers": {"throughput": {"enabled": False}},  # it waits for the device in each micro-batch
            "steps_per_print": 1 << 62,
        }
        self._engine, *_ = deepspeed.initialize(
            model=_Network(model, optim), optimizer=self.adam, config=config, dist_init_required=False
        )

    def forward(self, log_mel: Tensor, mask: Tensor | None) -> Tensor:
        logits: Tensor = self._engine(log_mel, mask)
        return logits

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed averages as well.
        self._engine.backward(_scaled(loss, self.adam, self._workers.world_size), scale_wrt_gas=False)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # only counts the micro-batch

    def step(self, lr: float, loss: Tensor) -> None:
        _set_lr(self._engine.optimizer, lr)
        self.adam.loss = loss
        self._engine.step()

    def state(self, into: State | None) -> None:
        if not self._sharded:
            if into is not None:
                _copy_state(self.model, self.adam, into)
            return
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        def keep(name: str, value: Tensor) -> None:
            if into is not None:
                _copy(name, value, into)

        for name, buffer in self.model.named_buffers():
            keep(f"model.{name}", buffer)
        for name, parameter in self.model.named_parameters():
            keep(f"model.{name}", safe_get_full_fp32_param(parameter))
            for moment in _MOMENTS:
                keep(f"{moment}.{name}", safe_get_full_optimizer_state(parameter, moment))
        if into is not None:
            _copy_rest(self.adam, into)

    def load_state(self, state: State) -> None:
        if not self._sharded:
            _load_state(self.model, self.adam, state)
            return
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        _load_rest(self.model, self.adam, state)
        zero = self._engine.optimizer
        for flat in zero.single_partition_of_fp32_groups:
            self.adam.state[flat] = {"step": state["adam.step"].to(flat.device)} | {
                moment: torch.zeros_like(flat) for moment in _MOMENTS
            }
        # Private, hence the exact pin of DeepSpeed: links each parameter with its slice of the flat moments, which
        # otherwise happens only in the first step.
        zero._lazy_init_hp_params_optimizer_state()
        for name, parameter in self.model.named_parameters():
            safe_set_full_fp32_param(parameter, state[f"model.{name}"].to(self._workers.device))
            for moment in _MOMENTS:
                safe_set_full_optimizer_state(parameter, state[f"{moment}.{name}"].to(self._workers.device), moment)


class _Network(nn.Module):
    """The model as it is computed: under autocast, and compiled if requested.

    Autocast is applied here and not by DeepSpeed, which would also sum the gradients in the lower precision.
    """

    def __init__(self, model: AudioModel, optim: OptimSection) -> None:
        super().__init__()
        self._model = model
        self._precision = optim.precision
        if optim.compile:
            self.compile()

    def forward(self, log_mel: Tensor, mask: Tensor | None) -> Tensor:
        with autocast(log_mel.device, self._precision):
            logits: Tensor = self._model(log_mel, mask)
        return logits


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which the model is computed."""
    return torch.autocast(device.type, _AUTOCAST.get(precision), enabled=precision in _AUTOCAST)


def _import_deepspeed(device: torch.device) -> Any:
    assert dist.is_initialized()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it writes to stdout, which is for a command's JSON
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # required although a process group exists
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    # A C++ extension for gloo over shared memory that is compiled at start-up; the lock file of a killed compilation
    # makes the next one hang for ever. The results are the same without it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _scaled(loss: Tensor, adam: CheckedAdam, world_size: int) -> Tensor:
    loss = loss * world_size
    return loss * adam.scale if adam.scaled else loss


def _whole(square: Tensor) -> Tensor:
    """The sum when each worker has the whole gradient."""
    return square


def _set_lr(optimizer: Any, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def _copy(name: str, value: Tensor, into: State) -> None:
    if name not in into:
        into[name] = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
    into[name].copy_(value.detach(), non_blocking=True)


def _copy_state(model: nn.Module, adam: CheckedAdam, into: State) -> None:
    for name, value in model.state_dict().items():
        _copy(f"model.{name}", value, into)
    for name, parameter in model.named_parameters():
        for moment in _MOMENTS:
            _copy(f"{moment}.{name}", adam.state[parameter][moment], into)
    _copy_rest(adam, into)


def _copy_rest(adam: CheckedAdam, into: State) -> None:
    """Copy Adam's state other than the moments, and wait until all copies are on the CPU."""
    _copy("adam.step", next(iter(adam.state.values()))["step"], into)  # the same for all parameters
    if adam.scaled:
        _copy("loss_scale.scale", adam.scale, into)
        _copy("loss_scale.steps", adam.steps_at_scale, into)
    if adam.scale.is_cuda:
        torch.cuda.synchronize()


def _load_state(model: nn.Module, adam: CheckedAdam, state: State) -> None:
    _load_rest(model, adam, state)
    for name, parameter in model.named_parameters():
        values = {"step": state["adam.step"]} | {moment: state[f"{moment}.{name}"] for moment in _MOMENTS}
        adam.state[parameter] = {key: value.to(parameter.device, copy=True) for key, value in values.items()}


def _load_rest(model: nn.Module, adam: CheckedAdam, state: State) -> None:
    """The weights and buffers, and the loss scale if both have one."""
    prefix = "model."
    model.load_state_dict({name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)})
    if adam.scaled and "loss_scale.scale" in state:
        adam.scale = state["loss_scale.scale"].to(adam.scale.device)
        adam.steps_at_scale = state["loss_scale.steps"].to(adam.scale.device)
