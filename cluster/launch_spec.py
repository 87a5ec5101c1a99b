"""How to start a run's workers: one value that is passed from the command to Ray Train or torchrun."""

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
    num_workers: int  # the maximum
    device: str  # auto, cpu or cuda
    # Whether the function polls workers.stop_request; if so, signals become stop requests.
    handles_stop: bool = False
    # Seconds without progress after which the function aborts itself. A process that does not answer for as long, or a
    # collective operation that takes twice as long, counts as failed.
    hang_timeout: float = 600

    # Ray only.
    address: str | None = None  # of the cluster; None: an embedded one
    min_workers: int | None = None  # the minimum to run with while the cluster has no capacity for more
    max_failures: int = 0  # failed starts in a row, without a new checkpoint, that are retried
    wait_for_workers: float = 0  # seconds to wait for capacity
    run: str | None = None  # name of the run in the cluster's metrics

    @property
    def least(self) -> int:
        return self.min_workers or self.num_workers
