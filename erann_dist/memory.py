"""When a GPU's memory is too small for a micro-batch."""

import torch

from erann_dist.engine import autocast
from erann_dist.errors import UserError
from erann_dist.features import padded_frames
from erann_dist.model import ERANN, MEL_BINS
from erann_dist.recipe import LEAST_MICRO_BATCH, OptimSection


def too_small(model: ERANN, optim: OptimSection, crop_samples: int) -> UserError:
    """What to say of it: the largest micro-batch that fits, which is tried out."""
    least = 1 if optim.small_micro_batch else LEAST_MICRO_BATCH
    # Even ones, for a mixup partner in the same micro-batch.
    sizes = [m for m in range(optim.micro_batch - 1, least - 1, -1) if optim.global_batch % m == 0 and m % 2 == 0]
    fits = next((size for size in sizes if _fits(model, optim, size, padded_frames(crop_samples))), None)
    advice = f"optim.micro_batch={fits} would fit" if fits else "no other would fit; use a smaller model.variant"
    return UserError(
        f"the GPU's memory is too small for optim.micro_batch={optim.micro_batch} of {crop_samples} samples; {advice}"
    )


def _fits(model: ERANN, optim: OptimSection, size: int, frames: int) -> bool:
    device = next(model.parameters()).device
    try:
        inputs = torch.zeros(size, 1, MEL_BINS, frames, device=device)
        with autocast(device, optim.precision):
            loss = model(inputs).float().sum()
        torch.autograd.grad(loss, list(model.parameters()))  # no hooks of an engine's
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.cuda.empty_cache()
    return True
