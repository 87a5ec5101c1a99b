"""A run's log: metrics.jsonl, the other sinks of its events, and how much of the time was productive.

One JSON object per line, {"event": a class of events.py, "time": Unix time, ...its fields}. A start of the run that
resumes from a checkpoint removes the lines of later steps, because it writes them again. History stays: starts,
incidents, the end. The log therefore reads as that of one undisturbed run with its incidents and the time they cost.

A command is what the user started; its workers may start several times. Time between commands does not count as lost.
"""

import os
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, fields
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO, get_type_hints

from pydantic import create_model

from erann_dist.clock import steady_time
from erann_dist.errors import UserError
from erann_dist.formats import strict_json
from erann_dist.log.events import (
    CheckpointSaved,
    Discarded,
    Ended,
    Evaluated,
    EvaluationProgress,
    Event,
    Finished,
    Incident,
    Phase,
    Started,
    Step,
)
from erann_dist.log.sinks import SINKS
from erann_dist.storage.folder import Folder, LocalFolder

LOG = "metrics.jsonl"
_REACHED = ".step"  # a file next to it, on a disk only: the last step that was done, in decimal digits
UPLOAD_S = 30.0  # between uploads to S3

Line = dict[str, Any]

_WORK, _HISTORY = (Step, Evaluated, CheckpointSaved), (Started, Incident, Finished, Ended, Discarded)


def _line_model(kind: type[Any]) -> type[strict_json.Record]:
    """The model of this event's lines: its fields, and when it was logged."""
    hints = get_type_hints(kind, include_extras=True)
    keys: dict[str, Any] = {
        field.name: (hints[field.name], ... if field.default is MISSING and field.default_factory is MISSING else None)
        for field in fields(kind)
    }
    return create_model(kind.__name__, __base__=strict_json.Record, time=(strict_json.Seconds, ...), **keys)


_LINES = {kind.__name__: _line_model(kind) for kind in (*_WORK, *_HISTORY)}
_IS_WORK = {kind.__name__ for kind in _WORK}
_FOUND_AGAIN = {"bad_clip", "bad_step"}  # kinds of incidents that are reported again when their steps are computed
_ACCOUNTED = ("event", "time", "step", "steps", "seconds", "launched", "seconds_lost")


@dataclass(frozen=True)
class Lost:
    """What a start of the run has to repeat, and what that costs."""

    steps: int  # that are computed again
    seconds: float  # that commands ran since the last step that counts
    last_step: int  # the last step that had been computed


class RunLog:
    """The log of a run that resumes after a step: metrics.jsonl, and the other sinks. Close it at the end.

    In a folder on a disk it is always complete; lines that a full disk rejects are written once there is space again.
    To S3 it is uploaded in the background; a failed upload is repeated with the next one. A start of the run that
    another one has replaced no longer changes the log.

    found: the existing lines, and reached: the last step that was done then, both for `lost`.
    lines: those of them that count and everything logged since, reduced to the keys that `goodput` needs.
    """

    def __init__(self, folder: Folder, from_step: int) -> None:
        self.found = read_log(folder)
        self.reached = _reached(folder)
        kept = continued(self.found, from_step)
        # Even when nothing changes: a process that was replaced has the old file open, and writes to that one.
        text = "".join(strict_json.dumps(line) + "\n" for line in kept)
        folder.write(LOG, text.encode())
        self.lines = [_accounted(line) for line in kept]
        self._copy: _Copy | None = None
        self._step: BinaryIO | None = None
        directory = Path(folder.url)
        if isinstance(folder, LocalFolder):
            folder.write(_REACHED, b"")
            self._step = (directory / _REACHED).open("wb", buffering=0)
        else:
            self._scratch = tempfile.TemporaryDirectory(prefix="erann-log-", ignore_cleanup_errors=True)
            directory = Path(self._scratch.name)
            (directory / LOG).write_text(text, encoding="utf-8")
            self._copy = _Copy(directory, folder, self.lines)
        self._file = (directory / LOG).open("ab", buffering=0)
        self._unwritten = b""
        self._sinks = [open_sink(directory, from_step) for open_sink in SINKS.values()]

    def event(self, event: Event) -> None:
        if isinstance(event, EvaluationProgress | Phase):
            return
        line = as_line(event, steady_time())
        self._unwritten += f"{strict_json.dumps(line)}\n".encode()
        self._write()
        self.lines.append(_accounted(line))
        for sink in self._sinks:
            sink.event(event)
        if isinstance(event, Started | CheckpointSaved):
            self.flush()

    def reach(self, step: int) -> None:
        """Record that this step is done. The log contains only some steps; on a disk every one is recorded."""
        if self._step:
            with suppress(OSError):
                os.pwrite(self._step.fileno(), str(step).encode(), 0)

    def _write(self) -> None:
        with suppress(OSError):
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]

    @property
    def problem(self) -> str | None:
        """Why the last upload failed, if it did, or what is missing in another sink."""
        problems = [self._copy.problem if self._copy else None, *(sink.problem for sink in self._sinks)]
        return next((problem for problem in problems if problem), None)

    def flush(self) -> None:
        """Start an upload now, without waiting for it."""
        if self._copy:
            self._copy.request()

    def close(self) -> None:
        """Waits for the last upload."""
        self._write()
        self._file.close()
        if self._step:
            self._step.close()
        for sink in self._sinks:
            sink.close()
        if self._copy:
            self._copy.close()
            self._scratch.cleanup()


class _Copy:
    """Uploads the log's changed files, in a thread."""

    def __init__(self, directory: Path, folder: Folder, lines: Sequence[Line]) -> None:
        self.problem: str | None = None
        self._directory = directory
        self._folder = folder
        self._lines = lines
        self._sizes: dict[str, int] = {}  # of what was uploaded
        self._version = folder.version(LOG)
        self._replaced = False
        self._requested = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="run-log", daemon=True)
        self._thread.start()

    def request(self) -> None:
        self._requested.set()

    def close(self) -> None:
        self._closing = True
        self._requested.set()
        self._thread.join()

    def _run(self) -> None:
        closing = False
        while not closing:
            self._requested.wait(UPLOAD_S)
            self._requested.clear()
            closing = self._closing
            try:
                self._upload()
                self.problem = None
            except (UserError, OSError) as error:
                self.problem = str(error)

    def _upload(self) -> None:
        for path in sorted(path for path in self._directory.rglob("*") if path.is_file()):
            name = path.relative_to(self._directory).as_posix()
            data = path.read_bytes()
            if self._sizes.get(name) == len(data) or (name == LOG and not self._is_ours()):
                continue
            self._folder.write(name, data)
            self._sizes[name] = len(data)
            if name == LOG:
                self._version = self._folder.version(LOG)

    def _is_ours(self) -> bool:
        """Whether the stored log is this start's, or one that this start continues.

        Its version shows that, unless S3 stored it and the response was lost.
        """
        if not self._replaced and self._folder.version(LOG) != self._version:
            known = [line for line in self._lines if line["event"] == "Started"]
            stored = [_accounted(line) for line in read_log(self._folder) if line["event"] == "Started"]
            self._replaced = any(line not in known for line in stored)
        return not self._replaced


def as_line(event: Event, now: float) -> Line:
    return {"event": type(event).__name__, "time": now, **asdict(event)}


def read_log(folder: Folder) -> list[Line]:
    """The lines of a run's log, none when there is no log yet. Damaged lines are left out."""
    return read_damaged_log(folder)[0]


def read_damaged_log(folder: Folder) -> tuple[list[Line], int]:
    """The same, and how many lines were left out; the last line, which may be incomplete, is not counted."""
    try:
        texts = folder.read(LOG).split(b"\n")
    except FileNotFoundError:
        return [], 0
    found = [_parse(text) for text in texts]
    skipped = sum(line is None and bool(text.strip()) for line, text in zip(found[:-1], texts[:-1], strict=True))
    return [line for line in found if line], skipped


def end(folder: Folder, ended: Ended) -> None:
    """Add the end of a command to the run's log, if it has one. Nothing else may be writing there."""
    with suppress(FileNotFoundError):
        text = folder.read(LOG)
        cut = b"" if text.endswith(b"\n") else b"\n"  # ends a truncated line
        folder.write(LOG, text + cut + f"{strict_json.dumps(as_line(ended, steady_time()))}\n".encode())


def last_step(folder: Folder) -> int:
    """The last step of a run that is known to have been done."""
    return max([_reached(folder), *(line["step"] for line in read_log(folder) if line["event"] == "Step")])


def _reached(folder: Folder) -> int:
    try:
        return strict_json.validate(strict_json.Count, folder.read(_REACHED))
    except (FileNotFoundError, ValueError):
        return 0


def _parse(text: bytes) -> Line | None:
    """A line, or None when it is truncated or does not match its event."""
    try:
        line = strict_json.loads(text)
        _LINES[line["event"]].model_validate(line)
    except (ValueError, KeyError, TypeError):
        return None
    return line


def _accounted(line: Line) -> Line:
    return {key: line[key] for key in _ACCOUNTED if key in line}


def continued(lines: Sequence[Line], from_step: int) -> list[Line]:
    """The lines that count when the run resumes after a step."""
    kept = []
    for line, following in zip_longest(lines, lines[1:]):
        if line["step"] <= from_step or not (line["event"] in _IS_WORK or line.get("kind") in _FOUND_AGAIN):
            kept.append(line)
        elif following is None or following["event"] == "Started":
            # A command's last line shows how long it ran.
            kept.append(as_line(Discarded(line["step"]), line["time"]))
    return kept


def lost(lines: Sequence[Line], from_step: int, launched: float, now: float, reached: int = 0) -> Lost:
    """What the start of the run that resumes after a step has to repeat; `lines` are those that it found.

    launched: when its command was started. reached: the last step known to be done from other sources than the lines.
    Seconds that an earlier incident has counted are not counted again.
    """
    if not lines:
        return Lost(0, 0.0, from_step)
    before = [line for line in lines if line["event"] in _IS_WORK and line["step"] <= from_step]
    done = max([lines[0]["time"], *map(_done_at, before)])
    commands = _commands([*lines, {"event": "Started", "time": now, "launched": launched}])
    running = sum(max(0.0, end - max(start, done)) for start, end in commands)
    counted = sum(line.get("seconds_lost", 0.0) for line in lines if line["time"] > done)
    last = max([from_step, reached, *(line["step"] for line in lines if line["event"] == "Step")])
    return Lost(last - from_step, max(0.0, running - counted), last)


def goodput(lines: Sequence[Line], now: float) -> float:
    """Share of the commands' running time that was spent on steps that count. The last command runs until now."""
    running = sum(end - start for start, end in _commands([*lines, {"event": "", "time": now}]))
    counted: float = sum(line["seconds"] for line in lines if line["event"] == "Step")
    return min(1.0, counted / running) if running else 0.0  # clocks of several hosts may disagree


def seconds_run(lines: Sequence[Line]) -> float:
    """How long commands ran, without the pauses between them."""
    return sum(end - start for start, end in _commands(lines))


class CommandGoodput:
    """The goodput of one command from its events, for a live view; the log's includes earlier commands."""

    def __init__(self) -> None:
        self._launched = 0.0
        self._counted: list[Step] = []
        self._seconds = 0.0

    def add(self, event: Event) -> None:
        if isinstance(event, Started):
            self._launched = event.launched
            while self._counted and self._counted[-1].step > event.step:
                self._seconds -= self._counted.pop().seconds
        elif isinstance(event, Step):
            self._counted.append(event)
            self._seconds += event.seconds

    def at(self, now: float) -> float:
        return min(1.0, self._seconds / (now - self._launched)) if now > self._launched else 0.0


def _done_at(line: Line) -> float:
    """When the step of a line was done; a checkpoint of it was begun after that."""
    return line["time"] - line["seconds"] if line["event"] == "CheckpointSaved" else line["time"]


def _commands(lines: Sequence[Line]) -> list[tuple[float, float]]:
    """When each command was started, and when it ended as far as is known, which is at its last line."""
    spans: list[tuple[float, float]] = []
    launched = None
    for line in lines:
        if not spans or line.get("launched", launched) != launched:
            launched = line.get("launched")
            start = launched if launched is not None else line["time"]
            spans.append((max(start, spans[-1][1]) if spans else start, start))
        start, end = spans[-1]
        spans[-1] = start, max(start, end, line["time"])
    return spans
