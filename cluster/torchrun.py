"""A run's workers under torchrun: the command is torchrun's agent and keeps running alongside them, as under Ray.

The workers connect to it over a socket. It sends them their work and receives the first worker's events, so that all
output comes from one process, and how each worker ended, so that one line can explain what ended the run.

All processes are on this machine, and none listens on a network, since their messages are pickles. The socket, and the
files in which they meet instead of torch's TCP store, are in a private folder of this user.
"""

import logging
import os
import pickle
import signal
import socket
import socketserver
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import FileStore
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from cluster.environment import WORKER_ENVIRONMENT, meeting_on_loopback
from cluster.launch_spec import LaunchSpec
from cluster.stop_request import STOPPING, announce_saving, exit_as, no_stop_request, signals_as_stop_request
from erann_dist.clock import Anchor, anchor, follow, steady_time
from erann_dist.environment import end_with_parent
from erann_dist.errors import Stopped, UserError
from erann_dist.log.events import Emit, Phase
from erann_dist.train.distributed import Workers, pick_device, process_group_backend
from erann_dist.words import count

_BLAME_S = 3.0  # Time within which a lost worker is noticed; others may see a broken connection before that.
_WHY = {"SIGKILL": ", as when memory runs out", "SIGALRM": ", by the watchdog of a hang"}


@dataclass(frozen=True)
class _Work:
    """What each worker receives."""

    spec: LaunchSpec
    launched: float
    clock: Anchor
    meeting: str  # the file in which the workers meet


@dataclass(frozen=True)
class _Ready:
    """Sent by a worker when it can handle signals."""

    rank: int
    pid: int


@dataclass(frozen=True)
class _End:
    """How a worker ended."""

    rank: int
    at: float  # by this machine's monotonic clock
    error: UserError | str | None  # A str is the traceback of another exception; None if it sent no error.


def run_under_torchrun(spec: LaunchSpec, on_event: Emit) -> None:
    """Run the function on workers on this machine until it has returned on all of them. See `launch`."""
    # It would log a page for each worker that fails; the failure is reported here.
    log = logging.getLogger("torch.distributed.elastic")
    log.propagate = False
    log.addHandler(logging.NullHandler())
    os.environ.update(WORKER_ENVIRONMENT | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})
    codes: dict[int, int] = {}  # exit codes of the workers that failed, by rank
    with tempfile.TemporaryDirectory(prefix="erann-torchrun-") as folder, meeting_on_loopback():
        address = f"{folder}/socket"
        work = _Work(spec, steady_time(), anchor(), f"{folder}/workers")
        settings = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=spec.num_workers,
            run_id=str(uuid.uuid4()),
            rdzv_backend="c10d",
            rdzv_endpoint=f"{folder}/agent",
            rdzv_configs={"store_type": "file"},
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(folder),
            signals_to_handle="",  # torchrun itself would give saving workers only half a minute.
        )
        on_event(Phase(0, f"starting {count(spec.num_workers, 'worker')}"))
        with _Server(address, work, on_event) as server, _signals_passed_on(server):
            try:
                elastic_launch(settings, sys.executable)("-m", "cluster.torchrun", address)
            except ChildFailedError as error:
                codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
    try:
        _raise_cause(server.ends, codes, spec.handles_stop)
    except Stopped as stopped:
        if server.signals:
            exit_as(stopped, server.signals[0])
        raise


class _Server(socketserver.ThreadingUnixStreamServer):
    """The server that the workers connect to. After the context, all their messages have been processed."""

    def __init__(self, address: str, work: _Work, on_event: Emit) -> None:
        super().__init__(address, _Connection)
        self.work = work
        self.on_event = on_event
        self.ends: list[_End] = []
        self._pids: list[int] = []
        self.signals: list[int] = []  # those that were passed on

    def __enter__(self) -> "_Server":
        threading.Thread(target=self.serve_forever, args=(0.1,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()  # waits for the connections' threads

    def pass_on(self, number: int) -> None:
        """Send a signal to the workers that are ready, and to the others once they are."""
        self.signals.append(number)
        for pid in list(self._pids):
            _send(number, pid)

    def begin(self, worker: _Ready) -> None:
        self._pids.append(worker.pid)
        for number in list(self.signals):
            _send(number, worker.pid)

    def end(self, worker: _Ready, error: _End | None) -> None:
        self._pids.remove(worker.pid)
        self.ends.append(error or _End(worker.rank, time.monotonic(), None))


class _Connection(socketserver.StreamRequestHandler):
    """A worker's connection."""

    server: _Server

    def handle(self) -> None:
        worker: _Ready | None = None
        error: _End | None = None
        with suppress(EOFError, pickle.UnpicklingError, ConnectionError):  # The worker has ended.
            pickle.dump(self.server.work, self.wfile)
            while True:
                message = pickle.load(self.rfile)
                if isinstance(message, _Ready):
                    worker = message
                    self.server.begin(worker)
                elif isinstance(message, _End):
                    error = message
                else:
                    with suppress(OSError):  # For example, when the command's output is no longer read.
                        self.server.on_event(message)
        if worker:
            self.server.end(worker, error)


def _send(number: int, pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


class _Interrupted(SignalException, KeyboardInterrupt):
    """Ctrl-C as an exception that torchrun's agent understands: it sends the workers the given signal."""


@contextmanager
def _signals_passed_on(server: _Server) -> Iterator[None]:
    """Pass stop signals on to the workers, which the terminal's Ctrl-C does not reach; a second Ctrl-C ends them."""

    def end_workers(*_: object) -> None:
        raise _Interrupted("Ctrl-C", signal.SIGKILL)

    def pass_on(number: int, _: object) -> None:
        if number == signal.SIGINT and number in server.signals:
            end_workers()
        if number == signal.SIGINT:
            announce_saving()
        server.pass_on(number)

    handlers: dict[int, Callable[[int, object], None]] = {signal.SIGINT: end_workers}
    if server.work.spec.handles_stop:
        handlers = dict.fromkeys(STOPPING, pass_on)
    handlers = {n: handler for n, handler in handlers.items() if signal.getsignal(n) is not signal.SIG_IGN}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise_cause(ends: list[_End], codes: dict[int, int], has_checkpoints: bool) -> None:
    """Raise what ended the run, if anything did: preferably a UserError, otherwise the first failure."""
    raised = [end.error for end in sorted(ends, key=lambda end: end.at) if isinstance(end.error, UserError)]
    for error in sorted(raised, key=lambda error: isinstance(error, Stopped)):
        raise error
    if not codes:
        return
    never_ready = [_End(rank, 0.0, None) for rank in codes.keys() - {end.rank for end in ends}]

    def order(end: _End) -> tuple[bool, float]:
        # When one worker has failed, the agent ends the others by SIGTERM, and half a minute later by SIGKILL. It may
        # do so to the first one too, if that has sent its error but another process exited sooner.
        return end.error is None and codes[end.rank] == -signal.SIGTERM, end.at + (_BLAME_S if end.error else 0.0)

    first = min([*never_ready, *(end for end in ends if end.rank in codes)], key=order)
    if isinstance(first.error, str):
        # A fault of this program or of the machine is printed in full, for debugging.
        print(first.error, end="", file=sys.stderr)
    how = first.error.splitlines()[-1] if isinstance(first.error, str) else _how(codes[first.rank])
    again = "run the same command again" + " to resume from the last checkpoint" * has_checkpoints
    raise UserError(f"the workers failed: worker {first.rank}: {how}", fix=again)


def _how(code: int) -> str:
    if code >= 0:
        return f"its process ended with exit code {code}"
    name = signal.Signals(-code).name
    return f"its process was ended by {name}{_WHY.get(name, '')}"


@contextmanager
def torchrun_worker(wanted_device: str, hang_timeout: float, meeting: str | None = None) -> Iterator[Workers]:
    """This process as a worker started by torchrun. meeting: the file to meet in; None for torchrun's own store."""
    device = pick_device(wanted_device, int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
    # The training loop's own watchdog should detect a hang first.
    backend, timeout = process_group_backend(device), timedelta(seconds=2 * hang_timeout)
    if meeting:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = FileStore(meeting, world_size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout)
    try:
        yield Workers(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


def work_for(address: str) -> None:
    """Run a worker's process, which gets its work from the command at this address."""
    end_with_parent()
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # Stdout is only for the command's result; libraries write there.
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(address)
        except OSError:  # The command ended before end_with_parent took effect.
            sys.exit(1)
        with connection.makefile("rb") as file:
            work: _Work = pickle.load(file)
        follow(work.clock)

        def send(message: object) -> None:
            connection.sendall(pickle.dumps(message))

        spec = work.spec
        stops = signals_as_stop_request(announces=False) if spec.handles_stop else nullcontext(no_stop_request)
        with (
            stops as stop_request,
            ExitStack() as group,
            _errors_sent(send),
        ):  # Before others see that it left the group.
            send(_Ready(int(os.environ["RANK"]), os.getpid()))
            workers = group.enter_context(torchrun_worker(spec.device, spec.hang_timeout, work.meeting))
            spec.function(spec.config, replace(workers, launched=work.launched, stop_request=stop_request), send)


@contextmanager
def _errors_sent(send: Callable[[object], None]) -> Iterator[None]:
    """Send the error by which the context is left, and exit."""
    error: UserError | str
    try:
        yield
        return
    except UserError as raised:
        error = raised
    except Exception:
        error = traceback.format_exc()
    send(_End(int(os.environ["RANK"]), time.monotonic(), error))
    if not isinstance(error, Stopped):  # After a stop request, the others end by themselves.
        sys.exit(1)


if __name__ == "__main__":
    # Imported under its real name, by which the command and its workers unpickle each other's messages.
    from cluster.torchrun import work_for

    work_for(sys.argv[1])
