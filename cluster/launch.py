"""Start a run's workers: in this process, under torchrun, or by Ray Train. Their function is the same for all."""

import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
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
    num_workers: int | tuple[int, int],
    device: str,
    on_event: Emit,
    address: str | None = None,
    heeds_notice: bool = False,
    max_failures: int = 0,
    wait_for_workers: float = 0,
    hang_timeout: float = 600,
) -> None:
    """Run `function(config, workers, emit)` on every worker and wait for all of them.

    function: importable by name on the workers. launcher: none, torchrun or ray. device: auto, cpu or cuda.
    heeds_notice: the function looks at workers.notice; SIGTERM and SIGUSR1 then come to it as one.
    Raises the worker's UserError, or UserError for a worker that was lost.

    Ray only. num_workers: (least, most) takes as many as the cluster has room for, at any time. address: the cluster's;
    none starts an embedded one. max_failures: how many starts in a row may fail without a new checkpoint and be followed
    by another; a Stopped, by which the function follows a notice, is no failure. wait_for_workers: seconds that the
    cluster gets to have room for the least. hang_timeout: seconds in which a worker's process has to answer.
    """
    if launcher == "ray":
        from cluster.ray_train import run_on_ray

        least, most = num_workers if isinstance(num_workers, tuple) else (num_workers, num_workers)
        run_on_ray(
            function,
            config,
            least=least,
            most=most,
            device=device,
            on_event=on_event,
            address=address,
            heeds_notice=heeds_notice,
            max_failures=max_failures,
            wait_for_workers=wait_for_workers,
            hang_timeout=hang_timeout,
        )
        return
    with signals_as_notice() if heeds_notice else nullcontext(no_notice) as notice:
        if launcher == "torchrun":
            _launch_under_torchrun(function, config, num_workers, device, on_event, notice)
        elif num_workers != 1:
            raise UsageError(f"launcher none runs 1 worker, not {num_workers}; use launcher ray or torchrun")
        else:
            with single_worker(pick_device(device)) as workers:
                function(config, replace(workers, notice=notice), on_event)


def is_first_process() -> bool:
    """False in all but the first of the processes that torchrun started: what is done once is done there."""
    return int(os.environ.get("RANK", "0")) == 0


def _launch_under_torchrun(
    function: WorkerFunction, config: dict[str, Any], num_workers: Any, device: str, on_event: Emit, notice: Notice
) -> None:
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        # This is the user's own command: it becomes torchrun, which runs the same command on each worker.
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_workers)]
        passed_on = {"TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"}
        environment = WORKER_ENVIRONMENT | passed_on | {_LAUNCHED: str(time.time())}
        os.execve(sys.executable, [*command, *sys.argv], os.environ | environment)
    end_with_parent()  # torchrun's workers would train on beside the next start of the run
    local_device = pick_device(device, int(os.environ["LOCAL_RANK"]))
    launched = float(os.environ.get(_LAUNCHED, time.time()))
    dist.init_process_group(process_group_backend(local_device))
    try:
        workers = Workers(dist.get_rank(), dist.get_world_size(), local_device, launched, notice=notice)
        function(config, workers, on_event)
    finally:
        dist.destroy_process_group()
