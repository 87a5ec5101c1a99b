"""What the workers of a run and the process that started them say to each other, over Ray."""

import asyncio
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.stop_request import Notice
from erann_dist.clock import Anchor, anchor
from erann_dist.log.events import CheckpointSaved, Emit, Event


@dataclass(frozen=True)
class Place:
    """Where a worker is."""

    ip: str
    node_id: str


@dataclass
class _Start:
    """What is known of one start of the workers."""

    number: int = 0
    places: dict[int, Place] = field(default_factory=dict)  # by rank
    notice: str | None = None
    events: list[Event] = field(default_factory=list)


class _Board:
    """The actor between them. A worker of an earlier start, that was cut off and still lives, is not heard."""

    def __init__(self, clock: Anchor) -> None:
        self._start = _Start()
        self._clock = clock
        self._news = asyncio.Event()
        self._noticed = asyncio.Event()

    async def time(self) -> float:
        """By the command's clock: it runs on this machine too."""
        return self._clock.now()

    async def begin(self, number: int) -> None:
        self._start = _Start(number)
        self._noticed.set()  # those of the start before wait no longer
        self._noticed = asyncio.Event()

    async def join(self, number: int, rank: int, place: Place) -> None:
        if number == self._start.number:
            self._start.places[rank] = place

    async def put(self, number: int, event: Event) -> None:
        if number == self._start.number:
            self._start.events.append(event)
            self._news.set()

    async def take(self, wait: float) -> list[Event]:
        """The events since the last call; waits so many seconds for one."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), wait)
        self._news.clear()
        events, self._start.events = self._start.events, []
        return events

    async def tell(self, number: int, notice: str) -> None:
        if number == self._start.number and self._start.notice is None:
            self._start.notice = notice
            self._noticed.set()

    async def notice(self, number: int) -> str | None:
        """This start's notice, when there is one."""
        if number == self._start.number:
            await self._noticed.wait()
        return self._start.notice if number == self._start.number else None

    async def facts(self) -> tuple[dict[int, Place], str | None]:
        return self._start.places, self._start.notice


@contextmanager
def open_board() -> Iterator[Any]:
    """A board, on this process's own node: no loss of another takes it away."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "scheduling_strategy": here, "max_concurrency": 10_000}  # each worker waits in a call
    board = ray.remote(_Board).options(**options).remote(anchor())
    try:
        yield board
    finally:
        ray.kill(board)


class Watch:
    """Beside the workers of one start, in a thread: passes their events on, and a reason to stop to them."""

    def __init__(self, board: Any, number: int, on_event: Emit, reason: Notice, step: int) -> None:
        self._board = board
        self._number = number
        self._on_event = on_event
        self._reason = reason
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self.step = step  # of the last event
        self.saved = False  # there is a new checkpoint

    def __enter__(self) -> "Watch":
        ray.get(self._board.begin.remote(self._number))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _work(self) -> None:
        told = last = False
        with suppress(RayError):  # without the board the cluster is gone, and the workers
            while not last:
                last = self._ended.is_set()
                for event in ray.get(self._board.take.remote(0 if last else 1)):
                    self.step = event.step
                    self.saved |= isinstance(event, CheckpointSaved)
                    try:
                        self._on_event(event)
                    except OSError:
                        pass  # as when nobody reads its output any more
                    except Exception:  # a fault of a reader's; the run goes on without it
                        traceback.print_exc()
                        self._on_event = lambda _: None
                if not told and (reason := self._reason()):
                    self._board.tell.remote(self._number, reason)
                    told = True
