"""Starts a run's workers in this process, under torchrun, or with Ray Train; all run the same function."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

from cluster.environment import is_first_process, is_torchruns_worker, meeting_on_loopback
from cluster.launch_spec import LaunchSpec
from cluster.stop_request import no_stop_request, signals_as_stop_request
from erann_dist.environment import end_with_parent
from erann_dist.errors import UsageError
from erann_dist.log.events import Emit
from erann_dist.train.distributed import Workers, pick_device, single_worker


def launch(spec: LaunchSpec, on_event: Emit) -> None:
    """Run `spec.function(spec.config, workers, emit)` on every worker and wait for all of them.

    Raises a worker's UserError, or UserError if a worker was lost. Stopped, which the function raises after a stop
    request, is not a failure.
    """
    if spec.launcher == "ray":
        from cluster.ray_train import run_on_ray

        return run_on_ray(spec, on_event)
    if spec.launcher == "torchrun" and not is_torchruns_worker():
        from cluster.torchrun import run_under_torchrun

        return run_under_torchrun(spec, on_event)
    if spec.launcher == "torchrun":
        from cluster.torchrun import torchrun_worker

        end_with_parent()  # A killed torchrun leaves its workers running, alongside those of the next start.
        worker: AbstractContextManager[Workers] = torchrun_worker(spec.device, spec.hang_timeout)
    elif spec.num_workers != 1:
        raise UsageError(f"launcher none runs 1 worker, not {spec.num_workers}; use launcher ray or torchrun")
    else:
        worker = _alone(spec.device)
    stops = signals_as_stop_request(is_first_process()) if spec.handles_stop else nullcontext(no_stop_request)
    with stops as stop_request, worker as workers:
        spec.function(spec.config, replace(workers, stop_request=stop_request), on_event)


@contextmanager
def _alone(device: str) -> Iterator[Workers]:
    with meeting_on_loopback(), single_worker(pick_device(device)) as workers:
        yield workers
