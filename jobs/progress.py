"""What a person sees while work goes on: a live line on a terminal, now and then a line in a log. All on stderr."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from erann_dist.events import Evaluated, EvaluationProgress, Event, Incident, Started, Step

console = Console(stderr=True, highlight=False, soft_wrap=True)
_PLAIN_SECONDS = 10.0


class Bar:
    """One running task: how much is done, and a few words on how it goes."""

    def __init__(self, title: str, total: int, progress: Progress | None) -> None:
        self._title = title
        self._total = total
        self._progress = progress
        self._task = progress.add_task(title, total=total, note="") if progress else TaskID(0)
        self._last_line = time.monotonic() - _PLAIN_SECONDS
        self._first: tuple[int, float] | None = None  # how much was done at the first update, and when that was

    def update(self, done: int, note: str = "") -> None:
        if self._progress:
            self._progress.update(self._task, completed=done, note=note)
        elif done == self._total or time.monotonic() - self._last_line >= _PLAIN_SECONDS:
            self._last_line = time.monotonic()
            console.print(f"{self._title}  {done}/{self._total}  {note}  {self._left(done)}".rstrip())

    def _left(self, done: int) -> str:
        """The time left, at the speed since the first update; the live bar has a column of its own for it."""
        now = time.monotonic()
        first, began = self._first = self._first or (done, now)
        if done <= first or done >= self._total:
            return ""
        return f"{timedelta(seconds=round((self._total - done) * (now - began) / (done - first)))} left"


@contextmanager
def bar(title: str, total: int) -> Iterator[Bar]:
    """A progress bar for the length of the context."""
    if not console.is_terminal:
        yield Bar(title, total, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        yield Bar(title, total, progress)


class RunView:
    """Shows a run's events. Use as a context, and call it with each event."""

    def __init__(self) -> None:
        self._open = ExitStack()
        self._bar: Bar | None = None
        self._title = ""
        self._steps = 0

    def __enter__(self) -> "RunView":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def __call__(self, event: Event) -> None:
        if isinstance(event, Started):
            self._steps = event.steps
            where = f"{event.workers} worker{'s' if event.workers > 1 else ''} on {event.device}"
            console.print(f"training on {event.train_clips} clips, evaluating on {event.eval_clips}, {where}")
            if event.resumed_from:
                console.print(f"going on from step {event.step} of {event.steps} ({event.resumed_from})")
        elif isinstance(event, Step):
            note = f"loss {event.loss:.4f}  lr {event.lr:.2e}  {event.examples_per_s:.1f} examples/s"
            self._show("train", self._steps, event.step, f"{note}  waiting for data {event.data_wait:.0%}")
        elif isinstance(event, Incident):
            console.print(f"step {event.step}: {event.text}", markup=False)
        elif isinstance(event, EvaluationProgress):
            self._show("score", event.total, event.done)
        elif isinstance(event, Evaluated):
            self._close()
            figures = "  ".join(f"{name} {value:.4f}" for name, value in event.metrics.items())
            console.print(f"step {event.step}: {figures}  on {event.clips} clips")

    def _show(self, title: str, total: int, done: int, note: str = "") -> None:
        if self._bar is None or self._title != title:
            self._close()
            self._bar, self._title = self._open.enter_context(bar(title, total)), title
        self._bar.update(done, note)

    def _close(self) -> None:
        self._open.close()
        self._bar = None
