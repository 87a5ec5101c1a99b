"""One training loop, under Ray Train, under torchrun or in a bare process.

The gradient of a step is the sum of its examples' losses over the global batch. So any number of workers up to one for
each micro-batch computes the same function, up to the order of summation; which examples those are is schedule.py's.
"""

import math
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from itertools import chain, tee
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from erann_dist.clock import steady_time
from erann_dist.data import loader
from erann_dist.data.cache import ClipCache
from erann_dist.data.manifest import Manifest, Task, require_same_labels
from erann_dist.data.shared_clips import shared_clips
from erann_dist.data.sources import count_reported, load_sources
from erann_dist.errors import Stopped, UsageError, UserError
from erann_dist.log.events import Emit, Evaluated, EvaluationProgress, Event, Finished, Incident, IncidentKind, Started
from erann_dist.log.run_log import RunLog, goodput, lost
from erann_dist.models.erann import ERANN
from erann_dist.models.log_mel import LogMel, padded_frames
from erann_dist.recipe import Recipe
from erann_dist.storage.folder import open_folder
from erann_dist.storage.slow_reads import SlowReads
from erann_dist.train import checkpoint, evaluation, memory
from erann_dist.train.async_checkpoint import Saver
from erann_dist.train.augment import draw_choices, make_inputs
from erann_dist.train.batchnorm import RunningStatistics
from erann_dist.train.distributed import Workers, device_name
from erann_dist.train.engine import make_engine, require_compiler
from erann_dist.train.model_folder import ModelInfo, initialise, model_card, save_model
from erann_dist.train.prefetch import Fed, feed
from erann_dist.train.step_metrics import Window
from erann_dist.train.step_results import Outcome, Outcomes
from erann_dist.train.watchdog import Watchdog, stacks_left, watching
from erann_dist.train.work_plan import Draws, deal, learning_rate, micro_batches_per_rank
from erann_dist.versions import program_versions

_KEYS_TOLD = 8  # of a bad step's clips, in its line
# By the first word of what launch says of the workers before.
_KINDS: dict[str, IncidentKind] = {"preempted": "preemption", "resized": "resize"}


def example_losses(logits: Tensor, targets: Tensor, task: Task) -> Tensor:
    """Each example's loss (M,): binary cross-entropy averaged over the classes, or cross-entropy. targets: (M, N)."""
    if task == "tagging":
        return F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none").mean(dim=1)
    return F.cross_entropy(logits.float(), targets, reduction="none")


def train(recipe: Recipe, workers: Workers, emit: Emit, incident: str | None = None) -> None:
    """Train, evaluate and write the model folder; go on from the run's last checkpoint if it has one.

    incident: what the command found wrong with the run's checkpoints or results, one line for the log.
    All workers call it. The first one's events go to `emit` and to the run's log. Raises UserError, and after a notice
    (`Workers.notice`) Stopped, when the checkpoint is written.
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
        try:
            training = _Training(recipe, workers, emit, clips, eval_clips, watchdog, resources)
            if incident and workers.failure is None:  # once, in the first of this command's starts
                training.damaged.insert(0, incident)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"the GPU's memory is too small for the weights of {recipe.model.variant} and their optimizer's state; "
                "use a smaller model.variant"
            ) from error
        try:
            training.run()
            return
        except torch.OutOfMemoryError:
            training.model.zero_grad()
        # Behind the exception, which holds on to what was computed.
        raise memory.too_small(training.model, recipe.optim, recipe.data.crop_samples)


class _Training:
    """One start of a run's workers, on one of them."""

    def __init__(
        self,
        recipe: Recipe,
        workers: Workers,
        emit: Emit,
        clips: Manifest,
        eval_clips: Manifest,
        watchdog: Watchdog,
        resources: ExitStack,
    ) -> None:
        """resources: closed when the training ends, however it does."""
        self.began = time.perf_counter()
        self.recipe, self.workers, self.clips, self.eval_clips = recipe, workers, clips, eval_clips
        self.watchdog = watchdog
        self.run_folder = open_folder(recipe.run_url)
        self.steps = recipe.steps(len(clips))
        self.draws = Draws(recipe, clips)
        self.log_mel = LogMel().to(workers.device)

        torch.set_num_threads(recipe.run.threads)
        torch.manual_seed(recipe.run.seed)  # the initial weights; no other random choice is torch's
        self.model = ERANN.from_name(recipe.model.variant, clips.num_classes, recipe.model.initialisation)
        self.model.to(workers.device)
        self.saver: Saver | None = None
        found = None
        if workers.is_first:
            # The right to write first: a start before that still lives could delete the checkpoint that is found.
            self.saver = Saver(self._begin(), recipe.checkpoint, self._is_checkpoint_due)
            resources.enter_context(closing(self.saver))
            found = checkpoint.latest(self.run_folder)
        self.resumed_from, self.damaged = workers.first(found) or (None, [])
        if recipe.model.init != "none" and not self.resumed_from:
            initialise(self.model, recipe.model.init, recipe.model.fresh)
        per_rank = micro_batches_per_rank(recipe.optim, workers.world_size)
        self.engine = make_engine(recipe.run.engine, self.model, recipe.optim, per_rank, workers)

        self.first_step = 0
        self.bad_clips = loader.BadClips(recipe.data.max_bad_clips)
        self.bad_steps: list[int] = []
        if self.resumed_from:
            self._resume(self.resumed_from)
            if self.saver:
                self.saver.saved_step, self.saver.last = self.first_step, self.resumed_from
        self.statistics = RunningStatistics(self.model)  # of the weights that were loaded

        cache = recipe.data.cache
        self.cache = ClipCache(Path(cache.dir), cache.max_bytes) if cache else None
        if self.cache:
            resources.enter_context(closing(self.cache))
        self.read, self.slow = Counter[str](), SlowReads()  # what the loader counts
        self.batches = self._batches(resources)
        self.told = set(self.bad_clips.found)
        self.problems: dict[str, IncidentKind] = {}  # a line each, of caches, storage and the log
        self.outcomes = Outcomes(workers.device)
        self.window = Window(self.read)
        self.log: RunLog | None = None
        self.reporters: list[Emit] = []
        if workers.is_first:
            self.log = resources.enter_context(closing(RunLog(self.run_folder, self.first_step)))
            self.reporters = [self.log.log, emit]
        self.is_storage_reported = any(line.get("kind") == "storage" for line in self.log.found) if self.log else False

    def run(self) -> None:
        recipe = self.recipe
        self._tell_start()
        if self._is_evaluation_due(self.first_step) and not self._was_evaluated(self.first_step):
            self._evaluate(self.first_step)  # in which the start before was lost
        self.model.train()
        self.window = Window(self.read)
        for step in range(self.first_step, self.steps):
            self._compute(step)
            done = step + 1
            evaluates = self._is_evaluation_due(done)
            saves = self._is_checkpoint_due(done)
            reports = saves or done % recipe.run.log_every == 0
            stops = self._hear_outcomes(all_of_them=reports)
            if stops and not reports:
                self._hear_outcomes(all_of_them=True)
            if reports or stops:
                self._report(done)
            if self.log:
                self.log.reach(done)
            self.watchdog.alive()
            self._tell_incidents(done)
            self._tell_saved()
            if saves or stops:
                self._save(done)
            if stops:
                self._stop(done)
            if evaluates:
                self._evaluate(done)
            if saves:
                self.window = Window(self.read)
        self._finish()

    def say(self, event: Event) -> None:
        """On the first worker, to all who want to know."""
        for reporter in self.reporters:
            reporter(event)

    def _batches(self, resources: ExitStack) -> Iterator[Fed]:
        """This worker's micro-batches to the end of the run."""
        recipe, workers, clips = self.recipe, self.workers, self.clips
        frames = padded_frames(recipe.data.crop_samples)

        steps = range(self.first_step, self.steps)
        dealt, drawn = tee(chain.from_iterable(deal(s, recipe.optim, workers.rank, workers.world_size) for s in steps))
        loaded = loader.load(
            clips,
            self.draws.crops(drawn),
            threads=recipe.data.loader_threads,
            cache=self.cache,
            cache_form=recipe.data.cache.format if recipe.data.cache else "flac",
            bad_clips=self.bad_clips,
            substitute=self.draws.substitute,
            read=self.read,
            slow=self.slow,
            pin_memory=workers.device.type == "cuda",
        )
        resources.enter_context(closing(loaded))
        return feed(
            (
                Fed(
                    batch.pcm,
                    torch.from_numpy(clips.targets(batch.crops.rows)),
                    draw_choices(micro_batch.examples, frames, recipe.run.seed, recipe.augment),
                    micro_batch.weight,
                )
                for batch, micro_batch in zip(loaded, dealt, strict=True)
            ),
            workers.device,
        )

    def _compute(self, step: int) -> None:
        """One step, on this worker's micro-batches."""
        optim, workers = self.recipe.optim, self.workers
        step_loss = torch.zeros((), device=workers.device)
        for _ in range(micro_batches_per_rank(optim, workers.world_size)):
            step_loss += self._compute_micro_batch()
        # One small all-reduce for all that the workers must know of each other.
        noticed = torch.full((1,), float(workers.notice() is not None), device=workers.device)
        total = workers.sum(torch.cat([self.statistics.share(), step_loss.reshape(1), noticed]))
        statistics, step_loss, notices = total[:-2], total[-2], total[-1]
        self.engine.step(learning_rate(step, self.steps, optim), step_loss)
        adam = self.engine.adam
        self.statistics.update(statistics / (optim.global_batch // optim.micro_batch), adam.skipped)
        self.outcomes.add(step + 1, step_loss, adam, notices)

    def _compute_micro_batch(self) -> Tensor:
        """The share () of the step's loss that the next micro-batch has; its gradient is added to the engine's."""
        waiting = time.perf_counter()
        batch = next(self.batches)
        self.window.waited += time.perf_counter() - waiting
        inputs = make_inputs(batch.pcm, batch.targets, batch.choices, self.log_mel, self.recipe.augment)
        logits = self.engine.forward(inputs.log_mel, inputs.mask)
        losses = example_losses(logits, inputs.targets, self.clips.info.task)
        loss = losses.sum() * (batch.weight / self.recipe.optim.global_batch)
        self.engine.backward(loss)
        self.statistics.add(batch.weight)
        return loss.detach()

    def _hear_outcomes(self, all_of_them: bool) -> bool:
        """Take note of what steps came to; whether the workers are to stop. The answer is the same on all."""
        stops = False
        for outcome in self.outcomes.known(all_of_them):
            stops |= outcome.notices > 0
            self.window.outcomes.append(outcome)
            # By overflows the loss scale finds its value; it does not help against a gradient that is undefined.
            overflowed = math.isfinite(outcome.loss) and outcome.loss_scale > 1
            if outcome.skipped and not overflowed:
                self._tell_bad_step(outcome)
        return stops

    def _tell_bad_step(self, outcome: Outcome) -> None:
        step, allowed = outcome.step, self.recipe.optim.max_bad_steps
        self.bad_steps.append(step)
        keys = self.draws.keys(step - 1)
        value = f"loss is {outcome.loss}" if not math.isfinite(outcome.loss) else f"gradient is {outcome.grad_norm}"
        some = ", ".join(keys[:_KEYS_TOLD]) + (", …" if len(keys) > _KEYS_TOLD else "")
        text = f"the {value}; clips {some}"
        if len(self.bad_steps) > allowed:
            self._await_saving()
            last = self.workers.first((self.saver and self.saver.last) or self.resumed_from)
            told = last and f"last checkpoint {self.run_folder}/{last}"
            raise UserError(
                f"step {step}: {text}; {told or 'no checkpoint yet'}; bad step number {len(self.bad_steps)}, "
                f"optim.max_bad_steps is {allowed}; more may be skipped, or another run may take a lower optim.lr"
            )
        self.say(Incident(step, "bad_step", f"skipped: {text}", keys=keys))

    def _report(self, step: int) -> None:
        optim = self.recipe.optim
        lr = learning_rate(step - 1, self.steps, optim)
        self.say(
            self.window.report(
                step,
                lr,
                optim.global_batch,
                self.draws.clips_per_example,
                with_cache=self.cache is not None,
                bad_clips=len(self.bad_clips.found),
            )
        )
        self.window = Window(self.read)

    def _tell_incidents(self, step: int) -> None:
        """Each bad clip once, and each reason why a cache takes no more or the log could not be uploaded.

        That S3 is read the slow way once in a run: each worker may have another reason.
        """
        self._note_problem("cache", self.cache.problem if self.cache else None)
        self._note_problem("storage", self.slow.problem)
        self._note_problem("log", self.log.problem if self.log else None)
        for key in sorted(self.bad_clips.found.keys() - self.told):
            self.say(Incident(step, "bad_clip", self.bad_clips.found[key], keys=[key]))
            self.told.add(key)
        for text in sorted(self.problems.keys() - self.told):
            kind = self.problems[text]
            if kind != "storage" or not self.is_storage_reported:
                self.say(Incident(step, kind, text))
            self.is_storage_reported |= kind == "storage"
            self.told.add(text)

    def _note_problem(self, kind: IncidentKind, text: str | None) -> None:
        if text:
            self.problems.setdefault(text, kind)

    def _is_evaluation_due(self, step: int) -> bool:
        """Whether there is one on the way at this step; the end has one of its own."""
        every = self.recipe.evaluate.every
        return every is not None and step % every == 0 and 0 < step < self.steps

    def _is_checkpoint_due(self, step: int) -> bool:
        """Whether one is saved at this step whatever happens."""
        # Before an evaluation too: one that takes long costs no steps if it is the run's last.
        return self._is_evaluation_due(step) or step % self.recipe.checkpoint.every == 0 or step == self.steps

    def _begin(self) -> checkpoint.Start:
        """Take over the run's folder. Raises UserError."""
        try:
            return checkpoint.begin(self.run_folder)
        except OSError as error:
            raise UserError(
                f"{self.run_folder}: {socket.gethostname()} can't write there ({error.strerror}); run.dir is a folder "
                "that all hosts share, or s3://bucket/prefix"
            ) from error

    def _save(self, step: int) -> None:
        """Copy the state; it is written while the training goes on."""
        began = time.perf_counter()
        self._await_saving()  # its copy is still in use
        self.bad_clips.unite(self.workers.gather_all(self.bad_clips.found))
        for problems in self.workers.gather_all(self.problems):
            self.problems |= problems
        self._tell_incidents(step)
        self.engine.state(self.saver.state if self.saver else None)
        if self.saver:
            self.saver.begin(self._facts(step), time.perf_counter() - began)

    def _tell_saved(self) -> None:
        for event in self.saver.finish() if self.saver else []:
            self.say(event)

    def _await_saving(self) -> None:
        """Wait until nothing is being written. All workers call it, and none looks as if it hung."""
        while not self.workers.first(self.saver is None or self.saver.is_done(seconds=1.0)):
            self.watchdog.alive()
        self._tell_saved()

    def _finish_saving(self) -> None:
        """Wait until the last checkpoint is written, and write it again if that failed."""
        self._await_saving()
        while self.workers.first(self.saver is not None and self.saver.has_failed):
            if self.saver:
                self.saver.begin_again()
            self._await_saving()

    def _stop(self, step: int) -> None:
        self._finish_saving()
        reasons = [reason for reason in self.workers.gather_all(self.workers.notice()) if reason]
        raise Stopped(f"{reasons[0]}: stopped at step {step} of {self.steps}, whose checkpoint is saved")

    def _evaluate(self, step: int, averaged: int | None = None) -> evaluation.Predictions | None:
        """Score the evaluation clips. The answer is the first worker's, None for scores that are not finite.

        Those are an incident while the training goes on, and at its end NotFinite is raised.
        """

        def progress(done: int, total: int) -> None:
            self.watchdog.alive()
            self.say(EvaluationProgress(step, done, total))

        try:
            predictions = evaluation.score(
                self.model,
                self.eval_clips,
                self.workers,
                loader_threads=self.recipe.data.loader_threads,
                pad_samples=self.recipe.evaluate.pad_samples,
                progress=progress,
                slow=self.slow,
            )
        except torch.OutOfMemoryError as error:
            raise memory.too_small_to_evaluate(self.eval_clips) from error
        except evaluation.NotFinite as error:
            if step == self.steps:
                raise
            self.say(Incident(step, "evaluation", str(error)))
            predictions = None
        records = bool(self.recipe.checkpoint.keep_best) and averaged is None
        if records:
            self._await_saving()
        if predictions and self.saver:
            metrics = evaluation.summarise(predictions, self.eval_clips.info.task)
            for event in self.saver.record(step, metrics) if records else []:
                self.say(event)
            self.say(Evaluated(step, len(self.eval_clips), metrics, averaged))
        return predictions

    def _finish(self) -> None:
        self._finish_saving()
        if self.recipe.evaluate.average_last:
            weights = {name: value.clone() for name, value in self.model.state_dict().items()}
            number = self._average_weights(self.recipe.evaluate.average_last)
            averaged = self._evaluate(self.steps, averaged=number)
            self._on_first_worker(lambda: self._write_model("model-averaged", averaged))
            self.model.load_state_dict(weights)
        predictions = self._evaluate(self.steps)
        self._on_first_worker(lambda: self._write_results(predictions))
        if predictions and self.log:
            outcome = evaluation.summarise(predictions, self.clips.info.task) | {"model": f"{self.run_folder}/model"}
            share = goodput(self.log.lines, steady_time())
            self.say(Finished(self.steps, time.perf_counter() - self.began, share, outcome))
        self.workers.wait_for_all()

    def _on_first_worker(self, work: Callable[[], None]) -> None:
        """Let the first worker do it while all wait for it, and none looks as if it hung. All workers call it."""
        with ThreadPoolExecutor(1) as thread:
            doing = thread.submit(work) if self.workers.is_first else None
            while not self.workers.first(doing is None or bool(wait([doing], timeout=1.0).done)):
                self.watchdog.alive()
            if doing:
                doing.result()

    def _average_weights(self, number: int) -> int:
        """Load the mean of the last checkpoints' weights; of how many there are."""
        names: list[str] = []
        if self.workers.is_first:
            names = checkpoint.regular(checkpoint.committed(self.run_folder), self._is_checkpoint_due)
            names = [name for name in names if checkpoint.is_whole(self.run_folder, name)][-number:]
        names = self.workers.first(names)
        mean = checkpoint.mean(self.run_folder, names, self.watchdog.alive)
        self.model.load_state_dict({k.removeprefix("model."): v for k, v in mean.items() if k.startswith("model.")})
        return len(names)

    def _write_results(self, predictions: evaluation.Predictions | None) -> None:
        """The evaluation's scores; then the model, by which the run is known as finished."""
        assert predictions
        assert self.saver
        self.saver.start.require_last()
        with self.run_folder.writing("predictions.parquet") as file:
            evaluation.write_predictions(file, predictions, self.eval_clips)
        self._write_model("model", predictions)

    def _write_model(self, name: str, predictions: evaluation.Predictions | None) -> None:
        assert predictions
        assert self.saver
        info = self.clips.info
        listed = len(self.eval_clips) + sum(count_reported(source) for source in self.recipe.data.eval)
        metrics = evaluation.detail(predictions, self.eval_clips, listed)
        variant, pad_samples = self.recipe.model.variant, self.recipe.evaluate.pad_samples
        model_info = ModelInfo(variant, info.task, info.label_ids, info.label_names, info.sample_rate, pad_samples)
        card = model_card(model_info, metrics, self.recipe)
        self.saver.start.require_last()
        save_model(open_folder(f"{self.run_folder}/{name}"), self.model, model_info, metrics, card)

    def _resume(self, name: str) -> None:
        """Take over a checkpoint."""
        path = f"{self.run_folder}/{name}"
        facts, state = checkpoint.load(self.run_folder, name)
        if facts.train_hash != self.clips.info.content_hash:
            raise UserError(f"{path}: made with other training clips than {self.recipe.data.train[0].url} now holds")
        if facts.recipe_hash != self.recipe.hash():
            raise UserError(f"{path}: made by another recipe; give this one another run.name")
        weights = {key: value for key, value in state.items() if key.startswith("model.")}
        checkpoint.require_shapes(path, weights, {f"model.{k}": v for k, v in self.model.state_dict().items()})
        self.engine.load_state(state)
        self.first_step = facts.step
        self.bad_clips.unite([dict.fromkeys(facts.bad_clips, "")])
        self.bad_steps = list(facts.bad_steps)

    def _facts(self, step: int) -> checkpoint.Facts:
        return checkpoint.Facts(
            step=step,
            recipe_hash=self.recipe.hash(),
            train_hash=self.clips.info.content_hash,
            variant=self.recipe.model.variant,
            threads=self.recipe.run.threads,
            bad_clips=sorted(self.bad_clips.found),
            bad_steps=list(self.bad_steps),
            versions=program_versions(),
        )

    def _was_evaluated(self, step: int) -> bool:
        """Whether the run's log has an evaluation at this step. The answer is the same on all workers."""
        lines = self.log.lines if self.log else []
        found = any(line["event"] == "Evaluated" and line["step"] == step for line in lines)
        return self.workers.first(found)

    def _tell_start(self) -> None:
        """What was lost since the last start, and that the training begins."""
        workers, step = self.workers, self.first_step
        hosts = workers.gather_all(socket.gethostname())
        hardware = workers.gather_all(device_name(workers.device))
        stacks = [stack for each in workers.gather_all(stacks_left(self.recipe.run_url)) for stack in each]
        if not (self.log and self.saver):
            return
        self.say(
            Started(
                step=step,
                steps=self.steps,
                workers=workers.world_size,
                device=str(workers.device),
                train_clips=len(self.clips),
                eval_clips=len(self.eval_clips),
                resumed_from=f"{self.run_folder}/{self.resumed_from}" if self.resumed_from else None,
                launched=workers.launched,
                hosts=hosts,
                hardware=hardware,
                versions=program_versions(),
            )
        )
        for problem in self.damaged:
            self.say(Incident(step, "checkpoint", problem))
        if self.log.found:
            gone = lost(self.log.found, step, workers.launched, steady_time(), max(self.log.reached, workers.reached))
            before = self.log.found[-1]
            why = f": {before['text']}" if before["event"] == "Ended" else ""
            text = workers.failure or f"the command before this one ended at step {gone.last_step}{why}"
            if stacks:
                name = f"stacks/start-{self.saver.start.number:04d}.txt"
                self.run_folder.write(name, "".join(f"{rank}\n{stack}\n" for rank, stack in stacks).encode())
                text += f"; the stacks of {', '.join(rank for rank, _ in stacks)} are in {self.run_folder}/{name}"
            kind = _KINDS.get(text.split(" ")[0].rstrip(":"), "failure")
            if not workers.failure and before.get("told"):
                kind = "stop"
            self.say(Incident(step, kind, text, gone.steps, gone.seconds))
