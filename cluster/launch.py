"""Start a run's workers: in this process, under torchrun, or by Ray Train. Their function is the same for all."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from cluster.environment import is_first_process, is_torchruns_worker, meeting_on_loopback
from cluster.stop_request import no_notice, signals_as_notice
from erann_dist.environment import end_with_parent
from erann_dist.errors import UsageError
from erann_dist.log.events import Emit
from erann_dist.train.distributed import Workers, pick_device, single_worker

# Called on every worker with the configuration. The first worker's events reach the caller of `launch`.
WorkerFunction = Callable[[dict[str, Any], Workers, Emit], None]


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
    if launcher == "torchrun" and not is_torchruns_worker():
        from cluster.torchrun import run_under_torchrun

        run_under_torchrun(
            function,
            config,
            num_workers=num_workers,
            device=device,
            on_event=on_event,
            heeds_notice=heeds_notice,
            hang_timeout=hang_timeout,
        )
        return
    if launcher == "torchrun":
        from cluster.torchrun import torchrun_worker

        end_with_parent()  # a torchrun that is killed leaves its workers, which would train on beside the next start
        worker: AbstractContextManager[Workers] = torchrun_worker(device, hang_timeout)
    elif num_workers != 1:
        raise UsageError(f"launcher none runs 1 worker, not {num_workers}; use launcher ray or torchrun")
    else:
        worker = _alone(device)
    with signals_as_notice(is_first_process()) if heeds_notice else nullcontext(no_notice) as notice, worker as workers:
        function(config, replace(workers, notice=notice), on_event)


@contextmanager
def _alone(device: str) -> Iterator[Workers]:
    with meeting_on_loopback(), single_worker(pick_device(device)) as workers:
        yield workers
