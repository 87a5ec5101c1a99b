"""The checkpoints of a run: safetensors and JSON, free of the number of workers and of the ZeRO stage.

    checkpoints/step-00001000/state.safetensors    weights, buffers and Adam's moments by parameter name
                              state.json           step, hashes of recipe and manifests, versions
                              COMMITTED            sha256 of both, written last

A checkpoint without its marker, or that does not match it, does not count. Loading one runs no code.
"""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from erann_dist.errors import UserError

_TENSORS, _FACTS, _MARKER = "state.safetensors", "state.json", "COMMITTED"


@dataclass(frozen=True)
class Facts:
    """What a checkpoint says of itself."""

    step: int  # optimizer steps done; the next example is step · global_batch
    recipe_hash: str
    train_hash: str  # of the training manifests' content
    variant: str
    threads: int
    bad_clips: list[str]  # keys of those that were given up so far
    versions: dict[str, str]


def save(folder: Path, facts: Facts, state: dict[str, Tensor], keep_last: int) -> Path:
    """Commit one checkpoint, then delete all but the last `keep_last`. Returns the checkpoint's folder."""
    target = folder / f"step-{facts.step:08d}"
    part = folder / f".{target.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(target, ignore_errors=True)
    part.mkdir(parents=True)
    save_file(state, part / _TENSORS)
    (part / _FACTS).write_text(json.dumps(asdict(facts), indent=1))
    marker = json.dumps({name: _sha256(part / name) for name in (_TENSORS, _FACTS)})
    for name in (_TENSORS, _FACTS):
        _sync(part / name)
    (part / _MARKER).write_text(marker)
    _sync(part / _MARKER)
    part.rename(target)
    # One of a later step is what a damaged checkpoint left that the run has gone back behind.
    earlier = [path for path in committed(folder) if path.name <= target.name]
    for old in set(committed(folder)) - set(earlier[-keep_last:]):
        shutil.rmtree(old)
    return target


def committed(folder: Path) -> list[Path]:
    """The committed checkpoints, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step-*/{_MARKER}"))


def latest(folder: Path) -> Path | None:
    """The last committed checkpoint whose files are what its marker says; None when nothing was committed.

    Raises UserError when there are checkpoints and all of them are damaged.
    """
    paths = committed(folder)
    for path in reversed(paths):
        try:
            marker = json.loads((path / _MARKER).read_text())
            if all(_sha256(path / name) == digest for name, digest in marker.items()):
                return path
        except (OSError, ValueError, AttributeError):
            continue
    if paths:
        raise UserError(f"{paths[-1]}: damaged, and no other checkpoint is whole; remove {folder} to start anew")
    return None


def load_facts(path: Path) -> Facts:
    return Facts(**json.loads((path / _FACTS).read_text()))


def load_state(path: Path, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint. Raises UserError unless the weights are shaped as `expected`."""
    state = read_tensors(path / _TENSORS)
    require_shapes(path, {k: v for k, v in state.items() if k.startswith("model.")}, expected)
    return state


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises UserError when it is none or is cut short."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: can't be read ({str(error).splitlines()[0]})") from error


def require_shapes(path: Path, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raise UserError, naming the first tensor that differs, unless names and shapes agree."""
    for name in sorted(found.keys() | expected.keys()):
        a = tuple(found[name].shape) if name in found else "missing"
        b = tuple(expected[name].shape) if name in expected else "unknown to the model"
        if a != b:
            raise UserError(f"{path}: {name} is {a} in the file, {b} in the model; they do not belong together")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
