"""A training run: check that it can be started or resumed, launch its workers, return its result."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from cluster.environment import is_first_process
from cluster.launch import launch
from cluster.launch_spec import LaunchSpec, WorkerFunction
from erann_dist.clock import steady_time
from erann_dist.data.shared_clips import remove_unused
from erann_dist.data.sources import load_train_and_eval
from erann_dist.errors import Stopped, UsageError, UserError
from erann_dist.formats import strict_yaml
from erann_dist.log import run_log
from erann_dist.log.events import Emit, Ended, Phase
from erann_dist.recipe import Recipe, differences, parse_recipe
from erann_dist.storage.folder import Folder, LocalFolder, open_folder
from erann_dist.train import checkpoint, watchdog
from erann_dist.train.checkpoint import Superseded
from erann_dist.train.distributed import Workers
from erann_dist.train.evaluation import read_detail
from erann_dist.train.model_folder import unfinish, weights_problem
from erann_dist.train.trainer import train
from jobs.outputs import exclusive
from jobs.training.study_manifest import STUDY_MANIFEST

Resume = Literal["auto", "never", "must"]
_RECIPE, _PREDICTIONS = "recipe.yaml", "predictions.parquet"


def pretrain(recipe: Recipe, resume: Resume, address: str | None, on_event: Emit) -> dict[str, Any]:
    """Train by a recipe, from the last checkpoint if there is one. A finished run is not run again.

    resume: `never` fails if the run exists, `must` fails if there is no checkpoint. Raises UserError.
    """
    run = open_folder(recipe.run_url)
    if is_first_process():
        check_run(recipe, run, resume)
    finished = is_finished(run)
    # Under a torchrun started by the user, each process checks this itself, and all get the same answer.
    problem = _results_problem(run) if finished else None
    if problem and not checkpoint.committed(run):
        raise UserError(f"{problem}; no checkpoint is left to recreate it from: remove {run} to run it again")
    if problem and is_first_process():
        unfinish(open_folder(f"{run}/model"))
    if finished and not problem and is_first_process():
        on_event(Phase(0, f"{run}: already finished, this is its result"))
    if problem or not finished:
        incident = f"{problem}; the results are recreated from the last checkpoint" if problem else None
        with _prepared(recipe, run, on_event) if is_first_process() else nullcontext(), _end_is_logged(run):
            config = {"recipe": recipe.model_dump(mode="json"), "incident": incident}
            spec = launch_spec(recipe, train_worker, config, address)
            launch(replace(spec, device=_device(recipe, run), max_failures=recipe.run.max_failures), on_event)
    return outcome(run)


def launch_spec(
    recipe: Recipe, function: WorkerFunction, config: dict[str, Any], address: str | None = None
) -> LaunchSpec:
    """How to start a recipe's workers, for a function that handles stop requests."""
    run = recipe.run
    return LaunchSpec(
        function,
        config,
        launcher=run.launcher,
        num_workers=run.max_workers,
        min_workers=run.min_workers,
        device=run.device,
        handles_stop=True,
        hang_timeout=run.hang_timeout,
        address=address,
        wait_for_workers=run.wait_for_workers,
        run=run.name,
    )


def _results_problem(run: Folder) -> str | None:
    """What is wrong with the results of a finished run, in one line; None if nothing is."""
    for name in ("model", *(["model-averaged"] if run.exists("model-averaged/config.json") else [])):
        if problem := weights_problem(open_folder(f"{run}/{name}")):
            return problem
    try:
        read_detail(run.read("model/metrics.json"))
    except FileNotFoundError:
        return f"{run}/model/metrics.json: is missing"
    except ValueError as error:
        return f"{run}/model/metrics.json: is damaged ({error})"
    # Without a checkpoint they can't be recreated; the model of a run that was cleaned up to save space is intact.
    if not run.exists(_PREDICTIONS) and checkpoint.committed(run):
        return f"{run}/{_PREDICTIONS}: is missing"
    return None


@contextmanager
def _prepared(recipe: Recipe, run: Folder, on_event: Emit) -> Iterator[None]:
    """Lock the run's folder for this command, and write the recipe to it."""
    on_event(Phase(0, "reading the manifests of the shard sets"))
    load_train_and_eval(recipe.data)  # Errors are raised here, before a cluster is started or a folder created.
    with only_one(run):
        settings = recipe.model_dump(mode="json", exclude_none=True)
        run.write(_RECIPE, strict_yaml.dump(settings).encode())
        try:
            yield
        finally:  # Killed workers leave files.
            watchdog.remove_empty(recipe.run_url)
            remove_unused(recipe.data.train)


@contextmanager
def only_one(run: Folder) -> Iterator[None]:
    """Lock the local folder of a run or a study for this command.

    In S3, only the fencing of the checkpoints protects against a second command.
    """
    if not isinstance(run, LocalFolder):
        yield
        return
    Path(run.url).mkdir(parents=True, exist_ok=True)
    with exclusive(Path(run.url, ".lock"), f"{run}: is being trained by another process; stop that first"):
        yield


@contextmanager
def _end_is_logged(run: Folder) -> Iterator[None]:
    """Record in the run's log why the command failed or was stopped."""
    launched = steady_time()
    try:
        yield
    except BaseException as error:
        if is_first_process() and not isinstance(error, Superseded):  # Otherwise the log belongs to another command.
            requested = isinstance(error, Stopped | KeyboardInterrupt)
            text = "interrupted by Ctrl-C" if isinstance(error, KeyboardInterrupt) else str(error)
            if not isinstance(error, UserError | KeyboardInterrupt | OSError):
                text = f"{type(error).__name__}: {text}"
            with suppress(UserError, OSError):  # The disk may be full, or S3 unreachable.
                run_log.end(run, Ended(run_log.last_step(run), text, requested, launched))
        raise


def _device(recipe: Recipe, run: Folder) -> str:
    """The run's device. A run that started on GPUs does not resume on CPUs because a cluster is incomplete."""
    started = [line for line in run_log.read_log(run) if line["event"] == "Started"]
    if recipe.run.device == "auto" and started and started[-1]["device"].startswith("cuda"):
        return "cuda"
    return recipe.run.device


def train_worker(config: dict[str, Any], workers: Workers, emit: Emit) -> None:
    """The function that each worker runs."""
    train(parse_recipe(config["recipe"], "recipe"), workers, emit, config["incident"])


def outcome(run: Folder) -> dict[str, Any]:
    """The result of a finished run. Raises as metrics_of."""
    metrics = metrics_of(run)
    names = ("mAP", "mAUC", "d_prime", "chance_mAP", "accuracy", "chance_accuracy", "clips", "listed", "coverage")
    return {"run": str(run), "model": f"{run}/model"} | {k: metrics[k] for k in names if k in metrics}


def metrics_of(run: Folder) -> dict[str, Any]:
    """The metrics of a finished run. Raises UserError when they can't be read."""
    try:
        return read_detail(run.read("model/metrics.json"))
    except FileNotFoundError as error:
        raise UserError(f"{run}/model/metrics.json: is missing; remove {run} to run it again") from error
    except ValueError as error:
        raise UserError(f"{run}/model/metrics.json: damaged ({error}); remove {run} to run it again") from error


def is_finished(run: Folder) -> bool:
    return run.exists("model/config.json")


def check_run(recipe: Recipe, run: Folder, resume: Resume) -> None:
    """Raise UserError unless the run may start or resume in this folder with this recipe."""
    if run.exists(STUDY_MANIFEST):
        raise UsageError(f"{run}: is the folder of a study; give this run another run.name")
    # A start that failed before its first checkpoint does not claim the name.
    begun = bool(checkpoint.committed(run))
    exists = begun or is_finished(run)
    if exists and resume == "never":
        raise UsageError(f"{run}: this run exists, but --resume never was given; give another run.name")
    if resume == "must" and not begun:
        raise UsageError(f"{run}: no checkpoint to resume from, but --resume must was given; omit it to start the run")
    if exists and (changes := differences(_recipe_of(run), recipe)):
        raise UsageError(
            f"{run}: started with a different recipe ({'; '.join(changes)}); give another run.name or the old recipe"
        )


def _recipe_of(run: Folder) -> Recipe:
    path = f"{run}/{_RECIPE}"
    try:
        tree = strict_yaml.load_dumped(run.read(_RECIPE))
    except (FileNotFoundError, ValueError) as error:
        state = "missing" if isinstance(error, FileNotFoundError) else "damaged"
        raise UserError(f"{path}: {state}, so the run's recipe is unknown; give another run.name") from error
    return parse_recipe(tree, path)
