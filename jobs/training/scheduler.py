"""Schedules several runs on one cluster: as many at once as it has capacity for, the others wait.

Each run has its own process, which does what `erann pretrain` does, on a shared cluster. A run that fails does not
affect the others; one whose process is lost is restarted and resumes from its checkpoint; a finished run is not run
again.
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

_ATTEMPTS = 3  # Starts of a run whose process is lost, or that fails because of the program or the machine.
_POLL_S = 1.0
_PATIENCE = 10  # Polls without capacity for any run before that is reported; a run's resources are freed sooner.

_Retry = Literal["", "again", "wait"]  # Whether to restart a run that failed: at once, or when there is capacity.
_RETRIES: dict[type[UserError], _Retry] = {NoCapacity: "wait", Unavailable: "again"}

Tell = Callable[[str, Event], None]  # Called with a run's name and each of its events.


@dataclass(frozen=True)
class Ended:
    """How a run ended: its result, or why it failed."""

    outcome: dict[str, Any] | None = None
    why: str | None = None
    then: _Retry = ""


@dataclass
class _RunProcess:
    """A run and its process."""

    run: RunSection
    process: ForkServerProcess
    pipe: Connection
    has_begun: bool = False  # Its workers have started, so their resources are allocated.
    ended: Ended | None = None


@dataclass(frozen=True)
class _Capacity:
    """A cluster's capacity, in workers of a run."""

    free: Callable[[RunSection], int]  # Now.
    most: Callable[[RunSection], int]  # If nobody else used the cluster.


def check_runs(recipes: dict[str, Recipe], address: str | None) -> None:
    """Raise UserError for anything that keeps these runs from starting, as far as this machine can tell."""
    launchers = {recipe.run.launcher for recipe in recipes.values()}
    if "torchrun" in launchers:
        raise UsageError("run.launcher torchrun trains one run; use ray, or none to train several one after the other")
    if len(launchers) > 1:
        raise UsageError("run.launcher is ray for some runs and none for others; runs of one command must share it")
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
    """Train by each recipe; returns by name how each run ended. The recipes must pass `check_runs`.

    Raises Stopped if a signal requests a stop (cluster.stop_request) before all runs are finished; each one that was
    running has then saved a checkpoint.
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
            _start_forkserver()
            ended |= _run(waiting, found, capacity, on_event, stop_request)
            if (reason := stop_request()) and not all(name in ended and ended[name].outcome for name in waiting):
                raise Stopped(f"{reason.text}: the checkpoint of each run is saved")
    return ended


def _run(
    recipes: dict[str, Recipe], address: str | None, capacity: _Capacity, on_event: Tell, stop_request: StopRequest
) -> dict[str, Ended]:
    waiting = deque(recipes)
    starts = Counter[str]()
    running: dict[str, _RunProcess] = {}
    ended: dict[str, Ended] = {}
    polls_without_capacity = 0
    try:
        while waiting or running:
            if stop_request():
                waiting.clear()
                for each in running.values():
                    each.process.terminate()  # This requests a stop; the run saves a checkpoint.
            while waiting and _fits(recipes[waiting[0]].run, list(running.values()), capacity):
                name = waiting.popleft()
                starts[name] += 1
                running[name] = _start(recipes[name], address)
            polls_without_capacity = 0 if running else polls_without_capacity + 1
            if waiting and polls_without_capacity == _PATIENCE:
                on_event(waiting[0], Incident(0, "resize", "waiting for the cluster to have capacity; others use it"))
            wait([end for each in running.values() for end in (each.pipe, each.process.sentinel)], _POLL_S)
            for name, each in list(running.items()):
                alive = each.process.is_alive()  # Checked before its last messages are read.
                _process_messages(name, each, on_event)
                if alive:
                    continue
                del running[name]
                end = each.ended or Ended(why=f"its process was lost (exit code {each.process.exitcode})", then="again")
                if end.then == "wait" and not stop_request() and capacity.most(each.run) >= each.run.min_workers:
                    starts[name] -= 1  # There would be capacity if others did not use it.
                    waiting.append(name)
                elif end.then == "again" and not stop_request() and starts[name] < _ATTEMPTS:
                    waiting.appendleft(name)
                elif end.then == "again":
                    ended[name] = Ended(why=f"{end.why}, in the last of {starts[name]} starts")
                else:
                    ended[name] = end
    finally:
        for each in running.values():  # After Ctrl-C, which their processes also received, or an error in this process.
            each.process.join(timeout=20)
            each.process.kill()
            each.process.join()
    return ended


def _fits(run: RunSection, others: list[_RunProcess], capacity: _Capacity) -> bool:
    """Whether a run may be started alongside the others."""
    # Runs that have not begun will take some of the free capacity.
    free = capacity.free(run) - sum(other.run.max_workers for other in others if not other.has_begun)
    if others:
        return free >= run.max_workers
    # If the cluster never has enough capacity, the run itself waits for it to grow, and reports that.
    return free >= run.min_workers or capacity.most(run) < run.min_workers


@contextmanager
def _cluster(recipes: dict[str, Recipe], address: str | None) -> Iterator[tuple[str | None, _Capacity]]:
    """The address of the cluster for all runs, and its capacity for their workers."""
    runs = [recipe.run for recipe in recipes.values()]
    if runs[0].launcher == "none":
        yield None, _Capacity(free=lambda run: 0, most=lambda run: 0)  # One run at a time.
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


def _start_forkserver() -> None:
    """Start the process that the runs' processes are forked from, ignoring signals.

    Stopping a job, as Ray does it, sends signals to all of its processes. If this parent died, the runs would be killed
    with it before they have saved their checkpoints; they handle the signals themselves (cluster/stop_request.py).
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
    handled = [number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN]
    process = context.Process(target=_train, args=(recipe.model_dump(mode="json"), address, theirs, handled))
    process.start()
    theirs.close()
    return _RunProcess(recipe.run, process, ours)


def _train(tree: dict[str, Any], address: str | None, pipe: Connection, handled: list[int]) -> None:
    """A run's process, which sends its events and its end through the pipe.

    handled: the signals that the command does not ignore.
    """
    end_with_parent()
    for number in handled:  # The process that this one was forked from ignores them.
        signal.signal(number, signal.SIG_DFL)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # Stdout is only for the command's result.
    # Until this process ends: it is asked to stop more than once, by the command and by what stops the command.
    with signals_as_stop_request(announces=False):
        pipe.send(_outcome(tree, address, pipe))


def _outcome(tree: dict[str, Any], address: str | None, pipe: Connection) -> Ended:
    try:
        return Ended(pretrain(parse_recipe(tree, "recipe"), "auto", address, pipe.send))
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:
        retry: _Retry = next((how for kind, how in _RETRIES.items() if isinstance(error, kind)), "")
        return Ended(why=str(error), then=retry)
    except OSError as error:
        return Ended(why=in_one_line(error), then="again")
    except Exception as error:
        traceback.print_exc()
        return Ended(why=f"{type(error).__name__}: {error}", then="again")


def _process_messages(name: str, each: _RunProcess, on_event: Tell) -> None:
    """Pass on the events that the run has sent, and record its end."""
    with suppress(EOFError, OSError):  # The process has ended.
        while each.pipe.poll():
            message = each.pipe.recv()
            if isinstance(message, Ended):
                each.ended = message
            else:
                each.has_begun |= isinstance(message, Started)
                on_event(name, message)
