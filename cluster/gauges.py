"""A run's figures among the metrics of its Ray cluster, from where Prometheus and the dashboard take them.

Gauges ray_erann_step, ray_erann_loss, ray_erann_examples_per_s, …, tagged by `run`, on the metrics port of the node
where the command runs; Ray hands them on every 10 s.
"""

from dataclasses import asdict

from erann_dist.clock import steady_time
from erann_dist.log.events import Emit, Evaluated, Event, Incident, Started, Step
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


def with_gauges(emit: Emit, run: str) -> Emit:
    """The same reader of events, that keeps the gauges of a run too. For a process that is connected to Ray."""
    from ray.util.metrics import Gauge

    described = {name: Gauge(f"erann_{name}", text, tag_keys=("run",)) for name, text in (_STEP | _OTHERS).items()}
    goodput = CommandGoodput()
    incidents = 0

    def gauge(name: str, value: float) -> None:
        if name not in described:
            described[name] = Gauge(f"erann_{name}", "Of the last evaluation.", tag_keys=("run",))
        described[name].set(value, {"run": run})

    def read(event: Event) -> None:
        nonlocal incidents
        emit(event)
        goodput.add(event)
        if isinstance(event, Started):
            gauge("step", event.step)
            gauge("steps", event.steps)
            gauge("workers", event.workers)
            gauge("incidents", incidents)
        elif isinstance(event, Step):
            values = asdict(event)
            for name in _STEP:
                gauge(name, values[name])
            gauge("goodput", goodput.at(steady_time()))
        elif isinstance(event, Evaluated) and event.averaged is None:
            for name, value in event.metrics.items():
                gauge(f"eval_{name}", value)
        elif isinstance(event, Incident):
            incidents += 1
            gauge("incidents", incidents)

    return read
