"""Takes a few real training steps of a run, to measure its speed."""

import statistics
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from cluster.launch import launch
from cluster.launch_spec import LaunchSpec
from cluster.stop_request import first_of
from erann_dist.errors import Stopped, UserError
from erann_dist.log.events import CheckpointSaved, Emit, Event, Finished, Incident, Interruption, Started, Step
from erann_dist.recipe import Recipe, parse_recipe
from erann_dist.train.distributed import Workers
from erann_dist.train.trainer import train

_WARM_UP = 2  # Steps that are not counted; only one if it took longer than _SLOW_S.
_SLOW_S = 20.0
_LEAST, _LEAST_S = 3, 5.0  # Minimum number of counted steps, and of seconds that they take in total.
_ENOUGH_S, _MOST = 30.0, 100  # Counted seconds or steps after which to stop in any case.
_CAPACITY_S = 30.0  # Time for resources that were held before to be freed.
_HANG_S = 180.0


@dataclass(frozen=True)
class ProbeResult:
    """The measurements of some steps on the run's workers."""

    step_s: float  # median seconds of a step
    steps: int  # number of counted steps
    data_wait: float  # share of the counted time that the first worker waited for data
    workers: int
    device: str
    hosts: list[str]  # by rank
    checkpoint_s: float  # seconds to write a checkpoint
    stall_s: float  # seconds for which it would have blocked training
    peak_gpu_bytes: list[int] = field(default_factory=list)  # by rank; none on CPUs
    incidents: list[str] = field(default_factory=list)


def take_steps(recipe: Recipe, folder: str, workers: int, address: str | None) -> ProbeResult:
    """Train by the recipe on Ray for some steps and a checkpoint, writing to `folder`; the caller removes it.

    Raises UserError as training does.
    """
    probe = changed(
        endless(recipe, log_every=1),
        run={"dir": folder, "name": "run", "hang_timeout": min(recipe.run.hang_timeout, _HANG_S)},
    )
    events: list[Event] = []
    launch(
        LaunchSpec(
            _probe_worker,
            {"recipe": probe.model_dump(mode="json")},
            launcher="ray",
            num_workers=workers,
            min_workers=probe.run.min_workers,
            device=probe.run.device,
            hang_timeout=probe.run.hang_timeout,
            address=address,
            wait_for_workers=_CAPACITY_S,
        ),
        events.append,
    )
    return _result(events)


def _result(events: list[Event]) -> ProbeResult:
    steps = counted([event for event in events if isinstance(event, Step)])
    started = next(event for event in events if isinstance(event, Started))
    saved = [event for event in events if isinstance(event, CheckpointSaved)]
    if not steps or not saved:
        raise UserError("the workers were stopped before enough steps were done; try again")
    seconds = sum(step.seconds for step in steps)
    finished = next(event for event in events if isinstance(event, Finished))
    return ProbeResult(
        step_s=statistics.median(step.seconds for step in steps),
        steps=len(steps),
        data_wait=sum(step.data_wait * step.seconds for step in steps) / seconds,
        workers=started.workers,
        device=started.device,
        hosts=started.hosts,
        checkpoint_s=saved[-1].seconds,
        stall_s=saved[-1].stall_s,
        peak_gpu_bytes=finished.outcome["peak_gpu_bytes"],
        incidents=[event.text for event in events if isinstance(event, Incident)],
    )


def _probe_worker(config: dict[str, Any], workers: Workers, emit: Emit) -> None:
    """The function that each worker runs. When the first worker has counted enough steps, all save a checkpoint and
    stop.
    """
    steps: list[Step] = []

    def count_steps(event: Event) -> None:
        emit(event)
        if isinstance(event, Step):
            steps.append(event)

    enough = Interruption("stop", "enough steps are done")
    stop_request = first_of(workers.stop_request, lambda: enough if are_enough(steps) else None)
    with suppress(Stopped):
        train(parse_recipe(config["recipe"], "recipe"), replace(workers, stop_request=stop_request), count_steps)
    is_cuda = workers.device.type == "cuda"
    peaks = workers.all_gather(torch.cuda.max_memory_reserved(workers.device) if is_cuda else 0)
    if workers.is_rank_zero:
        seconds = sum(step.seconds for step in steps)
        emit(Finished(len(steps), seconds, 0.0, {"peak_gpu_bytes": peaks if is_cuda else []}))


def counted(steps: list[Step]) -> list[Step]:
    """The steps after the warm-up."""
    return steps[1 if steps and steps[0].seconds > _SLOW_S else _WARM_UP :]


def are_enough(steps: list[Step]) -> bool:
    """Whether the steps that are done suffice to measure how long one takes."""
    measured = counted(steps)
    seconds = sum(step.seconds for step in measured)
    return len(measured) >= _MOST or seconds >= _ENOUGH_S or (len(measured) >= _LEAST and seconds >= _LEAST_S)


def endless(recipe: Recipe, log_every: int) -> Recipe:
    """The recipe without an end, checkpoints or evaluations."""
    return changed(
        recipe,
        optim={"examples": 10**12, "epochs": None},
        evaluate={"every": None},
        checkpoint={"every": 10**9, "keep_best": 0},
        run={"log_every": log_every},
    )


def changed(recipe: Recipe, **sections: dict[str, Any]) -> Recipe:
    """The recipe with these keys changed, by section."""
    tree = recipe.model_dump(mode="json")
    for section, keys in sections.items():
        tree[section] |= keys
    return parse_recipe(tree, "recipe")
