"""A run's figures on the metrics port of a real Ray cluster."""

import re
import time
import urllib.request

from erann_dist.log.events import Evaluated, Event, Incident
from tests.support.run_logs import started, step


def read_metrics(address: str) -> dict[str, float]:
    """The gauges of run "one", by name."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    return {name: float(value) for name, value in re.findall(r'^ray_erann_(\w+)\{.*run="one".*\} (\S+)$', text, re.M)}


def test_the_gauges_are_on_the_metrics_port() -> None:
    import ray

    from cluster.embedded import ray_cluster
    from cluster.gauges import GaugeSink

    events: list[Event] = [
        started(launched=time.time() - 1000),
        step(4, loss=0.25, seconds=0.5, data_wait=0.125),
        Incident(4, "cache", "full"),
        Evaluated(4, 20, {"mAP": 0.75}),
        Evaluated(4, 20, {"mAP": 0.5}, averaged=2),
    ]
    with ray_cluster():
        (node,) = ray.nodes()
        sink = GaugeSink("one")
        for event in events:
            sink.event(event)
        deadline = time.monotonic() + 180
        while not (found := read_metrics(f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}")):
            assert time.monotonic() < deadline
            time.sleep(1)
    assert 0 < found.pop("goodput") < 0.001
    assert found == {
        "step": 4,
        "steps": 10,
        "workers": 2,
        "loss": 0.25,
        "lr": 1e-3,
        "grad_norm": 1,
        "examples_per_s": 100,
        "clips_per_s": 200,
        "data_wait": 0.125,
        "incidents": 1,
        "eval_map": 0.75,
    }
