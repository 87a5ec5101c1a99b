"""Averages over the steps between two Step events."""

import time
from collections import Counter

from erann_dist.log.events import Step
from erann_dist.train.step_results import StepResult


class StepMetrics:
    """The measurements since the last Step event."""

    def __init__(self, read: Counter[str]) -> None:
        """read: ClipReader's counters, which continue to count."""
        self._read = read
        self.restart()

    def restart(self) -> None:
        """Begin a new interval, as after a checkpoint or an evaluation."""
        self._read_before = self._read.copy()
        self._began = time.perf_counter()
        self.data_wait_s = 0.0
        self.results: list[StepResult] = []

    def step_event(
        self, step: int, lr: float, global_batch: int, clips_per_example: int, *, with_cache: bool, bad_clips: int
    ) -> Step:
        """The event for the interval that ends with this step; the next interval begins."""
        seconds = time.perf_counter() - self._began
        counted = [result for result in self.results if not result.skipped] or self.results
        examples = len(self.results) * global_batch / seconds
        read = self._read.copy()
        read.subtract(self._read_before)
        clips = read["clips_cache"] + read["clips_origin"]
        event = Step(
            step=step,
            loss=sum(result.loss for result in counted) / len(counted),
            lr=lr,
            examples_per_s=examples,
            clips_per_s=examples * clips_per_example,
            data_wait=self.data_wait_s / seconds,
            steps=len(self.results),
            seconds=seconds,
            grad_norm=counted[-1].grad_norm,
            read_mb_per_s=(read["bytes_cache"] + read["bytes_origin"]) / 1e6 / seconds,
            cache_hits=read["clips_cache"] / clips if with_cache and clips else None,
            bad_clips=bad_clips,
        )
        self.restart()
        return event
