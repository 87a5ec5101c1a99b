"""Where a run's events go in addition to metrics.jsonl. To add a logger, add a file here and an entry in SINKS."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from erann_dist.log.events import Event
from erann_dist.log.sinks.tensorboard import TensorBoardSink


class Sink(Protocol):
    """Receives a run's events in order, on rank 0. It raises nothing: its `problem` reports what goes wrong."""

    @property
    def problem(self) -> str | None:
        """Why some of the events are missing in the output, one line."""

    def event(self, event: Event) -> None: ...

    def close(self) -> None:
        """Called at the end of the training, however it ends."""


# Each is opened with the folder that it may write to, which a run in S3 uploads, and the step after which it starts.
SINKS: dict[str, Callable[[Path, int], Sink]] = {"tensorboard": TensorBoardSink}
