"""Several runs at once, as many as the cluster has room for; the others wait for their turn.

Each run has a process of its own, which does what `erann pretrain` does, on one cluster for all. A run that fails does
not take the others along; one whose process is lost is started again and goes on from its checkpoint; one that is
finished is not run again.
"""

import multiprocessing
import os
import sys
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import Any

from cluster.notice import signals_as_notice
from erann_dist.environment import end_with_parent
from erann_dist.errors import Stopped, UsageError, UserError
from erann_dist.events import Event
from erann_dist.folder import open_folder
from erann_dist.recipe import Recipe, parse_recipe
from jobs.pretrain import check_run, is_finished, outcome, pretrain

_ATTEMPTS = 3  # of a run whose process is lost
_POLL_S = 1.0

Tell = Callable[[str, Event], None]  # is told a run's name and each of its events


@dataclass(frozen=True)
class Ended:
    """How a run ended: what it came to, or why it failed."""

    outcome: dict[str, Any] | None = None
    why: str | None = None


@dataclass
class _Going:
    """A run in its process."""

    process: ForkServerProcess
    pipe: Connection
    ended: Ended | None = None


def run_all(recipes: dict[str, Recipe], address: str | None, on_event: Tell) -> dict[str, Ended]:
    """Train by each recipe; how each run ended, by its name.

    Raises UserError, before one begins, when a folder holds a run by another recipe; and Stopped when it is told to
    stop, by SIGTERM or SIGUSR1: each run has saved a checkpoint then.
    """
    ended: dict[str, Ended] = {}
    for name, recipe in recipes.items():
        if recipe.run.launcher == "torchrun":
            raise UsageError("run.launcher torchrun trains one run; several take ray, or none for one after the other")
        run = open_folder(recipe.run_url)
        check_run(recipe, run, "auto")
        if is_finished(run):
            ended[name] = Ended(outcome(run))
    if waiting := {name: recipe for name, recipe in recipes.items() if name not in ended}:
        with _cluster(waiting, address) as (found, room), signals_as_notice() as notice:
            ended |= _run(waiting, found, room, on_event, notice)
            if reason := notice():
                raise Stopped(f"{reason}: the checkpoint of each run is saved")
    return ended


def _run(
    recipes: dict[str, Recipe],
    address: str | None,
    room: Callable[[], int],
    on_event: Tell,
    notice: Callable[[], str | None],
) -> dict[str, Ended]:
    waiting = deque(recipes)
    starts = Counter[str]()
    going: dict[str, _Going] = {}
    ended: dict[str, Ended] = {}
    try:
        while waiting or going:
            if notice():
                waiting.clear()
                for each in going.values():
                    each.process.terminate()  # it takes that as a notice, and saves a checkpoint
            while waiting and _fits(recipes[waiting[0]], [recipes[name] for name in going], room()):
                name = waiting.popleft()
                starts[name] += 1
                going[name] = _start(recipes[name], address)
            wait([end for each in going.values() for end in (each.pipe, each.process.sentinel)], _POLL_S)
            for name, each in list(going.items()):
                alive = each.process.is_alive()  # before its last words are heard
                _hear(name, each, on_event)
                if alive:
                    continue
                del going[name]
                if each.ended is None and starts[name] < _ATTEMPTS and not notice():
                    waiting.appendleft(name)
                else:
                    code = each.process.exitcode
                    lost = Ended(why=f"its process was lost (exit code {code}), {starts[name]} times in all")
                    ended[name] = each.ended or lost
    finally:
        for each in going.values():  # after Ctrl-C, which their processes have got too, or an error of this one
            each.process.join(timeout=20)
            each.process.kill()
            each.process.join()
    return ended


def _fits(recipe: Recipe, others: list[Recipe], room: int) -> bool:
    return not others or sum(each.run.max_workers for each in [recipe, *others]) <= room


@contextmanager
def _cluster(recipes: dict[str, Recipe], address: str | None) -> Iterator[tuple[str | None, Callable[[], int]]]:
    """The address of the cluster for all runs, and how many of their workers its nodes hold."""
    runs = [recipe.run for recipe in recipes.values()]
    if runs[0].launcher == "none":
        yield None, lambda: 1
        return
    from cluster.embedded import ray_cluster  # before Ray, whose environment it sets

    # isort: split
    import ray

    def room() -> int:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus, cpus = (int(sum(node.get(kind, 0) for node in nodes)) for kind in ("GPU", "CPU"))
        return gpus if runs[0].device == "cuda" or (runs[0].device == "auto" and gpus) else cpus

    with ray_cluster(address, max(run.max_workers for run in runs)):
        yield address or os.environ.get("RAY_ADDRESS") or ray.get_runtime_context().gcs_address, room


def _start(recipe: Recipe, address: str | None) -> _Going:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jobs.fleet"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_train, args=(recipe.model_dump(mode="json"), address, theirs))
    process.start()
    theirs.close()
    return _Going(process, ours)


def _train(tree: dict[str, Any], address: str | None, pipe: Connection) -> None:
    """A run's process: its events and its end go into the pipe."""
    end_with_parent()
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # only the command's result belongs there
    try:
        ended = Ended(pretrain(parse_recipe(tree, "recipe"), "auto", address, pipe.send))
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:
        ended = Ended(why=str(error))
    except Exception as error:
        traceback.print_exc()
        ended = Ended(why=f"{type(error).__name__}: {error}")
    pipe.send(ended)


def _hear(name: str, each: _Going, on_event: Tell) -> None:
    """Pass on what the run has said."""
    with suppress(EOFError, OSError):  # it has ended
        while each.pipe.poll():
            said = each.pipe.recv()
            if isinstance(said, Ended):
                each.ended = said
            else:
                on_event(name, said)
