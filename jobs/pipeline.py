"""Pretraining, evaluation, and fine-tuning on several data sets, as one resumable job."""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from cluster.stop_request import signals_as_stop_request
from erann_dist.data.sources import load_train_and_eval
from erann_dist.errors import UsageError
from erann_dist.recipe import PathText, Place, Recipe, Section, check, load_recipe, read_tree, setting
from erann_dist.storage.folder import open_folder
from erann_dist.train.model_folder import ModelInfo, require_beginning
from jobs.recipes import find_recipe
from jobs.report.reading import read
from jobs.report.report import REPORT
from jobs.report.report_page import report_page
from jobs.terminal.progress import FleetView, RunView, console, note
from jobs.training.cross_validation import CrossValidation, load_cross_validation, untrained
from jobs.training.finetune import check_folds, finetune
from jobs.training.pretrain import pretrain
from jobs.training.scheduler import check_runs
from jobs.training.study_manifest import StudyManifest, require_own


class Stage(Section):
    """A recipe, and the keys that are set in it."""

    recipe: PathText  # A file, or the name of a built-in recipe.
    # Keys either by section as in a recipe, or dotted as on the command line: {optim: {lr: 1e-4}} or {optim.lr: 1e-4}.
    set: dict[str, Any] = Field(default_factory=dict)

    @field_validator("set")
    @classmethod
    def _of_sections(cls, keys: dict[str, Any]) -> dict[str, Any]:
        for name, value in keys.items():
            if "." not in name and not isinstance(value, dict):
                raise ValueError(f"{name} is a section, {{key: value, ...}}, or a key such as {name}.name")
        return keys

    def settings(self) -> list[str]:
        """The keys as overrides of the recipe."""
        found: dict[str, Any] = {}
        for name, value in self.set.items():
            found |= {name: value} if "." in name else {f"{name}.{key}": each for key, each in value.items()}
        return [setting(key, value) for key, value in found.items()]


class Pipeline(Section):
    """The stages. All runs are written to the pipeline's folder, dir/name, regardless of each recipe's own run.dir."""

    pretrain: Stage
    finetune: list[Stage] = Field(min_length=1)
    run: Place


@dataclass(frozen=True)
class Plan:
    """A pipeline with its recipes loaded."""

    folder: str
    pretrain: Recipe
    validations: list[CrossValidation]  # These start from the pretrained model, which need not exist yet.


def load_pipeline(path: Path, overrides: list[str], address: str | None) -> Plan:
    """Load the pipeline and all its recipes.

    Raises UsageError and UserError for errors in any stage, so that none of them appears only after the pretraining.
    """
    pipeline = check(Pipeline, read_tree(path, overrides), str(path))
    folder = pipeline.run.url
    require_own(open_folder(folder), StudyManifest("pipeline", str(path)))
    place = setting("run.dir", folder)
    recipe = load_recipe(find_recipe(Path(pipeline.pretrain.recipe)), [*pipeline.pretrain.settings(), place], note)
    if recipe.run.launcher == "torchrun":
        raise UsageError(
            f"{pipeline.pretrain.recipe}: run.launcher torchrun trains one run; a pipeline takes ray or none"
        )
    variant = f"model.variant={recipe.model.variant}"
    validations = [
        load_cross_validation(
            find_recipe(Path(stage.recipe)), [variant, *stage.settings(), place], f"{recipe.run_url}/model"
        )
        for stage in pipeline.finetune
    ]
    clips, _ = load_train_and_eval(recipe.data)
    info = clips.info
    pretrained = ModelInfo(recipe.model.variant, info.task, info.label_ids, info.label_names, info.sample_rate)
    for validation in validations:
        if validation.name == recipe.run.name:
            raise UsageError(f"{path}: two stages are called {validation.name}; give one another set.run.name")
        require_beginning(
            untrained(validation),
            f"{validation.name}: the pretrained model",
            pretrained,
            validation.any_recipe.model.fresh,
        )
    check_runs({recipe.run.name: recipe}, address)
    check_folds(validations, address)
    return Plan(folder, recipe, validations)


def run_pipeline(plan: Plan, address: str | None) -> dict[str, Any]:
    """Run all stages that are not finished, and write the report. Returns the results. Raises UserError."""
    # A stop request that arrives as one stage ends also stops the next.
    with signals_as_stop_request(), _cluster(plan, address):
        console.print(f"1 of 2  pretrain and evaluate {plan.pretrain.model.variant}", style="bold")
        with RunView() as view:
            pretrained = pretrain(plan.pretrain, "auto", address, view.event)
        console.print(f"2 of 2  fine-tune on {len(plan.validations)} data sets", style="bold")
        with FleetView() as fleet:
            finetuned = finetune(plan.validations, address, fleet)
    parts = [plan.pretrain.run_url, *(str(validation.folder) for validation in plan.validations)]
    open_folder(plan.folder).write(REPORT, report_page([read(part, None) for part in parts]).encode())
    return {
        "folder": plan.folder,
        "pretrained": pretrained,
        "finetuned": finetuned,
        "report": f"{plan.folder}/{REPORT}",
    }


def _cluster(plan: Plan, address: str | None) -> Any:
    """A context with one cluster for all stages; empty if no stage needs one."""
    runs = [plan.pretrain.run, *(validation.any_recipe.run for validation in plan.validations)]
    workers = [run.max_workers for run in runs if run.launcher == "ray"]
    if not workers:
        return nullcontext()
    from cluster.embedded import opening, ray_cluster

    console.print(opening(address), markup=False)
    return ray_cluster(address, max(workers))
