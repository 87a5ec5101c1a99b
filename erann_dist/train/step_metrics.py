"""The steps between two Step events, and what is told of them."""

import time
from collections import Counter

from erann_dist.log.events import Step
from erann_dist.train.step_results import Outcome


class Window:
    """What happened since the last Step event."""

    def __init__(self, read: Counter[str]) -> None:
        self._read = read  # goes on counting
        self._read_before = read.copy()
        self.began = time.perf_counter()
        self.waited = 0.0  # seconds, for data
        self.outcomes: list[Outcome] = []

    def report(
        self, step: int, lr: float, global_batch: int, clips_per_example: int, *, with_cache: bool, bad_clips: int
    ) -> Step:
        seconds = time.perf_counter() - self.began
        counted = [outcome for outcome in self.outcomes if not outcome.skipped] or self.outcomes
        examples = len(self.outcomes) * global_batch / seconds
        read = self._read.copy()
        read.subtract(self._read_before)
        clips = read["clips_cache"] + read["clips_origin"]
        return Step(
            step=step,
            loss=sum(outcome.loss for outcome in counted) / len(counted),
            lr=lr,
            examples_per_s=examples,
            clips_per_s=examples * clips_per_example,
            data_wait=self.waited / seconds,
            steps=len(self.outcomes),
            seconds=seconds,
            grad_norm=counted[-1].grad_norm,
            read_mb_per_s=(read["bytes_cache"] + read["bytes_origin"]) / 1e6 / seconds,
            cache_hits=read["clips_cache"] / clips if with_cache and clips else None,
            bad_clips=bad_clips,
        )
