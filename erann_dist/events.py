"""What a run says while it goes on. The loop emits events; metrics.jsonl, TensorBoard and the live view read them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

# failure: workers were lost, hung, or the command before this one ended; stop: that was told to; resize: there are more
# or fewer workers.
IncidentKind = Literal["bad_clip", "cache", "bad_step", "checkpoint", "log", "failure", "stop", "preemption", "resize"]


@dataclass(frozen=True)
class Started:
    """Before the first step."""

    step: int  # 0, or the checkpoint's from which the run goes on
    steps: int
    workers: int
    device: str
    train_clips: int
    eval_clips: int
    resumed_from: str | None
    launched: float  # when the command was started, in unix time; the same for all starts of its workers
    hosts: list[str]  # by rank
    hardware: list[str] = field(default_factory=list)  # by rank: the name of the GPU, or of the processor
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """Averages over the steps since the last of these."""

    step: int  # steps done
    loss: float
    lr: float
    examples_per_s: float
    clips_per_s: float  # decoded; twice the examples with fresh mixup partners
    data_wait: float  # share of the time, on the first worker
    steps: int  # over which it averages: the last ones
    seconds: float  # that they took, without checkpoints and evaluations
    grad_norm: float  # of the whole gradient, before clipping
    read_mb_per_s: float  # by the first worker, from shards and cache
    cache_hits: float | None  # share of its clips that came from the cache; none without a cache
    bad_clips: int  # that it gave up so far


@dataclass(frozen=True)
class EvaluationProgress:
    """While an evaluation goes on, on the first worker."""

    step: int
    done: int
    total: int


@dataclass(frozen=True)
class Evaluated:
    step: int
    clips: int
    metrics: dict[str, float]
    averaged: int | None = None  # how many checkpoints' mean weights these are; none: the run's own


@dataclass(frozen=True)
class CheckpointSaved:
    """When it is committed, some steps later."""

    step: int
    path: str
    seconds: float  # until it was committed
    stall_s: float  # that training was held up


@dataclass(frozen=True)
class Incident:
    """What a person should know of, though the run goes on."""

    step: int
    kind: IncidentKind
    text: str  # one line: what, where
    steps_lost: int = 0  # that had been computed and are computed again
    seconds_lost: float = 0.0  # since the last step that counts was done
    keys: list[str] = field(default_factory=list)  # of the clips concerned


@dataclass(frozen=True)
class Finished:
    step: int
    seconds: float  # of this start of the run
    goodput: float  # share of the time since the first start of the run that was spent on steps that count
    outcome: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Ended:
    """In metrics.jsonl, when the command gives up a run that is not finished, or was told to stop."""

    step: int  # done, as far as the log knows
    text: str  # one line: why
    told: bool  # to stop: by a signal, Ctrl-C
    launched: float  # when the command was started, in unix time


@dataclass(frozen=True)
class Discarded:
    """In metrics.jsonl, in place of the last lines of a start whose steps are computed again: until when it ran."""

    step: int  # of the last of them


Event = Started | Step | EvaluationProgress | Evaluated | CheckpointSaved | Incident | Finished | Ended | Discarded
Emit = Callable[[Event], None]
