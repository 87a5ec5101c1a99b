"""Checkpoints written beside the training."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

from erann_dist import checkpoint
from erann_dist.checkpoint import Facts, Start, Superseded
from erann_dist.engine import State
from erann_dist.errors import UserError
from erann_dist.events import CheckpointSaved, Incident
from erann_dist.recipe import CheckpointSection


class Saver:
    """Writes the checkpoints of one start of a run, one at a time, in a thread of its own."""

    def __init__(self, start: Start, settings: CheckpointSection) -> None:
        self.start = start
        self.state: State = {}  # the copy that is written; not to be changed while `is_busy`
        self.saved_step: int | None = None
        self.last: str | None = None  # the name of the checkpoint of that step
        self._settings = settings
        self._failed = 0  # in a row
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[str] | None = None

    @property
    def is_busy(self) -> bool:
        """Whether something was begun of which `finish` has not told."""
        return self._writing is not None

    def begin(self, facts: Facts, stall_s: float) -> None:
        """Write `state`. stall_s: how long the training was held up for the copy."""
        self._facts, self._stall_s, self._began = facts, stall_s, time.perf_counter()
        keep = self._settings.keep_last, self._settings.keep_best
        self._writing = self._thread.submit(checkpoint.save, self.start, facts, self.state, *keep)

    def finish(self, wait_for_it: bool, meanwhile: Callable[[], None]) -> CheckpointSaved | Incident | None:
        """What came of the checkpoint that was begun, once it is known.

        meanwhile: called each second of the wait. Raises UserError when one too many failed, and Superseded.
        """
        if self._writing is None or not (wait_for_it or self._writing.done()):
            return None
        while not wait([self._writing], timeout=1.0).done:
            meanwhile()
        writing, self._writing = self._writing, None
        step, seconds = self._facts.step, time.perf_counter() - self._began
        try:
            self.last = writing.result()
        except Superseded:
            raise
        except (OSError, UserError) as error:
            return self._failure(error)
        self.saved_step, self._failed = step, 0
        return CheckpointSaved(step, f"{self.start.run}/{self.last}", seconds, self._stall_s)

    def _failure(self, error: OSError | UserError) -> Incident:
        reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
        text = f"{self.start.run}: the checkpoint of step {self._facts.step} could not be written ({reason})"
        self._failed += 1
        if self._failed > self._settings.max_failed:
            raise UserError(f"{text}; {self._failed} in a row, checkpoint.max_failed is {self._settings.max_failed}")
        return Incident(self._facts.step, "checkpoint", f"{text}; the next one is tried")

    def finish_surely(self, meanwhile: Callable[[], None]) -> list[CheckpointSaved | Incident]:
        """Wait until the last checkpoint that was begun is written, and write it again if that failed."""
        events = []
        while True:
            if event := self.finish(True, meanwhile):
                events.append(event)
            if self.saved_step == self._facts.step:
                return events
            self.begin(self._facts, self._stall_s)

    def close(self) -> None:
        """Waits for what is being written."""
        self._thread.shutdown()
