"""The events of a run while it trains. The loop emits them; metrics.jsonl, TensorBoard and the live view read them.

The field types bound the values in a log: erann_dist.log.run_log skips lines with other values.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from erann_dist.formats.strict_json import Count, Measured, Number, Seconds

# failure: workers were lost or hung, or the previous command ended; stop: the previous command was asked to stop;
# resize: the number of workers changed.
IncidentKind = Literal[
    "bad_clip",
    "cache",
    "storage",
    "bad_step",
    "checkpoint",
    "evaluation",
    "log",
    "failure",
    "stop",
    "preemption",
    "resize",
]


@dataclass(frozen=True)
class Interruption:
    """Why workers have to stop, or why they ended."""

    kind: IncidentKind
    text: str  # one line


@dataclass(frozen=True)
class Started:
    """Emitted before the first step."""

    step: Count  # 0, or the step of the checkpoint from which the run resumes
    steps: Count
    workers: Count
    device: str
    train_clips: Count
    eval_clips: Count
    resumed_from: str | None
    launched: Seconds  # when the command was started, in Unix time; the same for all starts of its workers
    hosts: list[str]  # by rank
    hardware: list[str] = field(default_factory=list)  # by rank: the name of the GPU, or of the processor
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """Averages over the steps since the last Step event."""

    step: Count  # steps done
    loss: Measured
    lr: Number
    examples_per_s: Number
    clips_per_s: Number  # decoded; twice the examples with fresh mixup partners
    data_wait: Number  # share of the time, on rank 0
    steps: Count  # how many it averages over
    seconds: Seconds  # that they took, without checkpoints and evaluations
    grad_norm: Measured  # of the whole gradient, before clipping
    read_mb_per_s: Number  # on rank 0, from shards and cache
    cache_hits: Number | None  # share of rank 0's clips that came from the cache; none without a cache
    bad_clips: Count  # that rank 0 has given up so far


@dataclass(frozen=True)
class Phase:
    """What a command is doing before its workers have started, which may take a minute. It is not logged."""

    step: Count
    text: str  # such as "starting 2 workers"


@dataclass(frozen=True)
class EvaluationProgress:
    """Emitted during an evaluation, on rank 0."""

    step: Count
    done: Count
    total: Count


@dataclass(frozen=True)
class Evaluated:
    step: Count
    clips: Count
    metrics: dict[str, Measured]
    averaged: Count | None = None  # of how many checkpoints the weights are the mean; none: the run's own weights


@dataclass(frozen=True)
class CheckpointSaved:
    """Emitted when the checkpoint is committed, some steps later."""

    step: Count
    path: str
    seconds: Seconds  # until it was committed
    stall_s: Seconds  # for which training was blocked


@dataclass(frozen=True)
class Incident:
    """Something a person should know about, although the run continues."""

    step: Count
    kind: IncidentKind
    text: str  # one line: what, where
    steps_lost: Count = 0  # that were computed and have to be computed again
    seconds_lost: Seconds = 0.0  # since the last step that counts
    keys: list[str] = field(default_factory=list)  # of the clips concerned


@dataclass(frozen=True)
class Finished:
    step: Count
    seconds: Seconds  # of this start of the run
    goodput: Number  # share of the time since the first start of the run that was spent on steps that count
    outcome: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Ended:
    """In metrics.jsonl, when the command gives up an unfinished run, or was asked to stop."""

    step: Count  # done, as far as the log knows
    text: str  # one line: why
    told: bool  # whether a stop was requested, by a signal or Ctrl-C
    launched: Seconds  # when the command was started, in Unix time


@dataclass(frozen=True)
class Discarded:
    """In metrics.jsonl, in place of the last lines of a start whose steps are computed again: how long it ran."""

    step: Count  # of the last of them


Event = (
    Phase | Started | Step | EvaluationProgress | Evaluated | CheckpointSaved | Incident | Finished | Ended | Discarded
)
Emit = Callable[[Event], None]
StopRequest = Callable[[], Interruption | None]  # why the workers have to stop, once a stop is requested


def both(first: Emit, second: Emit) -> Emit:
    """A receiver of events that passes each to these two."""

    def emit(event: Event) -> None:
        first(event)
        second(event)

    return emit
