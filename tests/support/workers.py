"""Run a training on several workers: processes of their own that meet over gloo, on a GPU over NCCL."""

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from erann_dist.log.events import Event, Step
from erann_dist.recipe import Recipe, parse_recipe
from erann_dist.train.distributed import Workers, process_group, single_worker
from erann_dist.train.trainer import train

T = TypeVar("T")

CPU = torch.device("cpu")


def run_workers(function: Callable[..., Any], world_size: int, *args: Any, device: torch.device = CPU) -> list[Any]:
    """function(workers, *args) on each of so many new processes; what each returned, by rank."""
    context = multiprocessing.get_context("forkserver")  # whose server has imported what takes long: conftest.py
    answers = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        processes = [
            context.Process(target=_worker, args=(function, rank, world_size, store, answers, args, device))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        results = dict(answers.get() for _ in processes)
        for process in processes:
            process.join()
    for result in results.values():
        assert not isinstance(result, str) or not result.startswith("Traceback"), result
    return [results[rank] for rank in range(world_size)]


def _worker(
    function: Callable[..., Any], rank: int, world_size: int, store: str, answers: Any, args: Any, device: torch.device
) -> None:
    try:
        with process_group(device, rank, world_size, dist.FileStore(store, world_size)) as workers:
            answers.put((rank, function(workers, *args)))
    except Exception:
        answers.put((rank, traceback.format_exc()))


def train_events(workers: Workers, tree: dict[str, Any]) -> list[Event]:
    """Train by a recipe and return the events."""
    recipe = parse_recipe(tree, "test")
    events: list[Event] = []
    train(recipe, workers, events.append)
    return events


def of_kind(events: list[Event], kind: type[T]) -> list[T]:
    return [event for event in events if isinstance(event, kind)]


def losses(events: list[Event]) -> np.ndarray:
    """Of each step that was logged."""
    return np.array([step.loss for step in of_kind(events, Step)])


def train_alone(recipe: Recipe) -> list[Event]:
    """Train in this process."""
    with single_worker(CPU) as workers:
        return train_events(workers, recipe.model_dump())


def train_on(world_size: int, recipe: Recipe) -> list[Event]:
    """Train on so many new processes; the first one's events."""
    return run_workers(train_events, world_size, recipe.model_dump())[0]
