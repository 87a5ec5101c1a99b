"""The results of a study, as stored in its results.json: the folds of a cross-validation, or a table of runs."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel, model_validator

from erann_dist.formats import strict_json
from erann_dist.formats.strict_json import Count, Name, Number, Scalar, Seconds
from erann_dist.storage.folder import Folder

RESULTS = "results.json"  # In the folder of a study that has been run.


class _Fold(strict_json.Record):
    fold: Count
    run: Name
    accuracy: Number | None
    best_accuracy: Number | None
    best_step: Count | None
    clips: Count | None
    train_clips: Count | None
    seconds: Seconds | None


class _FailedFold(strict_json.Record):
    fold: Count
    why: str


class _OfClass(strict_json.Record):
    name: str
    clips: Count
    accuracy: Number | None


class _Published(strict_json.Record):
    accuracy: Number
    what: str


class _Folds(strict_json.Record):
    kind: Literal["folds"]
    name: str
    data_set: str
    variant: str
    init: str
    folds_asked: str
    missing_clips: Count = 0
    comparable: bool
    why_not_comparable: str | None
    folds: list[_Fold]
    failed: list[_FailedFold]
    mean: Number | None
    std: Number | None
    best_mean: Number | None
    labels: list[str]
    confusion: list[list[Count]]
    per_class: list[_OfClass]
    paper: _Published | None

    @model_validator(mode="after")
    def _of_the_same_classes(self) -> "_Folds":
        sizes = {len(self.labels), len(self.per_class), len(self.confusion), *map(len, self.confusion)}
        if len(sizes) > 1:
            raise ValueError("labels, per_class and confusion are not of the same classes")
        return self


class _Row(BaseModel):
    """A row of a table, with a cell for each of its columns."""

    model_config = ConfigDict(**strict_json.STRICT | {"extra": "allow"})
    __pydantic_extra__: dict[str, Scalar]

    run: Name
    runs: list[Name]


class _FailedRun(strict_json.Record):
    run: Name
    why: str


class _Table(strict_json.Record):
    kind: Literal["study"]
    of: str = ""
    name: str
    columns: list[str]
    rows: list[_Row]
    failed: list[_FailedRun]
    notes: list[str] = Field(default_factory=list)
    measured_on: str | None = None


_Results = RootModel[Annotated[_Folds | _Table, Field(discriminator="kind")]]


def read_results(folder: Folder) -> dict[str, Any]:
    """The results of a study. Raises UserError if they can't be read."""
    advice = "run the study again to rewrite it"
    found: dict[str, Any] = strict_json.read(_Results, folder.read(RESULTS), f"{folder}/{RESULTS}", advice).model_dump()
    return found
