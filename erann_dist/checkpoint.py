"""The checkpoints of a run: safetensors and JSON, free of the number of workers and of the ZeRO stage.

    starts/0003-5f0c…                              each start of the run's workers; the last one may write
    checkpoints/step-00001000-0003/                the step, and the start that wrote it
        state.safetensors                          weights, buffers and Adam's state by parameter name
        state.json                                 step, hashes of recipe and manifests, versions
        COMMITTED                                  sha256 of both, written last
        metrics.json                               of the evaluation at this step, if there was one

A checkpoint without its marker, or that does not match it, is named and does not count. Loading one runs no code.
"""

import hashlib
import json
import secrets
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass

import safetensors.torch
from torch import Tensor

from erann_dist.errors import UserError
from erann_dist.folder import Folder

_TENSORS, _FACTS, _MARKER, _METRICS = "state.safetensors", "state.json", "COMMITTED", "metrics.json"
_CHECKPOINTS, _STARTS = "checkpoints/", "starts/"


@dataclass(frozen=True)
class Facts:
    """What a checkpoint says of itself."""

    step: int  # optimizer steps done; the next example is step · global_batch
    recipe_hash: str
    train_hash: str  # of the training manifests' content
    variant: str
    threads: int
    bad_clips: list[str]  # keys of those that were given up so far
    bad_steps: list[int]  # that were skipped, for their loss or gradient was not finite
    versions: dict[str, str]


class Superseded(UserError):
    """The run was started again elsewhere."""


class _Damaged(Exception):
    pass


def committed(run: Folder) -> list[str]:
    """The names of the committed checkpoints, oldest first."""
    return _committed(run.sizes(_CHECKPOINTS))


def _committed(files: Iterable[str]) -> list[str]:
    return sorted(file.removesuffix(f"/{_MARKER}") for file in files if file.endswith(f"/{_MARKER}"))


def latest(run: Folder) -> tuple[str | None, list[str]]:
    """The last committed checkpoint that is whole, and what is wrong with those behind it, a line each.

    Raises UserError when there are committed ones and none of them is whole.
    """
    files = run.sizes(_CHECKPOINTS)
    committed = _committed(files)
    found: str | None = None
    problems: list[str] = []
    for name in sorted({file.rpartition("/")[0] for file in files}, reverse=True):
        try:
            if name not in committed:
                raise _Damaged("writing it was not finished")
            _read(run, name)
        except _Damaged as damaged:
            problems.append(f"{run}/{name}: {damaged}")
        else:
            found = name
            break
    if committed and not found:
        raise UserError(f"{run}/{committed[-1]}: damaged, and no other checkpoint is whole; remove {run} to start anew")
    then = "the checkpoint before it is used" if found else "there is none before it"
    return found, [f"{problem}; {then}" for problem in problems]


def is_whole(run: Folder, name: str) -> bool:
    try:
        _read(run, name)
    except _Damaged:
        return False
    return True


def load(run: Folder, name: str) -> tuple[Facts, dict[str, Tensor]]:
    """A checkpoint that `latest` named. Raises UserError when it is damaged."""
    try:
        contents = _read(run, name)
    except _Damaged as damaged:
        raise UserError(f"{run}/{name}: {damaged}") from damaged
    return Facts(**json.loads(contents[_FACTS])), safetensors.torch.load(contents[_TENSORS])


def _read(run: Folder, name: str) -> dict[str, bytes]:
    """The files of a checkpoint, as its marker says they are."""
    try:
        marker = json.loads(run.read(f"{name}/{_MARKER}"))
        contents = {file: run.read(f"{name}/{file}") for file in (_TENSORS, _FACTS)}
        damaged = [file for file in contents if _sha256(contents[file]) != marker.get(file)]
    except FileNotFoundError as error:
        raise _Damaged("one of its files is missing") from error
    except (ValueError, AttributeError) as error:
        raise _Damaged(f"its {_MARKER} is damaged") from error
    if damaged:
        raise _Damaged(f"its {damaged[0]} is not what its {_MARKER} says")
    return contents


@dataclass(frozen=True)
class Start:
    """The right of one start of a run's workers to write in the run's folder, until the next one takes it over."""

    run: Folder
    name: str

    @property
    def number(self) -> int:
        return _number(self.name)

    def require_last(self) -> None:
        """Raise Superseded when there is a later one."""
        last = max(_starts(self.run), key=lambda name: (_number(name), name))
        if last != self.name:
            raise Superseded(f"{self.run}: this run was started again (start {last}), which goes on with it")


def begin(run: Folder) -> Start:
    """Take the right to write over from the starts before."""
    number = max(map(_number, _starts(run)), default=0) + 1
    start = Start(run, f"{number:04d}-{secrets.token_hex(4)}")
    run.write(f"{_STARTS}{start.name}", b"")
    start.require_last()
    return start


def _number(start: str) -> int:
    return int(start.partition("-")[0])


def _starts(run: Folder) -> list[str]:
    return [name.removeprefix(_STARTS) for name in run.sizes(_STARTS)]


def save(start: Start, facts: Facts, state: dict[str, Tensor]) -> str:
    """Commit one checkpoint; its name.

    What a start that was cut off writes late lies beside the later start's checkpoints, not in them. Raises Superseded.
    """
    run, name = start.run, f"{_CHECKPOINTS}step-{facts.step:08d}-{start.number:04d}"
    start.require_last()
    contents = {_TENSORS: safetensors.torch.save(state), _FACTS: json.dumps(asdict(facts), indent=1).encode()}
    for file, data in contents.items():
        run.write(f"{name}/{file}", data)
    start.require_last()
    marker = {file: _sha256(data) for file, data in contents.items()}
    run.write(f"{name}/{_MARKER}", json.dumps(marker).encode())
    return name


def record(start: Start, name: str, metrics: dict[str, float]) -> None:
    """Write down the evaluation of a checkpoint, by whose first metric the best are told. Raises Superseded."""
    start.require_last()
    start.run.write(f"{name}/{_METRICS}", json.dumps(metrics).encode())


def best(run: Folder, names: list[str]) -> list[str]:
    """Those that were evaluated, best first; of equals, the earlier one."""
    scores = {}
    for name in names:
        # There was no evaluation, or what was written of it is spoiled.
        with suppress(FileNotFoundError, ValueError, AttributeError, StopIteration, TypeError):
            scores[name] = float(next(iter(json.loads(run.read(f"{name}/{_METRICS}")).values())))
    return sorted(scores, key=lambda name: (-scores[name], name))


def delete_others(start: Start, newest: str, keep_last: int, keep_best: int) -> None:
    """Delete all but the last `keep_last` checkpoints up to the newest, and the best `keep_best`. Raises Superseded."""
    start.require_last()  # a later start may be reading what would be deleted
    run = start.run
    files = run.sizes(_CHECKPOINTS)
    # One of a later step is what a damaged checkpoint left that the run has gone back behind.
    earlier = [name for name in _committed(files) if name <= newest]
    kept = {*earlier[-keep_last:], *(best(run, earlier)[:keep_best] if keep_best else [])}
    for file in sorted(files, key=lambda file: not file.endswith(_MARKER)):  # markers first
        name = file.rpartition("/")[0]
        if name not in kept and int(name.rpartition("-")[2]) <= start.number:
            run.delete(file)


def require_shapes(path: str, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raise UserError, naming the first tensor that differs, unless names and shapes agree."""
    for name in sorted(found.keys() | expected.keys()):
        a = tuple(found[name].shape) if name in found else "missing"
        b = tuple(expected[name].shape) if name in expected else "unknown to the model"
        if a != b:
            raise UserError(f"{path}: {name} is {a} in the file, {b} in the model; they do not belong together")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
