"""What a run reports while it trains. The loop emits events; metrics.jsonl, TensorBoard and the live view read them.

The types have the bounds of what a log may say: erann_dist.log.run_log passes over lines that are outside.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from erann_dist.formats.strict_json import Count, Measured, Number, Seconds

# failure: workers were lost, hung, or the command before this one ended; stop: that was told to; resize: there are more
# or fewer workers.
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
    """Why workers are to stop, or why they ended."""

    kind: IncidentKind
    text: str  # one line


@dataclass(frozen=True)
class Started:
    """Before the first step."""

    step: Count  # 0, or the step of the checkpoint from which the run resumes
    steps: Count
    workers: Count
    device: str
    train_clips: Count
    eval_clips: Count
    resumed_from: str | None
    launched: Seconds  # when the command was started, in unix time; the same for all starts of its workers
    hosts: list[str]  # by rank
    hardware: list[str] = field(default_factory=list)  # by rank: the name of the GPU, or of the processor
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """Averages over the steps since the last of these."""

    step: Count  # steps done
    loss: Measured
    lr: Number
    examples_per_s: Number
    clips_per_s: Number  # decoded; twice the examples with fresh mixup partners
    data_wait: Number  # share of the time, on the first worker
    steps: Count  # over which it averages: the last ones
    seconds: Seconds  # that they took, without checkpoints and evaluations
    grad_norm: Measured  # of the whole gradient, before clipping
    read_mb_per_s: Number  # by the first worker, from shards and cache
    cache_hits: Number | None  # share of its clips that came from the cache; none without a cache
    bad_clips: Count  # that it gave up so far


@dataclass(frozen=True)
class Phase:
    """What a command is at before its workers have started, which may take a minute. It is not logged."""

    step: Count
    text: str  # such as "starting 2 workers"


@dataclass(frozen=True)
class EvaluationProgress:
    """While an evaluation goes on, on the first worker."""

    step: Count
    done: Count
    total: Count


@dataclass(frozen=True)
class Evaluated:
    step: Count
    clips: Count
    metrics: dict[str, Measured]
    averaged: Count | None = None  # how many checkpoints' mean weights these are; none: the run's own


@dataclass(frozen=True)
class CheckpointSaved:
    """When it is committed, some steps later."""

    step: Count
    path: str
    seconds: Seconds  # until it was committed
    stall_s: Seconds  # that training was held up


@dataclass(frozen=True)
class Incident:
    """What a person should know of, though the run goes on."""

    step: Count
    kind: IncidentKind
    text: str  # one line: what, where
    steps_lost: Count = 0  # that had been computed and are computed again
    seconds_lost: Seconds = 0.0  # since the last step that counts was done
    keys: list[str] = field(default_factory=list)  # of the clips concerned


@dataclass(frozen=True)
class Finished:
    step: Count
    seconds: Seconds  # of this start of the run
    goodput: Number  # share of the time since the first start of the run that was spent on steps that count
    outcome: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Ended:
    """In metrics.jsonl, when the command gives up a run that is not finished, or was told to stop."""

    step: Count  # done, as far as the log knows
    text: str  # one line: why
    told: bool  # to stop: by a signal, Ctrl-C
    launched: Seconds  # when the command was started, in unix time


@dataclass(frozen=True)
class Discarded:
    """In metrics.jsonl, in place of the last lines of a start whose steps are computed again: until when it ran."""

    step: Count  # of the last of them


Event = (
    Phase | Started | Step | EvaluationProgress | Evaluated | CheckpointSaved | Incident | Finished | Ended | Discarded
)
Emit = Callable[[Event], None]
StopRequest = Callable[[], Interruption | None]  # why the workers are to stop, once that is known


def both(first: Emit, second: Emit) -> Emit:
    def emit(event: Event) -> None:
        first(event)
        second(event)

    return emit
