"""Where a run's events go, besides its metrics.jsonl. Another logger is a file here and an entry in SINKS."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from erann_dist.log.events import Event
from erann_dist.log.sinks.tensorboard import TensorBoardSink


class Sink(Protocol):
    """Takes a run's events in their order, on rank 0. It raises nothing: what goes wrong is its `problem`."""

    @property
    def problem(self) -> str | None:
        """Why something of what it was given is missing where it goes, one line."""

    def event(self, event: Event) -> None: ...

    def close(self) -> None:
        """At the end of the training, however that comes."""


# Each is opened with the folder that it may write to, which a run in S3 uploads, and the step after which it begins.
SINKS: dict[str, Callable[[Path, int], Sink]] = {"tensorboard": TensorBoardSink}
