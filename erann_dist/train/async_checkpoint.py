"""Checkpoints written in the background while the training continues."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

from erann_dist.errors import UserError
from erann_dist.log.events import CheckpointSaved, Emit, Event, Incident
from erann_dist.recipe import CheckpointSection
from erann_dist.train import checkpoint
from erann_dist.train.checkpoint import Facts, Start, Superseded
from erann_dist.train.engine import Engine, State
from erann_dist.train.run import Run

# Seconds before the last checkpoint is written again, by how many attempts failed in a row.
_PAUSES_S = (0.0, 2.0, 5.0, 15.0, 30.0)


class CheckpointWriter:
    """Writes the checkpoints of one start of a run, one at a time, in a thread of its own. Rank 0 has one."""

    def __init__(self, start: Start, settings: CheckpointSection, due: Callable[[int], bool]) -> None:
        """due: at which steps a checkpoint is always written."""
        self.start = start
        self.state: State = {}  # the copy that is written; do not change it before `drain` has reported the result
        self.saved_step: int | None = None
        self.last: str | None = None  # the name of the checkpoint of that step
        self._settings = settings
        self._due = due
        self._failed = 0  # in a row
        self._reported: set[str] = set()  # problems with checkpoints that are kept or could not be deleted
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[list[Event]] | None = None

    def begin(self, facts: Facts, stall_s: float, pause_s: float = 0.0) -> None:
        """Write `state`, after a pause. stall_s: how long the training was blocked for the copy."""
        self._facts, self._stall_s = facts, stall_s
        self._writing = self._thread.submit(self._write, facts, stall_s, pause_s)

    def begin_again(self) -> None:
        """Write the checkpoint that failed again, after a pause."""
        self.begin(self._facts, self._stall_s, _PAUSES_S[min(self._failed, len(_PAUSES_S) - 1)])

    @property
    def has_failed(self) -> bool:
        """Whether the last checkpoint is known to have failed."""
        return self._writing is None and self._failed > 0

    def is_done(self, seconds: float) -> bool:
        """Whether nothing is being written any more; waits up to that long."""
        return self._writing is None or bool(wait([self._writing], timeout=seconds).done)

    def drain(self) -> list[Event]:
        """The events of the checkpoint that was begun, once it is done; later calls return none.

        Raises UserError when one too many failed, and Superseded.
        """
        if self._writing is None or not self._writing.done():
            return []
        writing, self._writing = self._writing, None
        try:
            events = writing.result()
        except Superseded:
            raise
        except (OSError, UserError) as error:
            return [self._failure(error)]
        self._failed = 0
        return events

    def record(self, step: int, metrics: dict[str, float]) -> list[Event]:
        """Write the evaluation next to the last checkpoint, if that is this step's. Raises Superseded."""
        try:
            if self.saved_step == step and self.last:
                checkpoint.record(self.start, self.last, metrics)
        except Superseded:
            raise
        except (OSError, UserError) as error:
            text = f"{self.start.run}: the evaluation of step {step} could not be written next to its checkpoint"
            return [Incident(step, "checkpoint", f"{text} ({_reason(error)})")]
        return []

    def close(self) -> None:
        """Wait for the checkpoint that is being written."""
        self._thread.shutdown()

    def _write(self, facts: Facts, stall_s: float, pause_s: float) -> list[Event]:
        time.sleep(pause_s)
        began = time.perf_counter()
        self.last = checkpoint.save(self.start, facts, self.state)
        self.saved_step = facts.step
        saved = CheckpointSaved(facts.step, f"{self.start.run}/{self.last}", time.perf_counter() - began, stall_s)
        try:
            keep_last, keep_best = self._settings.keep_last, self._settings.keep_best
            problems = checkpoint.delete_others(self.start, self.last, self._due, keep_last, keep_best)
        except Superseded:
            raise
        except (OSError, UserError) as error:
            text = f"{self.start.run}: old checkpoints could not be deleted ({_reason(error)})"
            problems = [text]
        new = [problem for problem in problems if problem not in self._reported]
        self._reported.update(new)
        return [saved, *(Incident(facts.step, "checkpoint", problem) for problem in new)]

    def _failure(self, error: OSError | UserError) -> Incident:
        step, allowed = self._facts.step, self._settings.max_failed
        text = f"{self.start.run}: the checkpoint of step {step} could not be written ({_reason(error)})"
        self._failed += 1
        if self._failed > allowed:
            raise UserError(f"{text}; {self._failed} in a row, checkpoint.max_failed is {allowed}")
        return Incident(step, "checkpoint", f"{text}; the next one is tried")


def _reason(error: OSError | UserError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


class AsyncCheckpoints:
    """The checkpoints of one start of a run, on each of its workers, which wait for each other where necessary."""

    def __init__(self, run: Run, writer: CheckpointWriter | None, emit: Emit) -> None:
        """writer: on rank 0."""
        self.writer = writer
        self._run = run
        self._emit = emit

    def begin(self, engine: Engine, facts: Callable[[], Facts]) -> None:
        """Copy the engine's state; it is written while the training continues. All workers call it."""
        began = time.perf_counter()
        self.wait()  # the copy is still in use
        now = facts()
        engine.state(self.writer.state if self.writer else None)
        if self.writer:
            self.writer.begin(now, time.perf_counter() - began)

    def report(self) -> None:
        """Emit the result of a finished checkpoint. Rank 0 raises UserError when one too many failed."""
        for event in self.writer.drain() if self.writer else []:
            self._emit(event)

    def wait(self) -> None:
        """Wait until nothing is being written. All workers call it; meanwhile their watchdogs see progress."""
        while not self._run.workers.broadcast(self.writer is None or self.writer.is_done(seconds=1.0)):
            self._run.watchdog.alive()
        self.report()

    def finish(self) -> None:
        """Wait until the last checkpoint is written, and write it again if that failed. All workers call it."""
        self.wait()
        while self._run.workers.broadcast(self.writer is not None and self.writer.has_failed):
            if self.writer:
                self.writer.begin_again()
            self.wait()

    def last(self, resumed_from: str | None) -> str | None:
        """The newest checkpoint's name, of this start or the one it resumed from. All workers call it."""
        self.wait()
        return self._run.workers.broadcast((self.writer and self.writer.last) or resumed_from)
