"""What a study came to, as its results.json says: the folds of a cross-validation, or a table of runs."""

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from erann_dist.errors import UserError
from erann_dist.folder import Folder

RESULTS = "results.json"  # in the folder of a study, when it has been run


class _Fold(BaseModel):
    fold: int
    run: str
    accuracy: float | None
    best_accuracy: float | None
    best_step: int | None
    clips: int | None
    train_clips: int | None
    seconds: float | None


class _FailedFold(BaseModel):
    fold: int
    why: str


class _OfClass(BaseModel):
    name: str
    clips: int
    accuracy: float | None


class _Published(BaseModel):
    accuracy: float
    what: str


class _Folds(BaseModel):
    kind: Literal["folds"]
    name: str
    data_set: str
    variant: str
    init: str
    folds_asked: str
    comparable: bool
    why_not_comparable: str | None
    folds: list[_Fold]
    failed: list[_FailedFold]
    mean: float | None
    std: float | None
    best_mean: float | None
    labels: list[str]
    confusion: list[list[int]]
    per_class: list[_OfClass]
    paper: _Published | None

    @model_validator(mode="after")
    def _of_the_same_classes(self) -> "_Folds":
        sizes = {len(self.labels), len(self.per_class), len(self.confusion), *map(len, self.confusion)}
        if len(sizes) > 1:
            raise ValueError("labels, per_class and confusion are not of the same classes")
        return self


class _Row(BaseModel):
    model_config = ConfigDict(extra="allow")

    run: str
    runs: list[str]


class _FailedRun(BaseModel):
    run: str
    why: str


class _Table(BaseModel):
    kind: Literal["study"]
    name: str
    columns: list[str]
    rows: list[_Row]
    failed: list[_FailedRun]
    notes: list[str] = []


def read_results(folder: Folder) -> dict[str, Any]:
    """What a study came to. Raises UserError when that can't be read."""
    path, again = f"{folder}/{RESULTS}", "run the study again to write it anew"
    try:
        result: dict[str, Any] = json.loads(folder.read(RESULTS))
        kinds: dict[str, type[BaseModel]] = {"folds": _Folds, "study": _Table}
        kinds[result["kind"]].model_validate(result)
    except ValidationError as error:
        missing = sorted(".".join(map(str, each["loc"])) for each in error.errors() if each["type"] == "missing")
        if missing:
            raise UserError(f"{path}: not a study's, without {', '.join(missing)}; {again}") from error
        first = error.errors()[0]
        raise UserError(f"{path}: damaged ({': '.join([*map(str, first['loc']), first['msg']])}); {again}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({' '.join(str(error).split())}); {again}") from error
    return result
