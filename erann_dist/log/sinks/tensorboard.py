"""TensorBoard's event file, written in this thread: what the disk has no room for is written later, none is lost.

TensorBoard's own writer has a thread that ends at the first error, and writes nothing from then on.
"""

import io
import os
import socket
import time
from contextlib import suppress
from itertools import count
from pathlib import Path

from erann_dist.errors import in_one_line

_NUMBERS = count()  # of this process's files, which may be made in the same second


class TensorBoardLog:
    """The events of one start of a run. Close it at the end."""

    def __init__(self, folder: Path, from_step: int) -> None:
        """What files that are there have of from_step and later does not count any more."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        self._event = Event
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_NUMBERS)}"
        self._path = folder / name
        self._file: io.FileIO | None = None
        self._unwritten = b""
        self.problem: str | None = None
        self._add(Event(step=from_step, file_version="brain.Event:2"))
        self._add(Event(step=from_step, session_log=SessionLog(status=SessionLog.START)))
        self.flush()

    def add_scalar(self, name: str, value: float, step: int) -> None:
        from torch.utils.tensorboard.summary import scalar

        self._add(self._event(step=step, summary=scalar(name, value)))

    def add_text(self, name: str, text: str, step: int) -> None:
        from torch.utils.tensorboard.summary import text as summary_of

        self._add(self._event(step=step, summary=summary_of(name, text)))

    def flush(self) -> None:
        """Write what is unwritten, as far as the disk takes it; `problem` is why it did not take all."""
        try:
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("ab", buffering=0)
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            error.filename = error.filename or str(self._path)
            self.problem = (
                f"TensorBoard's file is incomplete; the rest is written as soon as possible: {in_one_line(error)}"
            )

    def close(self) -> None:
        self.flush()
        if self._file:
            with suppress(OSError):
                self._file.close()

    def _add(self, event: object) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        event.wall_time = time.time()  # type: ignore[attr-defined]
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())  # type: ignore[attr-defined]
        self._unwritten += record.getvalue()
