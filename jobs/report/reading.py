"""Reads the content of the folder of a run or a study, as far as possible."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from erann_dist.errors import UsageError, UserError
from erann_dist.formats import strict_yaml
from erann_dist.log.run_log import LOG, Line, read_damaged_log
from erann_dist.recipe import Recipe, parse_recipe
from erann_dist.storage.folder import Folder, LocalFolder, open_folder
from erann_dist.train.evaluation import Predictions, read_detail, read_predictions
from jobs.runs.summary import standing
from jobs.training.results import RESULTS, read_results
from jobs.training.study_manifest import STUDY_MANIFEST

_EVALUATIONS = "model/evaluations/"


@dataclass(frozen=True)
class Scored:
    """The clips that a run's model was evaluated on."""

    keys: list[str]
    label_ids: list[str]
    predictions: Predictions


@dataclass(frozen=True)
class Run:
    name: str
    url: str
    lines: list[Line]  # its log
    standing: dict[str, Any]  # see jobs.runs.summary.standing
    recipe_text: str | None
    recipe: Recipe | None
    metrics: dict[str, Any] | None  # of model/, see erann_dist.train.evaluation.detail
    averaged: dict[str, Any] | None  # of model-averaged/
    evaluations: list[tuple[str, dict[str, Any]]]  # name and metrics of what erann evaluate wrote into its model folder
    scored: Scored | None
    notes: list[str]  # on what is missing or can't be read

    def events(self, kind: str) -> list[Line]:
        return [line for line in self.lines if line["event"] == kind]


@dataclass(frozen=True)
class Study:
    """Runs that belong together: the folds of a cross-validation, or the runs of a grid."""

    name: str
    url: str
    result: dict[str, Any]  # results.json
    runs: list[Run]
    notes: list[str]


def read(url: str, endpoint: str | None) -> Run | Study:
    """Read the run or the study in a folder.

    Raises UsageError if there is none, UserError if a study's results can't be read.
    """
    folder = open_folder(url, endpoint)
    if isinstance(folder, LocalFolder) and not Path(folder.url).is_dir():
        raise UsageError(f"{folder}: no such folder")
    if folder.exists(RESULTS):
        return _read_study(folder, endpoint)
    if folder.exists(LOG):
        return _read_run(folder)
    if folder.exists(STUDY_MANIFEST):
        raise UserError(
            f"{folder}: a study without {RESULTS}: it has not finished; run it again, or report on its runs"
        )
    raise UsageError(f"{folder}: no run ({LOG} is missing) and no study; list the runs in it with erann runs FOLDER")


def _read_study(folder: Folder, endpoint: str | None) -> Study:
    result = read_results(folder)
    if result["kind"] == "folds":
        names = [fold["run"] for fold in result["folds"]]
    else:
        names = [name for row in result["rows"] for name in row["runs"]]
    failed = {each.get("run") for each in result["failed"]}
    runs, notes = [], []
    for name in names:
        each = open_folder(f"{folder}/{name}", endpoint)
        if each.exists(LOG):
            runs.append(_read_run(each))
        elif name not in failed:
            notes.append(f"The run {name} is no longer there: {each}/{LOG} is missing.")
    return Study(_name(folder), str(folder), result, runs, notes)


def _read_run(folder: Folder) -> Run:
    lines, skipped = read_damaged_log(folder)
    notes = [f"{skipped:,} damaged lines of {LOG} are skipped."] if skipped else []
    stands = standing(_name(folder), lines, time.time())
    text, recipe = _recipe(folder, notes)
    metrics = _metrics(folder, "model/metrics.json", notes)
    scored = _scored(folder, notes)
    if stands["state"] != "finished":
        step = f" at step {stands['step']:,} of {stands['steps']:,}" if stands["steps"] else ""
        notes.insert(0, f"This run has not finished: {_STATES[stands['state']]}{step}. This page shows it so far.")
    else:
        needed = {"model/metrics.json": metrics, "predictions.parquet": scored}
        missing = [name for name, found in needed.items() if found is None]
        notes += [f"{name} is missing." for name in missing if not any(note.startswith(name) for note in notes)]
    averaged = _metrics(folder, "model-averaged/metrics.json", notes)
    others = _evaluations(folder, notes)
    return Run(_name(folder), str(folder), lines, stands, text, recipe, metrics, averaged, others, scored, notes)


_STATES = {"running": "it is running", "stopped": "it was stopped or its machine lost", "empty": "no event is logged"}


def _recipe(folder: Folder, notes: list[str]) -> tuple[str | None, Recipe | None]:
    """The recipe's text, and the parsed recipe."""
    text = None
    try:
        text = folder.read("recipe.yaml").decode(errors="replace")
        return text, parse_recipe(strict_yaml.load_dumped(text), "recipe.yaml")
    except FileNotFoundError:
        notes.append("recipe.yaml is missing.")
    except (UserError, ValueError) as error:
        notes.append(f"recipe.yaml can't be parsed: {_line(error)}.")
    return text, None


def _metrics(folder: Folder, name: str, notes: list[str]) -> dict[str, Any] | None:
    try:
        return read_detail(folder.read(name))
    except FileNotFoundError:
        return None
    except ValueError as error:
        notes.append(f"{name} is damaged: {_line(error)}.")
        return None


def _evaluations(folder: Folder, notes: list[str]) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for file in folder.sizes(_EVALUATIONS):
        name, separator, rest = file.removeprefix(_EVALUATIONS).rpartition("/metrics.json")
        if separator and not rest and (metrics := _metrics(folder, file, notes)):
            found.append((name, metrics))
    return found


def _scored(folder: Folder, notes: list[str]) -> Scored | None:
    try:
        with folder.reading("predictions.parquet") as file:
            return Scored(*read_predictions(file))
    except FileNotFoundError:
        return None
    except UserError as error:
        notes.append(f"{error}.")
        return None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _name(folder: Folder) -> str:
    return Path(folder.url).resolve().name if isinstance(folder, LocalFolder) else folder.url.rpartition("/")[2]


def runs_of(entries: Sequence[Run | Study]) -> list[Run]:
    """All runs, including those of studies."""
    return [run for entry in entries for run in ([entry] if isinstance(entry, Run) else entry.runs)]
