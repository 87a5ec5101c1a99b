"""Start a run's workers: in this process, under torchrun, or by Ray Train. Their function is the same for all."""

import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from cluster.environment import WORKER_ENVIRONMENT
from erann_dist.distributed import Workers, pick_device, process_group_backend, single_worker
from erann_dist.environment import end_with_parent
from erann_dist.errors import UsageError, UserError
from erann_dist.events import Emit, Event

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
) -> None:
    """Run `function(config, workers, emit)` on every worker and wait for all of them.

    function: importable by name on the workers. launcher: none, torchrun or ray. device: auto, cpu or cuda.
    address: the Ray cluster's; none starts an embedded one. Raises the worker's UserError, or UserError for a worker
    that was lost.
    """
    if launcher == "ray":
        _launch_on_ray(function, config, num_workers, device, on_event, address)
    elif launcher == "torchrun":
        _launch_under_torchrun(function, config, num_workers, device, on_event)
    else:
        if num_workers != 1:
            raise UsageError(f"launcher none runs 1 worker, not {num_workers}; use launcher ray or torchrun")
        with single_worker(pick_device(device)) as workers:
            function(config, workers, on_event)


def is_first_process() -> bool:
    """False in all but the first of the processes that torchrun started: what is done once is done there."""
    return int(os.environ.get("RANK", "0")) == 0


def _launch_under_torchrun(
    function: WorkerFunction, config: dict[str, Any], num_workers: int, device: str, on_event: Emit
) -> None:
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        # This is the user's own command: it becomes torchrun, which runs the same command on each worker.
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_workers)]
        os.execve(sys.executable, [*command, *sys.argv], os.environ | WORKER_ENVIRONMENT)
    end_with_parent()  # torchrun's workers would train on beside the next start of the run
    local_device = pick_device(device, int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(process_group_backend(local_device))
    try:
        function(config, Workers(dist.get_rank(), dist.get_world_size(), local_device), on_event)
    finally:
        dist.destroy_process_group()


def _launch_on_ray(
    function: WorkerFunction,
    config: dict[str, Any],
    num_workers: int,
    device: str,
    on_event: Emit,
    address: str | None,
) -> None:
    from cluster.embedded import ray_cluster

    scratch = tempfile.TemporaryDirectory(prefix="erann-ray-", ignore_cleanup_errors=True)
    with scratch as storage, ray_cluster(address, num_workers):
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
        from ray.train.v2.api.exceptions import TrainingFailedError
        from ray.util.queue import Queue

        resources = ray.cluster_resources()
        use_gpu = device == "cuda" or (device == "auto" and resources.get("GPU", 0) >= num_workers)
        kind = "GPU" if use_gpu else "CPU"
        if resources.get(kind, 0) < num_workers:
            raise UserError(f"the cluster has {resources.get(kind, 0):g} {kind}s, {num_workers} workers need one each")
        events = Queue(actor_options={"num_cpus": 0})
        trainer = TorchTrainer(
            _ray_worker,
            train_loop_config={"function": function, "config": config, "events": events, "cwd": str(Path.cwd())},
            torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=num_workers,
                use_gpu=use_gpu,
                resources_per_worker={"CPU": 1, **({"GPU": 1} if use_gpu else {})},
            ),
            # Ray keeps nothing of ours: checkpoints are the run folder's. A name used twice would resume silently.
            run_config=RunConfig(
                name=f"run-{os.getpid()}-{time.time_ns()}",
                storage_path=storage,
                failure_config=FailureConfig(max_failures=0),
            ),
        )
        finished = threading.Event()
        listener = threading.Thread(target=_listen, args=(events, on_event, finished), daemon=True)
        listener.start()
        before = signal.getsignal(signal.SIGINT)
        try:
            trainer.fit()
        except SystemExit as stop:  # what Ray Train makes of Ctrl-C
            raise KeyboardInterrupt from stop
        except (TrainingFailedError, ray.exceptions.RayError) as error:
            raise _user_error(error) from error
        finally:
            signal.signal(signal.SIGINT, before)
            finished.set()
            listener.join(timeout=10)
            events.shutdown()


def _ray_worker(settings: dict[str, Any]) -> None:
    """The function that Ray Train runs on each worker."""
    import ray.train.torch

    os.chdir(settings["cwd"])
    context = ray.train.get_context()
    workers = Workers(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())

    def emit(event: Event) -> None:
        settings["events"].put(event)

    settings["function"](settings["config"], workers, emit)


def _listen(events: Any, on_event: Emit, finished: threading.Event) -> None:
    from ray.util.queue import Empty

    while True:
        last_round = finished.is_set()
        try:
            while True:
                on_event(events.get(timeout=0.2))
        except Empty:
            if last_round:
                return


def _user_error(error: Any) -> UserError:
    """What a failed Ray run says to the user: the worker's own UserError if there is one."""
    failures = list(getattr(error, "worker_failures", {}).values()) or [getattr(error, "controller_failure", error)]
    for failure in failures:
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, UserError):
                return cause
            cause = getattr(cause, "cause", None) or cause.__cause__
    # A fault of this program or of the machine: what the worker said in full, for whoever is to find it.
    print(failures[0], file=sys.stderr)
    lines = str(failures[0]).strip().splitlines() or [repr(failures[0])]
    return UserError(f"a worker failed: {lines[-1]}; run the same command again to go on from the last checkpoint")
