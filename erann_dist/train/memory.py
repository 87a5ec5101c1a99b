"""Errors for a GPU whose memory is too small for a micro-batch."""

import numpy as np
import torch

from erann_dist import SAMPLE_RATE
from erann_dist.data.manifest import Manifest
from erann_dist.errors import UserError
from erann_dist.models.base import AudioModel
from erann_dist.recipe import LEAST_MICRO_BATCH, OptimSection
from erann_dist.train.engine import autocast
from erann_dist.train.evaluation import MICRO_BATCH


def too_small(model: AudioModel, optim: OptimSection, crop_samples: int) -> UserError:
    """The error when training does not fit, with the largest micro-batch that does, found by trial."""
    least = 1 if optim.small_micro_batch else LEAST_MICRO_BATCH
    # Only even sizes, for a mixup partner in the same micro-batch.
    sizes = [m for m in range(optim.micro_batch - 1, least - 1, -1) if optim.global_batch % m == 0 and m % 2 == 0]
    fits = next((size for size in sizes if _fits(model, optim, size, model.front_end.frames(crop_samples))), None)
    advice = f"optim.micro_batch={fits} would fit" if fits else "no smaller one would fit; use a smaller model.variant"
    return UserError(
        f"the GPU's memory is too small for optim.micro_batch={optim.micro_batch} of {crop_samples} samples; {advice}"
    )


def too_small_to_evaluate(clips: Manifest) -> UserError:
    """The error when whole clips do not fit."""
    longest = int(np.argmax(clips.samples))
    return UserError(
        f"the GPU's memory is too small to evaluate clips at their whole length, {MICRO_BATCH} at once; the longest is "
        f"{clips.keys[longest].as_py()} of {clips.samples[longest] / SAMPLE_RATE:.0f} s; exclude such clips with "
        "data.eval.without, or use a smaller model.variant"
    )


def _fits(model: AudioModel, optim: OptimSection, size: int, frames: int) -> bool:
    parameters = list(model.parameters())
    device = parameters[0].device
    try:
        moments = [torch.empty_like(p) for p in parameters for _ in range(2)]  # Adam's, which the first step creates
        inputs = torch.zeros(size, 1, model.front_end.mel_bins, frames, device=device)
        with autocast(device, optim.precision):
            loss = model(inputs).float().sum()
        torch.autograd.grad(loss, parameters)  # without an engine's hooks
        del moments
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.cuda.empty_cache()
    return True
