"""What a run's workers are started by: one value, from the command to Ray Train or torchrun."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from erann_dist.log.events import Emit
from erann_dist.train.distributed import Workers

# Called on every worker with the configuration. Rank 0's events reach the caller of `launch`.
WorkerFunction = Callable[[dict[str, Any], Workers, Emit], None]


@dataclass(frozen=True)
class LaunchSpec:
    function: WorkerFunction  # importable by name on the workers
    config: dict[str, Any]
    launcher: str  # none, torchrun or ray
    num_workers: int  # at most
    device: str  # auto, cpu or cuda
    # The function looks at workers.stop_request, as which signals then come to it.
    handles_stop: bool = False
    # Seconds without progress, which the function itself watches. A process that does not answer for so long, or an
    # operation between workers that takes twice as long, is given up.
    hang_timeout: float = 600

    # Ray only.
    address: str | None = None  # the cluster's; none starts an embedded one
    min_workers: int | None = None  # run on fewer, down to so many, while the cluster has no capacity for more
    max_failures: int = 0  # how many failed starts in a row, without a new checkpoint, are followed by another
    wait_for_workers: float = 0  # seconds that the cluster gets to have the capacity
    run: str | None = None  # the run's name among the cluster's metrics

    @property
    def least(self) -> int:
        return self.min_workers or self.num_workers
