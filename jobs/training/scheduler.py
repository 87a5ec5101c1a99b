"""Several runs at once, as many as the cluster has capacity for; the others wait for their turn.

Each run has a process of its own, which does what `erann pretrain` does, on one cluster for all. A run that fails does
not take the others along; one whose process is lost is started again and goes on from its checkpoint; one that is
finished is not run again.
"""

import multiprocessing
import os
import signal
import sys
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Literal

import torch

from cluster.stop_request import STOPPING, signals_as_stop_request
from erann_dist.data.cache import ClipCache
from erann_dist.environment import end_with_parent
from erann_dist.errors import NoCapacity, Stopped, Unavailable, UsageError, UserError, in_one_line
from erann_dist.log.events import Event, Incident, Started, StopRequest
from erann_dist.recipe import Recipe, RunSection, parse_recipe
from erann_dist.storage.folder import open_folder
from jobs.terminal.progress import console
from jobs.training.pretrain import check_run, is_finished, outcome, pretrain

_ATTEMPTS = 3  # of a run whose process is lost, or that fails by a fault of the program or the machine
_POLL_S = 1.0
_PATIENCE = 10  # polls without capacity for any run, after which a person is told; what a run held comes back in less

_Helps = Literal["", "again", "wait"]  # to start it again, or when there is capacity
_HELPS: dict[type[UserError], _Helps] = {NoCapacity: "wait", Unavailable: "again"}

Tell = Callable[[str, Event], None]  # is told a run's name and each of its events


@dataclass(frozen=True)
class Ended:
    """How a run ended: what it came to, or why it failed."""

    outcome: dict[str, Any] | None = None
    why: str | None = None
    then: _Helps = ""


@dataclass
class _RunProcess:
    """A run in its process."""

    run: RunSection
    process: ForkServerProcess
    pipe: Connection
    has_begun: bool = False  # its workers have, and the capacity that they need is theirs
    ended: Ended | None = None


@dataclass(frozen=True)
class _Capacity:
    """For how many of a run's workers a cluster has capacity."""

    free: Callable[[RunSection], int]  # now
    most: Callable[[RunSection], int]  # with nobody else on it


def check_runs(recipes: dict[str, Recipe], address: str | None) -> None:
    """Raise UserError for what keeps these runs from beginning, or all of them from training on this machine."""
    launchers = {recipe.run.launcher for recipe in recipes.values()}
    if "torchrun" in launchers:
        raise UsageError("run.launcher torchrun trains one run; several take ray, or none for one after the other")
    if len(launchers) > 1:
        raise UsageError("run.launcher is ray for some runs and none for others; those that share a command share it")
    elsewhere = launchers == {"ray"} and (address or os.environ.get("RAY_ADDRESS"))
    for recipe in recipes.values():
        check_run(recipe, open_folder(recipe.run_url), "auto")
        on_cpu = recipe.run.device == "cpu" or (
            recipe.run.device == "auto" and not elsewhere and not torch.cuda.is_available()
        )
        if recipe.optim.precision == "fp16" and on_cpu:
            raise UsageError("optim.precision fp16 needs a GPU; bf16 and fp32 run on CPUs")
        if recipe.data.cache and not elsewhere:
            ClipCache(Path(recipe.data.cache.dir), recipe.data.cache.max_bytes).close()


def run_all(recipes: dict[str, Recipe], address: str | None, on_event: Tell) -> dict[str, Ended]:
    """Train by each recipe; how each run ended, by its name. `check_runs` has nothing against them.

    Raises Stopped when a signal of cluster.stop_request tells it to stop, and not all are finished: each that ran has
    saved a checkpoint then.
    """
    ended: dict[str, Ended] = {}
    for name, recipe in recipes.items():
        run = open_folder(recipe.run_url)
        if is_finished(run):
            try:
                ended[name] = Ended(outcome(run))
            except UserError as error:
                ended[name] = Ended(why=str(error))
    if waiting := {name: recipe for name, recipe in recipes.items() if name not in ended}:
        with signals_as_stop_request() as stop_request, _cluster(waiting, address) as (found, capacity):
            _ready_to_fork()
            ended |= _run(waiting, found, capacity, on_event, stop_request)
            if (reason := stop_request()) and not all(name in ended and ended[name].outcome for name in waiting):
                raise Stopped(f"{reason.text}: the checkpoint of each run is saved")
    return ended


def _run(
    recipes: dict[str, Recipe], address: str | None, capacity: _Capacity, on_event: Tell, stop_request: StopRequest
) -> dict[str, Ended]:
    waiting = deque(recipes)
    starts = Counter[str]()
    going: dict[str, _RunProcess] = {}
    ended: dict[str, Ended] = {}
    polls_without_room = 0
    try:
        while waiting or going:
            if stop_request():
                waiting.clear()
                for each in going.values():
                    each.process.terminate()  # which requests a stop; it saves a checkpoint
            while waiting and _fits(recipes[waiting[0]].run, list(going.values()), capacity):
                name = waiting.popleft()
                starts[name] += 1
                going[name] = _start(recipes[name], address)
            polls_without_room = 0 if going else polls_without_room + 1
            if waiting and polls_without_room == _PATIENCE:
                on_event(waiting[0], Incident(0, "resize", "waits until the cluster has room; others work on it"))
            wait([end for each in going.values() for end in (each.pipe, each.process.sentinel)], _POLL_S)
            for name, each in list(going.items()):
                alive = each.process.is_alive()  # before its last words are heard
                _hear(name, each, on_event)
                if alive:
                    continue
                del going[name]
                end = each.ended or Ended(why=f"its process was lost (exit code {each.process.exitcode})", then="again")
                if end.then == "wait" and not stop_request() and capacity.most(each.run) >= each.run.min_workers:
                    starts[name] -= 1  # there would be capacity, were others not there
                    waiting.append(name)
                elif end.then == "again" and not stop_request() and starts[name] < _ATTEMPTS:
                    waiting.appendleft(name)
                elif end.then == "again":
                    ended[name] = Ended(why=f"{end.why}, at the last of {starts[name]} starts")
                else:
                    ended[name] = end
    finally:
        for each in going.values():  # after Ctrl-C, which their processes have got too, or an error of this one
            each.process.join(timeout=20)
            each.process.kill()
            each.process.join()
    return ended


def _fits(run: RunSection, others: list[_RunProcess], capacity: _Capacity) -> bool:
    """Whether a run may be started beside the others."""
    # Those that have not begun are about to take of what is free.
    free = capacity.free(run) - sum(other.run.max_workers for other in others if not other.has_begun)
    if others:
        return free >= run.max_workers
    # Where there is never capacity enough, the run itself waits for the cluster to grow, and says so.
    return free >= run.min_workers or capacity.most(run) < run.min_workers


@contextmanager
def _cluster(recipes: dict[str, Recipe], address: str | None) -> Iterator[tuple[str | None, _Capacity]]:
    """The address of the cluster for all runs, and its capacity for their workers."""
    runs = [recipe.run for recipe in recipes.values()]
    if runs[0].launcher == "none":
        yield None, _Capacity(free=lambda run: 0, most=lambda run: 0)  # none beside another
        return
    from cluster.embedded import opening, ray_cluster  # before Ray, whose environment it sets

    # isort: split
    import ray

    from cluster.capacity import bundle_of, free_capacity, total_capacity

    def bundle(run: RunSection) -> dict[str, float]:
        return bundle_of(run.device, run.min_workers)

    console.print(opening(address), markup=False)
    with ray_cluster(address, max(run.max_workers for run in runs)):
        found = address or os.environ.get("RAY_ADDRESS") or ray.get_runtime_context().gcs_address
        yield found, _Capacity(lambda run: free_capacity(bundle(run)), lambda run: total_capacity(bundle(run)))


def _ready_to_fork() -> None:
    """Start the process that the runs' own are forked from, deaf to signals.

    Whoever stops a job, as Ray does, sends them to all of its processes. This one is the parent of the runs, which
    would be killed with it before they have saved their checkpoints; they listen themselves (cluster/stop_request.py).
    """
    multiprocessing.set_forkserver_preload(["jobs.training.scheduler"])
    before = {number: signal.signal(number, signal.SIG_IGN) for number in STOPPING}
    try:
        forkserver.ensure_running()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(recipe: Recipe, address: str | None) -> _RunProcess:
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe(duplex=False)
    heard = [number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN]
    process = context.Process(target=_train, args=(recipe.model_dump(mode="json"), address, theirs, heard))
    process.start()
    theirs.close()
    return _RunProcess(recipe.run, process, ours)


def _train(tree: dict[str, Any], address: str | None, pipe: Connection, heard: list[int]) -> None:
    """A run's process: its events and its end go into the pipe. heard: the signals that the command does not ignore."""
    end_with_parent()
    for number in heard:  # which the process that this one was forked from does ignore
        signal.signal(number, signal.SIG_DFL)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # only the command's result belongs there
    # To the end of this process: it is told to stop more than once, by the command and by what stops the command.
    with signals_as_stop_request(announces=False):
        pipe.send(_outcome(tree, address, pipe))


def _outcome(tree: dict[str, Any], address: str | None, pipe: Connection) -> Ended:
    try:
        return Ended(pretrain(parse_recipe(tree, "recipe"), "auto", address, pipe.send))
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:
        helps: _Helps = next((what for kind, what in _HELPS.items() if isinstance(error, kind)), "")
        return Ended(why=str(error), then=helps)
    except OSError as error:
        return Ended(why=in_one_line(error), then="again")
    except Exception as error:
        traceback.print_exc()
        return Ended(why=f"{type(error).__name__}: {error}", then="again")


def _hear(name: str, each: _RunProcess, on_event: Tell) -> None:
    """Pass on what the run has said."""
    with suppress(EOFError, OSError):  # it has ended
        while each.pipe.poll():
            said = each.pipe.recv()
            if isinstance(said, Ended):
                each.ended = said
            else:
                each.has_begun |= isinstance(said, Started)
                on_event(name, said)
