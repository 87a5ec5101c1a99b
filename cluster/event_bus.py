"""Carries events from a run's workers to the process that started them, and stop requests the other way, over Ray."""

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

from erann_dist.clock import Anchor, anchor
from erann_dist.log.events import CheckpointSaved, Emit, Event, Interruption, StopRequest


@dataclass(frozen=True)
class Place:
    """The node of a worker."""

    ip: str
    node_id: str


@dataclass
class _Start:
    """The state of one start of the workers."""

    number: int = 0
    places: dict[int, Place] = field(default_factory=dict)  # by rank
    stop_request: Interruption | None = None
    events: list[Event] = field(default_factory=list)


class _EventBus:
    """The actor between them. It ignores workers of an earlier start that were cut off but still run."""

    def __init__(self, clock: Anchor) -> None:
        self._start = _Start()
        self._clock = clock
        self._news = asyncio.Event()
        self._stop_requested = asyncio.Event()

    async def time(self) -> float:
        """The command's time: the actor runs on the same machine."""
        return self._clock.now()

    async def begin(self, number: int) -> None:
        self._start = _Start(number)
        self._stop_requested.set()  # Releases waiting calls of the previous start.
        self._stop_requested = asyncio.Event()

    async def join(self, number: int, rank: int, place: Place) -> None:
        if number == self._start.number:
            self._start.places[rank] = place

    async def put(self, number: int, event: Event) -> None:
        if number == self._start.number:
            self._start.events.append(event)
            self._news.set()

    async def take(self, wait: float) -> list[Event]:
        """The events since the last call; waits up to `wait` seconds for the first."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), wait)
        self._news.clear()
        events, self._start.events = self._start.events, []
        return events

    async def request_stop(self, number: int, reason: Interruption) -> None:
        if number == self._start.number and self._start.stop_request is None:
            self._start.stop_request = reason
            self._stop_requested.set()

    async def stop_request(self, number: int) -> Interruption | None:
        """Wait for the start's stop request; None if another start has begun."""
        if number == self._start.number:
            await self._stop_requested.wait()
        return self._start.stop_request if number == self._start.number else None

    async def facts(self) -> tuple[dict[int, Place], Interruption | None]:
        return self._start.places, self._start.stop_request


@contextmanager
def open_event_bus() -> Iterator[Any]:
    """An event bus on this process's own node, so that it survives the loss of any other node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "scheduling_strategy": here, "max_concurrency": 10_000}  # Each worker waits in a call.
    bus = ray.remote(_EventBus).options(**options).remote(anchor())
    try:
        yield bus
    finally:
        ray.kill(bus)


class EventPump:
    """Passes on the events of one start's workers, and a stop request to them, in a background thread."""

    def __init__(self, bus: Any, number: int, on_event: Emit, reason: StopRequest, step: int) -> None:
        self._bus = bus
        self._number = number
        self._on_event = on_event
        self._reason = reason
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self.step = step  # of the last event
        self.saved = False  # whether there is a new checkpoint

    def __enter__(self) -> "EventPump":
        ray.get(self._bus.begin.remote(self._number))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _work(self) -> None:
        requested = last = False
        with suppress(RayError):  # If the bus is lost, so are the cluster and the workers.
            while not last:
                last = self._ended.is_set()
                for event in ray.get(self._bus.take.remote(0 if last else 1)):
                    self.step = event.step
                    self.saved |= isinstance(event, CheckpointSaved)
                    try:
                        self._on_event(event)
                    except OSError:
                        pass  # For example, when its output is no longer read.
                    except Exception:  # An error in the callback; the run continues without it.
                        traceback.print_exc()
                        self._on_event = lambda _: None
                if not requested and (reason := self._reason()):
                    self._bus.request_stop.remote(self._number, reason)
                    requested = True
