"""FLOP utilisation: the floating-point operations of training, and a device's peak as measured by matrix products."""

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor

import torch

from erann_dist.models.spec import macs_of
from erann_dist.train.distributed import pick_device

_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def training_flops(variant: str, num_classes: int, crop_samples: int) -> int:
    """FLOPs of one training example: forward, and backward with twice as many. A multiply-add counts as two."""
    return 3 * 2 * macs_of(variant, num_classes, crop_samples)


def peak_flops(device: str, precision: str) -> float:
    """FLOP/s of a product of large square matrices: the fastest of several, measured in a separate process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_peak, device, precision).result()


def _peak(wanted: str, precision: str) -> float:
    device = pick_device(wanted)
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    size = 8192 if device.type == "cuda" else 512
    a = torch.randn(size, size, device=device).to(_DTYPES[precision])
    best = float("inf")
    for _ in range(10):
        began = time.perf_counter()
        torch.mm(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best
