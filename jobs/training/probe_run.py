"""A few real steps of a run, by its recipe but for where it ends."""

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

_WARM_UP = 2  # steps that are not counted; one if that took so many seconds:
_SLOW_S = 20.0
_LEAST, _LEAST_S = 3, 5.0  # steps that are counted, and seconds that they are to take together
_ENOUGH_S, _MOST = 30.0, 100  # either is enough
_CAPACITY_S = 30.0  # until what was held before is free
_HANG_S = 180.0


@dataclass(frozen=True)
class ProbeResult:
    """What some steps on the run's workers came to."""

    step_s: float  # seconds of a step, in the median
    steps: int  # that were counted
    data_wait: float  # share of their time that the first worker waited for data
    workers: int
    device: str
    hosts: list[str]  # by rank
    checkpoint_s: float  # that a checkpoint took
    stall_s: float  # that training would have been held up by it
    peak_gpu_bytes: list[int] = field(default_factory=list)  # by rank; none on CPUs
    incidents: list[str] = field(default_factory=list)


def take_steps(recipe: Recipe, folder: str, workers: int, address: str | None) -> ProbeResult:
    """Train by the recipe on Ray for some steps and a checkpoint, into `folder`, which is left there.

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
        raise UserError("the workers were told to stop before enough steps were done; try again")
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
    """What each worker does. The first one notices when enough steps are done: all then save a checkpoint and stop."""
    steps: list[Step] = []

    def tell(event: Event) -> None:
        emit(event)
        if isinstance(event, Step):
            steps.append(event)

    enough = Interruption("stop", "enough steps are done")
    stop_request = first_of(workers.stop_request, lambda: enough if are_enough(steps) else None)
    with suppress(Stopped):
        train(parse_recipe(config["recipe"], "recipe"), replace(workers, stop_request=stop_request), tell)
    is_cuda = workers.device.type == "cuda"
    peaks = workers.all_gather(torch.cuda.max_memory_reserved(workers.device) if is_cuda else 0)
    if workers.is_rank_zero:
        seconds = sum(step.seconds for step in steps)
        emit(Finished(len(steps), seconds, 0.0, {"peak_gpu_bytes": peaks if is_cuda else []}))


def counted(steps: list[Step]) -> list[Step]:
    """Those behind the warm-up."""
    return steps[1 if steps and steps[0].seconds > _SLOW_S else _WARM_UP :]


def are_enough(steps: list[Step]) -> bool:
    """Whether the steps that are done tell how long one takes."""
    behind = counted(steps)
    seconds = sum(step.seconds for step in behind)
    return len(behind) >= _MOST or seconds >= _ENOUGH_S or (len(behind) >= _LEAST and seconds >= _LEAST_S)


def endless(recipe: Recipe, log_every: int) -> Recipe:
    """Without an end, checkpoints and evaluations."""
    return changed(
        recipe,
        optim={"examples": 10**12, "epochs": None},
        evaluate={"every": None},
        checkpoint={"every": 10**9, "keep_best": 0},
        run={"log_every": log_every},
    )


def changed(recipe: Recipe, **sections: dict[str, Any]) -> Recipe:
    """The recipe with other keys in these sections."""
    tree = recipe.model_dump(mode="json")
    for section, keys in sections.items():
        tree[section] |= keys
    return parse_recipe(tree, "recipe")
