"""The manifest of a study's folder: what the study consists of, so that unrelated runs don't become a part of it."""

from dataclasses import asdict, dataclass, field

from erann_dist.errors import UserError
from erann_dist.formats import strict_json
from erann_dist.log.run_log import LOG
from erann_dist.storage.folder import Folder

STUDY_MANIFEST = "study.json"  # In the folder of a study, written when it starts.


@dataclass(frozen=True)
class StudyManifest:
    kind: strict_json.Name  # folds, or which study
    of: strict_json.Name  # data sets, or recipe
    data: dict[str, strict_json.Name] = field(default_factory=dict)  # hashes of the clips, by the recipe's key
    weights: str | None = None  # sha256 of the weights that its runs start from


def require_own(folder: Folder, manifest: StudyManifest) -> None:
    """Raise UserError if the folder holds something else."""
    if folder.exists(LOG):
        raise UserError(f"{folder}: is the folder of a run; give this one another run.name")
    found = _read(folder)
    if found and (found.kind, found.of) != (manifest.kind, manifest.of):
        raise UserError(f"{folder}: holds a study of {found.of} ({found.kind}); give this one another run.name")


def require_unchanged(folder: Folder, manifest: StudyManifest) -> None:
    """Raise UserError if runs of the study were started with other clips or weights."""
    found = _read(folder)
    if not found or not found.data:  # Manifests of earlier versions have no hashes.
        return
    for key, content in manifest.data.items():
        if found.data.get(key) != content:
            raise UserError(f"{folder}: started when {key} held other clips; give this study another run.name")
    if found.weights != manifest.weights:
        raise UserError(
            f"{folder}: started with other weights than model.init now has; give this study another run.name"
        )


def write_mark(folder: Folder, manifest: StudyManifest) -> None:
    folder.write(STUDY_MANIFEST, strict_json.dumps(asdict(manifest)).encode())


def _read(folder: Folder) -> StudyManifest | None:
    if not folder.exists(STUDY_MANIFEST):
        return None
    return strict_json.read(
        StudyManifest,
        folder.read(STUDY_MANIFEST),
        f"{folder}/{STUDY_MANIFEST}",
        "remove it if the runs alongside it are this study's",
    )
