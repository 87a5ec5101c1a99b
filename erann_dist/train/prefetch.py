"""Copies micro-batches to the device in the background of the computation."""

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from erann_dist.train.augment import AugmentParams


@dataclass(frozen=True)
class DeviceBatch:
    """A micro-batch as the step takes it, before the front end."""

    pcm: Tensor  # (n, samples) int16
    targets: Tensor  # (n, N) float32
    params: AugmentParams
    weight: float  # of its loss, as in MicroBatch
    first_example: int  # its position in the run, which keys torch's random choices

    def map(self, function: Callable[[Tensor], Tensor]) -> "DeviceBatch":
        return replace(self, pcm=function(self.pcm), targets=function(self.targets), params=self.params.map(function))


def prefetch_to_device(batches: Iterable[DeviceBatch], device: torch.device) -> Generator[DeviceBatch, None, None]:
    """The batches on the device. On a GPU each is copied, on a separate stream, while the previous one is computed."""
    if device.type != "cuda":
        yield from batches
        return
    copying = torch.cuda.Stream(device)

    def begin(batch: DeviceBatch) -> tuple[DeviceBatch, torch.cuda.Event]:
        with torch.cuda.stream(copying):
            copied = batch.map(lambda tensor: tensor.pin_memory().to(device, non_blocking=True))
            return copied, copying.record_event()

    def finish(copied: DeviceBatch, done: torch.cuda.Event) -> DeviceBatch:
        computing = torch.cuda.current_stream(device)
        computing.wait_event(done)

        def used_there(tensor: Tensor) -> Tensor:
            tensor.record_stream(computing)  # the copying stream may reuse its memory only after the computation
            return tensor

        return copied.map(used_there)

    ahead = None
    for batch in batches:
        begun = begin(batch)
        if ahead:
            yield finish(*ahead)
        ahead = begun
    if ahead:
        yield finish(*ahead)
