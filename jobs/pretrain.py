"""A training run: check that it can be started or resumed, launch its workers, say what came of it."""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import yaml

from cluster.launch import is_first_process, launch
from erann_dist import checkpoint
from erann_dist.data import load_train_and_eval
from erann_dist.distributed import Workers
from erann_dist.errors import UserError
from erann_dist.events import Emit
from erann_dist.recipe import Recipe, differences, load_recipe, parse_recipe
from erann_dist.storage import write_text
from erann_dist.training import train

Resume = Literal["auto", "never", "must"]


def pretrain(recipe: Recipe, resume: Resume, address: str | None, on_event: Emit) -> dict[str, Any]:
    """Train by a recipe, from the last checkpoint if there is one. A run that is finished is not run again.

    resume: never refuses to touch a run that exists, must refuses to start one. Raises UserError.
    """
    run_dir = recipe.run_dir
    if is_first_process():
        _check_run(recipe, run_dir, resume)
    if not _is_finished(run_dir):
        if is_first_process():
            # What is wrong with the data shows here, before a cluster is started or a folder made.
            load_train_and_eval(recipe.data)
        with _only_one(run_dir) if is_first_process() else nullcontext():
            if is_first_process():
                _write_recipe(recipe, run_dir)
            launch(
                train_worker,
                {"recipe": recipe.model_dump(mode="json"), "run_dir": str(run_dir)},
                launcher=recipe.run.launcher,
                num_workers=recipe.run.max_workers,
                min_workers=recipe.run.min_workers,
                device=recipe.run.device,
                on_event=on_event,
                address=address,
                heeds_notice=True,
                max_failures=recipe.run.max_failures,
                wait_for_workers=recipe.run.wait_for_workers,
                hang_timeout=recipe.run.hang_timeout,
            )
    return outcome(run_dir)


@contextmanager
def _only_one(run_dir: Path) -> Iterator[None]:
    """Hold the run's folder for this command: two at a time would each take the other's workers for lost ones."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{run_dir}: this run is being trained by another process; stop that first") from error
        except OSError:
            pass  # a file system without locks; checkpoints are fenced all the same
        yield


def _write_recipe(recipe: Recipe, run_dir: Path) -> None:
    settings = recipe.model_dump(mode="json", exclude_none=True)
    write_text(run_dir / "recipe.yaml", yaml.safe_dump(settings, sort_keys=False))


def train_worker(config: dict[str, Any], workers: Workers, emit: Emit) -> None:
    """What each worker does."""
    train(parse_recipe(config["recipe"], "recipe"), Path(config["run_dir"]), workers, emit)


def outcome(run_dir: Path) -> dict[str, Any]:
    """What a finished run came to."""
    metrics = json.loads((run_dir / "model" / "metrics.json").read_text())
    names = ("mAP", "mAUC", "d_prime", "chance_mAP", "accuracy", "chance_accuracy", "clips", "listed", "coverage")
    return {"run": str(run_dir), "model": str(run_dir / "model")} | {k: metrics[k] for k in names if k in metrics}


def _is_finished(run_dir: Path) -> bool:
    return (run_dir / "model" / "config.json").exists()


def _check_run(recipe: Recipe, run_dir: Path, resume: Resume) -> None:
    # A start that failed before its first checkpoint does not claim the name.
    exists = _is_finished(run_dir) or bool(checkpoint.committed(run_dir / "checkpoints"))
    if exists and resume == "never":
        raise UserError(f"{run_dir}: this run exists, and --resume never was asked for; give another run.name")
    if resume == "must" and checkpoint.latest(run_dir / "checkpoints") is None:
        raise UserError(f"{run_dir}: no checkpoint to resume from, and --resume must was asked for")
    if exists and (changes := differences(load_recipe(run_dir / "recipe.yaml"), recipe)):
        raise UserError(
            f"{run_dir}: made with another recipe ({'; '.join(changes)}); give another run.name or the old recipe"
        )
