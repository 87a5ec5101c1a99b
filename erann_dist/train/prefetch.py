"""From the loader's batches to tensors on the device, copied there beside the computation."""

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from erann_dist.train.augment import Choices


@dataclass(frozen=True)
class Fed:
    """A micro-batch before the front end."""

    pcm: Tensor  # (n, samples) int16
    targets: Tensor  # (n, N) float32
    choices: Choices
    weight: float  # of its loss: MicroBatch's

    def map(self, function: Callable[[Tensor], Tensor]) -> "Fed":
        return Fed(function(self.pcm), function(self.targets), self.choices.map(function), self.weight)


def feed(batches: Iterable[Fed], device: torch.device) -> Generator[Fed, None, None]:
    """The batches on the device. On a GPU each is copied, by a stream of its own, while the one before is computed."""
    if device.type != "cuda":
        yield from batches
        return
    copying = torch.cuda.Stream(device)

    def begin(batch: Fed) -> tuple[Fed, torch.cuda.Event]:
        with torch.cuda.stream(copying):
            copied = batch.map(lambda tensor: tensor.pin_memory().to(device, non_blocking=True))
            return copied, copying.record_event()

    def finish(copied: Fed, done: torch.cuda.Event) -> Fed:
        computing = torch.cuda.current_stream(device)
        computing.wait_event(done)

        def used_there(tensor: Tensor) -> Tensor:
            tensor.record_stream(computing)  # its memory is not the copying stream's again before that has used it
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
