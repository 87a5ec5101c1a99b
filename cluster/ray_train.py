"""A run's workers under Ray Train: started on the available nodes, and restarted after each fault.

Every start is a separate `fit()`. Ray Train places the workers, joins them to a process group, monitors them, and ends
all of them when one fails; what happens next is decided here. Ray Train's own restarts would lose the steps since the
last checkpoint whenever the number of workers changes, and would give up if a worker is lost during the set-up of the
process group.
"""

import datetime
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass, replace
from typing import Any

from cluster.embedded import opening, ray_cluster  # before Ray, whose environment it sets

# isort: split
import ray
import ray.train.torch
import torch.distributed as dist
from ray.exceptions import OutOfMemoryError, RayActorError, RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

# Private: there is no other way to choose where the workers of one host meet. The test of open ports covers it.
from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError

# Private: a worker's preemption notice can't be read elsewhere, as the public get_preemption_info() is a collective
# call through an actor. The test of a drained node fails if it moves.
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2.api.exceptions import TrainingFailedError
from torch._C._distributed_c10d import FileStore

from cluster.capacity import Bundle, bundle_of, capacity_for, wait_for_capacity
from cluster.event_bus import EventPump, Place, open_event_bus
from cluster.gauges import GaugeSink
from cluster.launch_spec import LaunchSpec
from cluster.stop_request import first_of, no_stop_request, signals_as_stop_request
from erann_dist.clock import set_time, steady_time
from erann_dist.errors import Stopped, Unavailable, UserError
from erann_dist.log.events import Emit, Event, Incident, Interruption, Phase, StopRequest, both
from erann_dist.train.distributed import Workers
from erann_dist.words import count

_ANSWER_TIMEOUT = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"
_USERS_ANSWER_TIMEOUT = os.environ.get(_ANSWER_TIMEOUT)
_BLAME_S = 3.0  # Time within which Ray notices the loss of a worker.
_AGAIN = "run the same command again to resume from the last checkpoint"


@dataclass(frozen=True)
class Start:
    """What each worker of one start receives."""

    number: int  # 1, 2, …
    workers: int
    failure: Interruption | None  # why the previous workers ended
    reached: int  # the last step that the previous workers reported
    function: Any
    config: dict[str, Any]
    launched: float
    cwd: str
    bus: Any


def run_on_ray(spec: LaunchSpec, on_event: Emit) -> None:
    """Run the function on the cluster's workers until it has returned on all of them. See `launch`."""
    launched = steady_time()
    # A worker whose process does not answer, as on a frozen machine, counts as lost.
    os.environ[_ANSWER_TIMEOUT] = _USERS_ANSWER_TIMEOUT or str(spec.hang_timeout)
    scratch = tempfile.TemporaryDirectory(prefix="erann-ray-", ignore_cleanup_errors=True)
    stops = signals_as_stop_request() if spec.handles_stop else nullcontext(no_stop_request)
    least, most, wait_for_workers = spec.least, spec.num_workers, spec.wait_for_workers
    with (
        _lost_cluster_in_one_line(),
        redirect_stdout(sys.stderr),  # Ray reports lost workers on stdout, which is only for the command's result.
        scratch as storage,
        stops as stop,  # Until Ray has shut down: another SIGTERM would interrupt that.
        _announced_cluster(spec.address, least, on_event) as embedded,
        open_event_bus() as bus,
    ):
        if spec.run:
            on_event = both(on_event, GaugeSink(spec.run).event)
        resources = ray.cluster_resources()
        bundle = bundle_of(spec.device, least)
        if embedded and any(resources.get(kind, 0) < least for kind in bundle):
            wait_for_workers = 0  # An embedded cluster does not grow.
        if spec.device == "auto" and "GPU" not in bundle and (gpus := resources.get("GPU", 0)):
            text = f"training on CPUs: the cluster has {count(gpus, 'GPU')} for {count(least, 'worker')}"
            on_event(
                Incident(0, "resize", f"{text}; set run.device=cuda to wait for more, or lower run.workers to use them")
            )
        number = failures = step = 0
        failure: Interruption | None = None
        places: dict[int, Place] = {}
        while True:
            workers = wait_for_capacity(
                bundle,
                least,
                most,
                seconds=wait_for_workers,
                emit=lambda line: on_event(Incident(step, "resize", line)),  # noqa: B023 - called in this round
                stop=stop,
            )
            failure = _why_again(failure, places, workers)
            number += 1
            on_event(Phase(step, f"starting {count(workers, 'worker')}"))
            start = Start(number, workers, failure, step, spec.function, spec.config, launched, os.getcwd(), bus)
            with (
                _growth(bus, workers, bundle, most - workers) as growth,
                EventPump(bus, number, on_event, first_of(stop, growth), step) as watch,
            ):
                error = _fit(start, "GPU" in bundle, bundle, storage, spec.hang_timeout)
            if error is None:
                return
            step, failures = watch.step, 0 if watch.saved else failures
            places, stop_request = ray.get(bus.facts.remote())
            stopped, text = _explain(error, places)
            if stopped and stop():
                raise stopped
            if stopped and stop_request:
                failure = stop_request
                continue
            failure = Interruption("failure", text)
            failures += 1
            if failures > spec.max_failures:
                # A fault of this program or of the machine is printed in full, for debugging.
                print(error, file=sys.stderr)
                times = f" {failures} times in a row without a new checkpoint, last" if spec.max_failures else ""
                raise UserError(f"the workers failed{times}: {text}", fix=_AGAIN)


@contextmanager
def _announced_cluster(address: str | None, least: int, on_event: Emit) -> Iterator[bool]:
    """ray_cluster, announced by an event, as it may take half a minute."""
    on_event(Phase(0, opening(address)))
    with ray_cluster(address, least) as embedded:
        yield embedded


@contextmanager
def _lost_cluster_in_one_line() -> Iterator[None]:
    try:
        yield
    except RayError as error:
        if any(isinstance(cause, OutOfMemoryError) for cause in _causes(error)):
            raise UserError(f"{_OUT_OF_MEMORY}", fix=f"free some, or add nodes, and {_AGAIN}") from error
        raise UserError(f"the Ray cluster is lost ({type(error).__name__})", fix=_AGAIN) from error


@dataclass
class _InAFile(TorchConfig):  # type: ignore[misc]  # Ray's classes are Any
    """Lets the workers of one host meet in a file. Torch's TCP store listens on all networks, and anyone could join."""

    path: str = ""

    @property
    def backend_cls(self) -> type["_InAFileBackend"]:
        return _InAFileBackend


class _InAFileBackend(_TorchBackend):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: _InAFile) -> None:
        worker_group.execute(_set_torch_distributed_env_vars)
        count = len(worker_group)
        ray.get([worker_group.execute_single_async(i, _meet, backend_config, i, count) for i in range(count)])


def _meet(config: _InAFile, rank: int, world_size: int) -> None:
    dist.init_process_group(
        config.backend,
        store=FileStore(config.path, world_size),
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=config.timeout_s),
    )


def _fit(start: Start, use_gpu: bool, bundle: Bundle, storage: str, hang_timeout: float) -> Exception | None:
    """Start the workers once and wait for them. Returns the error that ended them, if any."""
    # The training loop's own watchdog should detect a hang first.
    how = {"backend": "nccl" if use_gpu else "gloo", "timeout_s": round(2 * hang_timeout)}
    trainer = _Trainer(
        _ray_worker,
        train_loop_config={"start": start},
        torch_config=_InAFile(**how, path=f"{storage}/{start.number}") if _is_embedded() else TorchConfig(**how),
        scaling_config=ScalingConfig(num_workers=start.workers, use_gpu=use_gpu, resources_per_worker=bundle),
        # Ray stores nothing of ours: checkpoints are in the run's folder. A reused name would silently resume.
        run_config=RunConfig(
            name=f"run-{os.getpid()}-{time.time_ns()}",
            storage_path=storage,
            failure_config=FailureConfig(max_failures=0, max_preemption_failures=0, controller_failure_limit=0),
        ),
    )
    try:
        trainer.fit()
    except (TrainingFailedError, RayError) as error:
        return error
    return None


class _Trainer(TorchTrainer):  # type: ignore[misc]  # Ray's classes are Any
    """Ray's trainer, without what a run does not need."""

    def _register_sigint_handler(self, controller: Any) -> None:
        """Do nothing: Ray's handler aborts the workers at Ctrl-C, before they have saved a checkpoint."""

    def _create_default_callbacks(self) -> list[Any]:
        """Leave out what costs a process at each start and is not needed.

        That is Ray Datasets, for which ray.data is loaded in every worker too; and on an embedded cluster, which ends
        with the command, the actor that frees the workers' resources when the controller is lost.
        """
        callbacks: list[Any] = super()._create_default_callbacks()
        needless = (DatasetsCallback, PlacementGroupCleanerCallback) if _is_embedded() else DatasetsCallback
        return [callback for callback in callbacks if not isinstance(callback, needless)]


def _is_embedded() -> bool:
    """Whether this process is connected to an embedded cluster, which listens on loopback only."""
    return bool(ray.util.get_node_ip_address() == "127.0.0.1")


@contextmanager
def _growth(bus: Any, workers: int, bundle: Bundle, more: int) -> Iterator[StopRequest]:
    """Requests a stop when there is capacity for more workers and it has stopped growing, as a node joins gradually."""
    with ExitStack() as stack:
        spare: Callable[[], int] | None = None
        found = 0

        def request() -> Interruption | None:
            nonlocal spare, found
            if spare is None:  # More is requested only once all workers have started.
                if more and len(ray.get(bus.facts.remote())[0]) == workers:
                    spare = stack.enter_context(capacity_for(bundle, more))
                return None
            before = found
            with suppress(RayError):  # While a node is being lost, the query may fail.
                found = spare()
            if not 0 < found == before:
                return None
            return Interruption("resize", f"resized from {workers} to {count(workers + found, 'worker')}")

        yield request


def _ray_worker(settings: dict[str, Any]) -> None:
    """The function that Ray Train runs on each worker."""
    start: Start = settings["start"]
    context, bus = ray.train.get_context(), start.bus
    rank, world_size = context.get_world_rank(), context.get_world_size()
    set_time(ray.get(bus.time.remote()))
    try:
        os.chdir(start.cwd)
    except OSError as error:
        raise UserError(
            f"{start.cwd}, where the command was started, does not exist on {socket.gethostname()} "
            f"({error.strerror}); start it in a folder that all hosts have"
        ) from error
    place = Place(ray.util.get_node_ip_address(), ray.get_runtime_context().get_node_id())
    sent = [bus.join.remote(start.number, rank, place)]

    def emit(event: Event) -> None:
        sent.append(bus.put.remote(start.number, event))
        del sent[:-1]

    stop_request = _worker_stop_request(start)
    device = ray.train.torch.get_device()
    workers = Workers(rank, world_size, device, start.launched, start.failure, start.reached, stop_request)
    try:
        start.function(start.config, workers, emit)
    except UserError:
        raise
    except Exception:
        # When a worker is lost, the others see a broken connection, often before Ray notices the loss.
        time.sleep(_BLAME_S)
        raise
    finally:
        ray.get(sent)


def _worker_stop_request(start: Start) -> StopRequest:
    """Returns why this worker should stop: a preemption notice for one of the run's nodes, or the command's request."""
    train_context = get_train_context()
    reasons: list[Interruption] = []

    def listen() -> None:
        with suppress(RayError):  # The command has ended.
            if reason := ray.get(start.bus.stop_request.remote(start.number)):
                reasons.append(reason)

    threading.Thread(target=listen, daemon=True).start()

    def request() -> Interruption | None:
        info = train_context.preemption_context.preemption_info
        if info and not reasons:
            ips = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
            nodes = ", ".join(ips[node_id] for node_id in info.preempted_node_ids)
            until = datetime.datetime.fromtimestamp(info.deadline_ms / 1000) if info.deadline_ms else None
            text = f"preempted: node {nodes} will be lost{f' at {until:%H:%M:%S}' if until else ''}"
            reasons.append(Interruption("preemption", text))
            start.bus.request_stop.remote(start.number, reasons[0])
        return reasons[0] if reasons else None

    return request


def _explain(error: Exception, places: dict[int, Place]) -> tuple[Stopped | None, str]:
    """The Stopped error, if the workers stopped on request, and why they ended.

    Raises a worker's UserError that would also end another start.
    """
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    raised = [cause for failure in failures.values() for cause in _causes(failure) if isinstance(cause, UserError)]
    for cause in raised:
        if not isinstance(cause, Stopped | Unavailable):
            raise cause
    # If several failed, the one that was lost is the cause.
    first = min(failures, key=lambda rank: (not isinstance(failures[rank], _LOST), rank), default=None)
    if first is None:
        text = _line(getattr(error, "controller_failure", error))
    elif lost := _lost_nodes(places):
        text = f"node {', '.join(lost)} lost"
    elif away := next((cause for cause in raised if isinstance(cause, Unavailable)), None):
        text = str(away)
    else:
        where = f" on {places[first].ip}" if first in places else ""
        text = f"worker {first}{where}: {_line(failures[first])}"
    return next((cause for cause in raised if isinstance(cause, Stopped)), None), text


_LOST = (WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError)


def _causes(error: BaseException | None) -> list[BaseException]:
    """The error and its causes."""
    return [] if error is None else [error, *_causes(getattr(error, "cause", None) or error.__cause__)]


_OUT_OF_MEMORY = "a node is low on memory: Ray's memory monitor ended a process of this run there"
_LINE = 200  # Maximum length of an error in an incident's text.


def _line(error: BaseException) -> str:
    if isinstance(error, WorkerHealthCheckTimeoutError):
        return "its process does not answer"
    if isinstance(error, WorkerHealthCheckFailedError):
        error = error.health_check_failure
    if any(isinstance(cause, OutOfMemoryError) for cause in _causes(error)):
        return _OUT_OF_MEMORY
    if isinstance(error, RayActorError):
        return "its process was lost: killed, crashed, out of memory, or ended by the watchdog of a hang"
    text = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}"
    return text if len(text) <= _LINE else f"{text[: _LINE - 1]}…"


def _why_again(failure: Interruption | None, places: dict[int, Place], workers: int) -> Interruption | None:
    """Why the workers are restarted; a change in their number is added to the text."""
    if failure is not None and len(places) not in (0, workers) and failure.kind != "resize":
        failure = replace(failure, text=f"{failure.text}; resized from {len(places)} to {count(workers, 'worker')}")
    return failure


def _lost_nodes(places: dict[int, Place]) -> list[str]:
    """The addresses of the workers' nodes that are lost. Ray itself notices some of them only half a minute later."""
    nodes = {node["NodeID"]: node for node in ray.nodes()}
    return sorted({place.ip for place in places.values() if not _answers(nodes[place.node_id])})


def _answers(node: dict[str, Any]) -> bool:
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=1).close()
    except OSError:
        return False
    return bool(node["Alive"])
