"""Start a run's workers: in this process, under torchrun, or by Ray Train. Their function is the same for all."""

import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from cluster.environment import WORKER_ENVIRONMENT
from cluster.notice import Notice, no_notice, signals_as_notice
from erann_dist.distributed import Workers, pick_device, process_group_backend, single_worker
from erann_dist.environment import end_with_parent
from erann_dist.errors import UsageError
from erann_dist.events import Emit

# Called on every worker with the configuration. The first worker's events reach the caller of `launch`.
WorkerFunction = Callable[[dict[str, Any], Workers, Emit], None]
_LAUNCHED = "ERANN_LAUNCHED"  # when the user's command was started, for the same command on torchrun's workers


def launch(
    function: WorkerFunction,
    config: dict[str, Any],
    *,
    launcher: str,
    num_workers: int,
    device: str,
    on_event: Emit,
    address: str | None = None,
    min_workers: int | None = None,
    heeds_notice: bool = False,
    max_failures: int = 0,
    wait_for_workers: float = 0,
    hang_timeout: float = 600,
    run: str | None = None,
) -> None:
    """Run `function(config, workers, emit)` on every worker and wait for all of them.

    function: importable by name on the workers. launcher: none, torchrun or ray. device: auto, cpu or cuda.
    heeds_notice: the function looks at workers.notice; SIGTERM and SIGUSR1 then come to it as one.
    hang_timeout: seconds without progress, which the function itself watches; a process that does not answer for so
    long, or an operation between workers that takes twice as long, is given up.
    Raises the worker's UserError, or UserError for a worker that was lost.

    Ray only. address: the cluster's; none starts an embedded one. min_workers: run on fewer than num_workers, down to
    so many, while the cluster has no room for more. max_failures: how many failed starts in a row, without a new
    checkpoint, are followed by another; a Stopped, by which the function follows a notice, is no failure.
    wait_for_workers: seconds that the cluster gets to have room. run: its name among the cluster's metrics.
    """
    if launcher == "ray":
        from cluster.ray_train import run_on_ray

        run_on_ray(
            function,
            config,
            least=min_workers or num_workers,
            most=num_workers,
            device=device,
            on_event=on_event,
            address=address,
            heeds_notice=heeds_notice,
            max_failures=max_failures,
            wait_for_workers=wait_for_workers,
            hang_timeout=hang_timeout,
            run=run,
        )
        return
    with signals_as_notice() if heeds_notice else nullcontext(no_notice) as notice:
        if launcher == "torchrun":
            _launch_under_torchrun(function, config, num_workers, device, on_event, notice, hang_timeout)
        elif num_workers != 1:
            raise UsageError(f"launcher none runs 1 worker, not {num_workers}; use launcher ray or torchrun")
        else:
            with single_worker(pick_device(device)) as workers:
                function(config, replace(workers, notice=notice), on_event)


def is_first_process() -> bool:
    """False in all but the first of the processes that torchrun started: what is done once is done there."""
    return int(os.environ.get("RANK", "0")) == 0


def _launch_under_torchrun(
    function: WorkerFunction,
    config: dict[str, Any],
    num_workers: int,
    device: str,
    on_event: Emit,
    notice: Notice,
    hang_timeout: float,
) -> None:
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        # This is the user's own command: it becomes torchrun, which runs the same command on each worker.
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_workers)]
        signals = ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]  # they are passed on to the workers
        environment = WORKER_ENVIRONMENT | {_LAUNCHED: str(time.time())}
        os.execve(sys.executable, [*command, *signals, *sys.argv], os.environ | environment)
    end_with_parent()  # torchrun's workers would train on beside the next start of the run
    local_device = pick_device(device, int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
    launched = float(os.environ.get(_LAUNCHED, time.time()))
    # The loop's own watchdog is to see a hang first.
    dist.init_process_group(process_group_backend(local_device), timeout=timedelta(seconds=2 * hang_timeout))
    try:
        workers = Workers(dist.get_rank(), dist.get_world_size(), local_device, launched, notice=notice)
        function(config, workers, on_event)
    finally:
        dist.destroy_process_group()
