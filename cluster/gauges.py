"""Exports a run's figures as metrics of its Ray cluster, for Prometheus and the dashboard.

Gauges ray_erann_step, ray_erann_loss, ray_erann_examples_per_s, …, tagged by `run`, on the metrics port of the node
where the command runs; Ray exports them every 10 s.
"""

from dataclasses import asdict
from typing import Any

from erann_dist.clock import steady_time
from erann_dist.log.events import Evaluated, Event, Incident, Started, Step
from erann_dist.log.run_log import CommandGoodput

_STEP = {
    "step": "Steps done.",
    "loss": "Mean loss since the last report.",
    "lr": "Learning rate.",
    "grad_norm": "Norm of the whole gradient, before clipping.",
    "examples_per_s": "Training examples per second, of all workers.",
    "clips_per_s": "Clips decoded per second, of all workers.",
    "data_wait": "Share of the time that the first worker waits for data.",
}
_OTHERS = {
    "steps": "Steps of the whole run.",
    "workers": "Workers that train.",
    "goodput": "Share of the time since the command was started that was spent on steps that count.",
    "incidents": "Incidents since the command was started.",
}


class GaugeSink:
    """Updates the gauges of a run, in a process that is connected to Ray."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges = {name: _gauge(name, text) for name, text in (_STEP | _OTHERS).items()}
        self._goodput = CommandGoodput()
        self._incidents = 0

    def event(self, event: Event) -> None:
        self._goodput.add(event)
        if isinstance(event, Started):
            self._set("step", event.step)
            self._set("steps", event.steps)
            self._set("workers", event.workers)
            self._set("incidents", self._incidents)
        elif isinstance(event, Step):
            values = asdict(event)
            for name in _STEP:
                self._set(name, values[name])
            self._set("goodput", self._goodput.at(steady_time()))
        elif isinstance(event, Evaluated) and event.averaged is None:
            for name, value in event.metrics.items():
                self._set(f"eval_{name}", value)
        elif isinstance(event, Incident):
            self._incidents += 1
            self._set("incidents", self._incidents)

    def _set(self, name: str, value: float) -> None:
        if name not in self._gauges:
            self._gauges[name] = _gauge(name, "Of the last evaluation.")
        self._gauges[name].set(value, {"run": self._run})


def _gauge(name: str, text: str) -> Any:
    from ray.util.metrics import Gauge

    return Gauge(f"erann_{name}", text, tag_keys=("run",))
