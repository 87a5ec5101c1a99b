"""Events as a run logs them, for tests of what reads them."""

from typing import Any

from erann_dist.formats import strict_json
from erann_dist.log.events import Event, Started, Step
from erann_dist.log.run_log import LOG, as_line
from erann_dist.storage.folder import Folder


def started(at: int = 0, launched: float = 0.0, **others: Any) -> Started:
    return Started(
        **{
            "step": at,
            "steps": 10,
            "workers": 2,
            "device": "cpu",
            "train_clips": 40,
            "eval_clips": 20,
            "resumed_from": f"checkpoints/step-{at:08d}-0001" if at else None,
            "launched": launched,
            "hosts": ["one", "two"],
        }
        | others
    )


def step(done: int, **others: Any) -> Step:
    return Step(
        **{
            "step": done,
            "loss": 1.0,
            "lr": 1e-3,
            "examples_per_s": 100.0,
            "clips_per_s": 200.0,
            "data_wait": 0.01,
            "steps": 1,
            "seconds": 1.0,
            "grad_norm": 1.0,
            "read_mb_per_s": 40.0,
            "cache_hits": None,
            "bad_clips": 0,
        }
        | others
    )


def write_log(folder: Folder, *events: tuple[float, Event]) -> None:
    """A run's log, of events and the times at which they came."""
    folder.write(LOG, "".join(strict_json.dumps(as_line(event, when)) + "\n" for when, event in events).encode())
