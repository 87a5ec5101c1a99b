"""The objects that one start of a run uses, on one of its workers."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from erann_dist.data.manifest import Manifest
from erann_dist.recipe import Recipe
from erann_dist.storage.folder import Folder
from erann_dist.train.distributed import Workers
from erann_dist.train.watchdog import Watchdog


@dataclass(frozen=True)
class Run:
    """The same on all workers, except for `workers` and `watchdog`."""

    recipe: Recipe
    workers: Workers
    clips: Manifest  # to train on
    eval_clips: Manifest
    folder: Folder
    watchdog: Watchdog
    began: float = field(default_factory=time.perf_counter)

    @property
    def steps(self) -> int:
        return self.recipe.steps(len(self.clips))

    def is_evaluation_due(self, step: int) -> bool:
        """Whether an intermediate evaluation follows this step; the one at the end does not count."""
        every = self.recipe.evaluate.every
        return every is not None and step % every == 0 and 0 < step < self.steps

    def is_checkpoint_due(self, step: int) -> bool:
        """Whether a checkpoint always follows this step."""
        # Also before an evaluation: if the run is lost during a long one, no steps are lost.
        return self.is_evaluation_due(step) or step % self.recipe.checkpoint.every == 0 or step == self.steps

    def on_rank_zero(self, work: Callable[[], None]) -> None:
        """Let rank 0 do the work while the other workers wait and their watchdogs see progress. All workers call it."""
        with ThreadPoolExecutor(1) as thread:
            doing = thread.submit(work) if self.workers.is_rank_zero else None
            while not self.workers.broadcast(doing is None or bool(wait([doing], timeout=1.0).done)):
                self.watchdog.alive()
            if doing:
                doing.result()
