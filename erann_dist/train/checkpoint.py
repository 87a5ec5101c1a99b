"""The checkpoints of a run: safetensors and JSON, independent of the number of workers and of the ZeRO stage.

    starts/0003-5f0c…                              one for each start of the run's workers; only the last may write
    checkpoints/step-00001000-0003/                the step, and the start that wrote it
        state.safetensors                          weights, buffers and Adam's state by parameter name
        state.json                                 step, hashes of recipe and manifests, versions
        COMMITTED                                  sha256 of both, written last
        metrics.json                               the evaluation at this step, if there was one

A checkpoint without its marker, or that does not match it, is reported and ignored. Loading a checkpoint runs no code.
Other files in these folders are left alone.
"""

import hashlib
import json
import re
import secrets
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import ClassVar

import safetensors.torch
import torch
from pydantic import ConfigDict, Field
from safetensors import SafetensorError
from torch import Tensor

from erann_dist.errors import UserError
from erann_dist.formats import strict_json
from erann_dist.storage.folder import Folder

_TENSORS, _FACTS, _MARKER, _METRICS = "state.safetensors", "state.json", "COMMITTED", "metrics.json"
_CHECKPOINTS, _STARTS = "checkpoints/", "starts/"
_NAME = re.compile(r"checkpoints/step-(?P<step>\d{8,})-(?P<start>\d{4,})")
_START = re.compile(r"\d{4,}-[0-9a-f]{8}")
_DTYPES = {torch.float32: "F32", torch.int64: "I64"}  # as safetensors calls them


@dataclass(frozen=True)
class Facts:
    """What a checkpoint records about itself."""

    __pydantic_config__: ClassVar[ConfigDict] = {**strict_json.STRICT, "extra": "forbid"}

    step: strict_json.Count  # optimizer steps done; the next example is step · global_batch
    recipe_hash: str
    train_hash: str  # of the training manifests' content
    variant: str
    threads: strict_json.Count
    bad_clips: list[str]  # keys of the clips given up so far
    bad_steps: list[strict_json.Count]  # skipped because their loss or gradient was not finite
    versions: dict[str, str]


class _Marker(strict_json.Record):
    tensors: strict_json.Sha256 = Field(alias=_TENSORS)
    facts: strict_json.Sha256 = Field(alias=_FACTS)

    def hashes(self) -> dict[str, str]:
        return {_TENSORS: self.tensors, _FACTS: self.facts}


class Superseded(UserError):
    """The run was started again elsewhere."""


class Removed(Superseded):
    """The run's folder was removed during training. Nothing more is written there."""


class _Damaged(Exception):
    pass


def committed(run: Folder) -> list[str]:
    """The names of the committed checkpoints, oldest first."""
    return _committed(_found(run))


def _found(run: Folder) -> dict[str, set[str]]:
    """The names of the existing checkpoints, oldest first, with the names of their files."""
    found = defaultdict(set)
    for path in run.sizes(_CHECKPOINTS):
        name, _, file = path.rpartition("/")
        if _NAME.fullmatch(name):
            found[name].add(file)
    return dict(sorted(found.items()))


def _committed(found: dict[str, set[str]]) -> list[str]:
    return [name for name, files in found.items() if _MARKER in files]


def step_of(name: str) -> int:
    return _numbers(name)["step"]


def _numbers(name: str) -> dict[str, int]:
    match = _NAME.fullmatch(name)
    assert match
    return {key: int(number) for key, number in match.groupdict().items()}


def regular(names: Iterable[str], due: Callable[[int], bool]) -> list[str]:
    """The checkpoints of steps at which one is due, without those saved for a stop request, whose time is arbitrary.

    names: oldest first. Of two checkpoints of one step, the later start's is returned.
    """
    return list({step_of(name): name for name in names if due(step_of(name))}.values())


def latest(run: Folder) -> tuple[str | None, list[str]]:
    """The last committed checkpoint that is intact, and the problems of those after it, a line each.

    Raises UserError when there are committed checkpoints and none of them is intact.
    """
    existing = _found(run)
    used: str | None = None
    problems: list[str] = []
    for name in reversed(existing):
        try:
            if _MARKER not in existing[name]:
                raise _Damaged("it was not completely written")
            _read(run, name)
        except _Damaged as damaged:
            problems.append(f"{run}/{name}: {damaged}")
        else:
            used = name
            break
    if not used and (names := _committed(existing)):
        raise UserError(
            f"{run}/{names[-1]}: damaged, and no other checkpoint is intact; remove {run} to start from scratch"
        )
    then = "the checkpoint before it is used" if used else "there is none before it"
    return used, [f"{problem}; {then}" for problem in problems]


def is_whole(run: Folder, name: str) -> bool:
    try:
        _read(run, name)
    except _Damaged:
        return False
    return True


def load(run: Folder, name: str) -> tuple[Facts, dict[str, Tensor]]:
    """A checkpoint that `latest` returned. Raises UserError when it is damaged."""
    try:
        contents = _read(run, name)
    except _Damaged as damaged:
        raise UserError(f"{run}/{name}: {damaged}") from damaged
    try:
        return strict_json.validate(Facts, contents[_FACTS]), safetensors.torch.load(contents[_TENSORS])
    except (ValueError, SafetensorError) as error:
        raise UserError(
            f"{run}/{name}: not a checkpoint of this version of the program ({str(error).splitlines()[0]}); "
            "remove it to resume from the one before"
        ) from error


def mean(run: Folder, names: list[str], alive: Callable[[], None]) -> dict[str, Tensor]:
    """The mean state of some checkpoints; integers are the last one's. alive: called before each is read."""
    sums: dict[str, Tensor] = {}
    for name in names:
        alive()
        for key, value in load(run, name)[1].items():
            if value.is_floating_point():
                sums[key] = sums.get(key, torch.zeros_like(value)) + value / len(names)
            else:
                sums[key] = value
    return sums


def _read(run: Folder, name: str) -> dict[str, bytes]:
    """The files of a checkpoint. Raises _Damaged unless they match its marker."""
    try:
        marker = strict_json.validate(_Marker, run.read(f"{name}/{_MARKER}")).hashes()
        contents = {file: run.read(f"{name}/{file}") for file in (_TENSORS, _FACTS)}
        damaged = [file for file in contents if _sha256(contents[file]) != marker[file]]
    except FileNotFoundError as error:
        raise _Damaged("one of its files is missing") from error
    except ValueError as error:
        raise _Damaged(f"its {_MARKER} is damaged ({error})") from error
    if damaged:
        raise _Damaged(f"its {damaged[0]} does not match its {_MARKER}")
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
        """Raise Superseded when there is a later start, Removed when there is none, not even this one."""
        starts = _starts(self.run)
        if not starts:
            raise Removed(f"{self.run}: was removed, or its {_STARTS} was, while this run trained; start it again")
        last = max(starts, key=lambda name: (_number(name), name))
        if last != self.name:
            raise Superseded(f"{self.run}: this run was started again, and start {last} continues it")


def begin(run: Folder) -> Start:
    """Take over the right to write from earlier starts."""
    number = max(map(_number, _starts(run)), default=0) + 1
    start = Start(run, f"{number:04d}-{secrets.token_hex(4)}")
    run.write(f"{_STARTS}{start.name}", b"")
    start.require_last()
    with suppress(UserError):  # it needs the permission to list uploads
        run.discard_unfinished(_CHECKPOINTS)  # of earlier starts, which were killed or may no longer write
    return start


def _number(start: str) -> int:
    return int(start.partition("-")[0])


def _starts(run: Folder) -> list[str]:
    return [name for name in (path.removeprefix(_STARTS) for path in run.sizes(_STARTS)) if _START.fullmatch(name)]


def save(start: Start, facts: Facts, state: dict[str, Tensor]) -> str:
    """Commit one checkpoint and return its name.

    A start that was cut off and writes late writes next to the later start's checkpoints, not into them. Raises
    Superseded.
    """
    run, name = start.run, f"{_CHECKPOINTS}step-{facts.step:08d}-{start.number:04d}"
    contents = {_TENSORS: serialised(state), _FACTS: [json.dumps(asdict(facts), indent=1).encode()]}
    start.require_last()
    try:
        marker = {file: _write(run, f"{name}/{file}", pieces) for file, pieces in contents.items()}
    except (OSError, UserError):
        start.require_last()  # a later start removes what this one is writing
        raise
    start.require_last()
    run.write(f"{name}/{_MARKER}", json.dumps(marker).encode())
    return name


def _write(run: Folder, file: str, pieces: Iterable[bytes | memoryview]) -> str:
    """Write a file and return its SHA-256."""
    digest = hashlib.sha256()
    with run.writing(file) as out:
        for piece in pieces:
            out.write(piece)
            digest.update(piece)
    return digest.hexdigest()


def serialised(state: dict[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes that safetensors.torch.save returns, piece by piece.

    That function copies everything twice and holds the GIL throughout, which blocks the training: .35 s for ERANN-1-6.
    Writing and hashing a tensor's own memory does neither.
    """
    names = sorted(state, key=lambda name: (-state[name].itemsize, name))
    header, end = {}, 0
    for name in names:
        begin, end = end, end + state[name].nbytes
        shape, dtype = list(state[name].shape), _DTYPES[state[name].dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        yield state[name].contiguous().view(-1).view(torch.uint8).numpy().data


def record(start: Start, name: str, metrics: dict[str, float]) -> None:
    """Write the evaluation of a checkpoint, whose first metric ranks the checkpoints. Raises Superseded."""
    start.require_last()
    start.run.write(f"{name}/{_METRICS}", strict_json.dumps(metrics).encode())


def best(run: Folder, names: list[str]) -> tuple[list[str], list[str]]:
    """The evaluated checkpoints, best first and ties oldest first; and damaged evaluations, a line each."""
    scores, problems = {}, []
    for name in names:
        try:
            metrics = strict_json.validate(dict[str, strict_json.Number | None], run.read(f"{name}/{_METRICS}"))
        except FileNotFoundError:
            continue  # it was not evaluated
        except ValueError as error:
            problems.append(f"{run}/{name}/{_METRICS}: damaged ({error}); this checkpoint counts as not evaluated")
            continue
        if (score := next(iter(metrics.values()), None)) is not None:
            scores[name] = score
    return sorted(scores, key=lambda name: (-scores[name], name)), problems


def delete_others(start: Start, newest: str, due: Callable[[int], bool], keep_last: int, keep_best: int) -> list[str]:
    """Delete all but the newest checkpoint, the last `keep_last` regular ones up to it, and the best `keep_best`.

    Returns what is wrong with the evaluations that rank them, a line each. Raises Superseded.
    """
    start.require_last()  # a later start may be reading what would be deleted
    run, found = start.run, _found(start.run)
    # A checkpoint of a later step was damaged, and the run resumed from an earlier one.
    earlier = [name for name in _committed(found) if name <= newest]
    evaluated, problems = best(run, earlier) if keep_best else ([], [])
    kept = {newest, *regular(earlier, due)[-keep_last:], *evaluated[:keep_best]}
    others = [name for name in found if name not in kept and _numbers(name)["start"] <= start.number]
    files = [(name, file) for name in others for file in found[name]]
    for name, file in sorted(files, key=lambda each: each[1] != _MARKER):  # markers first
        run.delete(f"{name}/{file}")
    return problems


def require_shapes(path: str, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raise UserError, naming the first tensor that differs, unless names and shapes agree."""
    for name in sorted(found.keys() | expected.keys()):
        a = tuple(found[name].shape) if name in found else "missing"
        b = tuple(expected[name].shape) if name in expected else "unknown to the model"
        if a != b:
            raise UserError(f"{path}: {name} is {a} in the file, {b} in the model; they do not belong together")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
