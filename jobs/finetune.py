"""Fine-tuning on data sets with folds, or training on them from scratch: the paper's protocol."""

import json
from typing import Any

from erann_dist import strict_json
from erann_dist.errors import UserError
from erann_dist.folder import Folder
from erann_dist.run_log import LOG
from jobs.fleet import Tell, run_all
from jobs.protocol import RESULTS, CrossValidation, results

MARK = "study.json"  # in the folder of a study, from its beginning


def finetune(validations: list[CrossValidation], address: str | None, on_event: Tell) -> list[dict[str, Any]]:
    """Run all folds; what they come to, which is written to each folder's results.json too. Raises UserError.

    Folds that are finished are not run again. One that fails leaves its place empty.
    """
    for validation in validations:
        claim(validation.folder, "folds", validation.data_set)
    recipes = {run_name(v, fold): recipe for v in validations for fold, recipe in v.recipes.items()}
    ended = run_all(recipes, address, on_event)
    outcomes = []
    for validation in validations:
        why = {fold: ended[run_name(validation, fold)].why for fold in validation.recipes}
        outcome = results(validation, {fold: reason for fold, reason in why.items() if reason})
        validation.folder.write(RESULTS, strict_json.dumps(outcome, indent=1).encode())
        outcomes.append(outcome)
    return outcomes


def run_name(validation: CrossValidation, fold: int) -> str:
    """How a fold is called among all runs."""
    return f"{validation.name}/fold-{fold}"


def claim(folder: Folder, kind: str, of: str) -> None:
    """Mark the folder as a study's. Raises UserError when it holds something else."""
    mark = {"kind": kind, "of": of}
    if folder.exists(LOG):
        raise UserError(f"{folder}: is the folder of a run; give this study another run.name")
    if not folder.exists(MARK):
        folder.write(MARK, strict_json.dumps(mark).encode())
    elif (found := json.loads(folder.read(MARK))) != mark:
        raise UserError(f"{folder}: holds a study of {found['of']} ({found['kind']}); give this one another run.name")
