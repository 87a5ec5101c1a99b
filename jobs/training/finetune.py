"""Fine-tuning, or training from scratch, on data sets with folds, by the paper's protocol."""

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
    """Run all folds; returns the results, which are also written to each folder's results.json. Raises UserError.

    Finished folds are not run again. A fold that fails is listed as failed; the others still run.
    """
    manifests = check_all(validations, address)
    recipes = _runs(validations)
    with ExitStack() as locks:
        for validation, manifest in zip(validations, manifests, strict=True):
            locks.enter_context(only_one(validation.folder))
            write_mark(validation.folder, manifest)
        ended = run_all(recipes, address, on_event)
        outcomes = []
        for validation in validations:
            why = {fold: ended[run_name(validation, fold)].why for fold in validation.recipes}
            outcome = results(validation, {fold: reason for fold, reason in why.items() if reason})
            validation.folder.write(RESULTS, strict_json.dumps(outcome, indent=1).encode())
            outcomes.append(outcome)
    return outcomes


def check_all(validations: list[CrossValidation], address: str | None) -> list[StudyManifest]:
    """The manifests of their folders. Raises UserError for anything that keeps the folds from running."""
    check_folds(validations, address)
    manifests = [_manifest(validation, begin_with(validation)) for validation in validations]
    for validation, manifest in zip(validations, manifests, strict=True):
        if has_begun(validation.folder):
            require_unchanged(validation.folder, manifest)
    return manifests


def check_folds(validations: list[CrossValidation], address: str | None) -> None:
    """Raise UserError for anything that keeps the folds from running, except a pretrained model not yet trained."""
    names = set[str]()
    for validation in validations:
        if validation.name in names:
            raise UsageError(f"two cross-validations are named {validation.name}; give each its own run.name")
        names.add(validation.name)
        require_own(validation.folder, _manifest(validation, None))
    check_runs(_runs(validations), address)


def has_begun(study: Folder) -> bool:
    """Whether any run of the study has started. Until then it may start with other clips or weights."""
    names = {name.partition("/")[0] for name in study.sizes() if "/" in name}
    runs = [open_folder(f"{study}/{name}") for name in names]
    return any(is_finished(run) or checkpoint.committed(run) for run in runs)


def run_name(validation: CrossValidation, fold: int) -> str:
    """The name of a fold's run."""
    return f"{validation.name}/fold-{fold}"


def _runs(validations: list[CrossValidation]) -> dict[str, Recipe]:
    return {run_name(v, fold): recipe for v in validations for fold, recipe in v.recipes.items()}


def _manifest(validation: CrossValidation, weights: str | None) -> StudyManifest:
    return StudyManifest("folds", validation.data_set, {"protocol.shards": validation.clips.info.content_hash}, weights)
