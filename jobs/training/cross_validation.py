"""Cross-validation by a recipe: one run for each fold of a shard set, and their combined result.

The recipe has the sections of any other recipe, and `protocol` in place of `data.train` and `data.eval`. Each fold is a
separate run in a subfolder of the cross-validation's, trained on the other folds and evaluated on its own.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from erann_dist.data.manifest import Manifest, load_manifest
from erann_dist.data.sources import load_source
from erann_dist.errors import UsageError, UserError
from erann_dist.log.run_log import Line, read_log, seconds_run
from erann_dist.models.base import AudioModel
from erann_dist.models.spec import build_model
from erann_dist.recipe import PathText, Real, Recipe, RunSection, Section, check, parse_recipe, read_section, read_tree
from erann_dist.storage.folder import Folder, open_folder
from erann_dist.train.model_folder import initialise, require_layers
from jobs.runs.summary import evaluations
from jobs.training import paper
from jobs.training.pretrain import metrics_of
from shards.sources.data_sets import DATA_SETS, ShardSetFacts, find_data_set

_ENOUGH = 0.99  # Share of a data set's clips that suffices: some are no longer available or can't be decoded.
Folds = Literal["official", "present", "actors"]


class Rates(Section):
    """Adam's constant learning rates."""

    scratch: Real = Field(gt=0, le=1000)
    finetune: Real = Field(gt=0, le=1000)


class Protocol(Section):
    """How a data set is divided and trained on."""

    shards: PathText  # the shard set
    # official: all folds of the data set; an error if one is missing. present: those that the set has. actors: RAVDESS
    # by actor, (actor − 1) // 2 mod 4 + 1, those that the set has.
    folds: Folds = "official"
    lr: Rates  # The defaults of optim.lr.


@dataclass(frozen=True)
class Division:
    """How a shard set is divided into folds, and what it lacks of the data set."""

    folds: list[int]
    missing_clips: int
    not_comparable: str | None  # Why the result can't be compared with the paper's.


@dataclass(frozen=True)
class CrossValidation:
    """A cross-validation's data and the recipes of its runs."""

    name: str
    folder: Folder
    clips: Manifest
    protocol: Protocol
    division: Division
    recipes: dict[int, Recipe]  # by fold

    @property
    def data_set(self) -> str:
        return self.clips.info.name

    @property
    def init(self) -> str:
        return self.any_recipe.model.init

    @property
    def variant(self) -> str:
        return self.any_recipe.model.variant

    @property
    def any_recipe(self) -> Recipe:
        """The recipe of one fold; the others differ only in their folds."""
        return next(iter(self.recipes.values()))


@dataclass(frozen=True)
class Design:
    """A cross-validation's recipe, before its data is read."""

    protocol: Protocol
    run: RunSection
    recipe: Callable[[int, list[int]], Recipe]  # The run's recipe for a fold and the folds to train on.


def read_design(path: Path, overrides: list[str], init: str | None) -> Design:
    """Read a cross-validation's recipe. init: overrides its model.init. Raises UsageError for errors in the recipe."""
    tree = read_tree(path, overrides)
    if "protocol" not in tree:
        raise UsageError(f"{path}: not a cross-validation: it has no section protocol; use erann pretrain to run it")
    protocol = check(Protocol, tree.pop("protocol"), f"{path}: protocol")
    model, data, optim = (read_section(tree, name, str(path)) for name in ("model", "data", "optim"))
    for key in ("train", "eval"):
        if key in data:
            raise UsageError(
                f"{path}: data.{key}: a cross-validation takes its clips from protocol.shards; remove this key"
            )
    run = check(RunSection, tree["run"], f"{path}: run")
    if init is not None:
        model = model | {"init": init}
    from_scratch = model.get("init", "none") == "none"
    optim = {"lr": protocol.lr.scratch if from_scratch else protocol.lr.finetune} | optim

    def recipe(fold: int, others: list[int]) -> Recipe:
        sources = {"train": {"url": protocol.shards, "fold": others}, "eval": {"url": protocol.shards, "fold": [fold]}}
        of_fold = {"dir": run.url, "name": f"fold-{fold}"}
        sections = {"model": model, "data": data | sources, "optim": optim, "run": tree["run"] | of_fold}
        return parse_recipe(tree | sections, str(path))

    recipe(1, [2])  # Errors in the recipe are raised here.
    return Design(protocol, run, recipe)


def load_cross_validation(path: Path, overrides: list[str], init: str | None) -> CrossValidation:
    """Read its recipe and divide its shard set into folds. init: overrides the recipe's model.init.

    Raises UsageError and UserError for any error, except in the pretrained model, which need not exist yet.
    """
    design = read_design(path, overrides, init)
    protocol, run = design.protocol, design.run
    clips = load_manifest(protocol.shards)
    division = _divide(clips, protocol)
    recipes = {
        fold: design.recipe(fold, [other for other in division.folds if other != fold]) for fold in division.folds
    }
    validation = CrossValidation(run.name, open_folder(run.url), clips, protocol, division, recipes)
    load_source(validation.any_recipe.data.eval[0])
    require_layers(untrained(validation), validation.any_recipe.model.fresh)
    return validation


def untrained(validation: CrossValidation) -> AudioModel:
    """The cross-validation's model, without weights."""
    with torch.device("meta"):
        return build_model(validation.variant, validation.clips.num_classes)


def begin_with(validation: CrossValidation) -> str | None:
    """The sha256 of the weights that its runs start from; None if from scratch. Raises as initialise."""
    if validation.init == "none":
        return None
    model = build_model(validation.variant, validation.clips.num_classes)
    return initialise(model, validation.init, validation.any_recipe.model.fresh).weights_sha256


def _divide(clips: Manifest, protocol: Protocol) -> Division:
    """Divide a set into folds. Raises UsageError, UserError if that is impossible, or impossible as requested."""
    url, info = protocol.shards, clips.info
    if info.task != "classification":
        raise UserError(f"{url}: is for {info.task}; a cross-validation needs clips with one label each")
    folded: dict[str, str] = {}
    for name in info.label_names:
        if (other := folded.setdefault(name.casefold(), name)) != name:
            raise UserError(f"{url}: the labels {other} and {name} differ only in case; pack the set with one of them")
    in_fold = clips.folds >= 0
    folds, size = sorted(set(clips.folds[in_fold].tolist())), int(in_fold.sum())
    if len(folds) < 2:
        raise UserError(
            f"{url}: has {len(folds)} folds, but a cross-validation needs two; set them in its list of clips"
        )
    # For a data set that is not registered, whatever folds and clips it has are complete.
    known = find_data_set(info.name)
    facts = known[1] if known else ShardSetFacts()
    number, full_size = facts.folds, facts.clips or size
    missing = sorted(set(range(1, number + 1)) - set(folds)) if number else []
    if protocol.folds == "actors" and not (known and known[0].folds_by_actor):
        names = ", ".join(name for name, each in DATA_SETS.items() if each.folds_by_actor)
        raise UsageError(f"protocol.folds=actors is only for {names}; {url} is {info.name}")
    if protocol.folds == "official" and missing:
        raise UserError(
            f"{url}: lacks {info.name}'s fold {', '.join(map(str, missing))}; protocol.folds=present runs the folds "
            "that it has"
        )
    labels = clips.targets(np.arange(len(clips))) > 0
    for fold in folds:
        counts = labels[in_fold & (clips.folds != fold)].sum(axis=0)
        if not counts.all():
            without = info.label_names[int(np.argmin(counts))]
            raise UserError(f"{url}: no clip of {without} outside fold {fold}, so none to train on when it is held out")
    why = None
    if missing:
        why = f"folds {', '.join(map(str, folds))} of {number}, {size} clips of {full_size}"
    elif size < _ENOUGH * full_size:
        why = f"{size} clips of {full_size}"
    return Division(folds, max(0, full_size - size), why)


def results(validation: CrossValidation, failed: dict[int, str]) -> dict[str, Any]:
    """The combined result of the finished runs. failed: by fold, why the others failed.

    A run whose metrics can't be read counts as failed.
    """
    failed, metrics = dict(failed), dict[int, dict[str, Any]]()
    for fold in [fold for fold in validation.recipes if fold not in failed]:
        try:
            metrics[fold] = metrics_of(_run(validation, fold))
        except UserError as error:
            failed[fold] = str(error)
    folds = [_fold(fold, each, read_log(_run(validation, fold))) for fold, each in metrics.items()]
    confusion = np.sum([each["confusion"] for each in metrics.values()], axis=0) if metrics else np.zeros((0, 0), int)
    accuracies = [fold["accuracy"] for fold in folds]
    best = [fold["best_accuracy"] for fold in folds if fold["best_accuracy"] is not None]
    labels = [each["name"] for each in next(iter(metrics.values()))["per_class"]] if metrics else []
    division, recipe, finetuned = validation.division, validation.any_recipe, validation.init != "none"
    published = paper.accuracy(validation.data_set, validation.variant, finetuned, recipe.augment.pitch_shift > 0)
    how = "fine-tuned" if finetuned else "from scratch"
    return {
        "kind": "folds",
        "name": validation.name,
        "data_set": validation.data_set,
        "variant": validation.variant,
        "init": validation.init,
        "folds_asked": validation.protocol.folds,
        "missing_clips": division.missing_clips,
        "comparable": division.not_comparable is None and not failed,
        "why_not_comparable": division.not_comparable or ("a fold failed" if failed else None),
        "folds": folds,
        "failed": [{"fold": fold, "why": why} for fold, why in failed.items()],
        "mean": statistics.fmean(accuracies) if folds else None,
        "std": statistics.stdev(accuracies) if len(folds) > 1 else None,
        "best_mean": statistics.fmean(best) if best else None,
        "labels": labels,
        "confusion": confusion.tolist(),
        "per_class": [
            {"name": name, "clips": int(row.sum()), "accuracy": row[number] / row.sum() if row.sum() else None}
            for number, (name, row) in enumerate(zip(labels, confusion, strict=True))
        ],
        "paper": published and {"accuracy": published, "what": f"{validation.variant} {how}"},
    }


def _run(validation: CrossValidation, fold: int) -> Folder:
    return open_folder(f"{validation.folder}/fold-{fold}")


def _fold(fold: int, metrics: dict[str, Any], lines: list[Line]) -> dict[str, Any]:
    """The result of a fold. The values taken from the run's log are None if the log is lost."""
    scored = [
        line
        for line in evaluations(lines)
        if line.get("averaged") is None and line["metrics"].get("accuracy") is not None
    ]
    best = max(scored, key=lambda line: (line["metrics"]["accuracy"], -line["step"]), default=None)
    started = next((line for line in lines if line["event"] == "Started"), None)
    return {
        "fold": fold,
        "run": f"fold-{fold}",
        "accuracy": metrics["accuracy"],
        # The best of the evaluations during training: chosen on the same fold that it is measured on.
        "best_accuracy": best and best["metrics"]["accuracy"],
        "best_step": best and best["step"],
        "clips": metrics["clips"],
        "train_clips": started and started["train_clips"],
        "seconds": seconds_run(lines) if lines else None,
    }
