"""A cross-validation by a recipe: one run for each fold of a shard set, and what they come to together.

The recipe has the sections of any other, and `protocol` in place of `data.train` and `data.eval`. Each fold is a run of
its own, below the folder of the whole, trained on the other folds and evaluated on its own.
"""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from erann_dist.errors import UsageError, UserError
from erann_dist.folder import Folder, open_folder
from erann_dist.manifest import Manifest, load_manifest
from erann_dist.model import ERANN
from erann_dist.model_folder import initialise
from erann_dist.recipe import Recipe, Section, check, parse_recipe, read_tree
from erann_dist.run_log import read_log
from jobs import paper
from jobs.runs import evaluations

RESULTS = "results.json"
Folds = Literal["official", "present", "actors"]
# By the name of the shard set: folds, clips.
_OFFICIAL = {"esc50": (5, 2000), "esc10": (5, 400), "urbansound8k": (10, 8732), "ravdess": (4, 1440)}


class Rates(Section):
    """Adam's constant learning rates."""

    scratch: float = Field(gt=0, allow_inf_nan=False)
    finetune: float = Field(gt=0, allow_inf_nan=False)


class Protocol(Section):
    """How a data set is divided and trained on."""

    shards: str = Field(min_length=1)  # the shard set
    # official: all folds of the data set, else refused. present: those that the set has. actors: RAVDESS's by actor,
    # (actor − 1) // 2 mod 4 + 1, those that the set has.
    folds: Folds = "official"
    lr: Rates  # which of them optim.lr is, unless that is given


@dataclass(frozen=True)
class CrossValidation:
    """The runs, and what is known of them before they begin."""

    name: str
    folder: Folder
    data_set: str
    protocol: Protocol
    recipes: dict[int, Recipe]  # by fold
    not_comparable: str | None  # why the result can't be held against the paper's

    @property
    def init(self) -> str:
        return self._any.model.init

    @property
    def variant(self) -> str:
        return self._any.model.variant

    @property
    def _any(self) -> Recipe:
        return next(iter(self.recipes.values()))


def load_cross_validation(path: Path, overrides: list[str], init: str | None) -> CrossValidation:
    """Read its recipe and divide its shard set. init: in place of the recipe's model.init.

    Raises UsageError and UserError for all that is wrong before the first run begins.
    """
    tree = read_tree(path, overrides)
    if "protocol" not in tree:
        raise UsageError(f"{path}: no cross-validation: it has no section protocol; erann pretrain runs it as it is")
    protocol = check(Protocol, tree.pop("protocol"), f"{path}: protocol")
    settings: dict[str, Any] = {"data": {}, "model": {}, "optim": {}} | tree
    if init is not None:
        settings["model"] = settings["model"] | {"init": init}
    from_scratch = settings["model"].get("init", "none") == "none"
    rate = protocol.lr.scratch if from_scratch else protocol.lr.finetune
    settings["optim"] = {"lr": rate} | settings["optim"]
    name, folder = settings["run"]["name"], settings["run"].get("dir", "runs").rstrip("/")

    def recipe(fold: int, others: list[int]) -> Recipe:
        sources = {"train": {"url": protocol.shards, "fold": others}, "eval": {"url": protocol.shards, "fold": [fold]}}
        run = {"dir": f"{folder}/{name}", "name": f"fold-{fold}"}
        return parse_recipe(settings | {"data": settings["data"] | sources, "run": settings["run"] | run}, str(path))

    recipe(1, [2])  # what is wrong with the recipe shows before the data is looked at
    clips = load_manifest(protocol.shards)
    folds, not_comparable = _divide(clips, protocol)
    recipes = {fold: recipe(fold, [other for other in folds if other != fold]) for fold in folds}
    if not from_scratch:
        model = recipes[folds[0]].model
        initialise(ERANN.from_name(model.variant, clips.num_classes), model.init, model.fresh)
    return CrossValidation(name, open_folder(f"{folder}/{name}"), clips.info.name, protocol, recipes, not_comparable)


def _divide(clips: Manifest, protocol: Protocol) -> tuple[list[int], str | None]:
    """The folds to run, and why the result is not comparable. Raises UsageError, UserError."""
    url, info = protocol.shards, clips.info
    if info.task != "classification":
        raise UserError(f"{url}: is for {info.task}; a cross-validation needs clips of one label each")
    folded: dict[str, str] = {}
    for name in info.label_names:
        if (other := folded.setdefault(name.casefold(), name)) != name:
            raise UserError(f"{url}: the labels {other} and {name} differ only in case; pack it with one of them")
    folds = sorted(set(clips.folds[clips.folds >= 0].tolist()))
    if len(folds) < 2:
        raise UserError(
            f"{url}: has {len(folds)} folds, and a cross-validation needs two; its list of clips names them"
        )
    number, size = _OFFICIAL.get(info.name, (len(folds), len(clips)))
    missing = sorted(set(range(1, number + 1)) - set(folds))
    if protocol.folds == "actors" and info.name != "ravdess":
        raise UsageError(f"protocol.folds is actors, which is for ravdess; {url} is {info.name}")
    if protocol.folds == "official" and missing:
        raise UserError(
            f"{url}: without {info.name}'s fold {', '.join(map(str, missing))}; protocol.folds=present runs those that "
            "are there"
        )
    labels = clips.targets(np.arange(len(clips))) > 0
    for fold in folds:
        without = (
            info.label_names[int(np.argmin(count))] if not (count := labels[clips.folds != fold].sum(0)).all() else ""
        )
        if without:
            raise UserError(f"{url}: no clip of {without} outside fold {fold}, to train on when that is held out")
    if missing:
        return folds, f"folds {', '.join(map(str, folds))} of {number}, {len(clips)} clips of {size}"
    if len(clips) < size:
        return folds, f"{len(clips)} clips of {size}" if len(clips) < 0.99 * size else None
    return folds, None


def results(validation: CrossValidation, failed: dict[int, str]) -> dict[str, Any]:
    """What the finished runs come to. failed: why those that are not did not."""
    folder = validation.folder
    done = {fold: recipe for fold, recipe in validation.recipes.items() if fold not in failed}
    metrics = {fold: json.loads(folder.read(f"fold-{fold}/model/metrics.json")) for fold in done}
    folds = [_fold(folder, fold, metrics[fold]) for fold in done]
    confusion = np.sum([metrics[fold]["confusion"] for fold in done], axis=0) if done else np.zeros((0, 0), int)
    accuracies = [fold["accuracy"] for fold in folds]
    labels = [each["name"] for each in next(iter(metrics.values()))["per_class"]] if done else []
    finetuned = validation.init != "none"
    published = paper.accuracy(validation.data_set, validation.variant, finetuned)
    how = "fine-tuned" if finetuned else "from scratch"
    return {
        "kind": "folds",
        "name": validation.name,
        "data_set": validation.data_set,
        "variant": validation.variant,
        "init": validation.init,
        "folds_asked": validation.protocol.folds,
        "comparable": validation.not_comparable is None and not failed,
        "why_not_comparable": validation.not_comparable or ("a fold failed" if failed else None),
        "folds": folds,
        "failed": [{"fold": fold, "why": why} for fold, why in failed.items()],
        "mean": statistics.fmean(accuracies) if folds else None,
        "std": statistics.stdev(accuracies) if len(folds) > 1 else None,
        "best_mean": statistics.fmean(fold["best_accuracy"] for fold in folds) if folds else None,
        "labels": labels,
        "confusion": confusion.tolist(),
        "per_class": [
            {"name": name, "clips": int(row.sum()), "accuracy": row[number] / row.sum() if row.sum() else None}
            for number, (name, row) in enumerate(zip(labels, confusion, strict=True))
        ],
        "paper": published and {"accuracy": published, "what": f"{validation.variant} {how}"},
    }


def _fold(folder: Folder, fold: int, metrics: dict[str, Any]) -> dict[str, Any]:
    lines = read_log(open_folder(f"{folder}/fold-{fold}"))
    scored = [line for line in evaluations(lines) if line.get("averaged") is None]
    best = max(scored, key=lambda line: (line["metrics"]["accuracy"], -line["step"]))
    started = next(line for line in lines if line["event"] == "Started")
    return {
        "fold": fold,
        "run": f"fold-{fold}",
        "accuracy": metrics["accuracy"],
        # Of the evaluations on the way: chosen on the fold that it is measured on.
        "best_accuracy": best["metrics"]["accuracy"],
        "best_step": best["step"],
        "clips": metrics["clips"],
        "train_clips": started["train_clips"],
        "seconds": lines[-1]["time"] - lines[0]["time"],
    }
