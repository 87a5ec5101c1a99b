"""A run's workers under torchrun: the command is torchrun's agent and stays alongside them, as it does under Ray.

The workers call it on a socket. It gives them their work and hears the first one's events, so that what a user sees
comes from one process, and how each of them ended, so that one line can tell what ended the run.

All of them are on this machine, and none of them listens to a network, for what they say to each other holds pickles.
The socket, and the files in which they meet in place of torch's TCP store, are in a folder of this user's own.
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

_BLAME_S = 3.0  # in which a lost worker is missed; the others may have met a broken connection before that
_WHY = {"SIGKILL": ", as when memory runs out", "SIGALRM": ", by the watchdog of a hang"}


@dataclass(frozen=True)
class _Work:
    """What each worker is given."""

    spec: LaunchSpec
    launched: float
    clock: Anchor
    meeting: str  # the file in which the workers meet


@dataclass(frozen=True)
class _Begun:
    """Said by a worker when it is ready for signals."""

    rank: int
    pid: int


@dataclass(frozen=True)
class _End:
    """How a worker ended."""

    rank: int
    at: float  # by this machine's monotonic clock
    error: UserError | str | None  # a str is the traceback of another exception; None if it could say nothing


def run_under_torchrun(spec: LaunchSpec, on_event: Emit) -> None:
    """Run the function on so many workers of this machine until it has returned on all of them. See `launch`."""
    log = logging.getLogger("torch.distributed.elastic")  # a page for each worker that fails; it is told here
    log.propagate = False
    log.addHandler(logging.NullHandler())
    os.environ.update(WORKER_ENVIRONMENT | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})
    codes: dict[int, int] = {}  # exit codes of those that failed, by rank
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
            signals_to_handle="",  # of torchrun's own accord workers that save get half a minute
        )
        on_event(Phase(0, f"starting {count(spec.num_workers, 'worker')}"))
        with _Desk(address, work, on_event) as desk, _signals_passed_on(desk):
            try:
                elastic_launch(settings, sys.executable)("-m", "cluster.torchrun", address)
            except ChildFailedError as error:
                codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
    try:
        _raise_cause(desk.ends, codes, spec.handles_stop)
    except Stopped as stopped:
        if desk.signals:
            exit_as(stopped, desk.signals[0])
        raise


class _Desk(socketserver.ThreadingUnixStreamServer):
    """Where the workers call. Behind the context all that they had to say is heard."""

    def __init__(self, address: str, work: _Work, on_event: Emit) -> None:
        super().__init__(address, _Call)
        self.work = work
        self.on_event = on_event
        self.ends: list[_End] = []
        self._pids: list[int] = []
        self.signals: list[int] = []  # that were passed on

    def __enter__(self) -> "_Desk":
        threading.Thread(target=self.serve_forever, args=(0.1,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()  # waits for the calls' threads

    def pass_on(self, number: int) -> None:
        """A signal, to the workers that have begun, and to the others when they do."""
        self.signals.append(number)
        for pid in list(self._pids):
            _send(number, pid)

    def begin(self, begun: _Begun) -> None:
        self._pids.append(begun.pid)
        for number in list(self.signals):
            _send(number, begun.pid)

    def end(self, begun: _Begun, error: _End | None) -> None:
        self._pids.remove(begun.pid)
        self.ends.append(error or _End(begun.rank, time.monotonic(), None))


class _Call(socketserver.StreamRequestHandler):
    """A worker's."""

    server: _Desk

    def handle(self) -> None:
        begun: _Begun | None = None
        error: _End | None = None
        with suppress(EOFError, pickle.UnpicklingError, ConnectionError):  # the worker is gone
            pickle.dump(self.server.work, self.wfile)
            while True:
                said = pickle.load(self.rfile)
                if isinstance(said, _Begun):
                    begun = said
                    self.server.begin(begun)
                elif isinstance(said, _End):
                    error = said
                else:
                    with suppress(OSError):  # as when nobody reads its output any more
                        self.server.on_event(said)
        if begun:
            self.server.end(begun, error)


def _send(number: int, pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


class _Interrupted(SignalException, KeyboardInterrupt):
    """Ctrl-C in the words of torchrun's agent, which sends the workers the signal given."""


@contextmanager
def _signals_passed_on(desk: _Desk) -> Iterator[None]:
    """What requests a stop goes to the workers, which the terminal's Ctrl-C does not reach; a second one ends them."""

    def end_workers(*_: object) -> None:
        raise _Interrupted("Ctrl-C", signal.SIGKILL)

    def pass_on(number: int, _: object) -> None:
        if number == signal.SIGINT and number in desk.signals:
            end_workers()
        if number == signal.SIGINT:
            announce_saving()
        desk.pass_on(number)

    handlers: dict[int, Callable[[int, object], None]] = {signal.SIGINT: end_workers}
    if desk.work.spec.handles_stop:
        handlers = dict.fromkeys(STOPPING, pass_on)
    heard = {n: handler for n, handler in handlers.items() if signal.getsignal(n) is not signal.SIG_IGN}
    before = {number: signal.signal(number, handler) for number, handler in heard.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise_cause(ends: list[_End], codes: dict[int, int], has_checkpoints: bool) -> None:
    """Raise what ended the run, if anything did: of several a UserError, and else the one that others followed from."""
    raised = [end.error for end in sorted(ends, key=lambda end: end.at) if isinstance(end.error, UserError)]
    for error in sorted(raised, key=lambda error: isinstance(error, Stopped)):
        raise error
    if not codes:
        return
    before_its_call = [_End(rank, 0.0, None) for rank in codes.keys() - {end.rank for end in ends}]

    def order(end: _End) -> tuple[bool, float]:
        # The agent itself ends the others when one has failed: by SIGTERM, and half a minute later by SIGKILL. So it
        # may end the first one too, when that has told its error and another one was sooner out.
        return end.error is None and codes[end.rank] == -signal.SIGTERM, end.at + (_BLAME_S if end.error else 0.0)

    first = min([*before_its_call, *(end for end in ends if end.rank in codes)], key=order)
    if isinstance(first.error, str):
        # A fault of this program or of the machine: in full, for whoever is to find it.
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
    """This process as the worker that a torchrun has started it as. meeting: a file; none for torchrun's own store."""
    device = pick_device(wanted_device, int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
    # The loop's own watchdog is to see a hang first.
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
    """What a worker's process does: it works for the command at this address."""
    end_with_parent()
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # the command's answer alone goes there; libraries say much
    with socket.socket(socket.AF_UNIX) as desk:
        try:
            desk.connect(address)
        except OSError:  # the command was ended before this process would end with it
            sys.exit(1)
        with desk.makefile("rb") as file:
            work: _Work = pickle.load(file)
        follow(work.clock)

        def tell(said: object) -> None:
            desk.sendall(pickle.dumps(said))

        spec = work.spec
        stops = signals_as_stop_request(announces=False) if spec.handles_stop else nullcontext(no_stop_request)
        with stops as stop_request, ExitStack() as group, _error_told(tell):  # before others see that the group is left
            tell(_Begun(int(os.environ["RANK"]), os.getpid()))
            workers = group.enter_context(torchrun_worker(spec.device, spec.hang_timeout, work.meeting))
            spec.function(spec.config, replace(workers, launched=work.launched, stop_request=stop_request), tell)


@contextmanager
def _error_told(tell: Callable[[object], None]) -> Iterator[None]:
    error: UserError | str
    try:
        yield
        return
    except UserError as raised:
        error = raised
    except Exception:
        error = traceback.format_exc()
    tell(_End(int(os.environ["RANK"]), time.monotonic(), error))
    if not isinstance(error, Stopped):  # after which the others end by themselves
        sys.exit(1)


if __name__ == "__main__":
    # Under its real name, by which the command and its workers know what they send each other.
    from cluster.torchrun import work_for

    work_for(sys.argv[1])
