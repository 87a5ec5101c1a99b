"""One training loop, under Ray Train, under torchrun or in a bare process.

The loss of a step is the sum of its examples' losses, divided by the global batch. So any number of workers up to one
per micro-batch computes the same function, up to the order of summation; work_plan.py determines the examples.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from erann_dist.data.cache import ClipCache
from erann_dist.data.clip_reader import ReadStats
from erann_dist.data.loader import BadClips, Batch, Loader
from erann_dist.data.manifest import Task, require_same_labels
from erann_dist.data.permutations import DROPOUT, keyed_seed
from erann_dist.data.shared_clips import shared_clips
from erann_dist.data.sources import load_sources
from erann_dist.errors import Stopped, UsageError, UserError
from erann_dist.log.events import Emit, Incident
from erann_dist.log.run_log import RunLog
from erann_dist.models.base import AudioModel
from erann_dist.models.log_mel import LogMel
from erann_dist.models.spec import build_model
from erann_dist.recipe import Recipe
from erann_dist.storage.folder import open_folder
from erann_dist.train import memory, resume
from erann_dist.train.async_checkpoint import AsyncCheckpoints
from erann_dist.train.augment import Inputs, draw_augment_params, make_inputs
from erann_dist.train.batchnorm import RunningStatistics
from erann_dist.train.checkpoint import Facts
from erann_dist.train.distributed import Workers
from erann_dist.train.engine import make_engine, require_compiler
from erann_dist.train.finish import Finisher
from erann_dist.train.model_folder import initialise
from erann_dist.train.prefetch import DeviceBatch, prefetch_to_device
from erann_dist.train.reporter import Reporter
from erann_dist.train.run import Run
from erann_dist.train.step_metrics import StepMetrics
from erann_dist.train.step_results import StepResult, StepResults
from erann_dist.train.watchdog import watching
from erann_dist.train.work_plan import MicroBatchCrops, SamplePlan, learning_rate, micro_batches_per_rank

_KEYS_SHOWN = 8  # How many clip keys the message of a bad step lists.


class BatchSource(Protocol):
    """The source of the loop's batches, such as a Loader."""

    def __iter__(self) -> Iterator[Batch[MicroBatchCrops]]: ...

    def close(self) -> None: ...


def example_losses(logits: Tensor, targets: Tensor, task: Task) -> Tensor:
    """Each example's loss (M,): binary cross-entropy averaged over the classes, or cross-entropy. targets: (M, N)."""
    if task == "tagging":
        return F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none").mean(dim=1)
    return F.cross_entropy(logits.float(), targets, reduction="none")


class Trainer:
    """One start of a run's workers, on one of them."""

    def __init__(self, run: Run, emit: Emit, resources: ExitStack) -> None:
        """resources: closed when the training ends, however it ends."""
        recipe, workers = run.recipe, run.workers
        self.run, self.optim, self.workers = run, recipe.optim, workers
        torch.set_num_threads(recipe.run.threads)
        torch.manual_seed(recipe.run.seed)  # of the initial weights
        self.model = self.make_model().to(workers.device)
        self.front_end = LogMel(self.model.front_end).to(workers.device)
        writer, self.resumed_from, self.damaged = resume.claim(run, resources)
        if recipe.model.init != "none" and not self.resumed_from:
            initialise(self.model, recipe.model.init, recipe.model.fresh)
        self.micro_batches = micro_batches_per_rank(recipe.optim, workers.world_size)
        self.engine = make_engine(recipe.run.engine, self.model, recipe.optim, self.micro_batches, workers)

        progress = resume.load(run, self.resumed_from, self.engine) if self.resumed_from else resume.Progress()
        self.first_step, self.bad_steps = progress.step, progress.bad_steps
        self.bad_clips = BadClips(recipe.data.max_bad_clips)
        self.bad_clips.unite([dict.fromkeys(progress.bad_clips, "")])
        if writer and self.resumed_from:
            writer.saved_step, writer.last = self.first_step, self.resumed_from
        self.statistics = RunningStatistics(self.model)  # of the loaded weights

        cache = recipe.data.cache
        self.cache = ClipCache(Path(cache.dir), cache.max_bytes, cache.format) if cache else None
        if self.cache:
            resources.enter_context(closing(self.cache))
        self.read = ReadStats()
        self.plan = SamplePlan(recipe, run.clips)
        self.batches = self._load_batches(resources)
        self.results, self.metrics = StepResults(workers.device), StepMetrics(self.read.counts)

        log = resources.enter_context(closing(RunLog(run.folder, self.first_step))) if workers.is_rank_zero else None
        self.reporter = Reporter(run, log, emit)
        self.reporter.ignore(progress.bad_clips)
        self.checkpoints = AsyncCheckpoints(run, writer, self.reporter.emit)
        self.finisher = Finisher(run, self.model, self.checkpoints, self.reporter, self.read.slow)

    # A benchmark that omits a part of the work overrides these.

    def make_model(self) -> AudioModel:
        """A model with new weights, from torch's generator."""
        section = self.run.recipe.model
        return build_model(section.variant, self.run.clips.num_classes, section.initialisation)

    def make_loader(self, crops: Iterator[MicroBatchCrops]) -> BatchSource:
        """The source of this worker's micro-batches."""
        return Loader(
            self.run.clips,
            crops,
            threads=self.run.recipe.data.loader_threads,
            cache=self.cache,
            bad_clips=self.bad_clips,
            substitute=self.plan.substitute,
            stats=self.read,
            pin_memory=self.workers.device.type == "cuda",
        )

    def make_inputs(self, batch: DeviceBatch) -> Inputs:
        """The front end and the augmentation."""
        return make_inputs(batch.pcm, batch.targets, batch.params, self.front_end, self.run.recipe.augment)

    def train(self) -> None:
        """From the first step to the end of the run, or until a stop is requested."""
        run, writer = self.run, self.checkpoints.writer
        self.reporter.start(self.first_step, self.resumed_from, self.damaged, writer.start.number if writer else 0)
        if run.is_evaluation_due(self.first_step) and not self.reporter.was_evaluated(self.first_step):
            self.finisher.evaluate(self.first_step)  # the previous start was lost during this evaluation
        self.model.train()
        self.metrics.restart()
        for done in range(self.first_step + 1, run.steps + 1):
            self.train_step(done - 1)
            saves = run.is_checkpoint_due(done)
            logs = saves or done % run.recipe.run.log_every == 0
            stops = self._process_step_results(wait=logs)
            if stops and not logs:
                self._process_step_results(wait=True)
            if logs or stops:
                self._report_metrics(done)
            self.reporter.step_done(done)
            run.watchdog.alive()
            self._report_incidents(done)
            self.checkpoints.report()
            if saves or stops:
                self.checkpoints.begin(self.engine, lambda: self._facts(done))  # noqa: B023 - called in this round
            if stops:
                self._stop(done)
            if run.is_evaluation_due(done):
                self.finisher.evaluate(done)
            if saves:
                self.metrics.restart()
        self.finisher.finish()

    def train_step(self, step: int) -> None:
        """One step, on this worker's micro-batches."""
        workers = self.workers
        loss = torch.zeros((), device=workers.device)
        for _ in range(self.micro_batches):
            loss += self.train_micro_batch()
        # One small all-reduce for everything that the workers must know about each other.
        stop_requested = torch.full((1,), float(workers.stop_request() is not None), device=workers.device)
        total = workers.all_reduce_sum(torch.cat([self.statistics.share(), loss.reshape(1), stop_requested]))
        statistics, loss, stop_requests = total[:-2], total[-2], total[-1]
        self.engine.step(learning_rate(step, self.run.steps, self.optim), loss)
        adam = self.engine.adam
        self.statistics.update(statistics / (self.optim.global_batch // self.optim.micro_batch), adam.skipped)
        self.results.add(step + 1, loss, adam, stop_requests)

    def train_micro_batch(self) -> Tensor:
        """The next micro-batch's part () of the step's loss; its gradient is added to the engine's."""
        waiting = time.perf_counter()
        batch = next(self.batches)
        self.metrics.data_wait_s += time.perf_counter() - waiting
        inputs = self.make_inputs(batch)
        # For dropout and whatever else in a model draws from torch's generators.
        torch.manual_seed(keyed_seed(self.run.recipe.run.seed, DROPOUT, batch.first_example))
        logits = self.engine.forward(inputs.log_mel, inputs.mask)
        losses = example_losses(logits, inputs.targets, self.run.clips.info.task)
        loss = losses.sum() * (batch.weight / self.optim.global_batch)
        self.engine.backward(loss)
        self.statistics.add(batch.weight)
        return loss.detach()

    def _load_batches(self, resources: ExitStack) -> Iterator[DeviceBatch]:
        """This worker's micro-batches to the end of the run."""
        recipe, workers, clips = self.run.recipe, self.workers, self.run.clips
        bins, frames = self.model.front_end.mel_bins, self.model.front_end.frames(recipe.data.crop_samples)
        steps = range(self.first_step, self.run.steps)
        loader = self.make_loader(self.plan.crops(steps, workers.rank, workers.world_size))
        resources.enter_context(closing(loader))
        batches = (
            DeviceBatch(
                batch.pcm,
                torch.from_numpy(clips.targets(batch.crops.rows)),
                draw_augment_params(batch.crops.micro_batch.examples, bins, frames, recipe.run.seed, recipe.augment),
                batch.crops.micro_batch.weight,
                int(batch.crops.micro_batch.examples[0]),
            )
            for batch in loader
        )
        return prefetch_to_device(batches, workers.device)

    def _process_step_results(self, wait: bool) -> bool:
        """Process the steps' results and return whether a stop is requested. The answer is the same on all workers."""
        stops = False
        for result in self.results.drain(wait):
            stops |= result.stop_requests > 0
            self.metrics.results.append(result)
            # Overflows are how the loss scale adapts. At scale 1 a non-finite gradient can't be one.
            overflowed = math.isfinite(result.loss) and result.loss_scale > 1
            if result.skipped and not overflowed:
                self._skip_bad_step(result)
        return stops

    def _skip_bad_step(self, result: StepResult) -> None:
        """Report a step whose loss or gradient is not finite. Raises UserError when it is one too many."""
        step, allowed = result.step, self.optim.max_bad_steps
        self.bad_steps.append(step)
        keys = self.plan.keys(step - 1)
        value = f"loss is {result.loss}" if not math.isfinite(result.loss) else f"gradient is {result.grad_norm}"
        some = ", ".join(keys[:_KEYS_SHOWN]) + (", …" if len(keys) > _KEYS_SHOWN else "")
        text = f"the {value}; clips {some}"
        if len(self.bad_steps) > allowed:
            last = self.checkpoints.last(self.resumed_from)
            where = f"last checkpoint {self.run.folder}/{last}" if last else "no checkpoint yet"
            raise UserError(
                f"step {step}: {text}; {where}; bad step number {len(self.bad_steps)}, "
                f"optim.max_bad_steps is {allowed}; allow more, or start another run with a lower optim.lr"
            )
        self.reporter.emit(Incident(step, "bad_step", f"skipped: {text}", keys=keys))

    def _report_metrics(self, step: int) -> None:
        event = self.metrics.step_event(
            step,
            learning_rate(step - 1, self.run.steps, self.optim),
            self.optim.global_batch,
            self.plan.clips_per_example,
            with_cache=self.cache is not None,
            bad_clips=len(self.bad_clips.found),
        )
        self.reporter.emit(event)

    def _report_incidents(self, step: int) -> None:
        self.reporter.problem("cache", self.cache.problem if self.cache else None)
        self.reporter.problem("storage", self.read.slow.problem)
        self.reporter.incidents(step, self.bad_clips)

    def _facts(self, step: int) -> Facts:
        """What the checkpoint of this step records, with what all workers found so far. All workers call it."""
        self.bad_clips.unite(self.workers.all_gather(self.bad_clips.found))
        self.reporter.gather_problems()
        self._report_incidents(step)
        return resume.facts(self.run, resume.Progress(step, list(self.bad_clips.found), self.bad_steps))

    def _stop(self, step: int) -> None:
        self.checkpoints.finish()
        reasons = [reason for reason in self.workers.all_gather(self.workers.stop_request()) if reason]
        raise Stopped(f"{reasons[0].text}: stopped at step {step} of {self.run.steps}, whose checkpoint is saved")


MakeTrainer = Callable[[Run, Emit, ExitStack], Trainer]


def train(
    recipe: Recipe, workers: Workers, emit: Emit, incident: str | None = None, make_trainer: MakeTrainer = Trainer
) -> None:
    """Train, evaluate and write the model folder; resume from the run's last checkpoint if it has one.

    incident: a problem that the command found with the run's checkpoints or results, one line for the log.
    make_trainer: called with Trainer's arguments.
    All workers call it. Rank 0's events go to `emit` and to the run's log.
    Raises UserError, and Stopped after a request to stop (`Workers.stop_request`), when the checkpoint is written.
    """
    if workers.world_size > (most := recipe.optim.global_batch // recipe.optim.micro_batch):
        raise UsageError(f"{workers.world_size} workers for {most} micro-batches a step; start at most {most}")
    if recipe.optim.precision == "fp16" and workers.device.type == "cpu":
        raise UsageError("optim.precision fp16 needs a GPU; bf16 and fp32 run on CPUs")
    if recipe.optim.compile:
        require_compiler(workers.device)
    with (
        watching(recipe.run_url, workers.rank, recipe.run.hang_timeout) as watchdog,
        shared_clips(recipe.data.train) as clips,
        ExitStack() as resources,
    ):
        eval_clips = load_sources(recipe.data.eval)
        require_same_labels(clips.info, eval_clips.info, recipe.data.train[0].url, recipe.data.eval[0].url)
        run = Run(recipe, workers, clips, eval_clips, open_folder(recipe.run_url), watchdog)
        try:
            trainer = make_trainer(run, emit, resources)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"the GPU's memory is too small for the weights of {recipe.model.variant} and their optimizer's state; "
                "use a smaller model.variant"
            ) from error
        if incident and workers.failure is None:  # only in the first of this command's starts
            trainer.damaged.insert(0, incident)
        try:
            trainer.train()
            return
        except torch.OutOfMemoryError:
            trainer.model.zero_grad()
        # After the exception is gone, because it keeps the computed tensors alive.
        raise memory.too_small(trainer.model, recipe.optim, recipe.data.crop_samples)
