"""The mark of a study's folder: what the study is of, so that nothing else is taken for a part of it."""

from dataclasses import asdict, dataclass, field

from erann_dist.errors import UserError
from erann_dist.formats import strict_json
from erann_dist.log.run_log import LOG
from erann_dist.storage.folder import Folder

STUDY_MANIFEST = "study.json"  # in the folder of a study, from its beginning


@dataclass(frozen=True)
class StudyManifest:
    kind: strict_json.Name  # folds, or which study
    of: strict_json.Name  # data sets, or recipe
    data: dict[str, strict_json.Name] = field(default_factory=dict)  # hashes of the clips, by the recipe's key
    weights: str | None = None  # sha256 of those that its runs begin with


def require_own(folder: Folder, mark: StudyManifest) -> None:
    """Raise UserError when the folder holds something else."""
    if folder.exists(LOG):
        raise UserError(f"{folder}: is the folder of a run; give this one another run.name")
    found = _read(folder)
    if found and (found.kind, found.of) != (mark.kind, mark.of):
        raise UserError(f"{folder}: holds a study of {found.of} ({found.kind}); give this one another run.name")


def require_unchanged(folder: Folder, mark: StudyManifest) -> None:
    """Raise UserError when its runs, some of which have begun, did so with other clips or weights."""
    found = _read(folder)
    if not found or not found.data:  # which marks had not from the beginning
        return
    for key, content in mark.data.items():
        if found.data.get(key) != content:
            raise UserError(f"{folder}: begun when {key} held other clips; give this study another run.name")
    if found.weights != mark.weights:
        raise UserError(f"{folder}: begun with other weights than model.init now has; give this study another run.name")


def write_mark(folder: Folder, mark: StudyManifest) -> None:
    folder.write(STUDY_MANIFEST, strict_json.dumps(asdict(mark)).encode())


def _read(folder: Folder) -> StudyManifest | None:
    if not folder.exists(STUDY_MANIFEST):
        return None
    return strict_json.read(
        StudyManifest,
        folder.read(STUDY_MANIFEST),
        f"{folder}/{STUDY_MANIFEST}",
        "remove it if the runs alongside it are this study's",
    )
