"""Fine-tuning on data sets with folds, or training on them from scratch: the paper's protocol."""

from contextlib import ExitStack
from typing import Any

from erann_dist.errors import UsageError
from erann_dist.formats import strict_json
from erann_dist.recipe import Recipe
from erann_dist.storage.folder import Folder, open_folder
from erann_dist.train import checkpoint
from jobs.training.cross_validation import CrossValidation, begin_with, results
from jobs.training.pretrain import is_finished, only_one
from jobs.training.results import RESULTS
from jobs.training.scheduler import Tell, check_runs, run_all
from jobs.training.study_manifest import StudyManifest, require_own, require_unchanged, write_mark


def finetune(validations: list[CrossValidation], address: str | None, on_event: Tell) -> list[dict[str, Any]]:
    """Run all folds; what they come to, which is written to each folder's results.json too. Raises UserError.

    Folds that are finished are not run again. One that fails leaves its place empty.
    """
    marks = check_all(validations, address)
    recipes = _runs(validations)
    with ExitStack() as held:
        for validation, mark in zip(validations, marks, strict=True):
            held.enter_context(only_one(validation.folder))
            write_mark(validation.folder, mark)
        ended = run_all(recipes, address, on_event)
        outcomes = []
        for validation in validations:
            why = {fold: ended[run_name(validation, fold)].why for fold in validation.recipes}
            outcome = results(validation, {fold: reason for fold, reason in why.items() if reason})
            validation.folder.write(RESULTS, strict_json.dumps(outcome, indent=1).encode())
            outcomes.append(outcome)
    return outcomes


def check_all(validations: list[CrossValidation], address: str | None) -> list[StudyManifest]:
    """The marks of their folders. Raises UserError for what keeps the folds from running."""
    check_folds(validations, address)
    marks = [_mark(validation, begin_with(validation)) for validation in validations]
    for validation, mark in zip(validations, marks, strict=True):
        if has_begun(validation.folder):
            require_unchanged(validation.folder, mark)
    return marks


def check_folds(validations: list[CrossValidation], address: str | None) -> None:
    """Raise UserError for what keeps the folds from running, but for the pretrained model, which may be yet to come."""
    names = set[str]()
    for validation in validations:
        if validation.name in names:
            raise UsageError(f"two cross-validations are called {validation.name}; give each a run.name of its own")
        names.add(validation.name)
        require_own(validation.folder, _mark(validation, None))
    check_runs(_runs(validations), address)


def has_begun(study: Folder) -> bool:
    """Whether any run below the study's folder has. Until then it may begin with other clips or weights."""
    names = {name.partition("/")[0] for name in study.sizes() if "/" in name}
    runs = [open_folder(f"{study}/{name}") for name in names]
    return any(is_finished(run) or checkpoint.committed(run) for run in runs)


def run_name(validation: CrossValidation, fold: int) -> str:
    """How a fold is called among all runs."""
    return f"{validation.name}/fold-{fold}"


def _runs(validations: list[CrossValidation]) -> dict[str, Recipe]:
    return {run_name(v, fold): recipe for v in validations for fold, recipe in v.recipes.items()}


def _mark(validation: CrossValidation, weights: str | None) -> StudyManifest:
    return StudyManifest("folds", validation.data_set, {"protocol.shards": validation.clips.info.content_hash}, weights)
