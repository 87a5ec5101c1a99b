"""TensorBoard's event file, written in this thread: what does not fit on the disk is written later, nothing is lost.

TensorBoard's own writer has a thread that ends at the first error; it writes nothing after that.
"""

import io
import os
import socket
import time
from contextlib import suppress
from dataclasses import asdict
from itertools import count
from pathlib import Path

from erann_dist.errors import in_one_line
from erann_dist.log.events import Evaluated, Event, Incident, Step

FOLDER = "tensorboard"
_NUMBERS = count()  # of this process's files, which may be created in the same second


class TensorBoardSink:
    """The events of one start of a run: scalars train/… and eval/…, and incidents as text."""

    def __init__(self, folder: Path, from_step: int) -> None:
        """TensorBoard then discards what existing files contain about steps after from_step."""
        from tensorboard.compat.proto import event_pb2

        self._record = event_pb2.Event
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_NUMBERS)}"
        self._path = folder / FOLDER / name
        self._file: io.FileIO | None = None
        self._unwritten = b""
        self.problem: str | None = None
        self._add(event_pb2.Event(step=from_step + 1, file_version="brain.Event:2"))
        self._add(
            event_pb2.Event(step=from_step + 1, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))
        )
        self._flush()

    def event(self, event: Event) -> None:
        if isinstance(event, Step):
            for name, value in asdict(event).items():
                if name not in ("step", "steps", "seconds") and value is not None:
                    self._add_scalar(f"train/{name}", value, event.step)
        elif isinstance(event, Evaluated):
            for name, value in event.metrics.items():
                self._add_scalar(f"eval{'_averaged' * bool(event.averaged)}/{name}", value, event.step)
        elif isinstance(event, Incident):
            self._add_text("incidents", f"{event.kind}: {event.text}", event.step)
        else:
            return
        self._flush()

    def _add_scalar(self, name: str, value: float, step: int) -> None:
        from torch.utils.tensorboard.summary import scalar

        self._add(self._record(step=step, summary=scalar(name, value)))

    def _add_text(self, name: str, text: str, step: int) -> None:
        from torch.utils.tensorboard.summary import text as summary_of

        self._add(self._record(step=step, summary=summary_of(name, text)))

    def _flush(self) -> None:
        """Write what is unwritten, as far as the disk accepts it; `problem` reports why some was left."""
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
        self._flush()
        if self._file:
            with suppress(OSError):
                self._file.close()

    def _add(self, event: object) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        event.wall_time = time.time()  # type: ignore[attr-defined]
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())  # type: ignore[attr-defined]
        self._unwritten += record.getvalue()
