"""Progress on stderr: a live display on a terminal, a line now and then in a log."""

import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from erann_dist.clock import steady_time
from erann_dist.log.events import (
    CheckpointSaved,
    Evaluated,
    EvaluationProgress,
    Event,
    Finished,
    Incident,
    Phase,
    Started,
    Step,
)
from erann_dist.log.run_log import CommandGoodput
from erann_dist.words import count

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # All control characters but tab and line feed.


class PlainConsole(Console):
    """Escapes control characters (as \\x1b), which a terminal would execute: file names and keys are untrusted."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(_CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text), **options)


console = PlainConsole(stderr=True, highlight=False, soft_wrap=True)
_PLAIN_SECONDS = 10.0
_FLEET_SECONDS = 30.0  # Seconds between two lines of a run, when several run at once.


class Bar:
    """The progress of one task, with a short note."""

    def __init__(self, title: str, total: int, progress: Progress | None) -> None:
        self._title = title
        self._total = total
        self._progress = progress
        self._task = progress.add_task(title, total=total, note="") if progress else TaskID(0)
        self._last_line = time.monotonic() - _PLAIN_SECONDS
        self._first: tuple[int, float] | None = None  # How much was done at the first update, and its time.

    def update(self, done: int, note: str = "") -> None:
        if self._progress:
            self._progress.update(self._task, completed=done, note=note)
        elif done == self._total or time.monotonic() - self._last_line >= _PLAIN_SECONDS:
            self._last_line = time.monotonic()
            _print(f"{self._title}  {done}/{self._total}  {note}  {self._left(done)}".rstrip())

    def _left(self, done: int) -> str:
        """The time left, at the speed since the first update; the live bar has a column of its own for it."""
        now = time.monotonic()
        self._first = self._first or (done, now)
        return _time_left(done, self._total, self._first, now)


@contextmanager
def bar(title: str, total: int) -> Iterator[Bar]:
    """A progress bar, shown while the context is open."""
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
    """Shows a run's events as lines and, on a terminal, the run's current state below them.

    Use it as a context and pass each event to `event`.
    """

    def __init__(self) -> None:
        self._open = ExitStack()
        self._bar: Bar | None = None
        self._title = ""
        self._steps = 0
        self._status = _Status()
        self._is_live = False

    def __enter__(self) -> "RunView":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def event(self, event: Event) -> None:
        self._status.update(event)
        step = f"step {event.step}: " if self._steps or event.step else ""  # An evaluation alone has no steps.
        if isinstance(event, Phase):
            _print(f"{step}{event.text}")
        elif isinstance(event, Started):
            self._start(event)
        elif isinstance(event, Incident):
            _print(f"{step}{event.text}{losses(event.steps_lost, event.seconds_lost)}")
        elif isinstance(event, Evaluated):
            self._close_bar()
            _print(f"{_evaluation(event, step)}  on {count(event.clips, 'clip')}")
        elif isinstance(event, Finished):
            _print(f"training finished after {duration(event.seconds)}, goodput of the whole run {event.goodput:.1%}")
        elif not self._is_live:
            self._show_bar(event)

    def _start(self, event: Started) -> None:
        where = f"{count(event.workers, 'worker')} on {event.device}"
        if (hosts := len(set(event.hosts))) > 1:
            where += f", {hosts} hosts"
        _print(f"training on {count(event.train_clips, 'clip')}, evaluating on {event.eval_clips:,}, {where}")
        if event.resumed_from:
            _print(f"resuming from step {event.step} of {event.steps} ({event.resumed_from})")
        self._steps = event.steps
        self._close_bar()
        if console.is_terminal and not self._is_live:
            self._is_live = True
            self._open.enter_context(Live(get_renderable=self._status.page, console=console, refresh_per_second=2))

    def _show_bar(self, event: Event) -> None:
        if isinstance(event, Step):
            note = f"loss {event.loss:.4f}  lr {event.lr:.2e}  {event.examples_per_s:.1f} examples/s"
            title, done, total = "train", event.step, self._steps
            note += f"  {event.clips_per_s:.1f} clips/s  waiting for data {event.data_wait:.1%}"
        elif isinstance(event, EvaluationProgress):
            title, done, total, note = "score", event.done, event.total, ""
        else:
            return
        if self._bar is None or self._title != title:
            self._close_bar()
            self._bar, self._title = self._open.enter_context(bar(title, total)), title
        self._bar.update(done, note)

    def _close_bar(self) -> None:
        if self._bar:
            self._open.close()
            self._bar = None


class FleetView:
    """Shows the events of several runs, each line prefixed with the run's name, and the state of each run.

    Use it as a context and call it with a run's name and each event.
    """

    def __init__(self) -> None:
        self._runs: dict[str, _Status] = {}
        self._last_line: dict[str, float] = {}  # When a line on a run's steps was last printed.
        self._open = ExitStack()

    def __enter__(self) -> "FleetView":
        if console.is_terminal:
            self._open.enter_context(Live(get_renderable=self._page, console=console, refresh_per_second=2))
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def __call__(self, name: str, event: Event) -> None:
        status = self._runs.setdefault(name, _Status())
        status.update(event)
        if isinstance(event, Started):
            start = f"resuming from step {event.step}" if event.resumed_from else "starting"
            _print(f"{name}: {start}, {count(event.steps, 'step')} on {count(event.train_clips, 'clip')}")
        elif isinstance(event, Incident):
            _print(f"{name}: step {event.step}: {event.text}{losses(event.steps_lost, event.seconds_lost)}")
        elif isinstance(event, Finished):
            _print(f"{name}: finished after {duration(event.seconds)}  {status.line()}")
        elif isinstance(event, Step) and not console.is_terminal:
            now = time.monotonic()
            if now - self._last_line.get(name, -_FLEET_SECONDS) >= _FLEET_SECONDS:
                self._last_line[name] = now
                _print(f"{name}: {status.line()}")

    def _page(self) -> Table:
        page = Table.grid(padding=(0, 2, 0, 0))
        for name, status in list(self._runs.items()):
            page.add_row(name, status.line())
        return page


class _Status:
    """The current state of a run, as a line or, once it has started, as a page."""

    def __init__(self) -> None:
        self._started: Started | None = None
        self._first: tuple[int, float] | None = None  # The first step reported by these workers, and its time.
        self._step: tuple[Step, float] | None = None
        self._scoring: EvaluationProgress | None = None
        self._goodput = CommandGoodput()
        self._incidents = 0
        self._checkpoint: tuple[CheckpointSaved, float] | None = None  # The last one, and when it was reported.
        self._evaluations: list[Evaluated] = []  # Those of the run's own weights, not of averaged ones.

    def update(self, event: Event) -> None:
        now = steady_time()
        self._goodput.add(event)
        if isinstance(event, Started):
            self._started = event
            self._first = self._step = self._scoring = None
        elif isinstance(event, Step):
            self._step = event, now
            self._first = self._first or (event.step, now)
        elif isinstance(event, CheckpointSaved):
            self._checkpoint = event, now
        elif isinstance(event, EvaluationProgress):
            self._scoring = event
        elif isinstance(event, Evaluated):
            self._scoring = None
            if event.averaged is None:
                self._evaluations.append(event)
        elif isinstance(event, Incident):
            self._incidents += 1

    def line(self) -> str:
        """The state in a few words."""
        if self._started is None:
            return "starting"
        latest, scoring, evaluations = self._step, self._scoring, self._evaluations
        steps, done = self._started.steps, latest[0].step if latest else self._started.step
        words = [f"step {done:,} of {steps:,}"]
        if latest:
            words.append(f"loss {latest[0].loss:.4f}")
        if scoring:
            words.append(f"scoring {scoring.done} of {scoring.total} clips")
        elif left := _time_left(done, steps, self._first, steady_time()):
            words.append(left)
        if evaluations:
            words.append("  ".join(f"{name} {value:.4f}" for name, value in evaluations[-1].metrics.items()))
        return "  ".join(words)

    def page(self) -> Table:
        assert self._started
        latest, scoring = self._step, self._scoring  # Another thread draws the page while events arrive.
        now = steady_time()
        page = Table.grid(padding=(0, 2, 0, 0))
        page.add_column(style="dim", min_width=len("checkpoint"))
        page.add_column(no_wrap=True, overflow="ellipsis")
        steps, done = self._started.steps, latest[0].step if latest else self._started.step
        left = _time_left(done, steps, self._first, now)
        page.add_row("step", _with_bar(done, steps, f", {left}" if left else ""))
        if latest:
            step, reported = latest
            page.add_row(
                "loss",
                f"{step.loss:.4f}  learning rate {step.lr:.2e}  gradient norm {step.grad_norm:.3g}  "
                f"({duration(now - reported)} ago)",
            )
            page.add_row(
                "speed",
                f"{step.examples_per_s:,.1f} examples/s  {step.clips_per_s:,.1f} clips/s  "
                f"waiting for data {step.data_wait:.1%}",
            )
        if scoring:
            page.add_row("scoring", _with_bar(scoring.done, scoring.total, " clips"))
        if self._evaluations:
            last, best = self._evaluations[-1], max(self._evaluations, key=score)
            name = next(iter(last.metrics))
            page.add_row(
                "evaluation",
                f"{name} {score(last):.4f} at step {last.step}, best {score(best):.4f} at step {best.step}",
            )
        if self._checkpoint:
            saved, reported = self._checkpoint
            page.add_row("checkpoint", f"step {saved.step}  ({duration(now - reported)} ago)")
        incidents = count(self._incidents, "incident") if self._incidents else "no incidents"
        page.add_row("goodput", f"{self._goodput.at(now):.1%} since this command was started, {incidents}")
        return page


def note(line: str) -> None:
    """Print what the user should know before the work starts."""
    console.print(f"note: {line}", markup=False)


def _print(line: str) -> None:
    console.print(line, markup=False)


def _with_bar(done: int, total: int, words: str) -> Table:
    line = Table.grid(padding=(0, 1, 0, 0))
    line.add_row(ProgressBar(total=total, completed=done, width=24), f"{done:,} of {total:,}{words}")
    return line


def _time_left(done: int, total: int, first: tuple[int, float] | None, now: float) -> str:
    """The time left, at the speed since the first update. first: how much was done then, and its time."""
    if first is None or done <= first[0] or done >= total:
        return ""
    return f"{duration((total - done) * (now - first[1]) / (done - first[0]))} left"


def duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _evaluation(event: Evaluated, step: str) -> str:
    """step: "step 4: ", or empty without training."""
    if event.averaged:
        step = f"{step.removesuffix(': ')} (mean weights of {event.averaged} checkpoints): "
    return step + "  ".join(f"{name} {value:.4f}" for name, value in event.metrics.items())


def score(event: Evaluated) -> float:
    """The evaluation's first metric, by which the best evaluation is chosen."""
    return next(iter(event.metrics.values()))


def losses(steps: int, seconds: float) -> str:
    """What an incident cost, to be appended to its text."""
    parts = [count(steps, "step")] * bool(steps) + [duration(seconds)] * (seconds >= 0.5)
    return f"; lost: {', '.join(parts)}" if parts else ""
