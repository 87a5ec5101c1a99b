"""Pretraining, its evaluation, and fine-tuning on several data sets, as one job that goes on where it was stopped."""

import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from erann_dist.data import load_train_and_eval
from erann_dist.folder import open_folder
from erann_dist.recipe import Recipe, Section, check, load_recipe, read_tree
from jobs.finetune import finetune
from jobs.pretrain import pretrain
from jobs.progress import FleetView, RunView, console
from jobs.protocol import CrossValidation, load_cross_validation
from jobs.recipes import find_recipe
from jobs.report.reading import read
from jobs.report.report import REPORT
from jobs.report.report_page import report_page


class Stage(Section):
    """A recipe, and what is set in it."""

    recipe: str = Field(min_length=1)  # a file, or the name of one that comes with the program
    set: dict[str, Any] = Field(default_factory=dict)  # keys by section, as in the recipe

    def settings(self) -> list[str]:
        """As overrides of the recipe's keys."""
        return [f"{key}={json.dumps(value)}" for key, value in _flat(self.set)]


class Place(Section):
    """Where all runs of the pipeline are: in dir/name."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    dir: str = Field("runs", min_length=1)


class Pipeline(Section):
    """The stages. Each recipe's runs go to the pipeline's folder, whatever its own run.dir."""

    pretrain: Stage
    finetune: list[Stage] = Field(min_length=1)
    run: Place


@dataclass(frozen=True)
class Plan:
    """A pipeline whose recipes are read."""

    folder: str
    pretrain: Recipe
    validations: list[tuple[Path, list[str]]]  # recipes and their overrides

    def validation(self, number: int, init: str) -> CrossValidation:
        path, settings = self.validations[number]
        return load_cross_validation(path, settings, init)


def load_pipeline(path: Path, overrides: list[str]) -> Plan:
    """Read it and all its recipes. Raises UsageError and UserError for what is wrong with them and their data."""
    pipeline = check(Pipeline, read_tree(path, overrides), str(path))
    folder = f"{pipeline.run.dir.rstrip('/')}/{pipeline.run.name}"
    place = f"run.dir={json.dumps(folder)}"
    recipe = load_recipe(find_recipe(Path(pipeline.pretrain.recipe)), [*pipeline.pretrain.settings(), place])
    variant = f"model.variant={recipe.model.variant}"
    validations = [
        (find_recipe(Path(stage.recipe)), [variant, *stage.settings(), place]) for stage in pipeline.finetune
    ]
    plan = Plan(folder, recipe, validations)
    load_train_and_eval(recipe.data)
    for number in range(len(validations)):
        plan.validation(number, "none")
    return plan


def run_pipeline(plan: Plan, address: str | None) -> dict[str, Any]:
    """All stages, those that are finished not again, and the report. What they came to. Raises UserError."""
    with _cluster(plan, address):
        console.print(f"1 of 2  pretrain {plan.pretrain.model.variant}, and evaluate it", style="bold")
        with RunView() as view:
            pretrained = pretrain(plan.pretrain, "auto", address, view)
        console.print(f"2 of 2  fine-tune on {len(plan.validations)} data sets", style="bold")
        validations = [plan.validation(number, pretrained["model"]) for number in range(len(plan.validations))]
        with FleetView() as fleet:
            finetuned = finetune(validations, address, fleet)
    parts = [plan.pretrain.run_url, *(str(validation.folder) for validation in validations)]
    open_folder(plan.folder).write(REPORT, report_page([read(part, None) for part in parts]).encode())
    return {
        "folder": plan.folder,
        "pretrained": pretrained,
        "finetuned": finetuned,
        "report": f"{plan.folder}/{REPORT}",
    }


def _cluster(plan: Plan, address: str | None) -> Any:
    """One cluster for all stages."""
    if plan.pretrain.run.launcher != "ray":
        return nullcontext()
    from cluster.embedded import ray_cluster

    return ray_cluster(address, plan.pretrain.run.max_workers)


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
